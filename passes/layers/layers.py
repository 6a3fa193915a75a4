"""The parts of a model in turn: their weights are there while they run, what they give is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import AnalysisError
from tensorize.base.progress import Progress
from tensorize.base.tensors import give_back
from tensorize.capture.batches import moved
from tensorize.capture.forward import untouched
from tensorize.capture.inputs import without_cache
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.capture.synthetic import changed_last, only_ids, with_ids
from tensorize.ir.sites import Batch
from tensorize.passes.curves.curve import Weights
from tensorize.passes.layers.chain import Back, Block, Chain, Front
from tensorize.passes.layers.work import Work
from tensorize.passes.observe.gathering import Wanted
from tensorize.passes.observe.loss import LossOption, PreservedLoss
from tensorize.passes.observe.outputs import call
from tensorize.passes.observe.parts import ALIKE, Together

Place = int | Literal["front", "back"]
"""A part of a model: a block, by its number, or what is before or after all of them."""


@dataclass(frozen=True)
class Layers:
    """A chain with what it runs on. ``values`` gives a parameter or a buffer by its name.

    In ``work`` lie what arrives at every block (``hidden``), for every batch, and what else it is
    given. One part's weights are in memory at a time, on the ``device``, and one batch.
    ``together`` tells whether batches were cut rightly, ``texts``, two that differ in their last
    token, whether the model is a decoder; both go through the blocks as well.
    """

    chain: Chain
    values: Weights
    batches: tuple[Batch, ...]
    work: Work
    together: Together | None = None
    texts: Batch | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _given: dict[int, list[tuple[list[Any], Any]]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.chain.blocks)

    def run(self, progress: Progress) -> None:
        """Run all batches through all blocks; what is finished is not done again.

        Raises:
            AnalysisError: what the model gives for some samples hangs on the others.
        """
        count = len(self._all)
        total = (self.count + 1) * count
        with self.outer(), torch.no_grad():
            for j in range(count):
                progress("forward", j, total)
                self._enter(j)
        for k in range(self.count):
            todo = [j for j in range(count) if not self.work.has(_hidden(k + 1, j))]
            with self.block(k) if todo else contextlib.nullcontext() as block:
                for j in todo:
                    progress("forward", (k + 1) * count + j, total)
                    with untouched(block):
                        self.work.put(_hidden(k + 1, j), hidden=call(block, self.inputs(k, j)))
                    give_back()
        progress("forward", total, total)
        self._check_samples_apart()

    @property
    def _all(self) -> tuple[Batch, ...]:
        more = None if self.together is None else self.together.batch, self.texts
        return (*self.batches, *(batch for batch in more if batch is not None))

    @property
    def of_texts(self) -> int:
        """The place of ``texts`` behind the batches."""
        return len(self._all) - 1

    def _check_samples_apart(self) -> None:
        if self.together is None:
            return
        whole = self.hidden(self.count, len(self.batches))
        parts = torch.cat([self.hidden(self.count, j) for j in self.together.parts])
        size = float(whole.abs().max())
        same = whole.shape == parts.shape
        if not (same and torch.allclose(whole, parts, rtol=0.0, atol=ALIKE * size, equal_nan=True)):
            raise AnalysisError(
                "batches are cut, so that a backward pass fits into memory, and what the model "
                "gives for some samples of them hangs on the others",
                way_out="give batches of so few samples that none is cut: calibration=[…]",
            )

    def _enter(self, j: int) -> None:
        """Keep what arrives at the first block, and what else every block is given."""
        hidden, found = self.chain.arguments(self.arguments(j))
        names: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        self._given[j] = []
        for arguments in found:
            leaves, spec = pytree.tree_flatten(arguments)
            for k, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    leaves[k] = _Named(names.setdefault(id(leaf), f"argument{len(names)}"))
                    tensors[leaves[k].name] = leaf
            self._given[j].append((leaves, spec))
        if not self.work.has(_hidden(0, j)):
            self.work.put(_arguments(j), **tensors)
            self.work.put(_hidden(0, j), hidden=hidden)

    def hidden(self, k: int, j: int) -> Tensor:
        """What arrives at the k-th block of the j-th batch; beyond the last, at the back."""
        return self.work.get(_hidden(k, j))["hidden"].to(self.device)

    def inputs(self, k: int, j: int, hidden: Tensor | None = None) -> Batch:
        """A call of the k-th block, on what arrives there or on something else."""
        leaves, spec = self._given[j][k]
        wanted = {leaf.name for leaf in leaves if isinstance(leaf, _Named)}
        tensors = self.work.get(_arguments(j)) if wanted else {}
        filled = [
            tensors[leaf.name].to(self.device) if isinstance(leaf, _Named) else leaf
            for leaf in leaves
        ]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return self._as_call(j, (self.hidden(k, j) if hidden is None else hidden, *args), kwargs)

    def outputs_from(self, j: int, hidden: Tensor | None = None) -> Batch:
        """A call of the back, on what arrives there or on something else."""
        batch = self.arguments(j)
        hidden = self.hidden(self.count, j) if hidden is None else hidden
        return self._as_call(j, (hidden, *batch.args), dict(batch.kwargs))

    def _as_call(self, j: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        batch = self._all[j]
        return Batch(args, kwargs, batch.given, number=batch.number, source=batch.source)

    def arguments(self, j: int) -> Batch:
        """A call of the whole model, and of the front."""
        return moved(self._all[j], self.device)

    # ------------------------------------------------------------------------------------- parts

    @contextlib.contextmanager
    def block(self, k: int) -> Iterator[Block]:
        """The k-th block with its weights."""
        with self._present(lambda name: self.chain.part_of(name) == k):
            yield Block(self.chain, k)

    @contextlib.contextmanager
    def outer(self) -> Iterator[tuple[Front, Back]]:
        """What is before and after the blocks, with its weights: tables of tokens, the head."""
        with self._present(lambda name: self.chain.part_of(name) is None):
            yield Front(self.chain), Back(self.chain)

    @contextlib.contextmanager
    def _present(self, belongs: Callable[[str], bool]) -> Iterator[None]:
        made: dict[int, Tensor] = {}
        places: list[tuple[nn.Module, str, Tensor]] = []
        for path, module in self.chain.model.named_modules():
            for leaf, blank in (*module._parameters.items(), *module._buffers.items()):
                name = f"{path}.{leaf}" if path else leaf
                if blank is None or not belongs(name):
                    continue
                if id(blank) not in made:
                    made[id(blank)] = self._value(name, blank)
                places.append((module, leaf, blank))
        try:
            for module, leaf, blank in places:
                setattr(module, leaf, made[id(blank)])
            yield
        finally:
            for module, leaf, blank in places:
                setattr(module, leaf, blank)
            made.clear()
            give_back()

    def _value(self, name: str, blank: Tensor) -> Tensor:
        value = self.values(name).to(self.device)
        own = isinstance(blank, nn.Parameter)
        return nn.Parameter(value, requires_grad=blank.requires_grad) if own else value


def wanted_in(chain: Chain, part: int | None, names: Collection[str]) -> Wanted:
    """Those of some weights that are of a block (None: of what is outside of all)."""
    return [
        (name, parameter)
        for name, parameter in chain.model.named_parameters()
        if name in names and chain.part_of(name) == part
    ]


def used_in(front: nn.Module, batch: Batch, wanted: Wanted) -> Wanted:
    """Those that a part uses."""
    used: set[str] = set()

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        used.add(name)
        return output

    def on_other(name: str, function: str) -> None:
        used.add(name)

    with untouched(front), Observer(wanted, on_matmul, on_other):
        call(front, batch)
    return [(name, parameter) for name, parameter in wanted if name in used]


def fitted_loss(layers: Layers, back: Back, loss_fn: LossOption) -> PreservedLoss:
    """The loss to preserve, of what the back gives for all batches."""
    places = {batch: j for j, batch in enumerate(layers.batches)}

    def outputs(model: nn.Module, batch: Batch) -> Any:
        return call(back, layers.outputs_from(places[batch]))

    return PreservedLoss.fit(layers.chain.model, layers.batches, loss_fn, outputs)


def two_texts(model: nn.Module, batch: Batch) -> Batch | None:
    """A text of a batch, and the same with another last token; None where it holds none."""
    ids = only_ids(batch)
    if ids is None or ids.shape[1] < 2:
        return None
    both = torch.cat([ids[:1], changed_last(ids[:1])])
    return without_cache(model, with_ids(batch, both))


@dataclass(frozen=True)
class _Named:
    """Stands for a tensor on disk."""

    name: str


def _hidden(k: int, j: int) -> str:
    return f"hidden-{k:04}-{j:05}"


def _arguments(j: int) -> str:
    return f"arguments-{j:05}"
