"""What an observer tells of a call against a weight, and a check of it against torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.capture.uses import patches


@dataclass
class Seen:
    """What an observer told of one weight."""

    matmuls: list[tuple[Frame, Matmul, Tensor]]
    others: list[str]


def observe(run: Callable[[], Any], *weights: nn.Parameter, frozen: bool = False) -> Seen:
    seen = Seen([], [])

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        seen.matmuls.append((frame, matmul, output))
        return output

    named = [(f"w{k}", weight) for k, weight in enumerate(weights)]
    with Observer(named, on_matmul, lambda name, other: seen.others.append(other), frozen=frozen):
        run()
    return seen


def the_matmul(run: Callable[[], Any], weight: nn.Parameter) -> tuple[Frame, Matmul, Tensor]:
    seen = observe(run, weight)
    assert seen.others == []
    assert len(seen.matmuls) == 1
    return seen.matmuls[0]


def product(frame: Frame, matmul: Matmul, weight: Tensor, absolute: bool = False) -> Tensor:
    """x · W as ``Matmul`` promises it: the output's index last, W the parameter's own matrix."""
    x = matmul.x.detach()
    if frame.expert is not None:
        weight = weight[frame.expert]
    if frame.rows is not None:
        weight = weight[slice(*frame.rows)]
    if matmul.convolution is not None:
        rows = patches(matmul, tuple(weight.shape[2:]))
        assert rows is not None
        groups = matmul.convolution.groups
        # Of every place, one row for each group of channels, against its group's outputs.
        x = rows.reshape(-1, groups, 1, rows.shape[-1])
        weight = weight.reshape(groups, weight.shape[0] // groups, -1)
    elif matmul.split:
        weight = weight.reshape(math.prod(weight.shape[: matmul.split]), -1)
    if absolute:
        x, weight = (x if matmul.contract == "lookup" else x.abs()), weight.abs()
    if matmul.contract == "lookup":
        return weight[x]
    if matmul.offsets is not None:
        ends = [0, *matmul.offsets.tolist()]
        matrices = weight.mT if matmul.contract == "columns" else weight
        parts = [x[a:b] @ m for a, b, m in zip(ends[:-1], ends[1:], matrices, strict=True)]
        return torch.cat(parts)
    return x @ (weight.mT if matmul.contract == "columns" else weight)


def check(frame: Frame, matmul: Matmul, output: Tensor, weight: Tensor) -> None:
    """from_rows(x · W) + bias is the output, to the rounding of sums of that length."""
    weight = weight.detach()
    rows, scale = (product(frame, matmul, weight, absolute) for absolute in (False, True))
    if matmul.convolution is not None:  # patches are flat: (batch, places) come back first
        lead = (output.shape[0], *output.shape[2:])
        rows, scale = rows.reshape(*lead, -1), scale.reshape(*lead, -1)
    expected, scale = matmul.from_rows(rows), matmul.from_rows(scale)
    if matmul.bias is not None:
        bias = matmul.bias.detach()
        if matmul.convolution is not None:
            bias = bias.reshape(-1, *[1] * (output.dim() - 2))
        expected, scale = expected + bias, scale + bias.abs()
    assert output.shape == expected.shape
    terms = 2 * math.prod(weight.shape[1:]) + 1
    assert ((output - expected).abs() <= terms * torch.finfo(output.dtype).eps * scale).all()
    assert torch.equal(matmul.to_rows(matmul.from_rows(rows)), rows)
    assert matmul.to_rows(output).shape == rows.shape
