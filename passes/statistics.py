"""Second moments of every site's inputs, and of the gradients at its outputs.

For the ``input`` metric forward passes are enough. The ``loss`` metric takes one backward pass a
batch of a probe whose gradients have the Hessian of the loss to preserve as second moment
(``preserved.py``), so that ½ tr(G ΔW C ΔWᵀ) is the rise of that loss to second order (K-FAC,
Martens & Grosse 2015). No gradient of a weight is ever computed, and the model stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tensorize.errors import AnalysisError
from tensorize.forward import untouched
from tensorize.ir import Batch
from tensorize.passes.pipeline import Program
from tensorize.passes.preserved import PreservedLoss, call, row_mask
from tensorize.uses import Frame, Matmul, Observer, patches

# A side with more entries than this keeps only the diagonal of its second moment (float64: a full
# one of 8192 takes 512 MB).
LARGEST_FULL_MOMENT = 8192


@dataclass
class Term:
    """Moments of one kind of use of a weight W (M, N).

    ``rows`` (M, M) or its diagonal (M,), ``columns`` likewise for N: which of them belongs to the
    inputs and which to the gradients depends on ``contract``. ``None`` stands for the identity.
    Both are sums; ``input_rows`` and ``output_rows`` say over how many rows.
    """

    contract: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    input_rows: int = 0


@dataclass
class Moments:
    """The terms of one weight: one a kind of use (a tied weight has several)."""

    terms: dict[str, Term] = field(default_factory=dict)

    def term(self, contract: str) -> Term:
        return self.terms.setdefault(contract, Term(contract))


@dataclass(frozen=True)
class CollectStatistics:
    """Program with ``statistics``: the moments that the metric needs, of every free site.

    ``loss`` is the loss to preserve; only the ``loss`` metric asks for its gradients.
    """

    batches: tuple[Batch, ...]
    loss: PreservedLoss | None
    name: str = "statistics"

    def run(self, program: Program) -> Program:
        if program.metric == "frobenius":
            return replace(program, summary="none needed: the weights alone")
        free = {site.name for site in program.sites if site.blocked is None}
        wanted = [(n, p) for n, p in program.model.named_parameters() if n in free]
        generator = torch.Generator().manual_seed(program.seed)
        moments: dict[str, Moments] = {name: Moments() for name in sorted(free)}
        output_rows = 0
        for position, batch in enumerate(self.batches):
            program.progress("statistics", position, len(self.batches))
            if program.metric == "loss":
                assert self.loss is not None
                rows = _add_gradients(
                    program.model, batch, position, wanted, moments, self.loss, generator
                )
                output_rows += rows
            else:
                _add_inputs(program.model, batch, position, wanted, moments)
        program.progress("statistics", len(self.batches), len(self.batches))
        notes = [*program.notes, *_normalise(moments, output_rows, program.metric)]
        summary = f"{len(self.batches)} batches, {output_rows or 'unknown'} output rows"
        return replace(program, statistics=moments, summary=summary, notes=tuple(notes))


def _add_inputs(
    model: nn.Module,
    batch: Batch,
    position: int,
    wanted: Sequence[tuple[str, nn.Parameter]],
    moments: Mapping[str, Moments],
) -> None:
    shapes = _shapes(wanted)

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        mask = row_mask(matmul.x, batch, matmul.contract)
        _add_term(moments[name].term(matmul.contract), shapes[name], matmul, None, mask)
        return output

    with untouched(model), Observer(wanted, on_matmul):
        call(model, batch, position)


def _add_gradients(
    model: nn.Module,
    batch: Batch,
    position: int,
    wanted: Sequence[tuple[str, nn.Parameter]],
    moments: Mapping[str, Moments],
    loss: PreservedLoss,
    generator: torch.Generator,
) -> int:
    shapes = _shapes(wanted)
    roots: list[Tensor] = []

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            # No weight asks for a gradient here: a zero that does is where backward passes end.
            roots.append(torch.zeros_like(output[..., :1]).requires_grad_())
            output = output + roots[-1]
        term = moments[name].term(matmul.contract)

        def on_gradient(gradient: Tensor) -> None:
            with torch.no_grad():
                _add_term(term, shapes[name], matmul, matmul.to_rows(gradient), None)

        output.register_hook(on_gradient)
        return output

    with untouched(model), torch.enable_grad():
        with Observer(wanted, on_matmul, frozen=True):
            result = call(model, batch, position)
        scalar, rows = loss.probe(result, batch, model, generator)
        if not roots or not scalar.requires_grad:
            raise AnalysisError(
                "the outputs do not depend on any weight in a differentiable way",
                way_out='metric="input" needs no gradients',
            )
        torch.autograd.backward(scalar, inputs=roots)  # so that no parameter's .grad is touched
    return rows


def _shapes(wanted: Sequence[tuple[str, nn.Parameter]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in wanted}


def _add_term(
    term: Term,
    shape: tuple[int, ...],
    matmul: Matmul,
    gradient: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Add the rows of one call: x (and g) to the two sides of the weight's metric."""
    lookup = matmul.contract == "lookup"
    convolution = matmul.convolution is not None
    if convolution:
        x = patches(matmul, shape[2:])
        x = None if x is None else x.detach()
    else:
        x = matmul.x.detach().reshape(-1) if lookup else _as_rows(matmul.x.detach())
    g = None if gradient is None else _as_rows(gradient)
    if g is not None:
        # A row that no counted output depends on has a gradient of exactly zero: padding.
        mask = (g != 0).any(-1)
    if mask is not None and x is not None and mask.numel() == x.shape[0]:
        x = x[mask]
        g = None if g is None else g[mask]
    rows, columns = (shape[0], math.prod(shape[1:])) if convolution else shape[-2:]
    term.input_rows += x.shape[0] if x is not None else int(matmul.x.shape[0])
    if matmul.contract == "columns":
        term.columns = term.columns if x is None else _plus(term.columns, _moment(x, columns))
        term.rows = term.rows if g is None else _plus(term.rows, _moment(g, rows))
    else:
        assert x is not None
        own = torch.bincount(x, minlength=rows).double() if lookup else _moment(x, rows)
        term.rows = _plus(term.rows, own)
        term.columns = term.columns if g is None else _plus(term.columns, _moment(g, columns))


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _moment(rows: Tensor, width: int) -> Tensor:
    """Σ x xᵀ over the rows, in float64: full (width, width), or its diagonal (width,)."""
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    if width > LARGEST_FULL_MOMENT:
        return rows.square().sum(0, dtype=torch.float64).cpu()
    return (rows.t() @ rows).double().cpu()


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _normalise(moments: Mapping[str, Moments], output_rows: int, metric: str) -> list[str]:
    """Turn sums into moments, in place: inputs a mean over their rows, gradients a sum over theirs.

    The gradients' sum is divided by the number of output rows, so that ½ tr(G ΔW C ΔWᵀ) is the
    mean rise of the loss over output rows, whatever the number of rows that the site sees.
    """
    notes = []
    for name, moment in moments.items():
        for contract, term in moment.terms.items():
            inputs = "columns" if contract == "columns" else "rows"
            gradients = "rows" if inputs == "columns" else "columns"
            sums = getattr(term, inputs)
            if sums is not None:
                sums.div_(max(term.input_rows, 1))
            sums = getattr(term, gradients)
            if sums is not None:
                sums.div_(max(output_rows, 1))
        moment.terms = {c: t for c, t in moment.terms.items() if t.input_rows > 0}
        if not moment.terms:
            why = "no counted output depends on it" if metric == "loss" else "it was not used"
            notes.append(f"{name}: {why} in the calibration data; judged by its weights alone")
    return notes
