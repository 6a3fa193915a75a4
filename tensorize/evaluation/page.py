"""An evaluation as one HTML page: gains and losses beside each other, and the pictures.

The page itself is ``templates/evaluation.html.j2``; here is what it shows, and where.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorize.base import printer
from tensorize.base.charts import Scale, budget_steps, budget_ticks, log_ends, log_ticks
from tensorize.base.html import environment
from tensorize.evaluation.evaluation import Evaluation
from tensorize.evaluation.quality import NEIGHBOURS
from tensorize.evaluation.results import Figures, Spectrum
from tensorize.formats.dense import is_dense
from tensorize.formats.registry import names
from tensorize.reports import layers

Peers = Mapping[str, Mapping[float, float]]
# The drawing areas of the two pictures, in their own units.
_CURVE = {"left": 58.0, "right": 446.0, "top": 14.0, "bottom": 334.0}
_SPECTRUM = {"left": 34.0, "right": 292.0, "top": 8.0, "bottom": 128.0}
_LEAST_SINGULAR = 1e-4
COLORS = 6
"""So many colours has the page for the curves of peers; then they begin again."""


def render(evaluation: Evaluation, peers: Peers) -> str:
    """The page, which needs no network and no other file."""
    contents = {
        "evaluation": evaluation,
        "dense": evaluation.dense,
        "models": evaluation.models,
        "groups": _groups(evaluation),
        "tables": _tables(evaluation),
        "chart": _chart(evaluation, peers),
        "maps": [m for m in (_heat_map(f) for f in evaluation.models) if m is not None],
        "spectra": _spectra(evaluation),
        "formats": _formats(evaluation),
        "share": evaluation.share,
        "nats": evaluation.unit == "nats",
    }
    pages = environment()
    pages.filters.update(flat=_without_blank_lines, cell_label=layers.label, hint=layers.hint)
    return pages.get_template("evaluation.html.j2").render(contents)


def _without_blank_lines(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines) or "(blank lines)"


# --------------------------------------------------------------------------- gains and losses


_SAME = 1.05
"""Sizes and times that differ by less are called the same."""


@dataclass(frozen=True)
class _Cell:
    """A figure of one model, how it compares with the dense one, and a bar from 0 to 1, which is
    the longer the better. ``worse``: than the dense one's, where models usually gain."""

    text: str
    beside: str = ""
    part: float | None = None
    worse: bool = False


@dataclass(frozen=True)
class _Row:
    """One figure of all models; ``hint`` says what it is, ``ends`` that what stands beside is a
    text whose end matters."""

    title: str
    hint: str
    dense: str
    cells: tuple[_Cell, ...]
    ends: bool = False


Read = Callable[[Figures], float | None]

_SHOW = {
    "bytes": printer.bytes_,
    "count": printer.count,
    "seconds": printer.seconds,
    "joules": lambda value: f"{printer.number(value)} J",
}


def _groups(evaluation: Evaluation) -> list[tuple[str, str, list[_Row]]]:
    """What is gained and what is lost: key, title, rows."""
    gains = [
        _less(evaluation, "Memory", "weights and buffers", lambda f: f.bytes, "bytes"),
        _less(evaluation, "Parameters", "each counted once", lambda f: f.parameters, "count"),
        _less(evaluation, "Latency", "one sample", lambda f: f.latency, "seconds"),
        _speed(evaluation),
        _less(evaluation, "Energy", f"a {evaluation.row}", lambda f: f.joules, "joules"),
    ]
    losses = [
        _text_loss(evaluation),
        *(_labelled(evaluation, name) for name in ("accuracy", "precision", "recall")),
        *_answers(evaluation),
        *_tasks(evaluation),
        _distance(evaluation),
        _agreement(evaluation, "Same first choice", "top-1 agreement", "top1"),
        _agreement(evaluation, "Same best five", "top-5 overlap", "top5"),
        _agreement(evaluation, "Cosine", "of embeddings", "cosine"),
        _agreement(evaluation, "Same neighbours", f"of the {NEIGHBOURS} nearest", "neighbours"),
        _worst(evaluation),
    ]
    groups = (("gain", "What you gain", gains), ("lose", "What you lose", losses))
    return [(key, title, [r for r in rows if r is not None]) for key, title, rows in groups]


def _tables(evaluation: Evaluation) -> list[tuple[str, str, str, str, list[Any]]]:
    """Precision and recall apart: id, title, words, unit, and the classes of every model."""
    every, found = (evaluation.dense, *evaluation.models), []
    said = "Precision and recall of every {} that occurs."
    if evaluation.dense.quality.classes:
        classes = [figures.quality.classes for figures in every]
        unit = f"{evaluation.row.capitalize()}s"
        found.append(("h-classes", "Classes", said.format("class"), unit, classes))
    if evaluation.dense.choices is not None:
        answers = [figures.choices.classes for figures in every if figures.choices is not None]
        found.append(("h-answers", "Answers", said.format("answer"), "Questions", answers))
    return found


def _less(evaluation: Evaluation, title: str, hint: str, read: Read, unit: str) -> _Row | None:
    """A figure that is better the smaller it is."""
    show = _SHOW[unit]
    dense = read(evaluation.dense)
    if not dense:
        return None
    how = {"seconds": "faster", "joules": "less"}.get(unit, "smaller")
    values = [read(figures) or 0.0 for figures in evaluation.models]
    least = min(dense, *values)
    cells = [
        _Cell(
            show(value),
            _times(dense, value, how),
            least / value if value else 1.0,
            worse=value > _SAME * dense,
        )
        for value in values
    ]
    return _Row(title, hint, show(dense), tuple(cells))


def _times(before: float, after: float, how: str) -> str:
    """``"2.5× smaller"``, or larger, or slower."""
    if after <= 0 or before <= 0:
        return ""
    ratio = before / after
    if 1 / _SAME < ratio < _SAME:
        return "the same"
    other = {"smaller": "larger", "faster": "slower", "less": "more"}[how]
    text = printer.number(max(ratio, 1 / ratio), 2 if max(ratio, 1 / ratio) < 10 else 3)
    return f"{text}× {how if ratio > 1 else other}"


def _speed(evaluation: Evaluation) -> _Row | None:
    dense = evaluation.dense.throughput
    if not dense:
        return None
    rates = [figures.throughput or 0.0 for figures in evaluation.models]
    most = max(dense, *rates)
    cells = [
        _Cell(
            f"{printer.count(rate)}/s",
            _times(rate, dense, "faster"),
            rate / most,
            worse=_SAME * rate < dense,
        )
        for rate in rates
    ]
    return _Row(
        "Throughput", f"{evaluation.row}s a second", f"{printer.count(dense)}/s", tuple(cells)
    )


def _text_loss(evaluation: Evaluation) -> _Row | None:
    dense = evaluation.dense.quality
    if dense.perplexity is None or dense.accuracy is not None:
        return None
    cells = []
    for figures in evaluation.models:
        value = figures.quality.perplexity or math.inf
        part = min(1.0, dense.perplexity / value)
        cells.append(_Cell(printer.number(value), _more(dense.perplexity, value), part))
    return _Row("Perplexity", "of the text", printer.number(dense.perplexity), tuple(cells))


def _more(before: float, after: float) -> str:
    change = after / before - 1
    if not math.isfinite(change):
        return ""
    if abs(change) >= 9.995:
        return f"{printer.number(after / before)}×"
    return f"{'+' if change >= 0 else '−'}{printer.percent(abs(change))}"


def _labelled(evaluation: Evaluation, name: str) -> _Row | None:
    dense = getattr(evaluation.dense.quality, name)
    if dense is None:
        return None
    cells = []
    for figures in evaluation.models:
        value = getattr(figures.quality, name)
        cells.append(_Cell(printer.percent(value), _points_off(dense, value), value))
    hint = "of the labels" if name == "accuracy" else "mean over classes"
    return _Row(name.capitalize(), hint, printer.percent(dense), tuple(cells))


def _points_off(before: float, after: float) -> str:
    points = 100 * (after - before)
    return f"{'+' if points >= 0 else '−'}{abs(points):.1f} points"


def _answers(evaluation: Evaluation) -> list[_Row]:
    """Multiple choice: right answers, precision and recall apart, and the dense model's again."""
    dense = evaluation.dense.choices
    if dense is None:
        return []
    asked = f"of {dense.questions} questions"
    titles = {
        "right": ("Right answers", asked),
        "right_by_length": ("Right by length", "likelihood over length"),
        "precision": ("Answers' precision", "mean over answers"),
        "recall": ("Answers' recall", "mean over answers"),
        "same": ("Same answers", "as the dense model"),
    }
    rows = []
    for name, (title, hint) in titles.items():
        cells, before = [], getattr(dense, name)
        for figures in evaluation.models:
            value = getattr(figures.choices, name)
            beside = "" if name == "same" else _points_off(before, value)
            cells.append(_Cell(printer.percent(value), beside, value))
        rows.append(_Row(title, hint, printer.percent(before), tuple(cells)))
    return rows


def _tasks(evaluation: Evaluation) -> list[_Row]:
    """The caller's tasks; whether more is better is not known, so there is no bar."""
    rows = []
    for k, task in enumerate(evaluation.dense.tasks):
        values = [figures.tasks[k].value for figures in evaluation.models]
        cells = [
            _Cell(printer.number(value), _more(task.value, value) if task.value else "")
            for value in values
        ]
        rows.append(_Row(task.name, "a task", printer.number(task.value), tuple(cells)))
    return rows


def _distance(evaluation: Evaluation) -> _Row:
    """Of KL the bar is the share of a choice's probability that is left, on the geometric mean; of
    an error the share of the variance that is not lost."""
    nats = evaluation.unit == "nats"
    cells = []
    for figures in evaluation.models:
        value = figures.quality.distance
        part = math.exp(-value) if nats else max(0.0, 1 - value)
        said = f"1 % exceed {printer.number(figures.quality.tail)}"
        cells.append(_Cell(printer.number(value), said, part if math.isfinite(value) else 0.0))
    title = "KL to dense" if nats else "Error"
    unit = f"nats {printer.each(evaluation.row)}" if nats else "squared, over variance"
    return _Row(title, unit, "0", tuple(cells))


def _agreement(evaluation: Evaluation, title: str, hint: str, name: str) -> _Row | None:
    values = [getattr(figures.quality, name) for figures in evaluation.models]
    if any(value is None for value in values):
        return None
    beside = [
        f"worst {f.quality.worst_cosine:.3f}" if name == "cosine" else "" for f in evaluation.models
    ]
    cells = [
        _Cell(f"{value:.4f}" if name == "cosine" else printer.percent(value), said, max(0.0, value))
        for value, said in zip(values, beside, strict=True)
    ]
    return _Row(title, hint, "1" if name == "cosine" else "100 %", tuple(cells))


def _worst(evaluation: Evaluation) -> _Row:
    cells = []
    for figures in evaluation.models:
        worst = figures.quality.worst
        place = f"{evaluation.row} {worst.row}, batch {worst.batch}"
        cells.append(_Cell(printer.number(worst.value), " ".join(worst.text.split()) or place))
    unit = "KL in nats" if evaluation.unit == "nats" else "error"
    written = any(figures.quality.worst.text for figures in evaluation.models)
    return _Row(f"Worst {evaluation.row}", f"{unit}, and where", "0", tuple(cells), written)


# ------------------------------------------------------------------------------------ the curve


def _chart(evaluation: Evaluation, peers: Peers) -> dict[str, Any] | None:
    """Distance over the share of the memory; None where nothing fits a logarithmic axis.

    The dense model, which has no distance, stands where the axis ends.
    """
    whole = max(evaluation.dense.bytes, 1)
    ours = sorted(
        (f.bytes / whole, f.quality.distance, f.name, _way(f))
        for f in evaluation.models
        if 0 < f.quality.distance < math.inf
    )
    others = {
        name: sorted((share, q) for share, q in curve.items() if 0 < q < math.inf)
        for name, curve in peers.items()
    }
    values = [q for _, q, _, _ in ours] + [q for curve in others.values() for _, q in curve]
    if not values:
        return None
    shares = [s for s, *_ in ours] + [s for curve in others.values() for s, _ in curve]
    step, most = budget_steps(max(1.0, *shares))
    scale = Scale(most, *log_ends(min(values), max(values)), **_CURVE)
    lines = {way: [(s, q) for s, q, _, each in ours if each == way] for way in (RANKS, BITS)}
    return {
        **_CURVE,
        "x_ticks": budget_ticks(scale, step),
        "y_ticks": log_ticks(scale),
        "lines": [(way, _points(scale, line)) for way, line in lines.items()],
        "dots": [
            (scale.x(s), scale.y(q), printer.shorten_end(name, 22), q, way, s > most / 2)
            for s, q, name, way in ours
        ],
        "ways": [way for way in (RANKS, BITS, QUANTIZED) if any(way == each[3] for each in ours)],
        "dense": scale.x(1.0),
        "peers": [
            (name, k % COLORS, _points(scale, curve), [(scale.x(s), scale.y(q)) for s, q in curve])
            for k, (name, curve) in enumerate(others.items())
        ],
    }


RANKS, BITS, QUANTIZED = "ranks", "bits and ranks", "quantized by torchao"


def _way(figures: Figures) -> str:
    """How a model was made small: a line joins those of one way."""
    if _is_quantized(figures.name):
        return QUANTIZED
    return BITS if any(weight.precision for weight in figures.weights) else RANKS


def _is_quantized(name: str) -> bool:
    return name.endswith((", int8", ", int4"))


def _points(scale: Scale, curve: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{scale.x(share)},{scale.y(quality)}" for share, quality in curve)


# ----------------------------------------------------------------------------- ranks, by layer


def _heat_map(figures: Figures) -> dict[str, Any] | None:
    """One model's weights: a row a kind, a column a layer."""
    if not figures.weights or _is_quantized(figures.name):
        return None
    return {"name": figures.name, "layers": layers.folded(figures.weights)}


def _formats(evaluation: Evaluation) -> list[str]:
    found = {weight.format for figures in evaluation.models for weight in figures.weights}
    return [name for name in names() if name in found]


# ------------------------------------------------------------------------------------ spectra


def _spectra(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One picture a kind of weight: a line a layer, and the ranks that the models kept."""
    kinds: dict[str, list[Spectrum]] = {}
    for spectrum in evaluation.spectra:
        kinds.setdefault(layers.place(spectrum.name)[0], []).append(spectrum)
    pictures = []
    for kind, spectra in kinds.items():
        most = max(min(s.shape) for s in spectra)
        scale = Scale(float(most), _LEAST_SINGULAR, 1.0, **_SPECTRUM)
        names = {s.name for s in spectra}
        ranks = []
        for figures in evaluation.models:
            if _is_quantized(figures.name):
                continue
            kept = [max(w.ranks) for w in figures.weights if w.name in names and w.ranks]
            kept += [most for w in figures.weights if w.name in names and is_dense(w.format)]
            if kept:
                median = statistics.median(kept)
                ranks.append((scale.x(median), f"{figures.name}: {median:g}"))
        lines = [
            " ".join(f"{scale.x(k)},{scale.y(max(v, _LEAST_SINGULAR))}" for k, v in s.values)
            for s in spectra
        ]
        size = printer.shape_text(spectra[0].shape)
        pictures.append({"kind": kind, "size": size, "lines": lines, "ranks": ranks, "most": most})
    return pictures
