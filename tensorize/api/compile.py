"""``tensorize.compile``: analyse, plan and apply in one call."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tensorize.api.analysis import planned
from tensorize.api.analyze import analyzed
from tensorize.api.apply import applied, apply_plan
from tensorize.api.options import Options
from tensorize.base import printer
from tensorize.base.progress import Progress, log, shown
from tensorize.base.tensors import unwrapped
from tensorize.capture.batches import ToInputs
from tensorize.capture.forward import in_usual_modes
from tensorize.hub.gathered import is_gathered
from tensorize.ir.budget import Budget
from tensorize.passes.allocate.allocate import RanksOption
from tensorize.passes.curves.formats import FormatsOption
from tensorize.passes.curves.precisions import PrecisionOption
from tensorize.passes.observe.loss import LossOption
from tensorize.passes.observe.select import Select
from tensorize.passes.predict.metrics import MetricFunction
from tensorize.reports.attach import report
from tensorize.reports.verdict import Verdict
from tensorize.running.in_use import use_kernels


def compile(
    model: nn.Module,
    budget: float | str | Budget | None = 0.1,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | str | None = None,
    tokenizer: Any = None,
    to_inputs: ToInputs | None = None,
    loss_fn: LossOption = None,
    metrics: Mapping[str, MetricFunction] | None = None,
    metric: str | None = None,
    refine: str | None = "auto",
    include: Select = None,
    exclude: Select = None,
    formats: FormatsOption = None,
    precision: PrecisionOption = None,
    activations: str | None = None,
    ranks: RanksOption = None,
    backend: str = "auto",
    autotune: bool = False,
    inplace: bool = False,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    max_memory: int | str | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """The same model, smaller: matmul weights replaced by low-rank or tensor-train factors.

    It ends with the verdict, on a terminal and in the log: what is kept, how fast it is, what is
    predicted to be lost, and where that is too much, what to do (``report(model).verdict``).

    Args:
        model: a dense module; it is left bit for bit as it was (``inplace=True``: it is rewritten
            itself, each dense weight released as soon as its cores exist).
        budget: the share of the model's parameters to keep, in (0, 1] or as ``"50%"``, a size as
            ``"10MB"``, a ``tensorize.Budget``, or ``"auto"``: the smallest model that is predicted
            to lose .02 nats, or 1 % of the outputs' variance. None where ``ranks`` says it all.
        example_inputs: what forward takes: a tuple of positional or a dict of keyword arguments.
        calibration: an iterable of such inputs, or of strings with ``tokenizer=``: the errors are
            then weighed by what they do to the model's outputs. ``"self"``: the model makes them
            itself, a decoder by writing text. None: it makes some where that takes no more than
            about a minute, else the weights alone are judged (as by ``metric="frobenius"``). Of a
            loader of (x, y) the model gets what its forward takes, x, and a ``loss_fn`` both.
        to_inputs: makes such inputs of a batch of the data, where that is not what they are:
            ``lambda batch: batch["image"]``.
        loss_fn: ``loss_fn(outputs, batch) -> scalar`` to preserve instead of the outputs;
            ``"logits"`` or ``"squared"``: what the outputs are compared as. None: by KL divergence
            where they are called ``logits``, or hold log-probabilities or chances, else squared.
        metrics: name → ``f(outputs, batch, dense_outputs)``, a number for a batch in whatever unit:
            measured on trial plans, and predicted for every budget (``plan.predicted.metrics``).
        metric: force ``"frobenius"``, ``"input"`` or ``"loss"``.
        refine: what is done to the factors with the calibration data: None, ``"refit"`` (solved
            again, in closed form, for the inputs of the compressed model) or ``"polish"`` (gradient
            steps on the distance to the dense outputs as well); "auto" is a refit.
        include, exclude: shell patterns over parameter and module names, or a predicate on sites.
        formats: which of ``"dense"``, ``"low_rank"``, ``"shared"`` (low rank with one first factor
            for weights of one input), ``"tt"`` and ``"block"`` may be used: a name, several, or
            pattern → names. By default the first three, and trains of weights that a cheap probe
            finds to be sums of a few Kronecker products.
        precision: bits of the weights: None (their own), ``"auto"``, or those that may be used, as
            ``"int8"``, ``"int4"``, ``"int3"``, ``"int2"`` and the weights' own dtype. Bits and
            ranks are then one choice, and a budget that is a share is one of the model's bytes, as
            they are stored.
        activations: what a CPU rounds the inputs of quantized weights to, so that products are ones
            of integers: ``"int8"``, ``"int16"`` (two digits of eight bits), or ``"float"``: they
            are left, and weights are made numbers at every call, which is slow. None: eight bits,
            and twice eight where the inputs would else cost more than the weights and that is no
            slower than dense. No others than ``"float"`` with ``Budget(bytes=)`` for weights of
            fewer than eight bits, which products of integers need as eight bits in memory.
        ranks: pattern → rank or ``"full"``; overrides the allocation.
        backend: ``"aten"``: contractions run as torch operations. ``"triton"``: as kernels wherever
            a family covers them, on a GPU or, with ``TRITON_INTERPRET=1``, on the CPU. ``"auto"``:
            as kernels where they were measured to beat torch on this GPU (``tune_kernels``).
            ``"inductor"``: the model's own call is compiled, at its first use, as by
            ``torch.compile(model, backend="tensorize")``.
        autotune: time the best few contraction orders of every tensor train on this machine, and
            remember the fastest (in ``~/.cache/tensorize``). No choice rests on a timing otherwise.
        seed: of the probes; same seed, same inputs, same machine: the same bits.
        cache_dir: where analyses are kept on disk, a weight at a time: a run that was killed goes
            on after the last one. None: nowhere.
        max_memory: bytes, or text such as ``"4GB"``: the most that second moments may take at once.
            Weights are then analysed in groups, each in passes over the calibration data of its
            own, and what is learned lies on disk; the bits are the same. The model and its
            forward and backward passes are not counted.
        progress: None: a bar on a terminal; True, False, or a function (stage, done, total).

    Raises:
        BudgetError: the budget is malformed or not feasible (it names the nearest that is).
        CaptureError: the model or its inputs cannot be used.
        AnalysisError: weights or options do not allow an analysis.
        CheckpointError: ``cache_dir`` cannot be used.
        TensorizeError: ``backend`` is unknown.

    Examples:
        >>> small = tensorize.compile(dense, budget=0.5, calibration=batches)
        >>> small(*inputs).shape == dense(*inputs).shape
        True
        >>> tensorize.report(small).totals.share.parameters <= 0.5
        True
    """
    result = compiled(model, Options.of(locals()))
    tell_verdict(report(result).verdict, progress)
    return result


@in_usual_modes("compile")
def compiled(model: nn.Module, options: Options) -> nn.Module:
    """``compile`` with its options as one record."""
    options.check_choice()
    with shown(options.progress) as tell:
        analysis = analyzed(model, replace(options, progress=tell))
        model = unwrapped(model)
        # It is one of the formats that were asked for, and of those that a probe found.
        plan = planned(analysis, replace(options, formats=None))
        if not is_gathered(model):
            small = applied(model, plan, replace(options, refine="auto", progress=tell))
            return use_kernels(small, options.backend)
        return use_kernels(apply_plan(model, plan, analysis, options, tell), options.backend)


def tell_verdict(verdict: Verdict, progress: Progress | bool | None) -> None:
    """What became of a model: on a terminal in three lines, elsewhere in the log."""
    seen = progress is not False and sys.stderr.isatty()
    level = logging.WARNING if verdict.ruined and not seen else logging.INFO
    for line in map(printer.plain, verdict.lines):
        log.log(level, line)
        if seen:
            print(f"tensorize: {line}", file=sys.stderr)
