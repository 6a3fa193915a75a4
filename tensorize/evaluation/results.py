"""What an evaluation found, of one model."""

from __future__ import annotations

from dataclasses import dataclass

from tensorize.evaluation.quality import ChoiceFigures, Quality, TaskFigures


@dataclass(frozen=True)
class WeightFigures:
    """What became of one weight: format, ranks, bits, and the share of its parameters kept."""

    name: str
    format: str
    ranks: tuple[int, ...]
    share: float
    precision: str | None = None


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a dense weight relative to the largest: pairs (index from 1, value)."""

    name: str
    shape: tuple[int, int]
    values: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Figures:
    """One model.

    ``latency`` is the seconds of a call with one sample, ``throughput`` rows a second with the
    first batch, ``joules`` what the machine used for a row of that, where it has a counter that can
    be read. ``written`` continues the prompts of the evaluation, ``choices`` answers its
    questions, and ``tasks`` holds what its tasks gave.
    """

    name: str
    parameters: int
    bytes: int
    quality: Quality
    latency: float | None = None
    throughput: float | None = None
    joules: float | None = None
    written: tuple[str, ...] = ()
    weights: tuple[WeightFigures, ...] = ()
    choices: ChoiceFigures | None = None
    tasks: tuple[TaskFigures, ...] = ()
