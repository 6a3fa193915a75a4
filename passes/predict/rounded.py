"""What a model loses whose weights are all rounded to integers: tried on it, not predicted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tensorize.algebra.metric import Metric
from tensorize.algebra.quantise import grid
from tensorize.base.tensors import at_work
from tensorize.ir.precision import Precision
from tensorize.ir.sites import Batch, Site
from tensorize.passes.curves.curve import as_matrix
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.predict.trials import Reference


class Rounded:
    """A dense model and some batches, to ask it what so many bits lose.

    Every entry goes to the nearest code, by itself: codes that are chosen for the data lose less.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], loss: PreservedLoss
    ) -> None:
        self._sites = sites
        self._reference = Reference(model, batches, loss)

    def loses(self, precision: Precision) -> float:
        """The rise of the loss where all of the sites have weights of a precision."""
        parameters = dict(self._reference.model.named_parameters())
        return self._reference.measure(
            {site.name: _rounded(site, parameters[site.name], precision) for site in self._sites}
        ).rise


def _rounded(site: Site, weight: nn.Parameter, precision: Precision) -> nn.Parameter:
    whole = as_matrix(site, at_work(weight.detach()))
    matrix = whole.reshape(-1, whole.shape[-1])  # rows of experts, too, have scales of their own
    found = grid(matrix, precision, Metric(1.0, None, None))
    values = found.values(found.nearest(matrix)).reshape(weight.shape).to(weight)
    return nn.Parameter(values, requires_grad=False)
