"""Training across machines: models in parts and checkpoints for any mesh, by PyTorch's engine."""

from tensorize.distributed.parallelize import parallelize

__all__ = ["parallelize"]
