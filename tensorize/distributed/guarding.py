"""Checks of linears in parts: each rank checks what it adds to a sum, and all check the sum.

A product that the ranks add up has y · s = Σ x_k · (W_kᵀ s), x_k and W_k being those of rank k. A
rank looks at its own part first, computes it again or mends its weight, and tells the others in the
message that carries the sum: so all know which rank it was, and stop together where it stays wrong.
The right sides go along in that message, one number a row (twelve in 16 bits), and the sum is
compared with theirs. Products that a rank computes for itself are checked by it as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.base.errors import FaultError
from tensorize.base.tensors import plain_parts
from tensorize.checking.faults import FORWARD, Fault
from tensorize.checking.guarding import Guard
from tensorize.checking.identity import COLUMNS, Vectors, Weight, signs, working
from tensorize.checking.limits import Seen
from tensorize.checking.site import Site
from tensorize.checking.use import Product, Use, beyond, name_of
from tensorize.distributed.layers import last_of
from tensorize.distributed.matrices import CodedMatrix, Matrix
from tensorize.distributed.ranks import Ranks, products, scattered, summed

_SUM = "sum over ranks"
_OUTCOMES = ("recomputed", "mended", "raised")


def sites_of_linear(path: str, linear: nn.Module, guard: Guard) -> list[Site]:
    """The checks of one linear in parts; none of matrices of few bits, nor of parts that are
    sharded once more (``dp``)."""
    of: Any = linear
    first, last = getattr(of, "first_matrix", None), of.last
    if last.parameter.device_mesh.ndim > 1 or isinstance(last, CodedMatrix):
        return []
    if not hasattr(linear, "reading"):
        return [PartOfSum(path, linear, last, guard)]
    own: list[Site] = [OwnRows(path, linear, last, guard)]
    known = [s.matrix_part.parameter for s in guard.sites.values() if isinstance(s, PartOfSum)]
    if first is None or isinstance(first, CodedMatrix):
        return own
    if any(first.parameter is weight for weight in known):
        return own  # the first of those that share a first factor checks it
    return [PartOfSum(path, linear, first, guard), *own]


class _Part(Site):
    """A rank's part of a matrix of a linear."""

    def __init__(self, path: str, linear: nn.Module, part: Matrix, guard: Guard) -> None:
        module = part.module
        inner = next(name for name, each in linear.named_modules() if each is module)
        name = ".".join(word for word in (path, inner, part.leaf) if word)
        super().__init__(name, "a rank's part", module, guard)
        self.linear: Any = linear
        self.matrix_part = part

    def tensors(self) -> list[Tensor]:
        return list(plain_parts(self.matrix_part.parameter))


class _Attached:
    """What takes a check off its linear, or off a reading, again."""

    def __init__(self, held: dict[Any, Any], key: Any) -> None:
        self.held, self.key = held, key

    def remove(self) -> None:
        self.held.pop(self.key, None)


class OwnRows(_Part):
    """A rank's rows of a weight: their product with what all ranks have is this rank's alone."""

    def attach(self) -> list[Any]:
        self.linear.own_check = self
        return [_Attached(vars(self.linear), "own_check")]

    @torch.no_grad()
    def matrix(self) -> Weight:
        return last_of(self.linear)[0].detach()

    @torch.no_grad()
    def _made(self) -> tuple[Weight, Tensor | None]:
        weight, bias = last_of(self.linear)
        return weight.detach(), None if bias is None else bias.detach()

    def product(self, x: Tensor) -> Tensor:
        """x (…, n) with this rank's rows.

        Raises:
            FaultError: it stays wrong. The other ranks wait for this one.
        """
        x = _alone(x)

        def again() -> Tensor:
            return F.linear(x, *last_of(self.linear))

        y = again()
        bias = self.linear.bias
        held = self.tensors() + ([] if bias is None else list(plain_parts(bias)))
        found = self.checked(COLUMNS, Product(held, self._made, x, again, self.guard.remember), y)
        return y if found is None else found


class PartOfSum(_Part):
    """A rank's columns of a weight: what they give is added up over the ranks.

    ``ranks``: among which.
    """

    def __init__(self, path: str, linear: nn.Module, part: Matrix, guard: Guard) -> None:
        super().__init__(path, linear, part, guard)
        self.ranks: Ranks = self.linear.ranks
        self.told: FaultError | None = None
        self.uses[_SUM] = Use(COLUMNS)

    def attach(self) -> list[Any]:
        if not hasattr(self.linear, "reading"):
            self.linear.sum_check = self
            return [_Attached(vars(self.linear), "sum_check")]
        checks, key = self.linear.reading.checks, id(self.matrix_part.parameter)
        checks[key] = self
        return [_Attached(checks, key)]

    @torch.no_grad()
    def matrix(self) -> Weight:
        return self.matrix_part.columns().detach()

    def part(
        self, x: Tensor, y: Tensor, again: Callable[[], Tensor]
    ) -> tuple[Tensor, Fault | None]:
        """What this rank adds, right if it can be, and the fault that it had."""
        use, before = self.use(COLUMNS), len(self.log.faults)
        if use.outward is None:  # all ranks have the same
            use.outward = signs(y.shape[-1], y.device)
        made = Product(self.tensors(), self._made, x, again, self.guard.remember)
        try:
            better = self.checked(COLUMNS, made, y)
        except FaultError as error:  # raised when all have heard of it
            better, self.told = None, error
        fault = self.log.faults[-1] if len(self.log.faults) > before else None
        return (y if better is None else better), fault

    def _made(self) -> tuple[Weight, Tensor | None]:
        return self.matrix(), None

    def known(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The signs (m, q) and the sums (n, q) of this rank's part, q of them."""
        use = self.use(COLUMNS)
        exact = use.exact
        assert exact is not None
        if dtype not in use.rounded:
            use.rounded[dtype] = exact.to(dtype)
        rounded: Vectors = use.rounded[dtype]
        if rounded.many is not None:
            return rounded.many[:2]
        return rounded.signs[:, None], rounded.sums[:, None]

    def scattered(self, x: Tensor) -> Tensor:
        """This rank's part of the sum over ranks of x Wᵀ, (…, m / ranks).

        Raises:
            FaultError: a rank's part stays wrong, or the sum is.
        """
        x = _alone(x)

        def again() -> Tensor:
            return F.linear(x, self.matrix_part())

        part, fault = self.part(x, again(), again)
        y = scattered(part, self.ranks)
        with torch.no_grad():
            dtype = working(y.dtype)
            left, right = self.known(dtype)
            own = y.detach().to(dtype)
            seen = own @ left[self.ranks.part(len(left))]
            squares = own.square().sum(-1, keepdim=True)
            expected = x.detach().to(dtype) @ right
            said = _said([fault], self.ranks, expected)
            parts = _summed([seen, expected, squares, said], self.ranks)
            _hear(parts[3], [self], y)
            self.judge(parts[0], parts[1], parts[2].sqrt().squeeze(-1), y)
        return y

    def judge(self, seen: Tensor, expected: Tensor, lengths: Tensor, y: Tensor) -> None:
        """Whether a sum over ranks is what their checks add up to.

        Args:
            seen: (…, q), of the sum.
            expected: (…, q), the sum of the ranks' right sides.
            lengths: (…), of the sum's rows.
            y: the sum, or a part of it.

        Raises:
            FaultError: it is not. Nobody knows whether the others see it: nothing is tried.
        """
        use = self.use(_SUM)
        use.exact = self.use(COLUMNS).exact
        off = (seen - expected).abs().amax(-1).flatten().double()
        known = torch.isfinite(expected).all(-1) & torch.isfinite(lengths)
        lengths = torch.where(torch.isfinite(lengths), lengths, 0.0)
        scale = torch.where(known, lengths, torch.inf).flatten().double()
        if len(off) == 0:
            return
        use.rows += len(off)
        dtypes = name_of(y, y)
        if self.log.calibrating:
            use.seen.setdefault(dtypes, Seen()).note(off, scale)
        elif (limit := use.limits.get(dtypes)) is None:
            self.miss(use, f"calibration saw nothing of it in {dtypes}")
        elif (found := beyond(off, scale, limit)) is not None:
            fault = self.log.note(self.name, f"{FORWARD}, as the ranks' sum,", y, *found)
            raise self.log.refused(fault, "every rank's part was right before it was added up")


def summed_product(
    sites: Sequence[Any],
    x: Tensor,
    weights: Sequence[Tensor],
    orders: Sequence[Tensor],
    squares: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``reduced_product``, checked.

    Raises:
        FaultError: a rank's part stays wrong, or the sum is.
    """
    ranks, dtype, x = sites[0].ranks, working(x.dtype), _alone(x)
    sizes = [len(weight) for weight in weights]

    def parts() -> Sequence[Tensor]:
        return products(x, weights, orders, ranks.this).split(sizes, -1)

    found = [
        site.part(x, y, lambda k=k: parts()[k])
        for k, (site, y) in enumerate(zip(sites, parts(), strict=True))
    ]
    narrow, faults = torch.cat([part for part, _ in found], -1), [fault for _, fault in found]
    with torch.no_grad():
        inputs = x.detach().to(dtype)
        expected = [inputs @ site.known(dtype)[1] for site in sites]
        said = _said(faults, ranks, inputs)
    beside = [*expected, said] if squares is None else [squares.to(dtype), *expected, said]
    if narrow.dtype == dtype:
        narrow, *beside = _summed([narrow, *beside], ranks)
    else:
        narrow, beside = summed(narrow, ranks), _summed(beside, ranks)
    with torch.no_grad():
        _hear(beside[-1], sites, x)
        each = narrow.detach().split(sizes, -1)
        for site, y, right in zip(sites, each, beside[-1 - len(sites) : -1], strict=True):
            wide = y.to(dtype)
            site.judge(wide @ site.known(dtype)[0], right, wide.norm(dim=-1), y)
    return narrow, x.new_empty(0, dtype=torch.float32) if squares is None else beside[0]


def _alone(x: Tensor) -> Tensor:
    """x under a name of its own, so that its gradient by one product is seen."""
    return x.view_as(x) if x.requires_grad and torch.is_grad_enabled() else x


def _summed(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """The sums over ranks of tensors of one dtype, in one message."""
    flat = summed(torch.cat([tensor.reshape(-1) for tensor in tensors]), ranks)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _said(faults: Sequence[Fault | None], ranks: Ranks, like: Tensor) -> Tensor:
    """What a rank has to say (2, ranks): of which of some sites it had a fault and what came of it,
    as a number that is not 0, and how far off it was. Of several it is one that stays."""
    said = like.new_zeros(2, ranks.count)
    known = [(_OUTCOMES.index(f.outcome), k, f.off) for k, f in enumerate(faults) if f is not None]
    if known:
        outcome, k, off = max(known)
        said[:, ranks.this] = like.new_tensor([1 + k * len(_OUTCOMES) + outcome, off])
    return said


def _hear(said: Tensor, sites: Sequence[PartOfSum], at: Tensor) -> None:
    """Take down what other ranks had to say.

    Raises:
        FaultError: some rank's part stays wrong: on every rank.
    """
    errors: list[FaultError] = []
    ranks = sites[0].ranks
    for rank, (code, off) in enumerate(said.t().tolist()):
        if code == 0:
            continue
        k, outcome = divmod(round(code) - 1, len(_OUTCOMES))
        site = sites[k]
        if rank == ranks.this:
            fault = None
        else:
            fault = site.log.note(site.name, FORWARD, at, None, off, ranks.processes[rank])
            fault.outcome = _OUTCOMES[outcome]
        if _OUTCOMES[outcome] == "raised":
            errors.append(_error(site, fault))
    if errors:
        raise errors[0]


def _error(site: PartOfSum, fault: Fault | None) -> FaultError:
    """Of this rank's own fault the error that waits; of another's a new one."""
    if fault is not None:
        return site.log.refused(fault, "it stays wrong when that rank computes it again")
    error, site.told = site.told, None
    assert error is not None
    return error
