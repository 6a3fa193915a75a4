"""Training in compressed form: from scratch, or on from a compressed model."""

from tensorize.training.start import initialize

__all__ = ["initialize"]
