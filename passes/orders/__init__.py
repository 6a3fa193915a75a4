"""Contraction orders: by FLOPs, and by time."""
