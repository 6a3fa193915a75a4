"""Checks of gradients: of the input by the same identity, of weights by sums over a whole backward.

The gradient of an input is a product with the same weight from its other side. The gradient of a
matrix dW = gyᵀ x has (signs · dW) = (gy · signs)ᵀ x, and the two factors of low rank have the
like, by matrices times vectors only. A tensor in which y is linear in any other way (a core of a
train, a table) has ⟨G, dG⟩ = ⟨gy, y − bias⟩ (Euler). What autograd gives a parameter is the sum
over all of its uses, and so is what it is compared with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tensorize.checking.faults import WEIGHT_GRADIENT, Log
from tensorize.checking.identity import Weight, signs
from tensorize.formats.low_rank import product
from tensorize.weight.lazy import FactoredWeight

if TYPE_CHECKING:
    from tensorize.checking.site import Site
    from tensorize.checking.use import Use

_MARGIN = 10.0
"""A limit over the largest value of calibration, which sees a few backward passes."""
_FOREIGN = 1e-2
"""How far off a gradient is, relative to its size, that something else than covered products adds
to."""

_ROUNDING = 2.0**-23

LEFT, RIGHT, MATRIX, EULER = "left", "right", "matrix", "euler"


class Leaf:
    """A parameter whose gradient is compared with what its uses say, once in every backward."""

    def __init__(self, name: str, kind: str, log: Log) -> None:
        self.name, self.kind, self.log = name, kind, log
        self.limit: float | None = None
        self.worst: float | None = None
        self._task, self._expected = -1, None

    def expect(self, values: Tensor) -> None:
        """Add what one use gives to the gradient's sums, inside of a backward."""
        task = torch._C._current_graph_task_id()
        if task != self._task or self._expected is None:
            self._task, self._expected = task, values
        else:
            self._expected = self._expected + values

    def verify(self, parameter: Tensor, gradient: Tensor) -> None:
        """Compare the gradient of one backward.

        Raises:
            FaultError: it is wrong, and nothing is to be mended.
        """
        expected, task = self._expected, self._task
        self._expected = None
        known = expected is not None and task == torch._C._current_graph_task_id()
        if not known or gradient.is_sparse:
            return
        assert expected is not None
        if not torch.isfinite(expected).all():
            return  # what arrived was no number already, as under a scaler of losses
        wide = gradient.detach().double()
        size = wide.norm()
        if self.kind == EULER:
            held = parameter.detach().double()
            seen, size = (wide * held).sum(), size * held.norm()
        elif self.kind == RIGHT:
            seen = wide @ signs(wide.shape[1], wide.device)
        else:
            seen = signs(wide.shape[0], wide.device) @ wide
        off = float((seen - expected).abs().max() / size.clamp(min=torch.finfo(torch.float64).tiny))
        if self.log.calibrating:
            self.worst = max(off, self.worst or 0.0)
        elif self.limit is not None and not off <= self.limit:
            fault = self.log.note(self.name, WEIGHT_GRADIENT, gradient, None, off / self.limit)
            self.log.skip(fault)

    def settle(self) -> None:
        """Make a limit of what calibration saw."""
        if self.worst is not None and self.worst < _FOREIGN:
            self.limit = _MARGIN * max(self.worst, _ROUNDING)
        self.worst = None


class Leaves:
    """The parameters of covered weights, by name; hooks come to them where gradients are asked."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.named: dict[str, Leaf] = {}
        self._of: Any = WeakTensorKeyDictionary()
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"log": self.log, "named": self.named}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _of=WeakTensorKeyDictionary(), _hooks=[])

    def known(self, name: str, kind: str, limit: float) -> None:
        """Take a limit from before."""
        leaf = self.named[name] = Leaf(name, kind, self.log)
        leaf.limit = limit

    def of(self, parameter: Tensor, name: str, kind: str) -> Leaf | None:
        """The leaf of a parameter; None: it gets no gradient."""
        if not (parameter.requires_grad and parameter.is_leaf):
            return None
        leaf = self._of.get(parameter)
        if leaf is None:
            leaf = self.named.setdefault(name, Leaf(name, kind, self.log))
            self._of[parameter] = leaf
            self._hooks.append(parameter.register_hook(_Verify(leaf, weakref.ref(parameter))))
        return leaf

    def release(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True)
class _Verify:
    """The hook of a parameter, which does not keep it alive."""

    leaf: Leaf
    parameter: weakref.ref[Tensor]

    def __call__(self, gradient: Tensor) -> None:
        parameter = self.parameter()
        if parameter is not None:
            self.leaf.verify(parameter, gradient)


def watch(
    site: Site, use: Use, weight: Weight, bias: Tensor | None, x: Tensor, y: Tensor,
    back: Callable[[Tensor], Tensor] | None,
) -> None:  # fmt: skip
    """Let the gradients of y = x Wᵀ + bias be checked, in every backward that comes through.

    ``back``: computes the gradient of x of that of y.
    """
    call = _Call(site, use, weight, bias, x.detach(), y.detach(), back)
    y.register_hook(call.of_output)
    if back is not None and x.requires_grad and not x.is_leaf:
        x.register_hook(call.of_input)


class _Call:
    """One product, between its forward and its backward."""

    def __init__(
        self, site: Site, use: Use, weight: Weight, bias: Tensor | None, x: Tensor, y: Tensor,
        back: Any,
    ) -> None:  # fmt: skip
        self.site, self.use, self.weight, self.bias = site, use, weight, bias
        self.x, self.y, self.back = x, y, back
        self.version, self.gy = y._version, None

    @torch.no_grad()
    def of_output(self, gy: Tensor) -> None:
        """Note what the gradients are to be."""
        self.gy = gy
        for leaf, values in self._expected(gy):
            leaf.expect(values)

    @torch.no_grad()
    def of_input(self, gx: Tensor) -> Tensor | None:
        """Check the gradient of the input."""
        gy, self.gy = self.gy, None
        if gy is None:
            return None
        return self.site.wrong_gradient(self.use, gy, gx, lambda: self.back(gy))

    def _expected(self, gy: Tensor) -> Any:
        weight, leaves, name = self.weight, self.site.guard.leaves, self.site.name
        rows = gy.reshape(-1, gy.shape[-1]).double()
        if isinstance(weight, Tensor):
            base = weight if weight.is_leaf else weight._base
            kind = MATRIX if self.site.alone else EULER
            leaf = None if base is None else leaves.of(base, name, kind)
            if leaf is None:
                return
            if kind == MATRIX:
                x = self.x.reshape(-1, self.x.shape[-1]).double()
                yield leaf, (rows @ signs(rows.shape[1], rows.device)) @ x
            else:
                yield leaf, self._euler(rows)
            return
        assert isinstance(weight, FactoredWeight)
        alone = self.site.alone
        kinds = (LEFT, RIGHT) if alone else (EULER,) * len(weight.cores)
        named = zip(weight.cores, kinds, strict=True)
        found = [leaves.of(core, f"{name}[{k}]", kind) for k, (core, kind) in enumerate(named)]
        if alone:
            yield from self._of_pair(weight, found, rows)
            return
        value = self._euler(rows)
        for k, leaf in enumerate(found):
            if leaf is not None:
                stored = k == 0 or not weight.spec.pivoted
                yield leaf, value if stored else value - self._of_identity(weight, k, rows)

    def _of_identity(self, weight: FactoredWeight, k: int, rows: Tensor) -> Tensor:
        """What of ⟨gy, y − bias⟩ is by the identity in core k, which is not stored."""
        held = enumerate(weight.cores)
        bare = tuple(torch.zeros_like(core) if j == k else core for j, core in held)
        return (rows * self.use.product(weight.with_cores(bare), self.x)).sum()

    def _of_pair(self, weight: FactoredWeight, leaves: Any, rows: Tensor) -> Any:
        left, right = (core.detach().double() for core in weight.cores)
        order = weight.indices
        x = self.x.reshape(-1, self.x.shape[-1]).double()
        if leaves[0] is not None:
            met = ((rows @ signs(rows.shape[1], rows.device)) @ x)[None]
            yield leaves[0], product(met, right, *order)[0]
        if leaves[1] is not None:
            own = signs(right.shape[1], right.device)
            if order:  # the columns that V is the identity in are not stored
                probe = own.new_zeros(x.shape[1])
                probe[order[0][right.shape[0] :].long()] = own
            else:
                probe = own
            yield leaves[1], left.t() @ (rows.t() @ (x @ probe))

    def _euler(self, rows: Tensor) -> Tensor:
        """⟨gy, y − bias⟩."""
        return (rows * self._outputs()).sum()

    def _outputs(self) -> Tensor:
        """y − bias in rows; computed anew where somebody wrote to y since."""
        if self.y._version != self.version:
            return self.use.product(self.weight, self.x)
        y = self.y.reshape(-1, self.y.shape[-1]).double()
        return y if self.bias is None else y - self.bias.detach().double()
