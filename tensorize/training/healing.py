"""Healing: the dense model is distilled into the factors of the compressed one.

Adam on the factors, relative to their sizes, over many batches: what a polish does with the
calibration data (``passes/rewrite/polish.py``), for as long and on as much as the caller has. The
state of a run can be kept in a directory, from which a killed one goes on to the same bits: the
order of the data and the random numbers of a step follow from the seed and the number of the step,
and everything else is in the file.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import CaptureError, CheckpointError
from tensorize.base.files import drafts_of, replacing
from tensorize.base.progress import Progress, shown
from tensorize.base.records import by_field, plain
from tensorize.base.sharded import is_first_in, is_sharded, mean_over, mesh_of, of_all_in, resharded
from tensorize.capture.batches import ToInputs, calibration_batches
from tensorize.capture.forward import in_usual_modes, untouched
from tensorize.capture.inputs import check_model
from tensorize.ir.sites import Batch
from tensorize.passes.observe.loss import LossFunction, split
from tensorize.passes.rewrite.descent import Descent, asking, rate_for, rounds, write
from tensorize.reports.attach import attach, known_report, samples_of
from tensorize.store.fingerprint import fingerprint, identity
from tensorize.store.identity import Opaque, content
from tensorize.training.distillation import (
    CORES,
    SMALLEST_SIZE,
    Layers,
    distillation_loss,
    trained_parameters,
)

log = logging.getLogger("tensorize")

STATE = "healing.pt"
_FORMAT = 1
# The held-out batches are looked at so often in a run, but not after fewer steps than this; so many
# are held out of the caller's.
_CHECKS, _LEAST_EVERY, _HELD_OUT = 16, 4, 6
# Where nothing has become better for some checks, or it is this much worse than at first, the best
# factors are taken again with a quarter of the rate, so often.
_DIVERGED, _RETREATS = 2.0, 2
_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Healing:
    """What became of a healing; the distances are to the dense model, in ``unit``.

    ``before`` and ``after`` are means over the held-out batches, ``losses`` what each step was
    taken on, ``checks`` pairs (steps taken, held-out distance). ``best_step`` is the number of
    steps after which the factors that are kept were the best, 0 where none were better.

    Examples:
        >>> done = tensorize.heal(copy.deepcopy(small), dense, batches, steps=4)
        >>> done.after <= done.before
        True
    """

    before: float
    after: float
    unit: str
    best_step: int
    steps: int
    stopped_early: bool
    losses: tuple[float, ...]
    checks: tuple[tuple[int, float], ...]

    @property
    def recovered(self) -> float:
        """The share of the distance that is gone."""
        return 1 - self.after / self.before if self.before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data."""
        return plain(by_field(self))

    def __str__(self) -> str:
        early = ", stopped early" if self.stopped_early else ""
        return (
            f"{self.before:.4g} to {self.after:.4g} {self.unit} on held-out batches "
            f"({100 * self.recovered:.0f} % recovered), best after {self.best_step} of "
            f"{self.steps} steps{early}"
        )


@in_usual_modes("heal")
def heal(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    held_out: Iterable[Any] | None = None,
    tokenizer: Any = None,
    to_inputs: ToInputs | None = None,
    loss_fn: LossFunction | None = None,
    layers: Layers = None,
    layer_weight: float = 1.0,
    train: str = CORES,
    rate: float | None = None,
    patience: int = 3,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> Healing:
    """Distil a dense model into the factors of a compressed one, in place.

    The model runs in evaluation mode (no dropout); the weights that are kept are the best ones on
    held-out batches. An error leaves it as it was, and a run that was killed goes on from
    ``checkpoint_dir`` when it is called again with the same arguments.

    A sharded model is healed by all of its processes: each of ``dp`` gives batches of its own, as
    many as the others, those of ``tp`` the same. A step learns from what they have together, and
    all of them come to the same result.

    Args:
        model: a compressed model; its factors are changed.
        teacher: the dense model, which stays as it is.
        batches: what the model's forward takes, or strings with ``tokenizer=``. They are gone
            through as often as ``steps`` need, in another order each time.
        steps: how many batches to learn from, one a step.
        held_out: other batches to judge by; without them some of ``batches`` are held out.
        to_inputs: makes what forward takes of a batch, where that is not what it is.
        loss_fn: ``loss_fn(outputs, batch) -> scalar``, instead of the distance of the outputs.
        layers, layer_weight: layers whose outputs to match as well, as in ``distillation_loss``.
        train: ``"cores"``, or ``"all"``: biases, norms and dense weights too.
        rate: the largest step relative to a parameter's size; None: as the damage asks for.
        patience: checks in a row without a better result, of some 16 in a run, after which the rate
            is cut; the third time, the run ends.
        checkpoint_dir: where the state is kept, about every minute; None: nowhere. Where it cannot
            be told what a model or the data hold (a generator, an object of C), nothing is kept,
            with a warning.
        seed: of the order of the data, and of random numbers that the model draws itself.
        progress: None: a bar on a terminal; True, False, or a function (stage, done, total).

    Raises:
        CaptureError: there is nothing to train, the batches do not fit, outputs are not finite, or
            processes have different numbers of batches.
        CheckpointError: ``checkpoint_dir`` cannot be used, or holds the state of another run.

    Examples:
        >>> done = tensorize.heal(copy.deepcopy(small), dense, batches, steps=4)
        >>> done.steps
        4
    """
    model, teacher = check_model(model), check_model(teacher)
    if model is teacher:
        raise CaptureError("model and teacher are one", way_out="teacher= is the dense model")
    if steps < 1 or patience < 1 or (rate is not None and not 0 < rate < 1):
        raise CaptureError(
            f"steps={steps}, patience={patience}, rate={rate}: one of them makes no sense",
            way_out="steps and patience are at least 1, a rate is in (0, 1) or None",
        )
    given = calibration_batches(batches, model, tokenizer, "batches", to_inputs)
    if held_out is None:
        learnt, unseen = _split(given)
    else:
        learnt = given
        unseen = calibration_batches(held_out, model, tokenizer, "held_out", to_inputs)
    resharded(model)
    parameters = list(trained_parameters(model, train).values())
    mesh = mesh_of(parameters)
    _check_alike(mesh, len(learnt), len(unseen), steps)
    trained = set(map(id, parameters))
    # The gradients of what is sharded are gathered by all who ask for one.
    others = [p for p in model.parameters() if is_sharded(p) and id(p) not in trained]
    distance = distillation_loss(teacher, loss_fn=loss_fn, layers=layers, layer_weight=layer_weight)
    kept = None
    if checkpoint_dir is not None:
        about = (steps, layers, layer_weight, train, rate, patience, seed)
        known = _identity(model, teacher, learnt, unseen, (*about, loss_fn), mesh)
        kept = None if known is None else _File(Path(checkpoint_dir) / STATE, known, mesh)
    start = [p.detach().clone() for p in parameters]

    def learn(position: int) -> Tensor:
        torch.manual_seed(seed + run.state.done)
        loss, rows = distance.mean(model, learnt[position])
        # The mean of what processes have of gradients is to be that over the rows of all of them.
        return loss * (max(rows, 1) / _mean_over(mesh, max(rows, 1)))

    def judge() -> float:
        torch.manual_seed(seed)
        total, rows = preserved.total_distance(model, teacher, unseen)
        resharded(model)
        return _mean_over(mesh, total) / max(_mean_over(mesh, rows), 1)

    with (
        shown(progress) as tell,
        untouched(model, but=parameters),
        untouched(teacher),
        asking(others, False),
        asking(parameters, True),  # by the first run FSDP2 has learnt which do
    ):
        preserved = distance.fit(learnt, mesh)
        before = judge()
        if not math.isfinite(before):
            raise CaptureError(
                "the distance to the teacher is not finite on the held-out batches",
                way_out="look for NaN in the outputs of the model and of the teacher",
            )
        run = Descent(
            parameters,
            learn,
            judge,
            before,
            steps=steps,
            every=max(_LEAST_EVERY, steps // _CHECKS),
            rate=rate_for(before) if rate is None else rate,
            smallest=SMALLEST_SIZE,
            patience=patience,
            worst=_DIVERGED * before,
            retreats=_RETREATS,
        )
        try:
            _descend(run, rounds(len(learnt), steps, seed), kept, tell)
        except BaseException:
            write(parameters, start)
            raise
    state = run.state
    done = Healing(
        before=state.before,
        after=state.best,
        unit=preserved.unit,
        best_step=state.best_step,
        steps=state.done,
        stopped_early=state.stopped and state.done < steps,
        losses=tuple(run.losses),
        checks=tuple(run.checks),
    )
    _note(model, done)
    return done


def _descend(run: Descent, order: Iterator[int], kept: _File | None, tell: Progress) -> None:
    """Go down from the state that is kept, if there is one, and keep it on the way."""
    if kept is not None and (found := kept.read()) is not None:
        run.load_state_dict(found)
    saved = time.monotonic()
    tell("healing", run.state.done, run.steps)
    for judged in run.run(order):
        if kept is not None and kept.is_due(judged, time.monotonic() - saved):
            kept.write(run.state_dict())
            saved = time.monotonic()
        tell("healing", run.state.done, run.steps)
    tell("healing", run.steps, run.steps)


# ------------------------------------------------------------------------------------ on the disk


class _File:
    """The state of a run in one file, written at once: a reader sees the old or the new one.

    Of the processes of a mesh one writes, and all read: the file is on a disk that they share.
    """

    def __init__(self, path: Path, identity: str, mesh: Any) -> None:
        self.path, self.identity, self.mesh = path, identity, mesh
        self._by_first(self._prepare)

    def is_due(self, judged: bool, seconds: float) -> bool:
        """Whether to write, which all processes do together."""
        return judged or _mean_over(self.mesh, seconds > _SAVE_SECONDS) > 0

    def write(self, data: dict[str, Any]) -> None:
        self._by_first(lambda: self._write(data))

    def _by_first(self, do: Callable[[], None]) -> None:
        """Let one process do it, and raise in all what it raises."""
        failure = None
        if is_first_in(self.mesh):
            try:
                do()
            except CheckpointError as error:
                failure = error
        if (failure := of_all_in(self.mesh, failure)[0]) is not None:
            raise failure

    def _prepare(self) -> None:
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in drafts_of(path):  # by a killed run: they are as large as the state
                left.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def _write(self, data: dict[str, Any]) -> None:
        try:
            with replacing(self.path) as draft, draft.open("wb") as file:
                torch.save({"format": _FORMAT, "identity": self.identity, **data}, file)
        except (OSError, RuntimeError) as error:  # torch says so where the disk is full
            raise self._unusable(error) from error

    def read(self) -> dict[str, Any] | None:
        """The state that was kept, or None where there is none yet."""
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            known = found["format"], found["identity"]
        except Exception as error:  # torch raises whatever its reader does
            raise CheckpointError(
                f"{self.path} is damaged: {type(error).__name__}: {error}",
                way_out="remove it; the run then starts anew",
            ) from error
        if known != (_FORMAT, self.identity):
            raise CheckpointError(
                f"{self.path} is the state of a run with other weights, data or settings",
                way_out="start from the same compressed model with the same arguments, or choose "
                "another checkpoint_dir",
            )
        return found

    def _unusable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be written: {type(error).__name__}: {error}",
            way_out="choose a checkpoint_dir with room that you may write to",
        )


def _identity(
    model: nn.Module,
    teacher: nn.Module,
    learnt: Sequence[Batch],
    unseen: Sequence[Batch],
    about: Sequence[Any],
    mesh: Any,
) -> str | None:
    """A hash of all that a run depends on; None, and a warning, where that cannot be told.

    Of a sharded model it is the parts of all processes, and their batches.
    """
    weights = [fingerprint(m.named_parameters()) for m in (model, teacher)]
    # What shards a model hangs process groups on it, which are other objects in every run.
    models = [m for m in (model, teacher) if mesh_of(m.parameters()) is None]
    try:
        known = content(weights, *models, tuple(learnt), tuple(unseen), tuple(about))
    except Opaque as error:
        log.warning("the state of the healing is not kept in checkpoint_dir: %s", error)
        known = None
    known = of_all_in(mesh, known)
    return None if None in known else identity(*known) if mesh is not None else known[0]


# ------------------------------------------------------------------------------------ odds and ends


def _split(batches: tuple[Batch, ...]) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Batches to learn from, and the few to judge by; of a single one, that one for both."""
    if len(batches) < 4 * _HELD_OUT:
        learnt, unseen = split(batches)
        return learnt, unseen or batches
    step = len(batches) // _HELD_OUT
    unseen = batches[step - 1 :: step][:_HELD_OUT]
    chosen = set(range(step - 1, step * _HELD_OUT, step))
    return tuple(b for k, b in enumerate(batches) if k not in chosen), unseen


def _mean_over(mesh: Any, value: float) -> float:
    return float(mean_over(mesh, torch.tensor(value, dtype=torch.float64)))


def _check_alike(mesh: Any, learnt: int, unseen: int, steps: int) -> None:
    """Raises CaptureError where processes would not run a sharded model equally often."""
    counts = of_all_in(mesh, (learnt, unseen, steps))
    if len(set(counts)) > 1:
        told = "; ".join(f"{a}, {b} and {c}" for a, b, c in counts)
        raise CaptureError(
            "processes have different numbers of batches to learn from, of held-out ones and of "
            f"steps: {told}",
            way_out="as many of each in every process; which batches is each one's own",
        )


def _note(model: nn.Module, done: Healing) -> None:
    """Let the model's report say that its factors are others than those it was made with."""
    found = known_report(model)
    if found is not None:
        note = f"healed: {done}; the errors of sites are those from before"
        measured = {
            "measured_loss": done.after,
            "outlook": replace(found.outlook, unit=done.unit),
            "weights": samples_of(model),
        }
        attach(model, replace(found, notes=(*found.notes, note), **measured))
