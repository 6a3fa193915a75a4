# pyright: reportMissingImports=false
"""torchtitan's configs of models, with factors in place of dense weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from tensorize.base.errors import AnalysisError, BudgetError, CaptureError
from tensorize.ir.spec import TTSpec
from tensorize.passes.rewrite.fresh_cores import core_scales, root_mean_square
from tensorize.torchtitan.layer import Factor, LowRank

KEEP = 0.25
WEIGHTS = ("layers.*.attention.*", "layers.*.feed_forward.*")
"""What is compressed unless told otherwise: not the embedding, the head, and routers of experts."""

_MULTIPLE = 8
_COLUMNS = 16, 64
_SAME = 0.2


class LowRankConverter(ModelConfigConverter):
    """Gives a model of torchtitan two layers of low rank in place of each dense one.

    Put it into ``model_registry(..., converters=[LowRankConverter.Config(keep=0.25)])``, after none
    that changes the class of the layers; those that come later find the two layers as any others.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        """``keep``: the share of its parameters that each weight keeps; ``weights``: which ones."""

        keep: float = KEEP
        weights: tuple[str, ...] = WEIGHTS

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Module.Config) -> Module.Config:
        """The same config, changed in place.

        Raises:
            BudgetError: the share is not in (0, 1), or leaves a weight without a rank.
            CaptureError: no weight has such a name, or a layer is not a plain linear one.
            AnalysisError: nothing says how large a weight is to be when training begins.
        """
        patterns = self.config.weights
        chosen = [
            found
            for found in model_config.traverse(Linear.Config)
            if any(fnmatchcase(found[0], pattern) for pattern in patterns)
        ]
        if not chosen:
            raise CaptureError(
                f"no linear layer of the model is called {' or '.join(patterns)}",
                way_out=f"weights={WEIGHTS!r}",
            )
        made = [factored(config, self.config.keep, name) for name, config, _, _ in chosen]
        for (_, _, parent, place), config in zip(chosen, made, strict=True):
            if isinstance(parent, list):
                parent[place] = config
            else:
                setattr(parent, place, config)
        return model_config


def factored(dense: Linear.Config, keep: float = KEEP, name: str | None = None) -> LowRank.Config:
    """A layer of low rank in place of a dense one, of the scale that the dense one begins with."""
    if type(dense) is not Linear.Config:
        raise CaptureError(
            f"a {dense._owner.__name__} is no plain linear layer",
            site=name,
            way_out="compress it once, before other converters, with tp_gemm_backend='default'",
        )
    m, n = dense.out_features, dense.in_features
    rank = _rank(m, n, keep, name)
    second, first = core_scales(TTSpec.low_rank(m, n, rank), _scale(dense, name))
    inits = dense.param_init or {}
    return LowRank.Config(
        sharding_config=dense.sharding_config,
        first=Factor.Config(in_features=n, out_features=rank, param_init=_normal(first)),
        second=Factor.Config(
            in_features=rank,
            out_features=m,
            bias=dense.bias,
            param_init={**inits, **_normal(second)},
        ),
    )


def _rank(m: int, n: int, keep: float, name: str | None) -> int:
    if not 0 < keep < 1:
        raise BudgetError(f"keep={keep!r} is no share between 0 and 1", way_out="keep=0.25")
    rank = int(keep * m * n / (m + n))
    if rank < 1:
        least = math.ceil(1e4 * (m + n) / (m * n)) / 1e4
        raise BudgetError(
            f"keep={keep} of a weight of {m} x {n} is less than rank 1",
            site=name,
            way_out=f"keep={least} or more, or weights= without it",
        )
    return rank - rank % _MULTIPLE if rank > _MULTIPLE else rank


def _normal(scale: float) -> dict[str, Callable[..., Any]]:
    return {"weight": partial(nn.init.normal_, std=scale)}


def _scale(dense: Linear.Config, name: str | None) -> float:
    """The root mean square of the entries that the dense layer would begin with.

    It is found from a few columns: 405B has weights of a billion entries.
    """
    made = (dense.param_init or {}).get("weight")
    if made is None:
        raise AnalysisError(
            "its config has no param_init for the weight",
            site=name,
            way_out='param_init={"weight": partial(nn.init.trunc_normal_, std=0.02)}',
        )
    found = []
    with torch.random.fork_rng(), torch.no_grad():
        for columns in _COLUMNS:
            torch.manual_seed(0)
            entries = torch.zeros(dense.out_features, columns, device="cpu")
            made(entries)
            found.append(root_mean_square(entries))
    few, more = found
    if more == 0.0 or abs(few / more - 1) > _SAME:
        raise AnalysisError(
            f"{_COLUMNS[0]} columns begin at {few:.3g} and {_COLUMNS[1]} at {more:.3g}: at what "
            f"all {dense.in_features} do, its initializer does not say",
            site=name,
            way_out='param_init={"weight": partial(nn.init.trunc_normal_, std=0.02)}',
        )
    return more
