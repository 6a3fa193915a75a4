"""Second moments of every site's inputs, and of the gradients at its outputs.

For the ``input`` metric forward passes are enough. The ``loss`` metric takes one backward pass a
batch of a probe whose gradients have the Hessian of the loss to preserve as second moment
(``preserved.py``), so that ½ tr(G ΔW C ΔWᵀ) is the rise of that loss to second order (K-FAC,
Martens & Grosse 2015). The model stays as it was.

K-FAC takes the rows that a weight meets as independent. That holds well where every position has an
output of its own. Where a model makes one output row of a whole sample (a sentence, an image), what
an error does at its positions adds up: the weight's gradient of a sample is D = Σ_t g_t x_tᵀ, and
the two sides of its metric are the moments E[D Dᵀ] and E[Dᵀ D], as those that Shampoo keeps (Gupta,
Koren & Singer 2018). On a trained sentence encoder K-FAC is off by factors from 1/6 to 24 from
weight to weight, these moments by 1/2 to 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.errors import AnalysisError
from tensorize.forward import untouched
from tensorize.ir import Batch, Site
from tensorize.observer import Observer
from tensorize.passes.pipeline import Program
from tensorize.passes.preserved import PreservedLoss, call, row_mask, samples_of
from tensorize.uses import Frame, Matmul, patches

# A side with more entries than this keeps only the diagonal of its second moment (float64: a full
# one of 8192 takes 512 MB).
LARGEST_FULL_MOMENT = 8192
# Each row of the outputs gives one sample of the gradients. Where there are few (one a sentence),
# the same batches are probed again, until there are about this many.
_OUTPUT_ROWS = 2048
# Gradients of samples, or products of their rows, are held so many elements at a time.
_ELEMENTS = 16_000_000


@dataclass
class Term:
    """Moments of one kind of use of a weight W (M, N).

    ``rows`` (M, M) or its diagonal (M,), ``columns`` likewise for N: which of them belongs to the
    inputs and which to the gradients depends on ``contract``. ``None`` stands for the identity.
    Both are sums, over ``input_rows`` rows; of a weight used as a whole, over as many gradients.
    The rows were seen ``probes`` times, with gradients that come from ``output_rows`` rows of the
    model's outputs (0: from as many). Of lookups, ``unseen`` is the share of those to come that
    will be of rows not looked up yet.

    ``pooled`` is the number of samples whose positions were added up first (0: none were), and
    ``squares`` the sum of ‖D Dᵀ‖² over them; ``noise`` is then the relative variance of each side
    that comes of their number.
    """

    contract: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    input_rows: int = 0
    output_rows: int = 0
    probes: int = 1
    unseen: float = 0.0
    pooled: int = 0
    squares: float = 0.0
    noise: tuple[float, float] | None = None

    @property
    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        return self.rows, self.columns

    @property
    def samples(self) -> tuple[int, int]:
        """Of how many independent vectors ``rows`` and ``columns`` are the moments, about.

        Gradients that come from one row of the outputs count once, however many rows they reach.
        """
        if self.contract == "whole":
            widths = [1 if side is None else len(side) for side in (self.columns, self.rows)]
            return self.input_rows * widths[0], self.input_rows * widths[1]
        inputs = self.input_rows // max(self.probes, 1)
        gradients = min(self.input_rows, self.output_rows or self.input_rows)
        return (gradients, inputs) if self.contract == "columns" else (inputs, gradients)


@dataclass
class Moments:
    """The terms of one weight: one a kind of use (a tied weight has several)."""

    terms: dict[str, Term] = field(default_factory=dict)

    def term(self, contract: str, *, pooled: bool = False) -> Term:
        kind = f"{contract}, by sample" if pooled else contract
        return self.terms.setdefault(kind, Term(contract))


@dataclass(frozen=True)
class CollectStatistics:
    """Program with ``statistics``: the moments that the metric needs, of every free site.

    ``loss`` is the loss to preserve; only the ``loss`` metric asks for its gradients. A batch is
    probed at most ``most_probes`` times. ``only`` names the weights whose moments are wanted: they
    are the same bits as among those of all. ``by_sample=False`` takes all rows as independent,
    whatever the outputs are.
    """

    batches: tuple[Batch, ...]
    loss: PreservedLoss | None
    most_probes: int = 4
    only: frozenset[str] | None = None
    by_sample: bool = True
    name: str = "statistics"

    def run(self, program: Program) -> Program:
        if program.metric == "frobenius":
            return replace(program, summary="none needed: the weights alone")
        free = {site.name for site in program.sites if has_moments(site, program.metric)}
        # All of them, so that whatever is asked for the same gradients arrive, on the same way.
        wanted = [(n, p) for n, p in program.model.named_parameters() if n in free]
        sites = {site.name: site for site in program.sites}
        generator = torch.Generator().manual_seed(program.seed)
        chosen = free if self.only is None else free & self.only
        moments: dict[str, Moments] = {name: Moments() for name in sorted(chosen)}
        output_rows = 0
        changed: set[str] = set()
        whole = {
            name: partial(_add_whole, moments[name].term("whole"), sites[name])
            if name in moments
            else _not_wanted
            for name in sorted(free)
            if sites[name].last_resort
        }
        probes, total = 1, len(self.batches)
        done = 0
        while done < total:
            program.progress("statistics", done, total)
            position = done % len(self.batches)
            batch = self.batches[position]
            done += 1
            if program.metric == "loss":
                assert self.loss is not None
                if done == 1:
                    changed = _changed_after_use(program.model, batch, wanted)
                given = program.model, batch, position, wanted
                add = partial(_add_rows, moments, sites, by_sample=self.by_sample)
                output_rows += backward(*given, add, self.loss, generator, changed, whole)
                if done == len(self.batches):
                    probes = min(max(_OUTPUT_ROWS // max(output_rows, 1), 1), self.most_probes)
                    total *= probes
            else:
                _add_inputs(program.model, batch, position, wanted, sites, moments)
        program.progress("statistics", total, total)
        for term in (term for moment in moments.values() for term in moment.terms.values()):
            term.output_rows, term.probes = output_rows, probes
            if term.contract == "lookup" and term.rows is not None:
                term.unseen = _unseen(term.rows, probes)
        notes = [*program.notes, *_normalise(moments, sites, output_rows, program.metric)]
        summary = f"{len(self.batches)} batches, {output_rows or 'unknown'} output rows"
        summary += f" in {probes} probes" if probes > 1 else ""
        if any(term.pooled for moment in moments.values() for term in moment.terms.values()):
            summary += ", one a sample: its positions are added up"
        return replace(program, statistics=moments, summary=summary, notes=tuple(notes))


def has_moments(site: Site, metric: str) -> bool:
    """Whether a metric asks for moments of a weight: what uses it as a whole has no inputs."""
    return site.blocked is None and (metric == "loss" or not site.last_resort)


def moment_bytes(site: Site, metric: str) -> int:
    """Memory of the second moments of one weight, of all its kinds of uses."""

    def side(width: int) -> int:
        return 8 * (width if width > LARGEST_FULL_MOMENT else width**2)

    rows, columns = site.matrix
    total = 0
    for contract in {use.contract for use in site.uses}:
        inputs, outputs = (columns, rows) if contract == "columns" else (rows, columns)
        own = 8 * inputs if contract == "lookup" else side(inputs)
        total += own + (side(outputs) if metric == "loss" else 0)
    return total


def _unseen(counts: Tensor, probes: int) -> float:
    """The chance that the next lookup is of a row never seen: the share of rows seen once.

    Good, "The population frequencies of species", Biometrika 40 (1953).
    """
    once = int(((counts > 0) & (counts <= probes)).sum())
    return once * probes / max(float(counts.sum()), 1.0)


def _add_inputs(
    model: nn.Module,
    batch: Batch,
    position: int,
    wanted: Sequence[tuple[str, nn.Parameter]],
    sites: Mapping[str, Site],
    moments: Mapping[str, Moments],
) -> None:
    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if name not in moments:
            return output
        mask = row_mask(matmul.x, batch, matmul.contract)
        _add_term(moments[name].term(matmul.contract), sites[name], frame, matmul, None, mask)
        return output

    with untouched(model), Observer(wanted, on_matmul):
        call(model, batch, position)


def _changed_after_use(
    model: nn.Module, batch: Batch, wanted: Sequence[tuple[str, nn.Parameter]]
) -> set[str]:
    """Weights whose input the model changes in place later on, before the gradients are there."""
    used: list[tuple[str, Tensor, int]] = []

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if not matmul.x.is_inference():
            used.append((name, matmul.x, matmul.x._version))
        return output

    with untouched(model), Observer(wanted, on_matmul):
        call(model, batch, 0)
    return {name for name, x, version in used if x._version != version}


def _add_rows(
    moments: Mapping[str, Moments],
    sites: Mapping[str, Site],
    name: str,
    frame: Frame,
    matmul: Matmul,
    gradient: Tensor,
    samples: int | None,
    *,
    by_sample: bool,
) -> None:
    if name not in moments:
        return
    site = sites[name]
    pairs = rows_by_sample(site, matmul, gradient, samples) if by_sample and samples else None
    if pairs is None:
        _add_term(moments[name].term(matmul.contract), site, frame, matmul, gradient, None)
    else:
        _add_samples(moments[name].term(matmul.contract, pooled=True), site, frame, *pairs)


def backward(
    model: nn.Module,
    batch: Batch,
    position: int,
    wanted: Sequence[tuple[str, nn.Parameter]],
    on_rows: Callable[[str, Frame, Matmul, Tensor, int | None], None],
    loss: PreservedLoss,
    generator: torch.Generator,
    changed: Collection[str] = (),
    whole: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> int:
    """One backward pass of a probe of the loss; the number of output rows that count.

    ``on_rows(name, frame, matmul, gradient, samples)`` is called for each matmul against a wanted
    weight with what arrives at its rows, and the number of samples where the outputs have one row
    for each; ``whole`` names the weights that are used as a whole, and what takes the gradient of
    each. ``changed`` are weights whose input the model changes later on.
    """
    whole = whole or {}
    samples: int | None = None
    roots: list[Tensor] = []
    # Inputs may carry gradients of the caller's own: backward passes end at the weights.
    args, kwargs = pytree.tree_map(_detached, (batch.args, dict(batch.kwargs)))
    batch = replace(batch, args=args, kwargs=kwargs)

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        if name in changed:
            matmul = replace(matmul, x=matmul.x.detach().clone())
        if not output.requires_grad:
            # No weight asks for a gradient here: a zero that does is where backward passes end.
            roots.append(torch.zeros_like(output[..., :1]).requires_grad_())
            output = output + roots[-1]

        def on_gradient(gradient: Tensor) -> None:
            with torch.no_grad():
                on_rows(name, frame, matmul, matmul.to_rows(gradient), samples)

        output.register_hook(on_gradient)
        return output

    wholes = {
        name: parameter.detach().requires_grad_() for name, parameter in wanted if name in whole
    }
    leaves = {id(parameter): wholes[name] for name, parameter in wanted if name in wholes}
    with untouched(model), torch.enable_grad():
        with Observer(wanted, on_matmul, frozen=True, stand_ins=leaves):
            result = call(model, batch, position)
        scalar, rows = loss.probe(result, batch, model, generator)
        samples = samples_of(result)
        roots += wholes.values()
        if not roots or not scalar.requires_grad:
            raise AnalysisError(
                "the outputs do not depend on any weight in a differentiable way",
                way_out='metric="input" needs no gradients',
            )
        torch.autograd.backward(scalar, inputs=roots)  # so that no parameter's .grad is touched
    for name, weight in wholes.items():
        if weight.grad is not None and weight.grad.any():
            whole[name](weight.grad)
    return rows


def _not_wanted(gradient: Tensor) -> None:
    """Takes the gradient of a weight whose moments are not collected in this pass."""


def _add_whole(term: Term, site: Site, gradient: Tensor) -> None:
    """Add the gradient (M, N) of a whole weight, from one probe, to the two sides of its metric.

    The Fisher of a weight that is not met by rows of inputs, as a Kronecker product of the two
    second moments of its gradients (as Shampoo does, Gupta, Koren & Singer 2018).
    """
    rows, columns = site.matrix
    gradient = gradient.reshape(rows, columns)
    term.rows = plus(term.rows, _moment(gradient.t(), rows))
    term.columns = plus(term.columns, _moment(gradient, columns))
    term.input_rows += 1


def _noise(term: Term) -> tuple[float, float]:
    """The relative variance of both sides, as means of the samples' own moments.

    Of the inputs a sample says the same in every probe; of the gradients, something new.
    """
    variances = []
    for name, side in (("rows", term.rows), ("columns", term.columns)):
        assert side is not None
        square = float(side.square().sum()) / term.pooled
        spread = max(term.squares / square - 1, 0.0) / term.pooled if square > 0 else 0.0
        of_inputs = name == ("columns" if term.contract == "columns" else "rows")
        variances.append(spread * term.probes if of_inputs else spread)
    return variances[0], variances[1]


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _add_term(
    term: Term,
    site: Site,
    frame: Frame,
    matmul: Matmul,
    gradient: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Add the rows of one call: x (and g) to the two sides of the weight's metric."""
    lookup, (rows, columns) = matmul.contract == "lookup", site.matrix
    x, g = matmul_rows(site, matmul, gradient)
    if g is not None:
        # A row that no counted output depends on has a gradient of exactly zero: padding.
        mask = (g != 0).any(-1)
    if mask is not None and x is not None and mask.numel() == x.shape[0]:
        x = x[mask]
        g = None if g is None else g[mask]
    count = int(matmul.x.shape[0]) if x is None else x.shape[0]
    term.input_rows += count
    width, other_width = (columns, rows) if matmul.contract == "columns" else (rows, columns)
    if x is None:
        own = _alike(matmul.x, width, count)
    elif lookup:
        own = torch.bincount(x, minlength=rows).double().cpu()
    else:
        own = _moment(x, width)
    other = None if g is None else _moment(g, g.shape[-1])
    if other is None and gradient is not None:
        other = _alike(gradient, other_width, count)
    of_rows, of_columns = (other, own) if matmul.contract == "columns" else (own, other)
    if frame.rows is not None and of_rows is not None:
        of_rows = _among(of_rows, frame.rows, rows)
    term.rows, term.columns = plus(term.rows, of_rows), plus(term.columns, of_columns)


def rows_by_sample(
    site: Site, matmul: Matmul, gradient: Tensor, samples: int
) -> tuple[Tensor, Tensor] | None:
    """x (samples, T, width) and g (samples, T, width) of one call, the rows of a sample together.

    None where a sample has one row (a head's), where rows cannot be told apart by samples, and for
    lookups, whose inputs' moment is a diagonal.
    """
    if matmul.contract == "lookup" or site.experts or max(site.matrix) > LARGEST_FULL_MOMENT:
        return None
    x, g = matmul_rows(site, matmul, gradient)
    if x is None or g is None or len(x) != len(g) or len(x) <= samples or len(x) % samples:
        return None
    lead = tuple(matmul.x.shape[:-1])
    if matmul.convolution is None and lead[0] != samples and lead[1:2] == (samples,):
        # Time comes first, as in torch's own recurrent and attention modules.
        x, g = (t.reshape(*lead[:2], -1, t.shape[-1]).transpose(0, 1) for t in (x, g))
    return x.reshape(samples, -1, x.shape[-1]), g.reshape(samples, -1, g.shape[-1])


def _add_samples(term: Term, site: Site, frame: Frame, x: Tensor, g: Tensor) -> None:
    """Add the two moments of the gradients D = Σ_t g_t x_tᵀ of every sample of one call."""
    counted = (g != 0).any(-1, keepdim=True)
    x = x.masked_fill(~counted, 0)  # what stands in padding may be anything
    of_outputs, of_inputs, squares = sample_moments(_widened(g), _widened(x))
    columns = term.contract == "columns"
    of_rows, of_columns = (of_outputs, of_inputs) if columns else (of_inputs, of_outputs)
    if frame.rows is not None:
        of_rows = _among(of_rows, frame.rows, site.matrix[0])
    term.rows, term.columns = plus(term.rows, of_rows), plus(term.columns, of_columns)
    term.squares += squares
    term.pooled += int(counted.any(1).sum())
    term.input_rows += int(counted.sum())


def sample_moments(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Σ D Dᵀ (M, M), Σ Dᵀ D (N, N) and Σ ‖D Dᵀ‖² over samples, D = gᵀ x, in float64.

    g is (samples, T, M), x (samples, T, N). No D is made where T is the smallest side:
    D Dᵀ = gᵀ (x xᵀ) g.
    """
    (_, time, rows), columns = g.shape, x.shape[-1]
    total_rows = torch.zeros(rows, rows, dtype=torch.float64)
    total_columns = torch.zeros(columns, columns, dtype=torch.float64)
    squares = 0.0
    direct = time > min(rows, columns)
    few = max(1, _ELEMENTS // (rows * columns if direct else time * time))
    for g_STM, x_STN in zip(g.split(few), x.split(few), strict=True):
        if direct:
            d_SMN = g_STM.mT @ x_STN
            own_rows = products(d_SMN.transpose(1, 2).flatten(0, 1))
            own_columns = products(d_SMN.flatten(0, 1))
            each = d_SMN @ d_SMN.mT if rows <= columns else d_SMN.mT @ d_SMN
            squares += float(each.square().sum(dtype=torch.float64))
        else:
            inner, outer = x_STN @ x_STN.mT, g_STM @ g_STM.mT
            own_rows = products(g_STM.flatten(0, 1), (inner @ g_STM).flatten(0, 1))
            own_columns = products(x_STN.flatten(0, 1), (outer @ x_STN).flatten(0, 1))
            both = inner @ outer  # tr(D Dᵀ D Dᵀ) = tr((x xᵀ) (g gᵀ) (x xᵀ) (g gᵀ))
            squares += float((both * both.mT).sum(dtype=torch.float64))
        total_rows += own_rows.cpu()
        total_columns += own_columns.cpu()
    return total_rows, total_columns, squares


def input_rows(site: Site, matmul: Matmul) -> Tensor | None:
    """The rows (rows, width) that a call multiplies the matrix by; None where none can be told."""
    return matmul_rows(site, matmul, None)[0]


def matmul_rows(
    site: Site, matmul: Matmul, gradient: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The rows that one call multiplies the matrix by, and what arrives at each product.

    None for a side whose rows cannot be told (a convolution in three dimensions).
    """
    x, call, kernel = matmul.x.detach(), matmul.convolution, site.shape[2:]
    if matmul.bag is not None:
        return _bag_rows(x, matmul.bag, site.matrix[0], gradient)
    if call is None:
        x = x.reshape(-1) if matmul.contract == "lookup" else _as_rows(x)
        return x, None if gradient is None else _as_rows(gradient)
    x = patches(matmul, kernel)
    x = None if x is None else x.detach()
    if gradient is None:
        return x, None
    if call.output_padding is None:
        return x, gradient.reshape(-1, site.matrix[0])
    # Transposed: a pixel's product is a patch of the output.
    forward = replace(matmul, x=gradient, convolution=replace(call, output_padding=None))
    return x, patches(forward, kernel)


def _bag_rows(
    ids: Tensor, bag: Mapping[str, Any], rows: int, gradient: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Row numbers in all bags, and what arrives at each of them: its share of the bag's."""
    if ids.dim() == 2:
        owner = torch.arange(ids.numel(), device=ids.device) // ids.shape[1]
    else:
        places = torch.arange(ids.numel(), device=ids.device)
        owner = torch.bucketize(places, bag["offsets"], right=True) - 1
    ids, padding = ids.reshape(-1), bag["padding_idx"]
    kept = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding % rows
    ids, owner = ids[kept], owner[kept]
    if gradient is None:
        return ids, None
    g = gradient[owner]
    if bag["mode"] == "mean":
        g = g / torch.bincount(owner).to(g.dtype)[owner].unsqueeze(-1)
    elif bag["per_sample_weights"] is not None:
        g = g * bag["per_sample_weights"].detach().reshape(-1)[kept].unsqueeze(-1)
    return ids, g


def _alike(values: Tensor, width: int, count: int) -> Tensor:
    """The diagonal for ``count`` rows of which only the mean square of an entry is known."""
    size = float(values.detach().double().square().mean()) * count
    return torch.full((width,), size, dtype=torch.float64)


def _among(moment: Tensor, rows: tuple[int, int], width: int) -> Tensor:
    """The moment of some rows of a weight as one of all of them."""
    first, end = rows
    if moment.dim() == 1 or width > LARGEST_FULL_MOMENT:
        diagonal = moment if moment.dim() == 1 else moment.diagonal()
        return torch.nn.functional.pad(diagonal, (first, width - end))
    return torch.nn.functional.pad(moment, (first, width - end, first, width - end))


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _moment(rows: Tensor, width: int) -> Tensor:
    """Σ x xᵀ over the rows, in float64: full (width, width), or its diagonal (width,)."""
    if width > LARGEST_FULL_MOMENT:
        return _widened(rows).square().sum(0, dtype=torch.float64).cpu()
    return products(rows).cpu()


def products(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Σ x yᵀ over the rows of x and y (x itself where there is none), in float64."""
    x = _widened(x)
    return (x.t() @ (x if y is None else _widened(y))).double()


def _widened(rows: Tensor) -> Tensor:
    """Half precision as float32: sums of products overflow in it, or lose their last digits."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum, in the place of ``total``; None is nothing yet."""
    if part is None or total is None:
        return part if total is None else total
    return total.add_(part)


def _normalise(
    moments: Mapping[str, Moments], sites: Mapping[str, Site], output_rows: int, metric: str
) -> list[str]:
    """Turn sums into moments, in place: inputs a mean over their rows, gradients a sum over theirs.

    The gradients' sum is divided by the number of output rows, so that ½ tr(G ΔW C ΔWᵀ) is the
    mean rise of the loss over output rows, whatever the number of rows that the site sees. Of
    several matrices each is taken to see its part of the rows: the sum over them is the rise.
    """
    notes = []
    for name, moment in moments.items():
        for term in moment.terms.values():
            inputs = "columns" if term.contract == "columns" else "rows"
            gradients = "rows" if inputs == "columns" else "columns"
            sums = getattr(term, inputs)
            if term.pooled:
                term.noise = _noise(term)
            if (term.pooled or term.contract == "whole") and sums is not None:  # sizes count once
                sums.div_(max(float((sums.diagonal() if sums.dim() == 2 else sums).sum()), 1e-300))
            elif sums is not None:
                sums.div_(max(term.input_rows, 1))
            sums = getattr(term, gradients)
            if sums is not None:
                sums.div_(max(output_rows, 1) * max(sites[name].experts, 1))
        moment.terms = {c: t for c, t in moment.terms.items() if t.input_rows > 0}
        if not moment.terms:
            why = "no counted output depends on it" if metric == "loss" else "it was not used"
            notes.append(f"{name}: {why} in the calibration data; judged by its weights alone")
    return notes
