"""``tensorize.save`` and ``tensorize.load``."""

from __future__ import annotations

import os

import torch
from torch import nn

from tensorize.api.analysis import Analysis
from tensorize.api.coded import coder_for
from tensorize.ir.budget import Budget
from tensorize.reports.attach import report
from tensorize.running.in_use import use_kernels
from tensorize.store import load as store_load
from tensorize.store import save as checkpoint


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    coded: str | Budget | None = None,
    analysis: Analysis | None = None,
) -> None:
    """Write a compiled model as safetensors and JSON, atomically.

    Args:
        coded: None: weights are stored as they lie in memory. ``"lossless"``: in fewer bytes, with
            every bit. ``tensorize.Budget(entry_error=1e-4)``: no entry of any stored tensor is
            further than this from what it was, and NaN and infinities stay what they are;
            ``entry_error="1e-3 relative"`` is a share of each tensor's range.
            ``tensorize.Budget(file=0.15)``: the file of weights has at most this share of the
            dense model's bytes (an int: so many bytes), and costs as little of the loss as it can;
            ``tensorize.Budget(loss=0.01)``: the loss is predicted to rise by at most this beyond
            what the plan costs. ``tensorize.load`` and ``from_pretrained`` read all of them.
        analysis: how errors of the weights count, for ``file`` and ``loss``: the one that the
            model was made by. None: the one that its plan finds in ``cache_dir``.

    Raises:
        CheckpointError: the model was not made by tensorize, or the directory cannot be written.
        BudgetError: ``coded`` is nothing that a file can be, or no file is so small.
        AnalysisError: nothing says how errors of the weights count.
    """
    checkpoint.save(model, directory, coder_for(model, coded, analysis))


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read a saved model: a Hugging Face one by itself, any other into ``model``.

    No pickle, no network, no dense weights. Returns the model, in evaluation mode. Its weights run
    by what it was compiled for (``backend``); the report says by what, and why.

    Args:
        device: where it goes; None: where ``model`` is, or the CPU.
        dtype: of its floating-point weights; None: as they were saved.

    Raises:
        CheckpointError: the artefact is damaged, foreign, of a newer format, or for another model.
    """
    found = store_load.load(directory, model, device=device, dtype=dtype)
    return use_kernels(found, report(found).backend)
