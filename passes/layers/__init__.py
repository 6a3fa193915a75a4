"""A model larger than memory, one layer at a time: weights come and go, activations lie on disk."""
