"""Which linears make what another one reads, through functions of single entries alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tensorize.capture.forward import once, untouched
from tensorize.ir.sites import Batch

_FUNCTIONS = frozenset(
    """abs add alias celu clamp clamp_max clamp_min clone cos detach div elu erf exp gelu
    hardsigmoid hardswish hardtanh leaky_relu mish mul neg pow reciprocal relu rsqrt
    rsub sigmoid silu sin softplus sqrt square sub tanh threshold _to_copy""".split()  # noqa: SIM905
)
_VIEWS = {"view", "_unsafe_view", "unsqueeze", "squeeze"}


def makers(
    model: nn.Module, batch: Batch, linears: Mapping[str, nn.Module], readers: Collection[str]
) -> dict[str, frozenset[str]]:
    """The linears whose outputs, and nothing else, a reader reads; and it alone reads them.

    One pass is watched. What comes between are functions of single entries, of such outputs and of
    numbers: then units of all of them may have another order, in the rows of these linears and the
    columns of the reader.

    Args:
        linears: modules of one input and one output, by name; all that may make or read.
        readers: names of those that are asked for.

    Returns:
        By name those readers of which it is true.
    """
    watch = _Watch()
    handles = []
    for name, module in linears.items():
        handles += [
            module.register_forward_pre_hook(watch.before(name, name in readers)),
            module.register_forward_hook(watch.after(name)),
        ]
    try:
        with untouched(model), watch:
            result = once(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in pytree.tree_leaves(result):
        watch.read(leaf)
    return {
        reader: frozenset(made)
        for reader, made in watch.made.items()
        if made and reader not in watch.mixed and not made & watch.spoiled
        if all(watch.readers[name] == {reader} for name in made)
    }


class _Watch(TorchDispatchMode):
    """Follows the outputs of linears; ``spoiled`` are linears whose output something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.spoiled: set[str] = set()
        self.mixed: set[str] = set()
        self.made: dict[str, set[str]] = defaultdict(set)
        self.readers: dict[str, set[str]] = defaultdict(set)
        self._of: dict[int, frozenset[str]] = {}
        self._alive: list[Tensor] = []  # the id of one that is freed is given to another
        self._inside = 0

    def before(self, name: str, asked: bool) -> Callable[..., None]:
        """What is done when a linear is called."""

        def hook(module: nn.Module, args: tuple) -> None:
            if not self._inside:
                made = self._of.get(id(args[0])) if len(args) == 1 else None
                if asked and made:
                    self.made[name] |= made
                    for each in made:
                        self.readers[each].add(name)
                else:
                    self.mixed.add(name)
                    self.read(*args)
            self._inside += 1

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """What is done when a linear has its output."""

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._inside -= 1
            if not self._inside:
                self._follow(output, frozenset({name}))

        return hook

    def read(self, *values: Any) -> None:
        """Something else reads these."""
        for value in values:
            self.spoiled |= self._of.get(id(value), frozenset())

    def _follow(self, tensor: Tensor, made: frozenset[str]) -> None:
        self._of[id(tensor)] = made
        self._alive.append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._inside:
            return result
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        known = [v for v in given if id(v) in self._of]
        if not known:
            return result
        if isinstance(result, Tensor) and _keeps_entries(func, given, known, result):
            made = frozenset().union(*(self._of[id(v)] for v in known))
            self._follow(result, made)
        else:
            self.read(*known)
        return result


def _keeps_entries(func: Any, given: list[Tensor], known: list[Tensor], result: Tensor) -> bool:
    """Whether an entry of the result is of the same unit as those that it is computed from."""
    name = func.overloadpacket.__name__.removesuffix("_")
    if name in _VIEWS:
        return result.dim() > 0 and result.shape[-1] == given[0].shape[-1] > 1
    if name not in _FUNCTIONS or result.dim() == 0:
        return False
    alike = all(each.shape == result.shape for each in known)
    return alike and all(each.dim() == 0 or any(each is k for k in known) for each in given)
