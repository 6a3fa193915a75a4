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

from dataclasses import dataclass
from functools import partial

import torch

from tensorize.base.tensors import give_back
from tensorize.ir.sites import Batch
from tensorize.passes.observe.backward import probing
from tensorize.passes.observe.counted import rows_of
from tensorize.passes.observe.gathering import Gathering, probes_for
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.stages import Found, Observed


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
        gathering = Gathering(found, self.only, self.by_sample)
        if not gathering.free:
            return found.to(Observed, statistics={}, summary="none needed: all weights stay dense")
        # All of them, so that whatever is asked for the same gradients arrive, on the same way.
        wanted = [(n, p) for n, p in found.model.named_parameters() if n in gathering.free]
        generator = torch.Generator().manual_seed(found.seed)
        output_rows = 0
        if found.metric == "loss":
            gathering.look(found.model, self.batches[0], wanted)
        probes, total = 1, len(self.batches)
        done = 0
        while done < total:
            found.progress("statistics", done, total)
            batch = self.batches[done % len(self.batches)]
            done += 1
            given = found.model, batch, wanted, partial(rows_of, found.counted, batch)
            if found.metric == "loss":
                assert self.loss is not None
                probe = probing(self.loss, batch, found.model, generator)
                output_rows += gathering.add_gradients(*given, probe)
                if done == len(self.batches):
                    probes = probes_for(output_rows, self.most_probes)
                    total *= probes
            else:
                gathering.add_inputs(*given)
            give_back()
        found.progress("statistics", total, total)
        return gathering.observed(output_rows, probes, len(self.batches))
