"""A kernel as the user sees it: its source, and what it compiles to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tensorize.base import html, printer
from tensorize.codegen.device import autotune, coded, compiler
from tensorize.codegen.device.compiler import Compiled
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton import tiles
from tensorize.codegen.triton.module import Source
from tensorize.codegen.triton.roles import NotCovered
from tensorize.ir.coded import QuantizedSpec
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Work


@dataclass(frozen=True)
class Kernel:
    """One launch of a compiled model.

    ``str()`` is its source: it is formatted, says what it computes, and runs alone. ``dtype`` is
    that of the model's weights.

    Examples:
        >>> kernels = tensorize.kernels(tensorize.weight.plain(copy.deepcopy(small)))
        >>> all("@triton.jit" in str(kernel) for kernel in kernels.values())
        True
    """

    name: str
    source: Source
    dtype: torch.dtype

    def compile(self, target: str) -> Compiled:
        """Compile for ``"cuda:80"``, ``"cuda:90"``, ``"cuda:100"``, ``"hip:gfx90a"`` or
        ``"hip:gfx942"``, none of which need be there.

        Returns an object with ``.registers``, ``.spills``, ``.shared_bytes``, ``.asm`` and
        ``.binary``.

        Raises:
            TensorizeError: the target is not known, or triton is not installed.
        """
        return compiler.compile(self.source, target, self.dtype)

    def __str__(self) -> str:
        return printer.plain(self.source.text)

    def _repr_html_(self) -> str:
        return html.text(str(self))

    def __repr__(self) -> str:
        return f"Kernel({self.name!r}, {self.dtype})"


def of_weight(
    spec: TTSpec, dtype: torch.dtype, device: str, *, bias: bool, lookup: bool
) -> dict[str, Kernel]:
    """Every kernel that a weight of this spec may be run by, by what it does.

    ``forward`` and ``decode`` as ``of_work`` has them; for training ``forward_saved``,
    ``input_gradient`` and ``core_gradients``; ``lookup``. Those that no family covers are not
    there.
    """
    found = of_work(Work((spec,), epilogue=Epilogue(bias=bias)), dtype, device)
    saving, back = (Work((spec,), side, saved=True) for side in ("columns", "rows"))
    saving = replace(saving, epilogue=Epilogue(bias=bias))
    if len(spec.cores) > 2:
        back = replace(back, saved=False)
    makers = {
        "forward_saved": lambda: triton_source.forward(saving, tiles.default(saving, dtype)),
        "input_gradient": lambda: triton_source.forward(back, tiles.default(back, dtype)),
        "core_gradients": lambda: triton_source.gradients(
            spec, "columns", tiles.default_gradients(spec, dtype)
        ),
    }
    if lookup:
        makers["lookup"] = lambda: triton_source.lookup(spec, tiles.default_lookup(spec, dtype))
    for name, make in makers.items():
        with contextlib.suppress(NotCovered):
            found[name] = Kernel(name, make(), dtype)
    return found


def of_work(work: Work, dtype: torch.dtype, device: str) -> dict[str, Kernel]:
    """What a launch is run by for any number of rows: ``forward``, ``decode`` for few of them.

    What serves fewer rows than its family does has their most in its name: ``forward_to_64``.
    """
    return _by_rows(lambda most: autotune.source(work, dtype, most, device), dtype)


def of_codes(spec: QuantizedSpec, dtype: torch.dtype, *, bias: bool) -> dict[str, Kernel]:
    """The same of a weight in codes: ``forward``, and of two factors ``first`` before it."""
    found: dict[str, Kernel] = {}
    for k in reversed(range(len(spec.inner.core_shapes))):
        with_identity = k == 1 and spec.inner.pivoted > 0
        product = coded.product_of(spec, k, "columns", bias=bias and k == 0, added=with_identity)
        found |= _by_rows(
            lambda most, product=product: coded.source_of(product, dtype, most),
            dtype,
            "first" if k else "forward",
        )
    return found


def _by_rows(
    source_for: Callable[[int], Source | None], dtype: torch.dtype, forward: str = "forward"
) -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for most in reversed(autotune.BUCKETS):
        source = source_for(most)
        if source is None or source in [known.source for known in found.values()]:
            continue
        family = "decode" if source.counters else forward
        name = f"{family}_to_{most}" if family in found else family
        found[name] = Kernel(name, source, dtype)
    return found


def named(owner: str, kernels: Mapping[str, Kernel]) -> dict[str, Kernel]:
    """The kernels of one owner, by its name and theirs."""
    return {f"{owner}.{k}": replace(v, name=f"{owner}.{k}") for k, v in kernels.items()}


def write(
    kernels: Mapping[str, Kernel], directory: Path, targets: Sequence[str] = ()
) -> dict[str, dict[str, dict[str, int]]]:
    """Write every source, and what it compiles to, to a directory; and ``kernels.json`` about them.

    Returns what each kernel needs on each target. Kernels of one text are compiled once.

    Raises:
        TensorizeError: a target is not known, or triton is not installed.
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made: dict[tuple[str, torch.dtype, str], Compiled] = {}
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, kernel in kernels.items():
        (directory / f"{name}.py").write_text(kernel.source.text)
        found[name] = {}
        for target in targets:
            key = (kernel.source.text, kernel.dtype, target)
            if key not in made:
                made[key] = kernel.compile(target)
            built = made[key]
            assembly, binary = ("ptx", "cubin") if target.startswith("cuda") else ("s", "hsaco")
            stem = f"{name}.{target.replace(':', '_')}"
            (directory / f"{stem}.{assembly}").write_text(built.asm)
            (directory / f"{stem}.{binary}").write_bytes(built.binary)
            found[name][target] = {
                "registers": built.registers,
                "spills": built.spills,
                "shared_bytes": built.shared_bytes,
            }
    (directory / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    return found
