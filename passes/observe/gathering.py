"""Second moments of some weights, gathered from runs of the model, or of a part of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import ModelError
from tensorize.capture.forward import untouched
from tensorize.capture.inner_gradients import is_transformed
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch, Site
from tensorize.passes.observe.backward import Peculiar, Probed, backward, not_wanted, peculiar
from tensorize.passes.observe.moments import (
    Moments,
    Term,
    among,
    conjugate,
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

Masks = Callable[[str, int], Tensor | None]
"""Of a weight's call by its number: the rows that count; None: all do."""
Wanted = Sequence[tuple[str, nn.Parameter]]


def probes_for(output_rows: int, most: int) -> int:
    """How often batches with so many output rows are probed."""
    return min(max(_OUTPUT_ROWS // max(output_rows, 1), 1), most)


class Gathering:
    """Moments of the weights of ``only`` (None: of all), as runs are added.

    ``free`` are all weights that the metric asks moments of: to be watched in every run that they
    are part of. ``by_sample=False`` takes all rows as independent, whatever the outputs are.
    """

    def __init__(
        self, found: Found, only: Collection[str] | None = None, by_sample: bool = True
    ) -> None:
        self._found, self._by_sample = found, by_sample
        self._sites = {site.name: site for site in found.sites}
        self.free = {site.name for site in found.sites if has_moments(site, found.metric)}
        chosen = self.free if only is None else self.free & set(only)
        self._moments: dict[str, Moments] = {name: Moments() for name in sorted(chosen)}
        self._special = Peculiar()

    def look(self, model: nn.Module, batch: Batch, wanted: Wanted) -> None:
        """See, in one run, which of the weights have no gradients row by row."""
        self._special = peculiar(model, batch, wanted)

    def add_gradients(
        self,
        model: nn.Module,
        batch: Batch,
        wanted: Wanted,
        counted: Masks,
        probe: Callable[[Any], Probed],
    ) -> int:
        """Add one backward pass of what ``probe`` makes of the outputs; its output rows."""
        whole = {
            name: partial(_add_whole, self._moments[name].term("whole"), self._sites[name])
            if name in self._moments
            else not_wanted
            for name in sorted(name for name, _ in wanted)
            if self._sites[name].last_resort or name in self._special.whole
        }
        add = partial(_add_rows, self._moments, self._sites, counted, by_sample=self._by_sample)
        return backward(model, batch, wanted, add, probe, self._special.changed, whole)

    def add_inputs(self, model: nn.Module, batch: Batch, wanted: Wanted, counted: Masks) -> None:
        """Add one forward pass."""
        calls: Counter[str] = Counter()
        moments = self._moments

        def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
            if name not in moments:
                return output
            if is_transformed():
                raise ModelError(
                    "it is used under a transform of torch.func (vmap, grad), where rows are not "
                    "seen",
                    site=name,
                    way_out='metric="loss" takes its gradient as a whole; or exclude it',
                )
            mask = counted(name, calls[name])
            calls[name] += 1
            term = moments[name].term(matmul.contract)
            _add_term(term, self._sites[name], frame, matmul, None, mask)
            return output

        with untouched(model), Observer(wanted, on_matmul):
            call(model, batch)

    def observed(self, output_rows: int, probes: int, batches: int) -> Observed:
        """The moments of what was added: of so many batches, each so often."""
        found, moments, sites = self._found, self._moments, self._sites
        for term in (term for moment in moments.values() for term in moment.terms.values()):
            term.output_rows, term.probes = output_rows, probes
            if term.contract == "lookup" and (counts := term.rows) is not None:
                term.unseen = unseen_share(counts, probes)
        few, unforeseen = _few(moments, sites, probes), _unforeseen(moments)
        notes = [*found.notes, *_normalise(moments, sites, output_rows, found.metric)]
        summary = f"{batches} batches, {output_rows or 'unknown'} output rows"
        summary += f" in {probes} probes" if probes > 1 else ""
        if any(term.pooled for moment in moments.values() for term in moment.terms.values()):
            summary += ", one a sample: its positions are added up"
        known = {
            "summary": summary, "notes": tuple(notes), "few": few, "unforeseen": unforeseen
        }  # fmt: skip
        return found.to(Observed, statistics=moments, **known)


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
        if counted is not None and len(counted) == len(x):
            x = x[counted]
            g = None if g is None else g[counted]
        count = x.shape[0]
    term.input_rows += count
    width = columns if matmul.contract == "columns" else rows
    if lookup:
        own = torch.bincount(x, minlength=rows).double().cpu()
    else:
        own = moment_of(x, width)
    other = None if g is None else moment_of(g, g.shape[-1])
    if matmul.contract == "columns":
        of_rows, of_columns = other, own
    else:
        of_rows, of_columns = (None if m is None else conjugate(m) for m in (own, other))
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


def _few(
    moments: Mapping[str, Moments], sites: Mapping[str, Site], probes: int
) -> dict[str, tuple[int, int]]:
    """The rows that weights met, and their columns, of weights that met fewer."""
    found: dict[str, tuple[int, int]] = {}
    for name, moment in moments.items():
        site, rows, widths = sites[name], 0, {0}
        for term in moment.terms.values():
            if term.contract in ("columns", "rows"):
                rows += term.input_rows // probes // max(site.experts, 1)
                widths.add(site.matrix[1 if term.contract == "columns" else 0])
        if 0 < rows < max(widths):
            found[name] = rows, max(widths)
    return found


def _unforeseen(moments: Mapping[str, Moments]) -> dict[str, float]:
    """Of tables, the share of lookups to come that are of rows that were not met."""
    return {
        name: term.unseen
        for name, moment in moments.items()
        for term in moment.terms.values()
        if term.contract == "lookup" and term.input_rows
    }


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
            notes.append(
                f"{name}: {why} in the calibration data; judged by its weights alone (if it is of "
                f"no use at all, ranks={{{name!r}: 1}} leaves its room to the others)"
            )
    return notes
