"""An evaluation as one HTML page: gains and losses beside each other, and the pictures.

The page itself is ``templates/evaluation.html.j2``; here is what it shows, and where.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorize.base import printer
from tensorize.base.charts import Scale, budget_steps, budget_ticks, log_ends, log_ticks
from tensorize.base.html import environment
from tensorize.evaluation.evaluation import Evaluation
from tensorize.evaluation.quality import NEIGHBOURS
from tensorize.evaluation.results import Figures, Spectrum, WeightFigures
from tensorize.formats.dense import is_dense

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
        "chart": _chart(evaluation, peers),
        "maps": [m for m in (_heat_map(f) for f in evaluation.models) if m is not None],
        "spectra": _spectra(evaluation),
        "noun": {"text": "tokens", "classes": "samples"}.get(evaluation.kind, "rows"),
        "share": evaluation.share,
        "nats": evaluation.unit == "nats",
    }
    pages = environment()
    pages.filters["flat"] = _without_blank_lines
    return pages.get_template("evaluation.html.j2").render(contents)


def _without_blank_lines(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines) or "(blank lines)"


# --------------------------------------------------------------------------- gains and losses


@dataclass(frozen=True)
class _Cell:
    """A figure of one model, how it compares with the dense one, and a bar from 0 to 1."""

    text: str
    beside: str = ""
    part: float | None = None


@dataclass(frozen=True)
class _Row:
    """One figure of all models; ``hint`` says what it is, ``is_place`` that it tells where."""

    title: str
    hint: str
    dense: str
    cells: tuple[_Cell, ...]
    is_place: bool = False


Read = Callable[[Figures], float | None]


def _groups(evaluation: Evaluation) -> list[tuple[str, str, list[_Row]]]:
    """What is gained and what is lost: key, title, rows."""
    gains = [
        _less(evaluation, "Memory", "weights and buffers", lambda f: f.bytes, "bytes"),
        _less(evaluation, "Parameters", "each counted once", lambda f: f.parameters, "count"),
        _less(evaluation, "Latency", "one sample", lambda f: f.latency, "seconds"),
        _speed(evaluation),
    ]
    losses = [
        _text_loss(evaluation),
        *(_labelled(evaluation, name) for name in ("accuracy", "precision", "recall")),
        _distance(evaluation),
        _agreement(evaluation, "Same first choice", "top-1 agreement", "top1"),
        _agreement(evaluation, "Same best five", "top-5 overlap", "top5"),
        _agreement(evaluation, "Cosine", "of embeddings", "cosine"),
        _agreement(evaluation, "Same neighbours", f"of the {NEIGHBOURS} nearest", "neighbours"),
        _worst(evaluation),
    ]
    groups = (("gain", "What you gain", gains), ("lose", "What you lose", losses))
    return [(key, title, [r for r in rows if r is not None]) for key, title, rows in groups]


def _less(evaluation: Evaluation, title: str, hint: str, read: Read, unit: str) -> _Row | None:
    """A figure that is better the smaller it is."""
    show = {"bytes": printer.bytes_, "count": printer.count, "seconds": printer.seconds}[unit]
    dense = read(evaluation.dense)
    if not dense:
        return None
    cells = []
    for figures in evaluation.models:
        value = read(figures) or 0.0
        how = "faster" if unit == "seconds" else "smaller"
        cells.append(_Cell(show(value), _times(dense, value, how), min(1.0, value / dense)))
    return _Row(title, hint, show(dense), tuple(cells))


def _times(before: float, after: float, how: str) -> str:
    """``"2.5× smaller"``, or larger, or slower."""
    if after <= 0 or before <= 0:
        return ""
    ratio = before / after
    if 0.97 < ratio < 1.03:
        return "the same"
    other = {"smaller": "larger", "faster": "slower"}[how]
    text = printer.number(max(ratio, 1 / ratio), 2 if max(ratio, 1 / ratio) < 10 else 3)
    return f"{text}× {how if ratio > 1 else other}"


def _speed(evaluation: Evaluation) -> _Row | None:
    dense = evaluation.dense.throughput
    if not dense:
        return None
    rates = [figures.throughput or 0.0 for figures in evaluation.models]
    most = max(dense, *rates)
    cells = [
        _Cell(f"{printer.count(rate)}/s", _times(rate, dense, "faster"), rate / most)
        for rate in rates
    ]
    noun = "tokens" if evaluation.kind == "text" else "rows"
    return _Row("Throughput", f"{noun} a second", f"{printer.count(dense)}/s", tuple(cells))


def _text_loss(evaluation: Evaluation) -> _Row | None:
    dense = evaluation.dense.quality
    if dense.perplexity is None or dense.accuracy is not None:
        return None
    cells = []
    for figures in evaluation.models:
        value = figures.quality.perplexity or math.inf
        cells.append(_Cell(printer.number(value), _more(dense.perplexity, value)))
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
        points = 100 * (value - dense)
        sign = "+" if points >= 0 else "−"
        cells.append(_Cell(printer.percent(value), f"{sign}{abs(points):.1f} points", value))
    hint = "of the labels" if name == "accuracy" else "mean over classes"
    return _Row(name.capitalize(), hint, printer.percent(dense), tuple(cells))


def _distance(evaluation: Evaluation) -> _Row:
    nats = evaluation.unit == "nats"
    cells = [
        _Cell(printer.number(f.quality.distance), f"1 % exceed {printer.number(f.quality.tail)}")
        for f in evaluation.models
    ]
    title = "KL to dense" if nats else "Error"
    noun = "token" if evaluation.kind == "text" else "row"
    unit = f"nats a {noun}" if nats else "squared, over variance"
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
    noun = {"text": "token", "classes": "sample"}.get(evaluation.kind, "row")
    cells = []
    for figures in evaluation.models:
        worst = figures.quality.worst
        said = " ".join(worst.text.split()) or f"{noun} {worst.row} of batch {worst.batch}"
        cells.append(_Cell(printer.number(worst.value), said))
    unit = "KL in nats" if evaluation.unit == "nats" else "error"
    return _Row(f"Worst {noun}", f"{unit}, and where", "0", tuple(cells), is_place=True)


# ------------------------------------------------------------------------------------ the curve


def _chart(evaluation: Evaluation, peers: Peers) -> dict[str, Any] | None:
    """Distance over the share of the memory; None where nothing fits a logarithmic axis."""
    whole = max(evaluation.dense.bytes, 1)
    ours = sorted(
        (f.bytes / whole, f.quality.distance, f.name)
        for f in evaluation.models
        if 0 < f.quality.distance < math.inf
    )
    others = {
        name: sorted((share, q) for share, q in curve.items() if 0 < q < math.inf)
        for name, curve in peers.items()
    }
    values = [q for _, q, _ in ours] + [q for curve in others.values() for _, q in curve]
    if not values:
        return None
    shares = [s for s, _, _ in ours] + [s for curve in others.values() for s, _ in curve]
    step, most = budget_steps(max(shares))
    scale = Scale(most, *log_ends(min(values), max(values)), **_CURVE)
    # A quantized model is another method: the line joins those that are not.
    line = [(s, q) for s, q, name in ours if not _is_quantized(name)]
    return {
        **_CURVE,
        "x_ticks": budget_ticks(scale, step),
        "y_ticks": log_ticks(scale),
        "line": _points(scale, line),
        "dots": [(scale.x(s), scale.y(q), name, q, _is_quantized(name)) for s, q, name in ours],
        "peers": [
            (name, k % COLORS, _points(scale, curve), [(scale.x(s), scale.y(q)) for s, q in curve])
            for k, (name, curve) in enumerate(others.items())
        ],
    }


def _is_quantized(name: str) -> bool:
    return name.endswith((", int8", ", int4"))


def _points(scale: Scale, curve: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{scale.x(share)},{scale.y(quality)}" for share, quality in curve)


# ----------------------------------------------------------------------------- ranks, by layer


def _place(name: str) -> tuple[str, int | None]:
    """What kind of weight it is, and in which layer: its name with the first number taken out."""
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    kind = name.removesuffix(".weight")
    if found is None:
        return kind, None
    return kind[: found.start()] + "*" + kind[found.end() :], int(found[0])


def _heat_map(figures: Figures) -> dict[str, Any] | None:
    """One model's weights: a row a kind, a column a layer."""
    if not figures.weights or _is_quantized(figures.name):
        return None
    rows: dict[str, dict[int | None, WeightFigures]] = {}
    for weight in figures.weights:
        kind, layer = _place(weight.name)
        rows.setdefault(kind, {})[layer] = weight
    layers = sorted({layer for row in rows.values() for layer in row if layer is not None})
    single = [(kind, row[None]) for kind, row in rows.items() if None in row]
    several = [
        (kind, [row.get(layer) for layer in layers])
        for kind, row in rows.items()
        if None not in row
    ]
    return {"name": figures.name, "layers": layers, "rows": several, "single": single}


# ------------------------------------------------------------------------------------ spectra


def _spectra(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One picture a kind of weight: a line a layer, and the ranks that the models kept."""
    kinds: dict[str, list[Spectrum]] = {}
    for spectrum in evaluation.spectra:
        kinds.setdefault(_place(spectrum.name)[0], []).append(spectrum)
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
