"""Training across machines: models in parts and checkpoints for any mesh, by PyTorch's engine."""

from tensorize.distributed.checkpoints import Saving, load, save
from tensorize.distributed.parallelize import parallelize

__all__ = ["Saving", "load", "parallelize", "save"]
