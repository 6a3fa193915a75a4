"""``tensorize.save`` and ``tensorize.load``."""

from __future__ import annotations

import os

import torch
from torch import nn

from tensorize.api.analysis import Analysis
from tensorize.api.coded import coder_for
from tensorize.base.errors import CheckpointError, check_one_of
from tensorize.ir.budget import Budget
from tensorize.reports.attach import report
from tensorize.running.in_use import use_kernels
from tensorize.store import compressed_tensors
from tensorize.store import load as store_load
from tensorize.store import save as checkpoint


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: str = "tensorize",
    coded: str | Budget | None = None,
    analysis: Analysis | None = None,
) -> None:
    """Write a compiled model as safetensors and JSON, atomically.

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
            what the plan costs. ``tensorize.load`` and ``from_pretrained`` read all of them.
        analysis: how errors of the weights count, for ``file`` and ``loss``: the one that the
            model was made by. None: the one that its plan finds in ``cache_dir``.

    Raises:
        CheckpointError: the model was not made by tensorize, a weight is of no form that the format
            holds, the format is not ours and ``coded`` is asked for, or the directory cannot be
            written.
        BudgetError: ``coded`` is nothing that a file can be, or no file is so small.
        AnalysisError: nothing says how errors of the weights count.

    Example:
        >>> tensorize.save(small, folder)
    """
    check_one_of("format", format, ("tensorize", compressed_tensors.METHOD), CheckpointError)
    if format == "tensorize":
        checkpoint.save(model, directory, coder_for(model, coded, analysis))
    elif coded is None:
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
    by what it was compiled for (``backend``); the report says by what, and why.

    Args:
        device: where it goes; None: where ``model`` is, or the CPU.
        dtype: of its floating-point weights; None: as they were saved.

    Raises:
        CheckpointError: the artefact is damaged, foreign, of a newer format, or for another model.

    Example:
        >>> tensorize.save(small, folder)
        >>> again = tensorize.load(folder, model=dense_again)
        >>> torch.equal(again(*inputs), small(*inputs))
        True
    """
    found = store_load.load(directory, model, device=device, dtype=dtype)
    return use_kernels(found, report(found).backend)
