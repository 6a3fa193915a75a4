"""Faults in products and in weights: noticed while a model runs, mended, named."""
