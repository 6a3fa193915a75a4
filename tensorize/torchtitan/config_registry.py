# pyright: reportMissingImports=false
"""torchtitan's Llamas, compressed: ``--module tensorize.torchtitan``.

Every name is that of torchtitan's own entry; the weights of the blocks keep a quarter here.
"""

from __future__ import annotations

from torchtitan.models.llama3 import config_registry as dense
from torchtitan.trainer import Trainer

from tensorize.torchtitan.convert import LowRankConverter


def llama3_debugmodel() -> Trainer.Config:
    return _compressed(dense.llama3_debugmodel())


def llama3_8b() -> Trainer.Config:
    return _compressed(dense.llama3_8b())


def llama3_70b() -> Trainer.Config:
    return _compressed(dense.llama3_70b())


def _compressed(config: Trainer.Config) -> Trainer.Config:
    spec = config.model_spec
    spec.model = LowRankConverter.Config().build().convert(spec.model)
    spec.state_dict_adapter = None  # the Hub's checkpoints have dense weights
    return config
