"""A compressed model to train from scratch, out of a dense definition."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.api.analyze import check_dense
from tensorize.api.outcome import report_of
from tensorize.api.wiring import figures
from tensorize.base.errors import AnalysisError, BudgetError, CaptureError, check_one_of
from tensorize.base.progress import Progress, shown
from tensorize.capture.forward import in_usual_modes
from tensorize.capture.inputs import check_model, find_inputs, notes_on_wrapper
from tensorize.hub import zeros
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan
from tensorize.ir.sites import Batch
from tensorize.ir.spec import NONLINEARITIES
from tensorize.passes.allocate.allocate import BATCH_SIZES, Allocate, RanksOption
from tensorize.passes.curves.prior import AssumeSpectra, TrainingFormats, exact_ranks
from tensorize.passes.observe.select import Select
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.pipeline import run_passes
from tensorize.passes.rewrite.copies import copy_sharing
from tensorize.passes.rewrite.fresh_cores import METHODS, SCALED, InitializeCores
from tensorize.passes.rewrite.fresh_dense import Initializer, is_on_meta
from tensorize.passes.stages import Analysed, Found, Given, Learned, Planned, Rewritten
from tensorize.reports.attach import attach
from tensorize.store import transformers_config
from tensorize.training.blueprint import keep_blueprint

_METRIC = "shape"


@in_usual_modes("initialize")
def initialize(
    model: nn.Module,
    budget: float | Budget | None = 0.25,
    *,
    example_inputs: Any = None,
    include: Select = None,
    exclude: Select = None,
    formats: TrainingFormats = None,
    ranks: RanksOption = None,
    method: str = SCALED,
    nonlinearity: str | None = None,
    pivoted: bool = False,
    rank_multiple: int = 8,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    initializer: Initializer | None = None,
    device: torch.device | str = "cpu",
    inplace: bool = False,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """The same model, smaller and not trained yet: cores in place of its fresh dense weights.

    Nothing is known of weights before they are trained, so formats and ranks follow from shapes and
    cost: every weight keeps the same share, tables that are looked up a larger one
    (``passes/curves/prior.py``). Outputs and gradients have the scale that they have in the dense
    model; ``training.parameter_groups`` gives the learning rates that go with it.

    Args:
        model: freshly initialised, or on the meta device: then its values are made here, module by
            module, by Hugging Face's ``_init_weights``, by ``reset_parameters`` or by
            ``initializer``, and no more than one module's dense weights exist at a time. A model
            that sets its values in a method of another name is to be built on a real device.
        budget: as in ``compile``: the share of the parameters to keep, or a ``Budget`` (not of
            errors or losses, of which nothing is known); ``None`` where ``ranks`` says it all.
        example_inputs: as in ``compile``.
        include, exclude: as in ``compile``.
        formats: as in ``compile``, by default low rank; or a ``TTSpec`` (for all weights, or
            pattern → spec): this very factorization. ``"tt"`` means two cores, ``"block"`` up to
            8 x 8 blocks.
        ranks: pattern → rank; overrides the allocation.
        method: ``"scaled"``: independent cores; ``"spectral"``: the best approximation of the
            fresh dense weight, scaled to its norm (Khodak et al. 2021).
        nonlinearity: ``"silu"``, ``"gelu"``, ``"relu"`` or ``"tanh"`` between the two factors of
            every plain linear (CoLA, Liu et al. 2025). Such a layer stands for no matrix:
            ``densify`` refuses it.
        pivoted: weights store no number that a change of basis can remove
            (``weight.pivoted``), but at tiny ranks: the same budget buys larger ones.
        rank_multiple: ranks above it are its multiples, as matrix units want.
        batch_sizes: input rows at which FLOPs and times are counted; the worst counts.
        initializer: a function of a module that makes the values of its own parameters.
        device: where values are made that are on meta. ``"meta"`` itself: the result stays there,
            for ``distributed.parallelize`` and ``training.fill``, which makes the very same values
            later, each rank its part.
        inplace: rewrite the model itself.
        seed: of all values made here; the random state is left as it was.

    Raises:
        BudgetError: the budget is malformed or not feasible (it names the nearest that is).
        CaptureError: the model or its inputs cannot be used, or nothing makes a module's values.
        AnalysisError: an option does not fit the model's weights.

    Examples:
        >>> fresh = tensorize.initialize(dense, 0.5, example_inputs=inputs)
        >>> fresh(*inputs).shape
        torch.Size([8, 32])
    """
    check_one_of("method", method, METHODS)
    check_one_of("nonlinearity", nonlinearity, (None, *NONLINEARITIES))
    limits = None if budget is None else Budget.of(budget)
    if limits is not None and (limits.error is not None or limits.loss is not None):
        raise BudgetError(
            "errors and losses are those of trained weights, and these are not trained yet",
            way_out="limit params, bytes, flops or latency",
        )
    if limits is None and ranks is None and not _names_specs(formats):
        raise BudgetError("budget=None needs ranks=", way_out="give a budget such as 0.25")
    how = {"batch_sizes": batch_sizes, "rank_multiple": rank_multiple}
    allocate = Allocate(limits, **how, even=True, pivots=pivoted, always=pivoted)
    given, model = model, check_model(model, on_meta=True, inplace=inplace)
    check_dense(model, "initialize")
    with shown(progress) as tell:
        found = _found(model, example_inputs, include, exclude, seed, tell)
        learned = run_passes(found, (AssumeSpectra(formats, pivoted),), Learned)
        asked = {**(ranks or {}), **exact_ranks(learned.spectra)}
        allocate = replace(allocate, ranks=asked or None)
        planned = run_passes(learned.to(Analysed, predictor=None), (allocate,), Planned)
        planned = replace(planned, plan=_of_shapes(planned.plan))
        _check_nonlinearity(planned.plan, nonlinearity)
        replaced = {site.name for site in planned.plan.sites if site.spec is not None}
        target = model if inplace else copy_sharing(model, replaced)
        cores = InitializeCores(target, method, nonlinearity, initializer, str(device))
        if is_on_meta(model) and cores.device == "meta":
            keep_blueprint(target, model, planned, cores)
        done = run_passes(planned, (cores,), Rewritten)
    untrained = "not trained yet: errors are those of no weight"
    notes = (untrained, *notes_on_wrapper(given, model))
    attach(target, report_of(done, notes=notes))
    transformers_config.note_factors(target)
    return target


def _check_nonlinearity(plan: Plan, nonlinearity: str | None) -> None:
    odd = (site for site in plan.sites if site.spec is not None and site.spec.pivoted)
    if nonlinearity is not None and (first := next(odd, None)) is not None:
        raise AnalysisError(
            f"with a {nonlinearity} between its factors no change of basis can remove anything",
            site=first.name,
            way_out="nonlinearity=None, or pivoted=False",
        )


def _names_specs(formats: TrainingFormats) -> bool:
    several = formats.values() if isinstance(formats, Mapping) else (formats,)
    return any(not isinstance(f, str | tuple | list | None) for f in several)


def _found(
    model: nn.Module, inputs: Any, include: Select, exclude: Select, seed: int, tell: Progress
) -> Found:
    """The model's sites: seen in a run, on meta where the model is and that can be, or with weights
    of zero that take no memory; or read by type."""
    find = FindSites(include, exclude)

    def found(running: nn.Module, batch: Batch | None, note: str) -> Found:
        given = Given(
            model=running,
            inputs=batch,
            metric=_METRIC,
            seed=seed,
            machine=figures(model),
            notes=(note,),
            progress=tell,
        )
        return replace(run_passes(given, (find,), Found), model=model)

    batch, source = find_inputs(model, inputs, ())
    note = f"uses of the weights were seen with {source}"
    if not is_on_meta(model):
        return found(model, batch, note)
    if batch is not None:
        try:
            return found(model, _on_meta(batch), note)
        except CaptureError as error:
            note = f"it does not run on the meta device, so modules are read by their type: {error}"
    if zeros.CAN_BE_WITHOUT_MEMORY:
        running = zeros.without_memory(model)
        batch, source = find_inputs(running, inputs, ())
        if batch is not None:
            with contextlib.suppress(CaptureError):
                return found(running, batch, f"uses of the weights were seen with {source}")
    return found(model, None, note)


def _on_meta(batch: Batch) -> Batch:
    def moved(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(moved, (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs, batch.given)


def _of_shapes(plan: Plan) -> Plan:
    """Without the figures that an assumed curve puts where a trained weight's errors stand."""
    sites = tuple(replace(s, predicted_error=0.0, predicted_loss=0.0) for s in plan.sites)
    return replace(plan, sites=sites, predicted=replace(plan.predicted, output_error=0.0), gap=0.0)
