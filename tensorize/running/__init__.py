"""Kernels in use: looked at, measured, shown."""
