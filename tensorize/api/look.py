"""``tensorize.densify`` and ``tensorize.graphs``: look at a result."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

from tensorize.base.tensors import doubled, unwrapped
from tensorize.capture.inputs import check_model, needed
from tensorize.checking.guarding import unguard
from tensorize.graphview.export import export_graph, mark_sites
from tensorize.graphview.graphs import Graphs
from tensorize.ir.spec import DENSE
from tensorize.passes.pipeline import debug_level
from tensorize.reports.attach import detach, report
from tensorize.store import transformers_config
from tensorize.weight import install
from tensorize.weight.install import core_names, restore
from tensorize.weight.lazy import FactoredWeight


def densify(model: nn.Module) -> nn.Module:
    """A copy of a compiled model with plain dense modules, holding the reconstructed weights.

    Raises:
        TensorizeError: a weight stands for no matrix (there is a function between its factors).

    Examples:
        >>> type(tensorize.densify(small)[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    model = check_model(model)
    for name, factored in install.factored(model):
        factored.require_matrix(name)
    dense = copy.deepcopy(model)
    detach(dense)
    unguard(dense)

    def build(factored: FactoredWeight) -> nn.Parameter:
        # Rebuilt in float64, so that the one rounding is the storage dtype's own.
        cores = tuple(doubled(core.detach()) for core in factored.cores)
        values = factored.with_cores(cores).dense()
        return nn.Parameter(values.to(factored.dtype).contiguous(), factored.requires_grad)

    restore(dense, build)
    transformers_config.forget_factors(dense)
    return dense


def graphs(model: nn.Module, example_inputs: Any = None) -> Graphs:
    """The model's FX graphs before and after, at the level of aten operations.

    Args:
        example_inputs: as in ``compile``; without them, inputs are found as ``compile`` finds them.

    Raises:
        TensorizeError: the model was not made by tensorize.
        CaptureError: no inputs are known, the model does not run on ``example_inputs``, or
            ``torch.export`` cannot trace it.

    Examples:
        >>> graphs = tensorize.graphs(small, inputs)
        >>> "low rank" in graphs.diff()
        True
    """
    found, model = report(model), unwrapped(model)
    batch = needed(model, example_inputs, "graphs need inputs to trace the model with")
    sites = {name: site for site in found.sites for name in (site.name, *site.aliases)}
    before = export_graph(densify(model), batch)
    mark_sites(before, {name: (name, DENSE, (), None) for name in sites})
    marks = {name: (name, site.format, site.ranks, site.precision) for name, site in sites.items()}
    for name, _ in install.factored(model):
        marks |= dict.fromkeys(core_names(model, name), marks[name])
    after = export_graph(model, batch)
    mark_sites(after, marks)
    result = Graphs(before, after)
    if debug_level() >= 3:
        print(result.print_readable(), file=sys.stderr)
    return result
