"""Training across machines: models in parts and checkpoints for any mesh, by PyTorch's engine."""

from tensorize.distributed.checkpoints import Saving, load, save
from tensorize.distributed.parallelize import parallelize
from tensorize.distributed.pipeline import schedule

__all__ = ["Saving", "load", "parallelize", "save", "schedule"]
