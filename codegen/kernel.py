"""A kernel as the user sees it: its source, and what it compiles to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensorize.codegen import launch, tiles, triton_source
from tensorize.codegen.triton_module import Source
from tensorize.codegen.triton_work import Epilogue, NotCovered, Work
from tensorize.ir import LOW_RANK, TTSpec


@dataclass(frozen=True)
class Kernel:
    """One launch of a compiled model.

    ``str()`` is its source: it is formatted, says what it computes, and runs alone. ``dtype`` is
    that of the model's weights.
    """

    name: str
    source: Source
    dtype: torch.dtype

    def compile(self, target: str) -> launch.Compiled:
        """Compile for ``"cuda:80"``, ``"cuda:90"``, ``"cuda:100"``, ``"hip:gfx90a"`` or
        ``"hip:gfx942"``, none of which need be there.

        Returns an object with ``.registers``, ``.spills``, ``.shared_bytes``, ``.asm`` and
        ``.binary``.

        Raises:
            TensorizeError: the target is not known, or triton is not installed.
        """
        return launch.compile(self.source, target, self.dtype)

    def __str__(self) -> str:
        return self.source.text

    def __repr__(self) -> str:
        return f"Kernel({self.name!r}, {self.dtype})"


def of_weight(spec: TTSpec, dtype: torch.dtype, *, bias: bool, lookup: bool) -> dict[str, Kernel]:
    """Every kernel that a weight of this spec may be run by, by what it does.

    ``forward`` (many rows), ``decode`` (few), ``input_gradient``, ``core_gradients``, ``lookup``;
    those that no family covers are not there.
    """
    epilogue = Epilogue(bias=bias)
    inference, training = Work((spec,), epilogue=epilogue), Work((spec,), "rows", saved=True)
    plain = Work((spec,), "rows")
    makers = {
        "forward": lambda: triton_source.forward(inference, tiles.default(inference, dtype)),
        "decode": lambda: triton_source.decode(inference, tiles.default_decode(inference, dtype)),
        "input_gradient": lambda: triton_source.forward(
            work := training if len(spec.cores) == 2 else plain, tiles.default(work, dtype)
        ),
        "core_gradients": lambda: triton_source.gradients(
            spec, "columns", tiles.default_gradients(spec, dtype)
        ),
    }
    if spec.format != LOW_RANK:
        del makers["decode"]
    if lookup:
        makers["lookup"] = lambda: triton_source.lookup(spec, tiles.default_lookup(spec, dtype))
    found = {}
    for name, make in makers.items():
        try:
            found[name] = Kernel(name, make(), dtype)
        except NotCovered:
            continue
    return found
