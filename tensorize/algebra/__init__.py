"""Matrices as singular values and as tensor trains, and the metrics that weigh errors."""
