"""``torch.compile(model, backend="tensorize")``."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from tensorize.backend.lower import lower_graph
from tensorize.backend.options import read_options
from tensorize.backend.preview import preview_graph
from tensorize.base.dynamo import kinds_of_modules, parameters_in
from tensorize.weight.low_rank import LowRankLinear

log = logging.getLogger("tensorize")


def tensorize(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **ignored: Any,
) -> Callable[..., Any]:
    """The backend: called by dynamo for every graph; the entry point ``torch_dynamo_backends``."""
    chosen = read_options(options)
    parameters = parameters_in(graph, example_inputs)
    if (chosen.budget is None and chosen.ranks is None) or _is_rewritten(graph):
        if chosen.budget is not None:
            log.warning("the model is compressed already: the backend's budget is not used")
        return lower_graph(graph, example_inputs, parameters, chosen)
    return preview_graph(graph, example_inputs, parameters, chosen)


def _is_rewritten(graph: fx.GraphModule) -> bool:
    """Whether the graph comes from modules that ``tensorize.compile`` rewrote."""
    return any(
        kind is LowRankLinear or getattr(kind, "_factored_parameters", ())
        for kind in kinds_of_modules(graph)
    )
