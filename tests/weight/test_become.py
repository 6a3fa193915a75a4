"""Modules of other classes, and the way back."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.training import checkpointing
from tensorize.weight import cores
from tensorize.weight.become import become, become_dense, dense_class


class Wide(nn.Module):
    """Declares an attribute that a plain linear does not have."""

    width: int
    in_features: int
    inner: nn.Module


def test_the_way_back_takes_what_the_dense_class_does_not_declare() -> None:
    layer = nn.Linear(3, 2)
    dense, weight = vars(layer).keys() - {"note"}, layer.weight
    called = []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    become(layer, Wide, width=5, inner=nn.ReLU(), note="the user's own")
    assert type(layer) is Wide
    assert dense_class(layer) is nn.Linear
    assert (layer.width, list(layer._modules)) == (5, ["inner"])
    become_dense(layer)
    assert type(layer) is dense_class(layer) is nn.Linear
    assert vars(layer).keys() == {*dense, "note"}
    assert (layer.in_features, layer.weight, list(layer._modules)) == (3, weight, [])
    layer(torch.zeros(1, 3))
    assert called == ["hook"]


def test_a_class_twice_removed_is_still_of_the_dense_model() -> None:
    layer = nn.Linear(3, 2)
    become(layer, Wide)
    become(layer, checkpointing.checkpointed(Wide))
    assert dense_class(layer) is nn.Linear
    become(layer, Wide)
    assert dense_class(layer) is nn.Linear


class _AsBefore:
    """A module as it was pickled when the call that makes it empty knew the dense class."""

    def __init__(self, module: nn.Module, empty: Any, arguments: tuple[Any, ...]) -> None:
        self.module, self.call = module, (empty, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(vars(self.module))
        del state["_dense_class"]
        return *self.call, state


@pytest.mark.parametrize("checkpointed", [False, True])
def test_old_pickles_of_classes_made_while_running_load(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model: Any = tensorize.initialize(nn.Sequential(nn.Embedding(64, 32)), 0.4)
    recipe = nn.Embedding, ("weight",), nn.Embedding
    empty: Any = (checkpointing._blank, (recipe,)) if checkpointed else (cores._blank, recipe)
    again = pickle.loads(pickle.dumps(_AsBefore(model[0], *empty)))
    rows = torch.arange(64)
    assert torch.equal(again(rows), model[0](rows))
    assert hasattr(type(again), "_saves_all") is checkpointed
    assert dense_class(again) is nn.Embedding
