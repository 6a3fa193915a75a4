"""What one launch of a kernel computes: weights of one input, and what is before and behind them.

Passes find it in graphs, code generators make text of it, and an operation takes it as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TypeVar

from tensorize.base.records import plain, record
from tensorize.ir.spec import TTSpec

_Input = TypeVar("_Input")

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
NORMS = ("rms", "layer")


@dataclass(frozen=True)
class Norm:
    """What x goes through first: "rms" x / √(mean x² + eps) · gain, "layer" with mean and shift."""

    kind: str
    eps: float

    def __post_init__(self) -> None:
        if self.kind not in NORMS:
            raise ValueError(f"a norm is one of {', '.join(NORMS)}, got {self.kind!r}")


@dataclass(frozen=True)
class Epilogue:
    """What a result goes through in float32: residual + scale · activation(y + bias)."""

    bias: bool = False
    activation: str | None = None
    scale: float | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(
                f"an activation is one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )


@dataclass(frozen=True)
class Work:
    """What one launch computes: y_k = epilogue(norm(x) W_kᵀ), or x W_k for contract "rows".

    ``gated``: two weights, one result: activation(x W_0ᵀ) · (x W_1ᵀ), then scale and residual.
    ``shared``: all weights have the first factor of the first one, whose product with x they use.
    ``saved``: the intermediate of the two cores is stored as well, for the gradients.
    ``guarded``: every product is checked, and the rows that are wrong are counted.
    ``notes`` are lines on the plan that it comes from.

    Its inputs, in this order: x; the norm's gain and shift; the cores, the order of the columns
    where the weight is pivoted, and the bias of every weight (a shared first factor and its order
    once); a residual for every result.
    """

    specs: tuple[TTSpec, ...]
    contract: str = "columns"
    norm: Norm | None = None
    epilogue: Epilogue = Epilogue()
    gated: bool = False
    shared: bool = False
    saved: bool = False
    guarded: bool = False
    notes: tuple[str, ...] = ()

    @property
    def into(self) -> int:
        return self.specs[0].shape[-1 if self.contract == "columns" else -2]

    @cached_property
    def outs(self) -> tuple[int, ...]:
        return tuple(s.shape[-2 if self.contract == "columns" else -1] for s in self.specs)

    @property
    def results(self) -> tuple[int, ...]:
        """The columns of every result."""
        return self.outs[:1] if self.gated else self.outs

    @property
    def fused(self) -> str:
        """In words, what this does beside multiplying one weight; "" for nothing."""
        what = self.epilogue
        weights = f"{len(self.specs)} weights" if len(self.specs) > 1 else ""
        found = (
            f"{self.norm.kind} norm" if self.norm else "",
            weights + (" of one first factor" if self.shared else ""),
            what.activation or "",
            "gated" if self.gated else "",
            "" if what.scale is None else f"scale {what.scale:g}",
            "residual" if what.residual else "",
            "guard" if self.guarded else "",
        )
        return ", ".join(part for part in found if part)

    def input_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """The shapes of its inputs, in their order."""
        found: list[tuple[int, ...]] = [(rows, self.into)]
        if self.norm is not None:
            found += [(self.into,)] * (2 if self.norm.kind == "layer" else 1)
        for k, spec in enumerate(self.specs):
            held = (*spec.core_shapes, *(index.shape for index in spec.indices))
            found += held[: 1 if self.shared and k else None]
            found += [(self.outs[k],)] * self.epilogue.bias
        return found + [(rows, width) for width in self.results] * self.epilogue.residual

    def cores(self, inputs: Sequence[_Input]) -> list[tuple[_Input, ...]]:
        """Of its inputs the cores of every weight, a shared one in each."""
        rest = list(inputs[1 + (0 if self.norm is None else 1 + (self.norm.kind == "layer")) :])
        found: list[tuple[_Input, ...]] = []
        for k, spec in enumerate(self.specs):
            own = 1 if self.shared and k else len(spec.core_shapes) + len(spec.indices)
            cores, rest = rest[:own], rest[own + self.epilogue.bias :]
            found.append((*cores, *(found[0][1:] if self.shared and k else ())))
        return found

    @property
    def orders(self) -> list[int]:
        """The places of the orders among its inputs."""
        cores = self.cores(range(len(self.input_shapes(1))))
        places = (c[-1] for c, spec in zip(cores, self.specs, strict=True) if spec.pivoted)
        return list(dict.fromkeys(places))

    @property
    def unguarded(self) -> Work:
        """The same without checks, which is cut and timed as this is."""
        return replace(self, guarded=False) if self.guarded else self

    def to_text(self) -> str:
        """As JSON, for an operation to take; ``work_of`` reads it."""
        data = plain(self)
        named = ("specs", "norm", "epilogue", "contract", "gated", "shared", "saved")
        guarded = ("guarded",) if self.guarded else ()  # what was timed is known without
        return json.dumps({name: data[name] for name in (*named, *guarded)})


@lru_cache(maxsize=4096)
def work_of(text: str) -> Work:
    """What ``Work.to_text`` wrote."""
    return record(Work, json.loads(text))
