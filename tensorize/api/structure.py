"""``tensorize.restructure`` and ``load_dense``: a compressed model without its data, or others.

A plan says all of the structure; values come from a state dict of the compressed model, or from
one of a dense model, which is factorized on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.api.apply import apply
from tensorize.api.look import densify
from tensorize.api.outcome import report_of
from tensorize.base.errors import AnalysisError, CheckpointError
from tensorize.base.tensors import parameter_of, unwrapped
from tensorize.capture.inputs import check_model
from tensorize.ir.plan import Plan, RankPlan
from tensorize.ir.sites import Site
from tensorize.passes.rewrite.copies import copy_sharing
from tensorize.passes.rewrite.factorize import put_cores
from tensorize.passes.stages import Rewritten
from tensorize.reports.attach import attach, report, samples_of
from tensorize.reports.report import Report
from tensorize.store import transformers_config
from tensorize.store.fingerprint import fingerprint
from tensorize.weight.install import blank, factored, followed, resize
from tensorize.weight.whole_model import settle


def restructure(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """The compressed structure of a plan, without data: what ``load_state_dict`` then fills.

    For checkpoints that other tools write of a compressed model, such as Lightning's, whose modules
    build their structure in ``__init__``. Factors are zero until they are loaded.

    Args:
        model: the dense architecture that the plan is of, with any values, or on the meta device;
            it is left as it was (``inplace=True``: it is rewritten itself).
        plan: from ``Analysis.plan``, ``report(small).plan`` or ``Plan.from_json``.

    Returns:
        A model whose state dict has the names and shapes of that of the compressed model.

    Raises:
        AnalysisError: the model has no such weight, or it has another shape.
        CaptureError: ``model`` is no module.

    A function between two factors (``initialize(nonlinearity=...)``) is in no plan: ``load`` knows
    it.

    Examples:
        >>> empty = tensorize.restructure(dense, tensorize.report(small).plan)
        >>> empty.load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    model = check_model(model, on_meta=True, inplace=inplace)
    if not isinstance(plan, Plan):
        raise AnalysisError(
            f"plan is a {type(plan).__name__}, not a Plan",
            way_out="tensorize.restructure(model, tensorize.report(small).plan)",
        )
    names = _names(model)
    choices = [choice for choice in plan.sites if choice.spec is not None]
    sites = {choice.name: _site(choice, names) for choice in choices}
    target = model if inplace else copy_sharing(model, set(sites))
    with followed(target):
        for choice in choices:
            dense = parameter_of(target, choice.name)
            assert choice.spec is not None
            cores = [core.clone() for core in blank(choice.spec, dense.device, dense.dtype)]
            put_cores(target, sites[choice.name], choice, cores)
    settle(target)
    attach(target, _report(target, plan, tuple(sites.values())))
    transformers_config.note_factors(target)
    return target


def _names(model: nn.Module) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Every parameter by each of its names, with all of these."""
    held: dict[int, list[str]] = {}
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in found.items():
        held.setdefault(id(parameter), []).append(name)
    return {name: (parameter, tuple(held[id(parameter)])) for name, parameter in found.items()}


def _site(choice: RankPlan, names: Mapping[str, tuple[Tensor, tuple[str, ...]]]) -> Site:
    """Where the factors of a weight go."""
    parameter, aliases = names.get(choice.name, (None, ()))
    shape = None if parameter is None else tuple(parameter.shape)
    if parameter is None or shape != choice.shape:
        what = "no such weight" if shape is None else f"a weight of shape {shape}"
        raise AnalysisError(
            f"the plan is of a weight of shape {choice.shape}, and the model has {what}",
            site=choice.name,
            way_out="pass the dense architecture that the plan was made for",
        )
    others = tuple(name for name in aliases if name != choice.name)
    dtype = str(parameter.dtype).removeprefix("torch.")
    return Site(choice.name, choice.shape, dtype, (), others)


def _report(model: nn.Module, plan: Plan, sites: tuple[Site, ...]) -> Report:
    done = Rewritten(
        sites=sites, sizes={}, spectra={}, predictor=None, plan=plan.alone, model=model, errors={}
    )
    notes = ("the structure of a plan: errors were not measured on what was loaded into it",)
    return replace(report_of(done, notes=notes), weights=())


def load_dense(
    model: nn.Module, state: Mapping[str, Tensor], *, example_inputs: Any = None
) -> nn.Module:
    """Load dense weights into a compressed model: they are factorized on the way, by its plan.

    Weights are judged by themselves (as by ``metric="frobenius"``): for the smallest loss compile
    the dense model. All else that ``state`` holds is loaded as it is.

    Args:
        model: compressed, or made by ``restructure``; it is filled, and keeps its formats and
            ranks.
        state: the state dict of a dense model of the same architecture.
        example_inputs: as in ``compile``, where the model was compiled with them.

    Returns:
        The same model.

    Raises:
        CheckpointError: ``state`` is no state dict of the dense architecture.
        TensorizeError: the model is not compressed.

    Examples:
        >>> other = tensorize.load_dense(copy.deepcopy(small), dense.state_dict())
        >>> other(*inputs).shape
        torch.Size([8, 32])
    """
    model = check_model(model)
    found = report(model)
    dense = densify(model)
    try:
        dense.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"these are not the dense model's weights: {error}",
            way_out="pass dense.state_dict(); what a compressed model holds goes into "
            "model.load_state_dict",
        ) from error
    plan = replace(
        found.plan.alone,
        metric="frobenius",
        refine=None,
        own_loss=False,
        cache=None,
        fingerprint=fingerprint(dense.named_parameters()),
    )
    made = apply(dense, plan, example_inputs=example_inputs, inplace=True, progress=False)
    inner, now = unwrapped(model), dict(factored(made))
    for name, weight in list(factored(inner)):
        if weight.spec != now[name].spec:  # by its order, which may keep fewer columns together
            resize(inner, name, now[name].spec, [*weight.cores, *now[name].indices])
    with torch.no_grad():
        inner.load_state_dict(made.state_dict())
    attach(model, _of_others(report(made), model))
    return model


def _of_others(made: Report, model: nn.Module) -> Report:
    """What was measured, and no prediction: that was of the weights that the plan was made for."""
    error = max((site.actual_error for site in made.sites), default=0.0)
    predicted = replace(made.plan.predicted, loss=None, loss_interval=None, output_error=error)
    plan = replace(made.plan, predicted=predicted)
    notes = (*made.notes, "the dense weights were loaded into the structure of an earlier plan")
    return replace(made, plan=plan, notes=notes, weights=samples_of(model))
