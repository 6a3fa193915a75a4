"""What compression costs and what it gains, measured beside the dense model.

    print(tensorize.evaluate({"10 %": small, "50 %": large}, dense, batches, tokenizer=tokenizer))

One table, ``to_dict()`` as JSON, and ``to_html(path)`` as one page.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.api import analyze
from tensorize.api.apply import apply
from tensorize.base import printer
from tensorize.base.errors import CaptureError, TensorizeError, check_one_of
from tensorize.base.progress import Progress, shown
from tensorize.capture.batches import ToInputs, calibration_batches
from tensorize.capture.forward import untouched
from tensorize.capture.inputs import check_model, takes
from tensorize.capture.kept import watching
from tensorize.capture.synthetic import is_causal, only_ids
from tensorize.evaluation.choices import (
    Answer,
    Question,
    choice_figures,
    chosen,
    encoded,
    logits_of,
    questions_of,
)
from tensorize.evaluation.evaluation import Evaluation
from tensorize.evaluation.meter import Meter, Sample, continued, size_in_bytes
from tensorize.evaluation.quality import CLASSES, OUTPUTS, TEXT, ChoiceFigures, TaskFigures
from tensorize.evaluation.results import Figures, Spectrum, WeightFigures
from tensorize.evaluation.speed import first_sample, joules, times
from tensorize.formats.dense import is_dense
from tensorize.ir.budget import Budget
from tensorize.ir.sites import Batch
from tensorize.passes.observe.hidden import shifts_labels
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import call, outputs_of, row_name
from tensorize.passes.observe.text import next_tokens, shifted
from tensorize.reports.attach import known_report
from tensorize.weight.whole_model import numbers

QUANTIZATIONS = ("int8", "int4")


PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 24, 32
# Singular values of a weight are computed where all of them together take so many FLOPs at most;
# so many of a weight are kept.
_SPECTRA_FLOPS, _SPECTRUM_POINTS = 2e11, 48


Models = (
    nn.Module
    | float
    | Budget
    | Mapping[str, nn.Module | float | Budget]
    | Sequence[nn.Module | float | Budget]
)
Task = Callable[[Any], Any]
"""Of a model, a number."""


def evaluate(
    model: Models,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    tokenizer: Any = None,
    to_inputs: ToInputs | None = None,
    labels: Iterable[Tensor] | None = None,
    calibration: Iterable[Any] | str | None = None,
    quantize: str | Sequence[str] = (),
    prompts: Sequence[str] | None = None,
    questions: Sequence[Mapping[str, Any]] = (),
    tasks: Mapping[str, Task] | None = None,
    time: bool = True,
    progress: Progress | bool | None = None,
) -> Evaluation:
    """Measure models beside the dense one: quality, agreement, size and speed.

    Every model sees the same batches, in evaluation mode, and is left as it was. Masked positions
    count in nothing.

    Args:
        model: a compressed model, several of them, or name → model. A budget in a model's place
            (as in ``compile``) is compressed to with ``calibration``; all of them share one
            analysis.
        dense: the model that they were made from.
        batches: what the models' forward takes, or strings with ``tokenizer=``. Where they hold
            ``labels``, those are what is predicted; else a decoder predicts the next token.
        to_inputs: makes what forward takes of a batch, where that is not what it is.
        tokenizer: with ``encode`` and ``decode``: decoders then write text, side by side.
        labels: those of the batches, one tensor each, where forward does not take them.
        quantize: ``"int8"``, ``"int4"`` or both: one more row for every model, and for the dense
            one, with its linear layers quantized by torchao.
        prompts: what to write on from; None: the beginnings of the first samples.
        questions: multiple choice, dicts with ``question``, ``choices`` (texts) and ``answer`` (the
            right one's number from 0), for decoders with a tokenizer.
        tasks: name, with its unit → a function of a model that gives a number: a roll-out's error,
            a relaxation's energy.
        time: measure latency and throughput, the models in turns.
        progress: None: a bar on a terminal; True, False, or a function (stage, done, total).

    Raises:
        CaptureError: the batches do not fit a model's forward, the labels the batches, or the
            questions a model; or a task gives no number.
        TensorizeError: torchao is not installed.

    Examples:
        >>> found = tensorize.evaluate(small, dense, batches, time=False)
        >>> found.models[0].parameters < found.dense.parameters
        True
        >>> def largest(model):
        ...     return model(batches[0]).abs().max()
        >>> tasks = {"largest": largest}
        >>> found = tensorize.evaluate(small, dense, batches, tasks=tasks, time=False)
        >>> found.dense.tasks[0].name
        'largest'
    """
    dense = check_model(dense)
    given = calibration_batches(batches, dense, tokenizer, "batches", to_inputs)
    samples, kind, row, causal = _samples(given, dense, labels)
    asked = questions_of(questions)
    if asked and not (causal and hasattr(tokenizer, "encode")):
        raise CaptureError(
            "questions= asks a decoder, and needs its tokenizer",
            way_out="pass tokenizer= and batches of its token ids, or leave questions= out",
        )
    answers_of_all = encoded(asked, tokenizer, _longest(dense, samples))
    ways = (quantize,) if isinstance(quantize, str) else tuple(quantize)
    for way in ways:
        _check_quantization(way)
    with shown(progress) as tell:
        models = _models(model, dense, calibration, tokenizer, tell)
        rows = plain = {"dense": dense, **models}
        for way in ways:
            rows = rows | {f"{name}, {way}": _quantized(each, way) for name, each in plain.items()}
        names = getattr(getattr(dense, "config", None), "id2label", None) or {}
        loss = PreservedLoss.fit(dense, [sample.batch for sample in samples], None)
        if loss.readings and kind == OUTPUTS:  # rows of chances, whatever they are called
            kind = CLASSES
        meters = {name: Meter(kind, loss, names) for name in rows}
        _measure(rows, samples, meters, tell)
        decode = getattr(tokenizer, "decode", None)
        qualities = {name: meter.quality(decode) for name, meter in meters.items()}
        counted = meters["dense"].rows
        costs = _costs(rows, samples) if time else [{} for _ in rows]
        starts = _prompts(prompts, samples, tokenizer) if causal else []
        written = _written(rows, starts, samples, tokenizer, tell)
        answers = _answered(rows, asked, answers_of_all, samples, tell)
        done = _done(rows, tasks or {}, tell)
        figures = [
            Figures(
                name=name,
                parameters=numbers(each),
                bytes=size_in_bytes(each),
                quality=qualities[name],
                **costs[k],
                written=tuple(written[name]),
                weights=_weights(each),
                choices=answers.get(name),
                tasks=done[name],
            )
            for k, (name, each) in enumerate(rows.items())
        ]
        shown_prompts = tuple(tokenizer.decode(ids[0].tolist()) for ids in starts)
        return Evaluation(
            kind, loss.unit, counted, figures[0], tuple(figures[1:]), shown_prompts,
            _spectra(dense, figures, tell), row,
        )  # fmt: skip


def _models(
    model: Models,
    dense: nn.Module,
    calibration: Iterable[Any] | str | None,
    tokenizer: Any,
    tell: Progress,
) -> dict[str, nn.Module]:
    """The models by name; budgets are compressed to."""
    if isinstance(model, Mapping):
        items = list(model.items())
    else:
        several = list(model) if isinstance(model, Sequence) else [model]
        items = [("" if isinstance(each, nn.Module) else _name_of(each), each) for each in several]
    if not items:
        raise CaptureError("there is no model to evaluate", way_out="pass a model, or budgets")
    analysis = None
    found: dict[str, nn.Module] = {}
    for name, each in items:
        if not isinstance(each, nn.Module):
            if analysis is None:
                data = calibration
                if not isinstance(data, str):
                    data = calibration_batches(data, dense, tokenizer) or None
                analysis = analyze.analyze(dense, calibration=data, progress=tell)
            each = apply(dense, analysis.plan(each), progress=tell)
        name = name or f"{printer.percent(_kept(each, dense))} kept"
        while name in found or name == "dense":
            name += " again"
        found[name] = each
    return found


def _name_of(budget: Any) -> str:
    return f"{printer.percent(budget)} kept" if isinstance(budget, float) else str(budget)


def _kept(model: nn.Module, dense: nn.Module) -> float:
    counts = [numbers(each) for each in (model, dense)]
    return counts[0] / max(counts[1], 1)


@torch.no_grad()
def _measure(
    rows: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    meters: Mapping[str, Meter],
    tell: Progress,
) -> None:
    """All models on all batches; the dense model's outputs are kept for one batch at a time."""
    dense, total, done = rows["dense"], len(samples) * len(rows), 0
    for sample in samples:
        wanted = None
        for name, model in rows.items():
            tell("evaluating", done, total)
            with untouched(model):
                result = call(model, sample.batch)
            wanted = result if wanted is None else wanted
            meters[name].add(wanted, result, sample, dense)
            done += 1
    tell("evaluating", total, total)


# ------------------------------------------------------------------------------ samples and labels


def _samples(
    given: Sequence[Batch], dense: nn.Module, labels: Iterable[Tensor] | None
) -> tuple[list[Sample], str, str, bool]:
    """The batches with their targets, the kind of outputs, what a row of them is, and whether the
    model is a decoder."""
    beside = None if labels is None else list(labels)
    if beside is not None and len(beside) != len(given):
        raise CaptureError(
            f"there are {len(given)} batches and {len(beside)} labels",
            way_out="labels= holds one tensor for each batch",
        )
    accepted = takes(dense, "labels")
    samples, kind, row, causal = [], OUTPUTS, "row", False
    for batch in given:
        own = batch.kwargs.get("labels")
        if own is not None and not accepted:
            kwargs = {k: v for k, v in batch.kwargs.items() if k != "labels"}
            batch = replace(batch, kwargs=kwargs, given=kwargs or batch.args)
        if beside is not None:
            own = beside[batch.number]
        ids = only_ids(batch)
        if not samples:
            with untouched(dense):
                result = call(dense, batch)
                output, row = outputs_of(result, batch, dense)[0], row_name(result, batch, dense)
                if output.logits and ids is not None and output.shape[:-1] == ids.shape:
                    causal = is_causal(dense, batch, ids)
            kind = _kind(output.shape, output.logits, own, dense)
        samples.append(_sample(batch, own, ids, causal, dense))
    return samples, kind, row, causal


def _kind(shape: tuple[int, ...], logits: bool, labels: Any, dense: nn.Module) -> str:
    one_a_sample = len(shape) == 2 or getattr(dense, "loss_type", None) == "ForTokenClassification"
    labelled = isinstance(labels, Tensor) and not labels.is_floating_point()
    if one_a_sample and (labelled or logits):
        return CLASSES
    return TEXT if logits else OUTPUTS


def _sample(
    batch: Batch, labels: Any, ids: Tensor | None, causal: bool, dense: nn.Module
) -> Sample:
    targets, counted = None, batch
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        targets = labels
        counted = replace(batch, kwargs={**batch.kwargs, "labels": labels})
        if shifts_labels(dense):
            targets = shifted(labels)
    elif causal and ids is not None:
        targets = next_tokens(batch, ids)
    return Sample(batch, counted, targets, ids)


# ------------------------------------------------------------------------------------ quantization


def _check_quantization(way: str) -> None:
    check_one_of("quantize", way, QUANTIZATIONS)
    try:
        importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise TensorizeError(
            f"quantize={way!r} needs torchao, which is not installed",
            way_out="pip install torchao, or leave quantize= out",
        ) from error


def _quantized(model: nn.Module, way: str) -> nn.Module:
    """A copy with the weights of its linear layers, those of cores among them, quantized."""
    quantization = importlib.import_module("torchao.quantization")
    if way == "int8":
        config = quantization.Int8WeightOnlyConfig()
    else:
        config = quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, way))
    result = copy.deepcopy(model)
    try:
        quantization.quantize_(result, config)
    except Exception as error:  # torchao raises whatever its layouts do
        raise TensorizeError(
            f"torchao cannot quantize the model to {way}: {type(error).__name__}: {error}",
            way_out="quantize it yourself, and pass it as one of the models",
        ) from error
    return result


# --------------------------------------------------------------------------- times, text, pictures


def _costs(
    rows: Mapping[str, nn.Module], samples: Sequence[Sample]
) -> list[dict[str, float | None]]:
    """Seconds of one sample, rows a second of the first batch, and joules of one of these rows, for
    every model."""
    models, batch = list(rows.values()), samples[0].batch
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(untouched(model))
        results = [call(model, batch) for model in models]  # what they write is seen by that
        output = outputs_of(results[0], batch, models[0])[0]
        single = times(models, first_sample(batch))
        whole = times(models, batch)
        count, used = len(output.rows), joules(models, batch)
    return [
        {
            "latency": latency,
            "throughput": count / max(seconds, 1e-9),
            "joules": None if energy is None else energy / count,
        }
        for latency, seconds, energy in zip(single, whole, used, strict=True)
    ]


def _prompts(
    given: Sequence[str] | None, samples: Sequence[Sample], tokenizer: Any
) -> list[Tensor]:
    """Ids (1, T) to write on from, where there is a tokenizer that reads and writes them."""
    if not hasattr(tokenizer, "decode") or not hasattr(tokenizer, "encode"):
        return []
    device = samples[0].ids.device if samples[0].ids is not None else None
    if given is not None:
        encoded = [tokenizer.encode(text) for text in given]
        found = [getattr(ids, "ids", ids) for ids in encoded]
        if not all(found):
            raise CaptureError(
                f"prompts[{[bool(ids) for ids in found].index(False)}] has no token",
                way_out="give texts to write on from, or prompts=None",
            )
        return [torch.tensor([ids], device=device) for ids in found]
    starts: list[Tensor] = []
    for sample in samples:
        assert sample.ids is not None
        mask = sample.batch.argument("attention_mask")
        for k, ids in enumerate(sample.ids):
            seen = ids if mask is None or mask.shape != sample.ids.shape else ids[mask[k] != 0]
            if len(starts) < PROMPTS and len(seen) > 1:
                starts.append(seen[None, :_PROMPT_TOKENS])
    return starts


@torch.no_grad()
def _written(
    rows: Mapping[str, nn.Module],
    starts: Sequence[Tensor],
    samples: Sequence[Sample],
    tokenizer: Any,
    tell: Progress,
) -> dict[str, list[str]]:
    """What every model writes on from every start, by name."""
    found: dict[str, list[str]] = {name: [] for name in rows}
    for done, (name, model) in enumerate(rows.items()):
        if not starts:
            break
        tell("writing", done, len(rows))
        assert samples[0].ids is not None
        longest = samples[0].ids.shape[1]
        with untouched(model), watching():
            for ids in starts:
                tokens = continued(model, ids, _NEW_TOKENS, longest)
                found[name].append(tokenizer.decode(tokens))
        tell("writing", done + 1, len(rows))
    return found


def _longest(dense: nn.Module, samples: Sequence[Sample]) -> int:
    """How many tokens the model surely takes at once."""
    limit = getattr(getattr(dense, "config", None), "max_position_embeddings", None)
    ids = samples[0].ids
    return limit or (1 if ids is None else ids.shape[1])


@torch.no_grad()
def _answered(
    rows: Mapping[str, nn.Module],
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    samples: Sequence[Sample],
    tell: Progress,
) -> dict[str, ChoiceFigures]:
    """How every model answers the questions, by name."""
    if not questions:
        return {}
    ids = samples[0].ids
    assert ids is not None
    found: dict[str, tuple[list[int], list[int]]] = {}
    for done, (name, model) in enumerate(rows.items()):
        tell("asking", done, len(rows))
        with untouched(model), watching():
            found[name] = chosen(logits_of(model, ids.device), answers)
    tell("asking", len(rows), len(rows))
    dense, _ = found["dense"]
    return {name: choice_figures(questions, each, dense) for name, each in found.items()}


def _done(
    rows: Mapping[str, nn.Module], tasks: Mapping[str, Task], tell: Progress
) -> dict[str, tuple[TaskFigures, ...]]:
    """What the tasks give for every model, by name, in evaluation mode and with gradients."""
    found: dict[str, tuple[TaskFigures, ...]] = {}
    total = len(rows) * len(tasks)
    for name, model in rows.items():
        figures = []
        for task, function in tasks.items():
            tell("tasks", len(found) * len(tasks) + len(figures), total)
            with untouched(model), torch.enable_grad():
                figures.append(TaskFigures(task, _number(task, function(model))))
        found[name] = tuple(figures)
    tell("tasks", total, total)
    return found


def _number(task: str, value: Any) -> float:
    single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not single and (isinstance(value, bool) or not isinstance(value, int | float)):
        tensor = isinstance(value, Tensor)
        kind = f"a tensor of shape {tuple(value.shape)}" if tensor else repr(value)
        raise CaptureError(
            f"tasks[{task!r}] gives no number but {kind}",
            way_out="a task is a function of a model that returns one number",
        )
    return float(value.detach() if isinstance(value, Tensor) else value)


def _weights(model: nn.Module) -> tuple[WeightFigures, ...]:
    report = known_report(model)
    if report is None:
        return ()
    return tuple(
        WeightFigures(s.name, s.format, s.ranks, s.share, s.precision) for s in report.sites
    )


def _spectra(dense: nn.Module, figures: Sequence[Figures], tell: Progress) -> tuple[Spectrum, ...]:
    """Singular values of the dense weights that some model has as factors."""
    names = dict.fromkeys(w.name for f in figures for w in f.weights if not is_dense(w.format))
    parameters = dict(dense.named_parameters())
    matrices = {n: parameters[n] for n in names if n in parameters and parameters[n].dim() == 2}
    found, spent = [], 0.0
    for done, (name, matrix) in enumerate(matrices.items()):
        m, n = matrix.shape
        spent += 4.0 * m * n * min(m, n)
        if spent > _SPECTRA_FLOPS:
            break
        tell("spectra", done, len(matrices))
        values = torch.linalg.svdvals(matrix.detach().float())
        places = torch.logspace(0, math.log10(len(values)), _SPECTRUM_POINTS).round().long()
        relative = (values / values[0].clamp_min(1e-30)).tolist()
        chosen = sorted({min(int(k), len(values)) for k in places})
        found.append(Spectrum(name, (m, n), tuple((k, relative[k - 1]) for k in chosen)))
    tell("spectra", len(matrices), len(matrices))
    return tuple(found)
