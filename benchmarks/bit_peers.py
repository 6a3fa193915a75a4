"""What others do to bits, from their papers, in plain torch: to compare with ours at equal bytes.

=======  =========================================================================================
RTN      every entry to the nearest code, scales from least to largest entry
GPTQ     columns one after another, the later ones take up what the earlier lost (Frantar et al.
         2023): damping .01, no order by activation, layer by layer in the order of the forward
         pass, inputs from the model as it is compressed so far
GPTQ+LR  the same, and a low-rank correction in bfloat16: the SVD of what the codes lost, whitened
         by the inputs' second moment (LQER, Zhang et al. 2024; EoRA, Liu et al. 2024)
=======  =========================================================================================

Groups of 64 or 128 columns have a scale in bfloat16 and a zero point of as many bits as the codes;
they count, and so does all that stays in 16 bits. *Ends* are the tables and the head: they stay in
16 bits, as these tools leave them; or are rounded to 8 or 4 after all else; or everything has the
same bits: tables are then rounded before all else, so that the layers see it, and a head of its own
is one more layer. Norms and biases always stay.

Weights hold the numbers that the codes stand for: what is compared is what they lose.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.capture.inputs import batch_of

DAMPING = 0.01
HEAD = "lm_head"
ENDS = (8, 4)


@dataclass(frozen=True)
class Setting:
    """Bits of the codes, columns of a group, and the rank of the corrections."""

    bits: int
    group: int = 64
    rank: int = 0

    def __str__(self) -> str:
        corrected = f", rank {self.rank}" if self.rank else ""
        return f"{self.bits} bits in groups of {self.group}{corrected}"

    def bytes(self, rows: int, columns: int) -> int:
        """Of a weight: codes, scales and zero points, and the factors of a correction."""
        groups = -(-columns // self.group)
        codes = -(-columns * self.bits // 8) + 2 * groups + -(-groups * self.bits // 8)
        return rows * codes + 2 * self.rank * (rows + columns)


PLAIN = (
    *(Setting(bits) for bits in (8, 4, 3, 2)),
    *(Setting(bits, group=128) for bits in (4, 3, 2)),
)
METHODS = {
    "RTN": PLAIN,
    "GPTQ": PLAIN,
    "GPTQ+LR": tuple(Setting(bits, rank=rank) for bits in (4, 3, 2) for rank in (8, 32)),
}


@dataclass(frozen=True)
class Changed:
    """A model whose weights hold what is left of them, and the bytes that it would take."""

    model: nn.Module
    bytes: int


def configurations(
    method: str, model: nn.Module, calibration: Sequence[Any]
) -> Iterator[tuple[str, Changed]]:
    """What each configuration of a method makes of a model, by name, one after another.

    Args:
        method: one of ``METHODS``.
        model: in float32, with the numbers of a model in bfloat16.
        calibration: what the layers' inputs are made of.
    """
    layers, ends = parts(model)
    tables = [name for name in ends if name != HEAD]
    data = None if method == "RTN" else calibration
    for setting in METHODS[method]:
        small = layers_rounded(model, layers, data, setting)
        kinds = dict.fromkeys(layers, setting)
        yield f"{setting}, ends in 16 bits", Changed(small, size(model, kinds))
        for end in (Setting(bits, setting.group) for bits in ENDS):
            whole = copy.deepcopy(small)
            round_all(whole, ends, end)
            sizes = size(model, {**kinds, **dict.fromkeys(ends, end)})
            yield f"{setting}, ends in {end.bits} bits", Changed(whole, sizes)
        whole = copy.deepcopy(model)
        plain = replace(setting, rank=0)
        round_all(whole, tables, plain)
        every = [name for name in (*layers, *ends) if name not in tables]
        kinds = {**dict.fromkeys(every, setting), **dict.fromkeys(tables, plain)}
        whole = layers_rounded(whole, every, data, setting)
        yield f"{setting}, everything", Changed(whole, size(model, kinds))


def parts(model: nn.Module) -> tuple[list[str], list[str]]:
    """The layers of a model, and its ends: tables and a head of its own."""
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    tables = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
    heads = [name for name in linears if name == HEAD]
    return [name for name in linears if name != HEAD], [*tables, *heads]


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The weight (M, N) of a layer or a table."""
    return model.get_parameter(f"{name}.weight")


def size(model: nn.Module, kinds: Mapping[str, Setting]) -> int:
    """Bytes of a model in bfloat16, some modules' weights as these settings keep them."""
    total = sum(2 * parameter.numel() for parameter in model.parameters())
    for name, setting in kinds.items():
        rows, columns = weight_of(model, name).shape
        total += setting.bytes(rows, columns) - 2 * rows * columns
    return total


# ------------------------------------------------------------------------------------- one weight


def steps(group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every row of a group (M, columns), from its range; (M, 1) each."""
    low = group.amin(1, keepdim=True).clamp_max(0)
    high = group.amax(1, keepdim=True).clamp_min(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12).bfloat16().float()
    return step, (-low / step).round().clamp(0, 2**bits - 1)


def nearest(weight: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What the nearest codes stand for."""
    return ((weight / step).round().add(zero).clamp(0, 2**bits - 1) - zero) * step


def to_nearest(weight: Tensor, kind: Setting) -> Tensor:
    """Every entry of a weight (M, N) by itself."""
    bits = kind.bits
    return torch.cat([nearest(g, *steps(g, bits), bits) for g in weight.split(kind.group, 1)], 1)


def with_feedback(weight: Tensor, moment: Tensor, kind: Setting) -> Tensor:
    """GPTQ: column by column, what one loses is taken up by those after it.

    Args:
        weight: (M, N).
        moment: X Xᵀ of the layer's inputs, (N, N), damped.
    """
    work, done = weight.clone(), torch.empty_like(weight)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True).to(work.dtype)
    for start in range(0, work.shape[1], kind.group):
        group = slice(start, min(start + kind.group, work.shape[1]))
        step, zero = steps(work[:, group], kind.bits)
        lost = torch.zeros_like(work[:, group])
        for k in range(group.start, group.stop):
            done[:, k] = nearest(work[:, k : k + 1], step, zero, kind.bits)[:, 0]
            off = (work[:, k] - done[:, k]) / upper[k, k]
            work[:, k : group.stop] -= off[:, None] * upper[k, k : group.stop]
            lost[:, k - start] = off
        work[:, group.stop :] -= lost @ upper[group, group.stop :]
    return done


def correction(lost: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The low-rank matrix nearest to what was lost, for these inputs; its factors in bfloat16."""
    root = torch.linalg.cholesky(moment).to(lost.dtype)
    u, s, v = torch.linalg.svd(lost @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
    return (u[:, :rank] * s[:rank]).bfloat16().float() @ right.bfloat16().float()


# --------------------------------------------------------------------------------- a whole model


@torch.no_grad()
def round_all(model: nn.Module, names: Sequence[str], kind: Setting) -> None:
    """Every entry of these modules' weights to the nearest code, in place."""
    for name in names:
        weight = weight_of(model, name)
        weight.copy_(to_nearest(weight, kind))


@torch.no_grad()
def layers_rounded(
    model: nn.Module,
    names: Sequence[str],
    calibration: Sequence[Any] | None,
    kind: Setting,
) -> nn.Module:
    """A copy with rounded layers: with feedback where there are data, else to the nearest."""
    small = copy.deepcopy(model)
    if calibration is None:
        round_all(small, names, kind)
        return small
    groups = by_input(small, names, calibration[0])
    seen = {name for group in groups for name in group}
    round_all(small, [name for name in names if name not in seen], kind)  # no output needs them
    for group in groups:
        moment = second_moment(small, group[0], calibration)
        for name in group:
            weight = weight_of(small, name)
            found = with_feedback(weight, moment, kind)
            if kind.rank:
                found += correction(weight - found, moment, kind.rank)
            weight.copy_(found)
    return small


class _Enough(Exception):
    """A forward pass need not go on."""


def by_input(model: nn.Module, names: Sequence[str], batch: Any) -> list[list[str]]:
    """Layers that read the same input, together, in the order of the forward pass."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if seen and seen[-1][0] is inputs[0]:
            seen[-1][1].append(name)
        else:
            seen.append((inputs[0], [name]))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in names
    ]
    given = batch_of(batch)
    model(*given.args, **given.kwargs)
    for hook in hooks:
        hook.remove()
    return [group for _, group in seen]


def second_moment(model: nn.Module, name: str, calibration: Sequence[Any]) -> Tensor:
    """X Xᵀ of a layer's inputs over the calibration data, damped, in float64."""
    columns = weight_of(model, name).shape[1]
    total = torch.zeros(columns, columns, dtype=torch.float64)

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, columns)
        total.add_((x.mT @ x).double())
        raise _Enough

    hook = model.get_submodule(name).register_forward_pre_hook(add)
    for batch in map(batch_of, calibration):
        try:
            model(*batch.args, **batch.kwargs)
        except _Enough:
            continue
    hook.remove()
    diagonal = total.diagonal()
    diagonal.add_(DAMPING * diagonal.mean())
    return total
