"""Contraction orders: by FLOPs, by time, and with gradients."""
