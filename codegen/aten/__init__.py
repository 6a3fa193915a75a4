"""Contraction plans as text of torch operations."""
