"""peft's LoRA finds a linear layer that was factorized by its name, as it found the dense one.

Imported when peft's LoRA is (``hooks.py``). The adapter stands beside the whole layer,
y = W x + B A x with W in factors. The two real linears in a ``LowRankLinear`` can have adapters of
their own as well (``target_modules="all-linear"``), which needs nothing from here.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora import model as lora
from peft.tuners.lora.layer import Linear, dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tensorize.weight.cores import FactoredLinear
from tensorize.weight.low_rank import LowRankLinear


def dispatch(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
    """The adapter for a module, or None; in place of peft's own last resort."""
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    known = isinstance(layer, LowRankLinear | FactoredLinear)
    if not known or options.get("parameter_name") is not None:
        return dispatch_default(target, adapter_name, config=config, **options)
    with warnings.catch_warnings():  # that it is no layer of torch
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        return Linear(target, adapter_name, config=config, **options)


lora.dispatch_default = dispatch  # pyright: ignore[reportPrivateImportUsage]
