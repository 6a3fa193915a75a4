"""``tensorize.save`` and ``tensorize.load``."""

from __future__ import annotations

import os

import torch
from torch import nn

from tensorize.base.errors import CheckpointError, check_one_of
from tensorize.reports.attach import report
from tensorize.running.in_use import use_kernels
from tensorize.store import compressed_tensors
from tensorize.store import load as store_load
from tensorize.store import save as checkpoint


def save(model: nn.Module, directory: str | os.PathLike[str], *, format: str = "tensorize") -> None:
    """Write a compiled model as safetensors and JSON, atomically.

    Args:
        format: ``"compressed-tensors"`` writes a Hugging Face model, whose linears are all dense in
            four or eight bits, for vLLM and for transformers with the package compressed-tensors.
            Tables are then written as numbers.

    Raises:
        CheckpointError: the model was not made by tensorize, a weight is of no form that the format
            holds, or the directory cannot be written.

    Example:
        >>> tensorize.save(small, folder)
    """
    check_one_of("format", format, ("tensorize", compressed_tensors.METHOD), CheckpointError)
    write = checkpoint.save if format == "tensorize" else compressed_tensors.save
    write(model, directory)


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
