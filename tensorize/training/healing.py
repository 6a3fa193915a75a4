"""Healing: the dense model is distilled into the factors of the compressed one.

Adam on the factors, relative to their sizes, over many batches: what a polish does with the
calibration data (``passes/rewrite/polish.py``), for as long and on as much as the caller has. The
state of a run can be kept in a directory, from which a killed one goes on to the same bits: the
order of the data and the random numbers of a step follow from the seed and the number of the step,
and everything else is in the file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorize.base.errors import CaptureError, CheckpointError
from tensorize.base.files import drafts_of, replacing
from tensorize.base.progress import Progress, shown
from tensorize.capture.batches import calibration_batches
from tensorize.capture.forward import in_usual_modes, untouched
from tensorize.capture.inputs import check_model
from tensorize.ir.sites import Batch
from tensorize.passes.observe.loss import LossFunction, PreservedLoss, split
from tensorize.passes.rewrite.descent import (
    Descent,
    rate_for,
    rounds,
    share_of_rate,
    trainable,
    write,
)
from tensorize.reports.attach import attach, known_report
from tensorize.store.fingerprint import fingerprint, hash_batch
from tensorize.training.distillation import (
    CORES,
    SMALLEST_SIZE,
    Distillation,
    Layers,
    distillation_loss,
    trained_parameters,
)

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
        return asdict(self)

    def __str__(self) -> str:
        early = ", stopped early" if self.stopped_early else ""
        return (
            f"{self.before:.4g} to {self.after:.4g} {self.unit} on held-out batches "
            f"({100 * self.recovered:.0f} % recovered), best after {self.best_step} of "
            f"{self.steps} steps{early}"
        )


@in_usual_modes
def heal(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    held_out: Iterable[Any] | None = None,
    tokenizer: Any = None,
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

    Args:
        model: a compressed model; its factors are changed.
        teacher: the dense model, which stays as it is.
        batches: what the model's forward takes, or strings with ``tokenizer=``. They are gone
            through as often as ``steps`` need, in another order each time.
        steps: how many batches to learn from, one a step.
        held_out: other batches to judge by; without them some of ``batches`` are held out.
        loss_fn: ``loss_fn(outputs, batch) -> scalar``, instead of the distance of the outputs.
        layers, layer_weight: layers whose outputs to match as well, as in ``distillation_loss``.
        train: ``"cores"``, or ``"all"``: biases, norms and dense weights too.
        rate: the largest step relative to a parameter's size; None: as the damage asks for.
        patience: checks in a row without a better result, of some 16 in a run, after which the rate
            is cut; the third time, the run ends.
        checkpoint_dir: where the state is kept, about every minute; None: nowhere.
        seed: of the order of the data, and of random numbers that the model draws itself.
        progress: None: a bar on a terminal; True, False, or a function (stage, done, total).

    Raises:
        CaptureError: there is nothing to train, the batches do not fit, or outputs are not finite.
        CheckpointError: ``checkpoint_dir`` cannot be used, or holds the state of another run.
    """
    check_model(model)
    check_model(teacher)
    if model is teacher:
        raise CaptureError("model and teacher are one", way_out="teacher= is the dense model")
    if steps < 1 or patience < 1 or (rate is not None and not 0 < rate < 1):
        raise CaptureError(
            f"steps={steps}, patience={patience}, rate={rate}: one of them makes no sense",
            way_out="steps and patience are at least 1, a rate is in (0, 1) or None",
        )
    given = calibration_batches(batches, model, tokenizer, "batches")
    if held_out is None:
        learnt, unseen = _split(given)
    else:
        learnt, unseen = given, calibration_batches(held_out, model, tokenizer, "held_out")
    parameters = trained_parameters(model, train)
    distance = distillation_loss(teacher, loss_fn=loss_fn, layers=layers, layer_weight=layer_weight)
    kept = None
    if checkpoint_dir is not None:
        about = (steps, layers, layer_weight, train, rate, patience, seed, loss_fn is not None)
        identity = _identity(model, teacher, learnt, unseen, about)
        kept = _File(Path(checkpoint_dir) / STATE, identity)
    start = [p.detach().clone() for p in parameters.values()]
    with shown(progress) as tell, untouched(model), untouched(teacher):
        run = _Run(model, distance, parameters, learnt, unseen, steps, rate, patience, seed)
        try:
            done = run.run(kept, tell)
        except BaseException:
            write(list(parameters.values()), start)
            raise
    _note(model, done)
    return done


@dataclass
class _State:
    """All of a run but the tensors."""

    before: float
    best: float
    done: int = 0
    best_step: int = 0
    scale: float = 1.0
    idle: int = 0
    retreats: int = 0
    stopped: bool = False


class _Run:
    """A run of a healing, step by step."""

    def __init__(
        self,
        model: nn.Module,
        distance: Distillation,
        parameters: dict[str, nn.Parameter],
        learnt: Sequence[Batch],
        unseen: Sequence[Batch],
        steps: int,
        rate: float | None,
        patience: int,
        seed: int,
    ) -> None:
        self.model, self.distance, self.steps = model, distance, steps
        self.parameters = list(parameters.values())
        self.learnt, self.unseen = learnt, unseen
        self.patience, self.seed = patience, seed
        self.every = max(_LEAST_EVERY, steps // _CHECKS)
        self.loss: PreservedLoss = distance.fit(learnt)
        before = self._judge()
        if not math.isfinite(before):
            raise CaptureError(
                "the distance to the teacher is not finite on the held-out batches",
                way_out="look for NaN in the outputs of the model and of the teacher",
            )
        self.rate = rate_for(before) if rate is None else rate
        self.state = _State(before, before)
        self.losses: list[float] = []
        self.checks: list[tuple[int, float]] = []
        self.best = [p.detach().clone() for p in self.parameters]
        self.descent = Descent(self.parameters, self.rate, SMALLEST_SIZE)

    def run(self, kept: _File | None, tell: Progress) -> Healing:
        state = self.state
        if kept is not None and (found := kept.read()) is not None:
            self._restore(found)
            state = self.state
        saved = time.monotonic()
        order = rounds(len(self.learnt), self.steps, self.seed)
        for position in itertools.islice(order, state.done, None):
            if state.stopped:
                break
            tell("healing", state.done, self.steps)
            self._step(position)
            checked = state.done % self.every == 0 or state.done == self.steps
            if checked and not state.stopped:
                self._check()
            if kept is not None and (checked or time.monotonic() - saved > _SAVE_SECONDS):
                kept.write(self._tensors())
                saved = time.monotonic()
        tell("healing", self.steps, self.steps)
        write(self.parameters, self.best)
        return Healing(
            before=state.before,
            after=state.best,
            unit=self.loss.unit,
            best_step=state.best_step,
            steps=state.done,
            stopped_early=state.stopped and state.done < self.steps,
            losses=tuple(self.losses),
            checks=tuple(self.checks),
        )

    def _step(self, position: int) -> None:
        state = self.state
        torch.manual_seed(self.seed + state.done)
        with trainable(self.parameters), torch.enable_grad():
            loss, _ = self.distance.mean(self.model, self.learnt[position])
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        sizes = [g.float().norm() for g in gradients if g is not None]
        share = state.scale * share_of_rate(state.done, self.steps)
        state.done += 1
        self.losses.append(float(loss))
        if sizes and bool(torch.isfinite(torch.stack([loss.detach().float(), *sizes])).all()):
            self.descent.step(gradients, share)
        else:
            self._retreat()

    def _judge(self) -> float:
        torch.manual_seed(self.seed)
        return self.loss.mean_distance(self.model, self.distance.teacher, self.unseen)

    def _check(self) -> None:
        """Look at the held-out batches; keep the best, and step back where it goes wrong."""
        state, reached = self.state, self._judge()
        self.checks.append((state.done, reached))
        if reached < state.best:
            state.best, state.best_step, state.idle = reached, state.done, 0
            self.best = [p.detach().clone() for p in self.parameters]
            return
        state.idle += 1
        if state.idle >= self.patience or not reached <= _DIVERGED * state.before:
            self._retreat()

    def _retreat(self) -> None:
        state = self.state
        if state.retreats == _RETREATS:
            state.stopped = True
            return
        write(self.parameters, self.best)
        self.descent = Descent(self.parameters, self.rate, SMALLEST_SIZE)
        state.scale, state.idle, state.retreats = state.scale / 4, 0, state.retreats + 1

    def _tensors(self) -> dict[str, Any]:
        return {
            "state": asdict(self.state),
            "losses": self.losses,
            "checks": self.checks,
            "masters": self.descent.masters,
            "adam": self.descent.adam.state_dict(),
            "largest": self.descent.largest,
            "best": self.best,
        }

    def _restore(self, found: dict[str, Any]) -> None:
        self.state = _State(**found["state"])
        self.losses, self.checks = list(found["losses"]), [(k, x) for k, x in found["checks"]]
        for master, value in zip(self.descent.masters, found["masters"], strict=True):
            master.copy_(value)
        self.descent.adam.load_state_dict(found["adam"])
        self.descent.largest = list(found["largest"])
        for best, value in zip(self.best, found["best"], strict=True):
            best.copy_(value)
        write(self.parameters, self.descent.masters)


# ------------------------------------------------------------------------------------ on the disk


class _File:
    """The state of a run in one file, written at once: a reader sees the old or the new one."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in drafts_of(path):  # by a killed run: they are as large as the state
                left.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def write(self, data: dict[str, Any]) -> None:
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
) -> str:
    """A hash of all that a run depends on, but for what a ``loss_fn`` computes."""
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update((fingerprint(model) + fingerprint(teacher)).encode())
    for batches in (learnt, unseen):
        digest.update(f"{len(batches)} batches;".encode())
        for batch in batches:
            hash_batch(digest, batch)
    return digest.hexdigest()


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


def _note(model: nn.Module, done: Healing) -> None:
    """Let the model's report say that its factors are others than those it was made with."""
    found = known_report(model)
    if found is not None:
        note = f"healed: {done}; the errors of sites are those from before"
        attach(model, replace(found, notes=(*found.notes, note)))
