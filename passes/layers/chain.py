"""A model as a front, blocks that follow on each other, and a back, each of which runs alone.

The blocks are modules of one list that are called one after the other, once each, with what the
former gave as their first argument: the layers of transformers. Whatever else a block is given
(masks, positions) may hang on the data, and not on weights. The front is all that comes before the
first of them, the back what comes after the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import AnalysisError
from tensorize.capture.forward import untouched
from tensorize.capture.inner_gradients import differentiates
from tensorize.ir.sites import Batch, Site
from tensorize.passes.observe.counted import most_rows
from tensorize.passes.observe.outputs import call

_WAY_OUT = 'metric="frobenius" judges weights alone; or load the model, and compile it in memory'
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is given beside what the former one gave."""


@dataclass(frozen=True)
class Chain:
    """``blocks`` are the names of modules of the model, in the order of their calls.

    ``tuples``: of how many entries is what each gives; 0: it is a tensor. Of the batch that it was
    found with, what goes from block to block takes so many bytes (``passed``), and no product has
    more than ``most_rows``.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    tuples: tuple[int, ...]
    passed: int = 0
    most_rows: int = 0

    def modules(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.blocks]

    def part_of(self, name: str) -> int | None:
        """The block that a parameter is of, by its number; None: none of them."""
        for k, block in enumerate(self.blocks):
            if name.startswith(f"{block}."):
                return k
        return None

    def given(self, k: int, hidden: Tensor) -> Any:
        """Something of the shape of what the k-th block gives."""
        count = self.tuples[k]
        return (hidden, *[None] * (count - 1)) if count else hidden

    def arguments(self, batch: Batch) -> tuple[Tensor, list[Arguments]]:
        """What arrives at the first block, and what else every block is given; none of them
        runs."""
        found: list[Arguments] = []

        def passing(k: int) -> Callable[..., Any]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                found.append((args, kwargs))
                if k == len(self.blocks) - 1:
                    raise _Arrived(hidden)
                return self.given(k, hidden)

            return forward

        with untouched(self.model), _forwards(self.modules(), passing):
            try:
                call(self.model, batch)
            except _Arrived as arrived:
                return arrived.hidden, found
        raise AssertionError("the last block was not called")


class _Arrived(BaseException):
    """Ends a run of the model at a block; nothing in it catches it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextlib.contextmanager
def _forwards(
    blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """What blocks do when they are called, by their numbers."""
    try:
        for k, block in enumerate(blocks):
            vars(block)["forward"] = make(k)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


# ----------------------------------------------------------------------------------------- parts


class Entry:
    """Where a backward pass through a part of a chain ends: ``gradient`` is what arrived."""

    gradient: Tensor | None = None

    def take(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()


class Part(nn.Module):
    """A part of a chain that is called with what arrives at it."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = Entry()  # what a module holds itself is put back after a run

    def _enter(self, hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return hidden
        leaf = hidden.detach().requires_grad_()
        leaf.register_hook(self.entry.take)
        return leaf


class Block(Part):
    """One block: hidden states, and its arguments, to hidden states."""

    def __init__(self, chain: Chain, k: int) -> None:
        super().__init__()
        self.block = chain.modules()[k]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = self.block(self._enter(hidden), *args, **kwargs)
        return given if isinstance(given, Tensor) else given[0]


class Back(Part):
    """What the last block gave, and the model's own arguments, to its outputs."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.model = chain.model
        self._chain = (chain,)  # no module of this one

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        (chain,) = self._chain
        entry, last = self._enter(hidden), len(chain.blocks) - 1

        def passing(k: int) -> Callable[..., Any]:
            return lambda before, *_, **__: chain.given(k, entry if k == last else before.detach())

        with _forwards(chain.modules(), passing):
            return self.model(*args, **kwargs)


class Front(nn.Module):
    """The model's own arguments to what arrives at the first block."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.model = chain.model
        self._chain = (chain,)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (chain,) = self._chain

        def stopping(k: int) -> Callable[..., Any]:
            def forward(hidden: Tensor, *_: Any, **__: Any) -> NoReturn:
                raise _Arrived(hidden)

            return forward

        with _forwards(chain.modules(), stopping):
            try:
                self.model(*args, **kwargs)
            except _Arrived as arrived:
                return arrived.hidden
        raise AssertionError("the first block was not called")


# ------------------------------------------------------------------------------------- finding it


def find_chain(model: nn.Module, running: nn.Module, batch: Batch, names: Collection[str]) -> Chain:
    """The chain of a model, as a batch goes through ``running``, which is a copy of it.

    ``names`` are the weights that products are counted of.

    Raises:
        AnalysisError: it is none, or does not run in parts.
    """
    if differentiates(running):
        _refuse("its forward takes gradients itself")
    if getattr(getattr(running, "config", None), "is_encoder_decoder", False):
        _refuse("it is an encoder and a decoder, which reads all that the encoder gave")
    name = _longest_list(running)
    blocks = tuple(f"{name}.{key}" for key, _ in running.get_submodule(name).named_children())
    wanted = [(n, p) for n, p in running.named_parameters() if n in names]
    with most_rows(wanted) as most:
        tuples, passed = _in_sequence(running, batch, blocks)
    chain = Chain(running, blocks, tuples, passed, most())
    _check_arguments(chain, batch)
    return replace(chain, model=model)


def check_apart(chain: Chain, sites: Sequence[Site]) -> None:
    """Raises AnalysisError for a weight that is used in several parts of a chain."""
    for site in sites:
        if len({chain.part_of(name) for name in site.names}) > 1:
            _refuse(f"{site.name} is also {', '.join(site.aliases)}, of another layer", site.name)


def _longest_list(model: nn.Module) -> str:
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    if not lists:
        _refuse("it has no list of layers")
    return max(lists)[1]


def _in_sequence(
    model: nn.Module, batch: Batch, names: Sequence[str]
) -> tuple[tuple[int, ...], int]:
    """Of how many entries is what every block gives, and the bytes of the first of them."""
    blocks = [model.get_submodule(name) for name in names]
    calls: list[tuple[int, Any, Any]] = []

    def watching(k: int) -> Callable[..., Any]:
        plain = blocks[k].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = plain(*args, **kwargs)
            calls.append((k, args[0] if args else None, given))
            return given

        return forward

    makers = [watching(k) for k in range(len(blocks))]
    with untouched(model), _forwards(blocks, lambda k: makers[k]):
        call(model, batch)
    if [k for k, _, _ in calls] != list(range(len(blocks))):
        _refuse(f"{names[0]} and those after it are not called one after the other, once each")
    before: Any = None
    for k, hidden, given in calls:
        first = given[0] if isinstance(given, tuple) and given else given
        if not isinstance(hidden, Tensor) or not isinstance(first, Tensor):
            _refuse(f"{names[k]} is not called with a tensor first, or gives none")
        if k > 0 and hidden is not before:
            _refuse(f"{names[k]} is not called with what {names[k - 1]} gave")
        before = first
    counts = [len(given) if isinstance(given, tuple) else 0 for _, _, given in calls]
    return tuple(counts), before.nbytes


def _check_arguments(chain: Chain, batch: Batch) -> None:
    """Raises AnalysisError where blocks are given what hangs on weights, or no plain values."""
    carried: list[tuple[int, Any]] = []

    def carrying(k: int) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            carried.append((k, (args, kwargs)))
            if k == len(chain.blocks) - 1:
                raise _Arrived(hidden)
            return chain.given(k, hidden.detach().requires_grad_())

        return forward

    with (
        untouched(chain.model),
        torch.enable_grad(),
        _forwards(chain.modules(), carrying),
        contextlib.suppress(_Arrived),
    ):
        call(chain.model, batch)
    for k, arguments in carried:
        for leaf in pytree.tree_leaves(arguments):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                _refuse(f"{chain.blocks[k]} is given a tensor that hangs on weights before it")
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                _refuse(f"{chain.blocks[k]} is given a {type(leaf).__name__}")


def _refuse(why: str, site: str | None = None) -> NoReturn:
    raise AnalysisError(
        f"the model cannot be analysed layer by layer: {why}", site=site, way_out=_WAY_OUT
    )
