"""Which rows of every matmul count: those that some counted output depends on.

A row of an output counts unless an attention mask or a label of -100 hides it, or the caller's loss
does not read it. From there dependence is followed backwards: one backward pass of random numbers
at the outputs' counted rows, and zeros at the others, through the model as it runs, however it
transposes, packs, drops or routes its rows. A row of a product that nothing arrives at is of no
account, whatever stands in it.

What arrives tells whether there is an influence, not how large it is:

- Every row is brought to one size at every product, so that nothing fades away over depth.
- Activations let everything pass: a unit that is off, or saturated, is there all the same.
- What is smaller than what rounding leaves, among what arrives at the other rows, is nothing.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tensorize.base.errors import ModelError
from tensorize.capture.forward import out_of_memory, untouched
from tensorize.capture.inner_gradients import differentiates
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch, Site
from tensorize.passes.observe.backward import pass_back
from tensorize.passes.observe.hidden import hides_rows
from tensorize.passes.observe.loss import LossFunction, of_the_caller
from tensorize.passes.observe.outputs import call, outputs_of
from tensorize.passes.observe.rows import gradient_rows
from tensorize.passes.stages import Found, Opened

Stage = TypeVar("Stage", Found, Opened)
Counted = Mapping[str, Mapping[int, Tensor]]
"""Of one batch: by weight and the number of its call, a mask (rows,) of those that count. Of a
call that is not there all do."""

# What arrives at a row that nothing depends on is what sums leave that cancel: at most this share
# of the size at most other rows.
_ROUNDING, _MOST = 2.0**-17, 0.9


@dataclass(frozen=True)
class CountRows:
    """Finds the rows that count, of those batches where not all do.

    Where all rows of the outputs count, and none is made of several, all rows of everything do,
    and no backward pass is run.
    """

    batches: tuple[Batch, ...]
    loss_fn: LossFunction | None = None
    name: str = "rows"

    def run(self, found: Stage) -> Stage:
        sites = {site.name: site for site in found.free}
        wanted = [(name, p) for name, p in found.model.named_parameters() if name in sites]
        if not self.batches or not wanted:
            return replace(found, counted={}, summary="all count: there are no data")
        if differentiates(found.model):  # what arrives at a row depends on that itself
            return replace(found, counted={}, summary="all count: the model differentiates")
        everywhere = self.loss_fn is not None or _pools(found.model, self.batches[0], wanted)
        some = [batch for batch in self.batches if everywhere or hides_rows(batch, found.model)]
        counted: dict[Batch, Counted] = {}
        for done, batch in enumerate(some):
            found.progress("rows", done, len(some))
            try:
                counted[batch] = counted_rows(found.model, batch, sites, self.loss_fn)
            except (ModelError, RuntimeError, MemoryError) as error:
                if found.metric == "loss" or not (
                    isinstance(error, ModelError) or out_of_memory(error)
                ):
                    raise
                said = str(error).partition("\n")[0]
                why = f"all rows of the data count, padding too: no gradients tell which: {said}"
                return replace(found.noted(why), counted={}, summary=why)
        found.progress("rows", len(some), len(some))
        masks = [m for own in counted.values() for calls in own.values() for m in calls.values()]
        rows, those = sum(map(len, masks)), sum(int(mask.sum()) for mask in masks)
        summary = f"{those} of {rows} rows count in {len(some)} batches" if some else "all count"
        return replace(found, counted=counted, summary=summary)


def counted_rows(
    model: nn.Module,
    batch: Batch,
    sites: Mapping[str, Site],
    loss_fn: LossFunction | None = None,
) -> Counted:
    """The rows that count of all calls of some weights, for one batch.

    Raises:
        ModelError: the model does not run, forward or backward, or no gradient arrives anywhere.
    """
    wanted = [(name, p) for name, p in model.named_parameters() if name in sites]
    return reached_rows(model, batch, wanted, sites, reading(model, batch, loss_fn))


def reading(
    model: nn.Module, batch: Batch, loss_fn: LossFunction | None
) -> Callable[[Any], Tensor]:
    """A scalar of the outputs of a batch that depends on all of their rows that count."""
    generator = torch.Generator().manual_seed(0)

    def probe(result: Any) -> Tensor:
        roots = _read_by(loss_fn, result, batch) if loss_fn else _counted(result, batch, model)
        total = torch.zeros((), dtype=torch.float32)
        for rows in roots:
            noise = torch.randn(rows.shape, generator=generator).to(rows.device)
            total = total.to(rows.device) + (noise * rows.float()).sum()
        return total

    return probe


def reached_rows(
    model: nn.Module,
    batch: Batch,
    wanted: Sequence[tuple[str, nn.Parameter]],
    sites: Mapping[str, Site],
    probe: Callable[[Any], Tensor],
) -> Counted:
    """The rows of all calls of the ``wanted`` weights that a scalar of the outputs depends on.

    Raises:
        ModelError: the model does not run, forward or backward, or no gradient arrives anywhere.
    """
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def arrives(name: str, frame: Frame, matmul: Matmul, number: int, gradient: Tensor) -> Tensor:
        entries = matmul.to_rows(gradient)
        sizes = entries.abs().amax(-1, keepdim=True)
        there = sizes > _ROUNDING * _usual(sizes)
        passed = torch.where(there, entries / sizes, torch.zeros_like(entries))
        rows = gradient_rows(sites[name], matmul, passed)
        found[name][number] = (rows != 0).any(-1).cpu()
        return matmul.from_rows(passed)

    with _Straight():
        pass_back(model, batch, wanted, probe, arrives)
    # A weight that is called and that nothing arrives at has no row that counts.
    return found


def rows_of(
    counted: Mapping[Batch, Counted] | None, batch: Batch, name: str, number: int
) -> Tensor | None:
    """A mask of the rows that count, of a weight's call by its number; None: all do."""
    return None if counted is None else counted.get(batch, {}).get(name, {}).get(number)


def _usual(sizes: Tensor) -> Tensor:
    """The size that most rows have that anything arrives at."""
    some = sizes[sizes > 0]
    if not len(some):
        return sizes.new_zeros(())
    return some.kthvalue(max(1, int(_MOST * len(some)))).values


def _counted(result: Any, batch: Batch, model: nn.Module) -> list[Tensor]:
    return [output.rows for output in outputs_of(result, batch, model)]


def _read_by(loss_fn: LossFunction, result: Any, batch: Batch) -> list[Tensor]:
    """The rows of a model's outputs that a loss of the caller's reads."""
    loss = of_the_caller(loss_fn, result, batch)
    leaves = [
        leaf
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if not loss.requires_grad or not leaves:
        return [loss.reshape(1, 1)]
    read = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    rows = []
    for leaf, gradient in zip(leaves, read, strict=True):
        if gradient is not None:
            width = leaf.shape[-1] if leaf.dim() else 1
            counted = (gradient.reshape(-1, width) != 0).any(-1)
            rows.append(leaf.reshape(-1, width)[counted])
    return rows or [loss.reshape(1, 1)]


def _pools(model: nn.Module, batch: Batch, wanted: Sequence[tuple[str, nn.Parameter]]) -> bool:
    """Whether some product has more rows than the outputs, or rows that are sorted into stacks."""
    with untouched(model), most_rows(wanted) as most:
        outputs = outputs_of(call(model, batch), batch, model)
    return most() > min(len(output.rows) for output in outputs)


@contextlib.contextmanager
def most_rows(wanted: Sequence[tuple[str, nn.Parameter]]) -> Iterator[Callable[[], int]]:
    """The largest number of rows of a product in here; without bound where they are sorted into
    stacks."""
    most = 0

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        nonlocal most
        rows = matmul.to_rows(output)
        routed = matmul.stacked or matmul.offsets is not None or frame.expert is not None
        count = rows.numel() // max(rows.shape[-1], 1)
        most = max(most, count if not routed else 1 << 62)
        return output

    with Observer(wanted, on_matmul):
        yield lambda: most


# --------------------------------------------------------------------------------- activations


class _Pass(torch.autograd.Function):
    """The value of ``y``, and the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _named(owners: Sequence[Any], names: str) -> frozenset[Any]:
    return frozenset(getattr(o, n) for o in owners for n in names.split() if hasattr(o, n))


_ACTIVATIONS = _named(
    (F, torch, torch.Tensor),
    "relu relu_ relu6 hardtanh hardtanh_ hardswish hardsigmoid hardshrink softshrink threshold "
    "threshold_ leaky_relu rrelu elu elu_ celu selu gelu silu mish softplus softsign logsigmoid "
    "tanh tanh_ sigmoid sigmoid_ erf clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip "
    "clip_",
)


class _Straight(TorchFunctionMode):
    """Activations give their own values, and let whatever arrives at them pass."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        bends = isinstance(x, Tensor) and x.requires_grad and func in _ACTIVATIONS
        if not bends or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        assert isinstance(x, Tensor)
        plain = x.detach()
        value = func(plain, *args[1:], **kwargs)
        if value is plain or (value.shape == x.shape and value.data_ptr() == x.data_ptr()):
            return x  # it was written in place
        return _Pass.apply(x, value.detach()) if value.shape == x.shape else func(*args, **kwargs)
