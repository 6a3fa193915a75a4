"""Trace a model to a graph, and mark the weights in it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from tensorize.base.errors import CaptureError
from tensorize.capture.forward import untouched
from tensorize.ir.sites import Batch


def export_graph(model: nn.Module, batch: Batch) -> fx.GraphModule:
    """The aten-level graph of one forward pass, by ``torch.export``.

    Non-strict first; strict, through dynamo, where a model takes another way when it is compiled.

    Raises:
        CaptureError: the model cannot be exported with these inputs.
    """
    kwargs = dict(batch.kwargs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False  # a key-value cache is no tensor that a graph can return
    failures: list[Exception] = []
    for strict in (False, True):
        try:
            with untouched(model), _silent("torch._subclasses", "torch._dynamo", "torch.export"):
                program = torch.export.export(model, batch.args, kwargs, strict=strict)
            break
        except Exception as error:  # export raises errors of many kinds
            failures.append(error)
    else:
        first = failures[0]
        raise CaptureError(
            f"torch.export cannot trace the model: {type(first).__name__}: {first}",
            way_out="graphs() needs a model that torch.export accepts; everything else works",
        ) from first
    graph, signature = program.graph_module, program.graph_signature
    graph.meta["tensorize_names"] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
    }
    return graph


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Keep loggers and warnings quiet about an attempt whose failure is handled."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_VIEWS = ("aten.t.", "aten.permute.", "aten.transpose.", "aten.view.", "aten.detach.", "aten.to.")


def mark_sites(
    graph: fx.GraphModule, parameters: Mapping[str, tuple[str, str, tuple[int, ...], str | None]]
) -> None:
    """Note in ``graph.meta["tensorize_sites"]`` which nodes compute with which site.

    ``parameters``: qualified name of a graph's parameter → (site, format, ranks, precision).
    """
    names: Mapping[str, str] = graph.meta.get("tensorize_names", {})
    marks: dict[str, tuple[str, str, tuple[int, ...], str | None]] = {}
    for node in graph.graph.nodes:
        site = parameters.get(names.get(node.name, ""))
        if node.op != "placeholder" or site is None:
            continue
        waiting = list(node.users)
        while waiting:
            user = waiting.pop()
            if str(user.target).startswith(_VIEWS):
                waiting.extend(user.users)
            else:
                marks[user.name] = site
    graph.meta["tensorize_sites"] = marks
