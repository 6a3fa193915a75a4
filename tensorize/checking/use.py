"""One use of a weight: its limits, what is made of the weight as it is, the verdict."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tensorize.checking.identity import LOOKUP, NARROW, Vectors, Weight, rows_of, times
from tensorize.checking.limits import MARGIN, NARROW_MARGIN, Limit, Seen
from tensorize.checking.memory import state_of

Found = tuple[Tensor, float]
"""Rows that are wrong, and how far off the worst is, in units of its limit."""


def name_of(x: Tensor, y: Tensor) -> str:
    """The dtypes that a limit is of."""
    names = (str(tensor.dtype).removeprefix("torch.") for tensor in (x, y))
    return " to ".join(dict.fromkeys(names))


_LEARNING = " with gradients"
"""Of 16 bits: what is saved for gradients is rounded where it need not be without."""


def unrounded_name(x: Tensor) -> str:
    """As ``name_of``, of a product of 16 bits before it is rounded."""
    return f"{name_of(x, x)} to float32"


@dataclass(slots=True)
class Product:
    """One call: x meets the weight that is ``held`` in some tensors.

    ``make`` looks at them as a matrix and a bias; ``again`` computes the product once more.
    ``wrote`` hears that somebody wrote to what it is held in.
    """

    held: Sequence[Tensor]
    make: Callable[[], tuple[Weight, Tensor | None]]
    x: Tensor
    again: Callable[[], Tensor]
    wrote: Callable[[Sequence[Tensor]], None]


@dataclass
class Use:
    """How a weight is multiplied at one place.

    ``limits`` by dtypes of input and output; ``back_limits``: those of the gradient of the input.
    ``outward``: the signs of outputs, where they are not to be chosen by the weight.
    """

    contract: str
    limits: dict[str, Limit] = field(default_factory=dict)
    back_limits: dict[str, Limit] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    back_seen: dict[str, Seen] = field(default_factory=dict)
    rows: int = 0
    missed: dict[str, int] = field(default_factory=dict)
    outward: Tensor | None = None
    exact: Vectors | None = None
    rounded: dict[torch.dtype, Vectors] = field(default_factory=dict)
    _by_dtype: dict[tuple[torch.dtype, torch.dtype, bool], Limit] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> Use:
        copied = memo[id(self)] = Use(self.contract, dict(self.limits), dict(self.back_limits))
        copied.outward = self.outward
        if self.exact is not None:  # for graphs; else it is made of the copied weight
            copied.exact = replace(copy.deepcopy(self.exact, memo), state=())
        return copied

    def name(self, x: Tensor, y: Tensor, *, gradients: bool) -> str:
        """What the limit of a product goes by."""
        return name_of(x, y) + (_LEARNING if gradients and y.dtype in NARROW else "")

    def limit(self, x: Tensor, y: Tensor, *, gradients: bool) -> Limit | None:
        """The limit of these dtypes; None where calibration saw none."""
        key = x.dtype, y.dtype, gradients
        found = self._by_dtype.get(key)
        if found is None:
            found = self.limits.get(self.name(x, y, gradients=gradients))
            if found is not None:
                self._by_dtype[key] = found
        return found

    def vectors(self, product: Product, dtype: torch.dtype, *, gradients: bool) -> Vectors:
        """Those of the weight as it is: made anew where what it is held in was written to."""
        exact = self.exact
        state = tuple([state_of(tensor) for tensor in product.held])
        if exact is None or exact.state != state or (gradients and exact.unfinished):
            if exact is None or exact.state != state:
                product.wrote(product.held)
            weight, bias = product.make()
            back = gradients and self.contract != LOOKUP
            chosen = self.outward if exact is None else exact.signs
            exact = self.exact = Vectors.of(
                weight, bias, self.contract, state, gradients=back, outward=chosen
            )
            self.rounded.clear()
        if dtype is torch.float64:
            return exact
        found = self.rounded.get(dtype)
        if found is None:
            found = self.rounded[dtype] = exact.to(dtype)
        return found

    def renew(self, weight: Weight) -> bool:
        """Make the vectors anew, but for what the bias adds; whether they were others."""
        old = self.exact
        assert old is not None
        back = old.back is not None
        made = Vectors.of(weight, None, self.contract, old.state, gradients=back, outward=old.signs)
        made = made.with_offsets(old)
        rounded = {dtype: made.to(dtype) for dtype in self.rounded}
        before = [old, *self.rounded.values()]
        changed = any(a.differs(b) for a, b in zip([made, *rounded.values()], before, strict=True))
        if changed:
            self.exact, self.rounded = made, rounded
        return changed

    def fast(self, vectors: Vectors, limit: Limit, x: Tensor, y: Tensor) -> bool:
        """Whether no row can be wrong, by one number of all rows."""
        off = vectors.off(x, y)
        if vectors.many is not None:  # whose noise is near its limit: each row by its own
            return beyond(off, vectors.scale(x, y), limit) is None
        return float(torch.linalg.vector_norm(off, torch.inf)) <= limit.floor

    def wrong(self, limit: Limit, x: Tensor, y: Tensor) -> Found | None:
        """The rows of y that are wrong, each by its own limit, with sums in float64.

        Of rows whose input is not finite nothing is known.
        """
        assert self.exact is not None
        x = x.double() if x.is_floating_point() else x
        y = y.double()
        return beyond(self.exact.off(x, y), self.exact.scale(x, y), limit)

    def wrong_back(self, limit: Limit, gy: Tensor, gx: Tensor) -> Found | None:
        """The same of the gradient of the input."""
        off, scale = self.back_off(gy, gx)
        return beyond(off, scale, limit)

    def back_off(self, gy: Tensor, gx: Tensor) -> tuple[Tensor, Tensor]:
        """How far off rows of the gradient of the input are, and their scales."""
        exact = self.exact
        assert exact is not None
        assert exact.back is not None
        assert exact.in_signs is not None
        gy, gx = gy.double(), gx.double()
        off = gx @ exact.in_signs - gy @ exact.back
        return off, torch.linalg.vector_norm(gy, dim=-1)

    def product(self, weight: Weight, x: Tensor) -> Tensor:
        """x Wᵀ, x W, or rows of W, in float64."""
        if self.contract == LOOKUP:
            return rows_of(weight, x.reshape(-1)).double()
        return times(weight, x.reshape(-1, x.shape[-1]).double(), self.contract)

    def settle(self) -> None:
        """Make limits of what was seen."""
        for seen, limits in ((self.seen, self.limits), (self.back_seen, self.back_limits)):
            for name, part in seen.items():
                narrow = seen is self.seen and self._is_narrow(name)
                margin = NARROW_MARGIN if narrow else MARGIN
                made = part.limit(self._rounding(name, narrow=narrow), margin)
                if made is not None:
                    limits[name] = made
            seen.clear()

    def _is_narrow(self, dtypes: str) -> bool:
        """Whether limits of these dtypes are of many sums, relative to y."""
        many = self.exact is not None and self.exact.many is not None
        return many and not dtypes.endswith(" to float32")

    def _rounding(self, dtypes: str, *, narrow: bool) -> float:
        """What one rounding of all outputs does to a row of scale 1, about."""
        assert self.exact is not None
        eps = torch.finfo(getattr(torch, dtypes.removesuffix(_LEARNING).split(" to ")[-1])).eps
        if narrow:
            return eps / 4
        if self.exact.sizes is not None:
            return eps
        return eps * float(self.exact.sums.norm()) / math.sqrt(len(self.exact.sums))


def beyond(off: Tensor, scale: Tensor, limit: Limit) -> Found | None:
    """Rows that are further off than their limits; nothing is known where a scale is not finite."""
    allowed = (limit.relative * scale).clamp(min=limit.floor)
    wrong = ~(off.abs() <= allowed) & torch.isfinite(scale)
    if not wrong.any():
        return None
    rows = wrong.nonzero().flatten()
    worst = (off.abs() / allowed)[rows].nan_to_num(nan=torch.inf).max()
    return rows, float(worst)


def in_rows(x: Tensor, y: Tensor, contract: str) -> tuple[Tensor, Tensor]:
    """Input and output as rows (B, N) and (B, M), in what checks are computed in."""
    outputs = _rows(y)
    if contract == LOOKUP:
        return x.detach().reshape(-1), outputs
    inputs = _rows(x)
    if inputs.dtype is not outputs.dtype:
        inputs, outputs = inputs.double(), outputs.double()
    return inputs, outputs


def _rows(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dim() != 2:
        tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
