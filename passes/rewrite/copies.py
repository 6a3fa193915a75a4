"""Copies of a model that hold nothing of it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from tensorize.base.errors import ModelError
from tensorize.base.references import replace_held
from tensorize.base.tensors import lies_in_memory
from tensorize.capture.inner_gradients import note_copy


def copy_sharing(model: nn.Module, names: Collection[str], *, to_run: bool = False) -> nn.Module:
    """A deep copy that shares the dense weights which are about to be replaced.

    What a deep copy leaves bound to the original is bound to the copy: functions with what they
    close over, what ``torch.compile`` made of methods, and hooks on the parameters that stay.

    ``to_run``: it is run and thrown away, and may share what was computed from parameters.
    """
    shared = [p for name, p in model.named_parameters() if name in names]
    storages = [p.untyped_storage() for p in shared if lies_in_memory(p)]
    # What else lies on their memory is no copy either.
    memo: dict[Any, Any] = {"torch": {s._cdata: s for s in storages}} | {id(p): p for p in shared}
    if to_run:
        replace_held(model, lambda value: _keep_computed(value, memo))
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            way_out="pass inplace=True",
        ) from error
    note_copy(copied, model)
    replace_held(copied, lambda value: memo.get(id(value), value))
    for parameter in model.parameters():
        twin = memo.get(id(parameter), parameter)
        if twin is not parameter:
            _copy_hooks(parameter, twin)
    return copied


def _keep_computed(value: Any, memo: dict[Any, Any]) -> Any:
    if isinstance(value, Tensor) and not value.is_leaf:  # torch copies none
        memo[id(value)] = value
    return value


def _copy_hooks(parameter: nn.Parameter, twin: nn.Parameter) -> None:
    for hook in (parameter._backward_hooks or {}).values():
        twin.register_hook(hook)
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        twin.register_post_accumulate_grad_hook(hook)
