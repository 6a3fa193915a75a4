"""Kernels on a device: compiled, launched, timed."""
