"""Second moments of every site's inputs, and of the gradients at its outputs.

For the ``input`` metric forward passes are enough. The ``loss`` metric takes one backward pass a
batch of a probe whose gradients have the Hessian of the loss to preserve as second moment
(``loss.py``), so that ½ tr(G ΔW C ΔWᵀ) is the rise of that loss to second order (K-FAC,
Martens & Grosse 2015). The model stays as it was.

K-FAC takes the rows that a weight meets as independent. That holds well where every position has an
output of its own. Where a model makes one output row of a whole sample (a sentence, an image), what
an error does at its positions adds up: the weight's gradient of a sample is D = Σ_t g_t x_tᵀ, and
the two sides of its metric are the moments E[D Dᵀ] and E[Dᵀ D], as those that Shampoo keeps (Gupta,
Koren & Singer 2018). On a trained sentence encoder K-FAC is off by factors from 1/6 to 24 from
weight to weight, these moments by 1/2 to 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tensorize.base.errors import ModelError
from tensorize.base.tensors import give_back
from tensorize.capture.forward import untouched
from tensorize.capture.inner_gradients import is_transformed
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch, Site
from tensorize.passes.observe.backward import Peculiar, backward, not_wanted, peculiar
from tensorize.passes.observe.counted import Counted, rows_of
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.moments import (
    Moments,
    Term,
    alike,
    among,
    has_full_moments,
    has_moments,
    moment_of,
    noise_of,
    sample_moments,
    unseen_share,
    widened,
)
from tensorize.passes.observe.outputs import call
from tensorize.passes.observe.rows import matmul_rows, rows_by_matrix, rows_by_sample
from tensorize.passes.stages import Found, Observed

# Each row of the outputs gives one sample of the gradients. Where there are few (one a sentence),
# the same batches are probed again, until there are about this many.
_OUTPUT_ROWS = 2048


@dataclass(frozen=True)
class CollectStatistics:
    """Collects the moments that the metric needs, of every free site.

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

    def run(self, found: Found) -> Observed:
        if found.metric == "frobenius":
            return found.to(Observed, statistics={}, summary="none needed: the weights alone")
        if not found.free:
            return found.to(Observed, statistics={}, summary="none: no weight can be factorized")
        free = {site.name for site in found.sites if has_moments(site, found.metric)}
        if not free:
            return found.to(Observed, statistics={}, summary="none needed: all weights stay dense")
        # All of them, so that whatever is asked for the same gradients arrive, on the same way.
        wanted = [(n, p) for n, p in found.model.named_parameters() if n in free]
        sites = {site.name: site for site in found.sites}
        generator = torch.Generator().manual_seed(found.seed)
        chosen = free if self.only is None else free & self.only
        moments: dict[str, Moments] = {name: Moments() for name in sorted(chosen)}
        output_rows = 0
        special = Peculiar()
        if found.metric == "loss":
            special = peculiar(found.model, self.batches[0], wanted)
        whole = {
            name: partial(_add_whole, moments[name].term("whole"), sites[name])
            if name in moments
            else not_wanted
            for name in sorted(free)
            if sites[name].last_resort or name in special.whole
        }
        probes, total = 1, len(self.batches)
        done = 0
        while done < total:
            found.progress("statistics", done, total)
            batch = self.batches[done % len(self.batches)]
            done += 1
            if found.metric == "loss":
                assert self.loss is not None
                given = found.model, batch, wanted
                counted = partial(rows_of, found.counted, batch)
                add = partial(_add_rows, moments, sites, counted, by_sample=self.by_sample)
                output_rows += backward(*given, add, self.loss, generator, special.changed, whole)
                if done == len(self.batches):
                    probes = min(max(_OUTPUT_ROWS // max(output_rows, 1), 1), self.most_probes)
                    total *= probes
            else:
                _add_inputs(found.model, batch, wanted, sites, moments, found.counted)
            give_back()
        found.progress("statistics", total, total)
        for term in (term for moment in moments.values() for term in moment.terms.values()):
            term.output_rows, term.probes = output_rows, probes
            if term.contract == "lookup" and (counts := term.rows) is not None:
                term.unseen = unseen_share(counts, probes)
        few = _few(moments, sites, probes)
        notes = [*found.notes, *_normalise(moments, sites, output_rows, found.metric)]
        summary = f"{len(self.batches)} batches, {output_rows or 'unknown'} output rows"
        summary += f" in {probes} probes" if probes > 1 else ""
        if any(term.pooled for moment in moments.values() for term in moment.terms.values()):
            summary += ", one a sample: its positions are added up"
        known = {"summary": summary, "notes": tuple(notes), "few": few}
        return found.to(Observed, statistics=moments, **known)


def _add_inputs(
    model: nn.Module,
    batch: Batch,
    wanted: Sequence[tuple[str, nn.Parameter]],
    sites: Mapping[str, Site],
    moments: Mapping[str, Moments],
    counted: Mapping[Batch, Counted] | None,
) -> None:
    calls: Counter[str] = Counter()

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if name not in moments:
            return output
        if is_transformed():
            raise ModelError(
                "it is used under a transform of torch.func (vmap, grad), where rows are not seen",
                site=name,
                way_out='metric="loss" takes its gradient as a whole; or exclude it',
            )
        mask = rows_of(counted, batch, name, calls[name])
        calls[name] += 1
        _add_term(moments[name].term(matmul.contract), sites[name], frame, matmul, None, mask)
        return output

    with untouched(model), Observer(wanted, on_matmul):
        call(model, batch)


def _add_rows(
    moments: Mapping[str, Moments],
    sites: Mapping[str, Site],
    counted: Callable[[str, int], Tensor | None],
    name: str,
    frame: Frame,
    matmul: Matmul,
    gradient: Tensor,
    call: int,
    samples: int | None,
    *,
    by_sample: bool,
) -> None:
    if name not in moments:
        return
    site = sites[name]
    mask = counted(name, call)
    pairs = None
    if by_sample and samples and has_full_moments(site):
        pairs = rows_by_sample(site, matmul, gradient, samples, mask)
    if pairs is None:
        _add_term(moments[name].term(matmul.contract), site, frame, matmul, gradient, mask)
    else:
        _add_samples(moments[name].term(matmul.contract, pooled=True), site, frame, *pairs)


def _add_whole(term: Term, site: Site, gradient: Tensor) -> None:
    """Add the gradient (M, N) of a whole weight, from one probe, to the two sides of its metric.

    The Fisher of a weight that is not met by rows of inputs, as a Kronecker product of the two
    second moments of its gradients (as Shampoo does, Gupta, Koren & Singer 2018).
    """
    rows, columns = site.matrix
    gradient = gradient.reshape(-1, rows, columns)
    of_rows = moment_of(gradient.mT.reshape(-1, rows), rows)
    term.add(of_rows, moment_of(gradient.conj().reshape(-1, columns), columns))
    term.input_rows += 1


def _add_term(
    term: Term,
    site: Site,
    frame: Frame,
    matmul: Matmul,
    gradient: Tensor | None,
    counted: Tensor | None,
) -> None:
    """Add the rows of one call: x (and g) to the two sides of the weight's metric.

    For y = W x the gradient of the loss is Re(gᴴ ΔW x): G = E[g gᴴ] and C = E[x xᴴ]. For y = Wᵀ x
    both are the conjugates of that.
    """
    lookup, (rows, columns) = matmul.contract == "lookup", site.matrix
    if site.apart:
        x, g = rows_by_matrix(matmul, gradient, site.experts, counted)
        count = x.shape[0] * x.shape[1]
    else:
        x, g = matmul_rows(site, matmul, gradient)
        if x is not None and counted is not None and len(counted) == len(x):
            x = x[counted]
            g = None if g is None else g[counted]
        count = int(matmul.x.shape[0]) if x is None else x.shape[0]
    term.input_rows += count
    width, other_width = (columns, rows) if matmul.contract == "columns" else (rows, columns)
    if x is None:
        own = alike(matmul.x, width, count)
    elif lookup:
        own = torch.bincount(x, minlength=rows).double().cpu()
    else:
        own = moment_of(x, width)
    other = None if g is None else moment_of(g, g.shape[-1])
    if other is None and gradient is not None:
        other = alike(gradient, other_width, count)
    if matmul.contract == "columns":
        of_rows, of_columns = other, own
    else:
        of_rows, of_columns = (None if m is None else m.conj().resolve_conj() for m in (own, other))
    if frame.rows is not None and of_rows is not None:
        of_rows = among(of_rows, frame.rows, rows)
    term.add(of_rows, of_columns)


def _add_samples(
    term: Term, site: Site, frame: Frame, x: Tensor, g: Tensor, counted: Tensor
) -> None:
    """Add the two moments of the gradients D = Σ_t g_t x_tᵀ of every sample of one call."""
    x, g = (t.masked_fill(~counted.unsqueeze(-1), 0) for t in (x, g))  # padding may be anything
    of_outputs, of_inputs, squares = sample_moments(widened(g), widened(x))
    columns = term.contract == "columns"
    of_rows, of_columns = (of_outputs, of_inputs) if columns else (of_inputs, of_outputs)
    if frame.rows is not None:
        of_rows = among(of_rows, frame.rows, site.matrix[0])
    term.add(of_rows, of_columns)
    term.squares += squares
    term.pooled += int(counted.any(1).sum())
    term.input_rows += int(counted.sum())


def _few(moments: Mapping[str, Moments], sites: Mapping[str, Site], probes: int) -> dict[str, int]:
    """The rows that weights met which met fewer than they have columns."""
    found: dict[str, int] = {}
    for name, moment in moments.items():
        site, rows, widths = sites[name], 0, {0}
        for term in moment.terms.values():
            if term.contract in ("columns", "rows"):
                rows += term.input_rows // probes // max(site.experts, 1)
                widths.add(site.matrix[1 if term.contract == "columns" else 0])
        if 0 < rows < max(widths):
            found[name] = rows
    return found


def _normalise(
    moments: Mapping[str, Moments], sites: Mapping[str, Site], output_rows: int, metric: str
) -> list[str]:
    """Turn sums into moments, in place: inputs a mean over their rows, gradients a sum over theirs.

    The gradients' sum is divided by the number of output rows, so that ½ tr(G ΔW C ΔWᵀ) is the
    mean rise of the loss over output rows, whatever the number of rows that the site sees. Of
    several matrices each is taken to see its part of the rows, where they are not judged apart: the
    sum over them is the rise.
    """
    notes = []
    for name, moment in moments.items():
        apart = sites[name].apart
        for term in moment.terms.values():
            inputs = "columns" if term.contract == "columns" else "rows"
            gradients = "rows" if inputs == "columns" else "columns"
            if term.pooled:
                term.noise = noise_of(term)
            if (own := term.held.get(inputs)) is not None:
                once = term.pooled or term.contract == "whole"  # sizes count once
                rows = term.input_rows / (sites[name].experts if apart else 1)
                own.div_(max(term.size(inputs), 1e-300) if once else max(rows, 1))
            if (arrived := term.held.get(gradients)) is not None:
                arrived.div_(max(output_rows, 1) * (1 if apart else max(sites[name].experts, 1)))
        moment.terms = {c: t for c, t in moment.terms.items() if t.input_rows > 0}
        if not moment.terms:
            why = "no counted output depends on it" if metric == "loss" else "it was not used"
            notes.append(f"{name}: {why} in the calibration data; judged by its weights alone")
    return notes
