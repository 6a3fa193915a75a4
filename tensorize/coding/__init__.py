"""Tensors as fewer bytes than memory holds: exactly, with a bound, or in a metric."""
