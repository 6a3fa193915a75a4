"""``tensorize.save`` and ``tensorize.load``, and what codes a file as it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.api.analysis import Analysis, kept_analysis
from tensorize.base.errors import AnalysisError, BudgetError, CheckpointError, check_one_of
from tensorize.base.tensors import unwrapped
from tensorize.cache import analyses as disk
from tensorize.checking.kept import guard_record, note_artefact, resume
from tensorize.coding.peers import PEERS
from tensorize.coding.tensors import Coding, encode
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan
from tensorize.ir.sites import Batch
from tensorize.passes.filling import coder
from tensorize.passes.filling.fill import Filling
from tensorize.passes.filling.refit import Refit
from tensorize.passes.filling.trial import Cost, Trial
from tensorize.passes.filling.weights import weights_of
from tensorize.passes.observe.counted import CountRows, rows_of
from tensorize.passes.observe.loss import LossOption, function_of
from tensorize.passes.stages import Analysed, Opened, Planned
from tensorize.reports.attach import report
from tensorize.running.in_use import use_kernels
from tensorize.store import compressed_tensors
from tensorize.store import load as store_load
from tensorize.store import save as checkpoint
from tensorize.store.coded import CodedGroup, CodedTensors, Coder, lossless, within
from tensorize.store.contents import dtype_name, slots_of

LOSSLESS = "lossless"

_SAID = 24
"""Bytes that a file says of every tensor and every stream, about."""


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: str = "tensorize",
    coded: str | bool | Budget | None = None,
    analysis: Analysis | None = None,
    coder: str | None = None,
) -> None:
    """Write a compiled model as safetensors and JSON, atomically; with its limits if guarded.

    Args:
        format: ``"compressed-tensors"`` writes a Hugging Face model, whose linears are all dense in
            four or eight bits, for vLLM and for transformers with the package compressed-tensors.
            Tables are then written as numbers.
        coded: None: weights are stored as they lie in memory. ``"lossless"``: in fewer bytes, with
            every bit. ``tensorize.Budget(entry_error=1e-4)``: no entry of any stored tensor is
            further than this from what it was, and NaN and infinities stay what they are;
            ``entry_error="1e-3 relative"`` is a share of each tensor's range.
            ``tensorize.Budget(file=0.15)``: the file of weights has at most this share of the
            dense model's bytes (an int: so many bytes), and costs as little of the loss as it can;
            ``tensorize.Budget(loss=0.01)``: the loss is predicted to rise by at most this beyond
            what the plan costs. True: at the size of file that the plan's ``Budget(file=)`` chose,
            with the analysis that it was made by. ``tensorize.load`` and ``from_pretrained`` read
            all of them.
        analysis: how errors of the weights count, for ``file`` and ``loss``: the one that the
            model was made by. None: the one that its plan finds in ``cache_dir``.
        coder: who codes within an ``entry_error``. None: we do. ``"sz3"`` or ``"zfp"``: these do
            (packages ``pysz`` and ``zfpy``), of every tensor that they hold within the bound, which
            is checked; ours of the others, which the manifest names. To load it, the package must
            be there.

    Raises:
        CheckpointError: the model was not made by tensorize, a weight is of no form that the format
            holds, the format is not ours and ``coded`` is asked for, the ``coder`` is not
            installed, or the directory cannot be written.
        BudgetError: ``coded`` is nothing that a file can be, or no file is so small.
        AnalysisError: nothing says how errors of the weights count.

    Examples:
        >>> tensorize.save(small, folder)
    """
    check_one_of("format", format, ("tensorize", compressed_tensors.METHOD), CheckpointError)
    if format == "tensorize":
        made_by = coder_for(model, coded, analysis, coder)
        checkpoint.save(model, directory, made_by, guard_record(unwrapped(model)))
        note_artefact(unwrapped(model), Path(directory))
    elif coded is None and coder is None:
        compressed_tensors.save(model, directory)
    else:
        raise CheckpointError(
            f"format={format!r} has no coded files",
            way_out='save(model, directory, coded=…), which is format="tensorize"',
        )


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read a saved model: a Hugging Face one by itself, any other into ``model``.

    No pickle, no network, no dense weights. Returns the model, in evaluation mode. Its weights run
    by what it was compiled for (``backend``); the report says by what, and why. What was guarded is
    guarded again.

    Args:
        device: where it goes; None: where ``model`` is, or the CPU.
        dtype: of its floating-point weights; None: as they were saved.

    Raises:
        CheckpointError: the artefact is damaged, foreign, of a newer format, or for another model.

    Examples:
        >>> tensorize.save(small, folder)
        >>> again = tensorize.load(folder, model=dense_again)
        >>> torch.equal(again(*inputs), small(*inputs))
        True
    """
    found = store_load.load(directory, model, device=device, dtype=dtype)
    found = use_kernels(found, report(found).backend)
    note_artefact(found, Path(directory))
    resume(found)
    return found


def coder_for(
    model: nn.Module,
    asked: str | bool | Budget | None,
    analysis: Analysis | None,
    by: str | None = None,
) -> Coder | None:
    """What codes a model's tensors as a caller asks for it; None: nothing does.

    Raises:
        BudgetError: it is nothing that a file can be.
        AnalysisError: nothing says how errors of the model's weights count.
        CheckpointError: what it is to be coded ``by`` is not there, or keeps no such limit.
    """
    if by is not None:
        _check_coder(by, asked)
    if asked is None:
        return None
    if asked == LOSSLESS:
        return lossless
    model = unwrapped(model)
    if asked is True:
        size = report(model).plan.predicted.file
        if size is None:
            raise BudgetError(
                "coded=True, and the model's plan chose no size of its file",
                way_out="coded=tensorize.Budget(file=0.15), or compile with that budget",
            )
        asked, analysis = Budget(file=size), analysis or kept_analysis(model)
    limit = _only_limit(asked)
    if limit == "entry_error":
        assert isinstance(asked, Budget)
        assert asked.entry_error is not None
        return within(asked.entry_error, by)
    assert isinstance(asked, Budget)
    plan = report(model).plan
    program = _program(plan, analysis)
    data = _Data() if analysis is None else _Data(analysis.calibration, analysis.loss_fn)
    return _InMetric(model, program, plan, data, asked)


def _check_coder(name: str, asked: Any) -> None:
    """Raises CheckpointError for a coder that is not there, or for another limit than its own."""
    check_one_of("coder", name, tuple(PEERS), CheckpointError)
    if not isinstance(asked, Budget) or _only_limit(asked) != "entry_error":
        raise CheckpointError(
            f"coder={name!r} keeps a largest error of entries, and no other limit",
            way_out=f"coded=tensorize.Budget(entry_error=1e-3), coder={name!r}",
        )
    assert PEERS[name].module is not None


def _only_limit(asked: Any) -> str:
    """The one limit of a budget of a file."""
    given = (
        [f.name for f in fields(Budget) if getattr(asked, f.name, None) is not None]
        if isinstance(asked, Budget)
        else []
    )
    if len(given) == 1 and given[0] in ("file", "loss", "entry_error"):
        return given[0]
    raise BudgetError(
        f"coded={asked!r} is nothing that a file can be",
        way_out='coded="lossless", or one limit: coded=tensorize.Budget(file=0.15), '
        "tensorize.Budget(loss=0.01) or tensorize.Budget(entry_error=1e-4)",
    )


def _program(plan: Plan, analysis: Analysis | None) -> Analysed:
    """What is known of how errors of a model's weights count."""
    if analysis is not None:
        if analysis.fingerprint != plan.fingerprint:
            raise AnalysisError(
                "the analysis is of another model than the plan that this one was made by",
                way_out="pass the analysis whose plan was applied",
            )
        return analysis.program
    found = None if plan.cache is None else disk.read(plan.cache)
    if found is None:
        raise AnalysisError(
            "nothing says how errors of this model's weights count: its analysis is not at hand",
            way_out="pass analysis=tensorize.analyze(dense_model, calibration=...), the one that "
            "it was made by, or compile with cache_dir=, where it is kept; "
            "coded=tensorize.Budget(entry_error=...) needs none",
        )
    return found


@dataclass(frozen=True)
class _Data:
    """What an analysis holds of the data that it was made with."""

    batches: tuple[Batch, ...] = ()
    loss_fn: LossOption = None


def _refit(model: nn.Module, program: Analysed, plan: Plan, data: _Data) -> Refit:
    """Codes are chosen on these data, of which the rows count that did in the analysis."""
    counted = program.counted
    if counted is None:  # the cache does not hold it
        opened = program.to(Planned, plan=plan).to(Opened, model=model)
        counted = CountRows(data.batches, function_of(data.loss_fn)).run(opened).counted
    return Refit(model, data.batches, lambda batch, name: rows_of(counted, batch, name, 0))


class _InMetric:
    """Codes the weights in their metrics, and all else without loss.

    Where the analysis holds its data, codes are chosen for the inputs that the weights really meet.
    """

    def __init__(
        self, model: nn.Module, program: Analysed, plan: Plan, data: _Data, asked: Budget
    ) -> None:
        self._asked, self._plan = asked, plan
        weights = list(weights_of(model, program.spectra))
        refit = _refit(model, program, plan, data) if data.batches and weights else None
        self._filling = Filling(weights, refit)
        keys: dict[int, str] = {}
        for slot in slots_of(model):
            keys.setdefault(id(slot.tensor), slot.key)
        self._keys: Mapping[int, str] = keys
        self._predictor = program.predictor
        if self._predictor is None and asked.loss is not None:
            raise AnalysisError(
                "this analysis cannot predict a loss, as it saw no data",
                way_out="analyze(model, calibration=...), or coded=tensorize.Budget(file=...)",
            )
        self._trial: Trial | None = None
        if self._predictor is not None:
            self._trial = Trial.of(self._filling, data.loss_fn)

    @torch.no_grad()
    def __call__(self, stored: Mapping[str, Tensor]) -> CodedTensors:
        metric = {
            self._keys[id(tensor)] for each in self._filling.weights for tensor in each.tensors
        }
        others = {key: encode(tensor) for key, tensor in stored.items() if key not in metric}
        cost: Cost | None = None
        if self._asked.loss is not None:
            assert self._predictor is not None
            limit = coder.allowed(self._predictor, self._asked.loss)
            expected = self._filling.within_distortion(limit)
            if self._trial is not None:
                made, cost = self._trial.within(self._asked.loss, expected.theta)
            else:
                made = coder.coded(self._filling, expected)
        else:
            given = self._asked.limits(self._plan.dense)["file"]
            made = coder.within_bytes(
                self._filling,
                int(given),
                lambda made: self._all(others, made, None).size - made.bytes,
                sum(len(data) for _, data in others.values()) + _SAID * (len(stored) + 24),
            )
            if self._trial is not None:
                cost = self._trial.cost(made)
        return self._all(others, made, cost)

    def _all(
        self,
        others: Mapping[str, tuple[Coding, bytes]],
        made: coder.Filled,
        cost: Cost | None,
    ) -> CodedTensors:
        together = []
        for tensors, group, data in made.groups:
            names = tuple(self._keys[id(tensor)] for tensor in tensors)
            dtypes = tuple(dtype_name(tensor.dtype) for tensor in tensors)
            shapes = tuple(tuple(tensor.shape) for tensor in tensors)
            together.append((CodedGroup(names, dtypes, shapes, group), data))
        if cost is not None:
            loss = cost.loss, cost.interval
        else:
            loss = self._predictor and coder.rise(self._predictor, made.distortion)
        known = {"asked": str(self._asked), **coder.summary(made, loss)}
        errors = {self._keys[tensor]: error for tensor, error in made.errors.items()}
        return CodedTensors(others, together, known, errors)
