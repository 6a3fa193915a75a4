"""Training in compressed form: from scratch, or on from a compressed model."""

from tensorize.training.adapt import Adaptation, RankSchedule
from tensorize.training.blueprint import fill
from tensorize.training.checkpointing import checkpoint_low_rank, low_rank_contexts
from tensorize.training.checkpoints import load_checkpoint, save_checkpoint
from tensorize.training.from_scratch import initialize
from tensorize.training.groups import parameter_groups
from tensorize.training.host_updates import UpdateRates
from tensorize.training.memory import MemoryEstimate, activations, memory
from tensorize.training.offload import Offload, offload
from tensorize.training.rounding import round_stochastically

__all__ = [
    "Adaptation",
    "MemoryEstimate",
    "Offload",
    "RankSchedule",
    "UpdateRates",
    "activations",
    "checkpoint_low_rank",
    "fill",
    "initialize",
    "load_checkpoint",
    "low_rank_contexts",
    "memory",
    "offload",
    "parameter_groups",
    "round_stochastically",
    "save_checkpoint",
]
