"""Read an einsum or a tensordot with a weight as a matmul."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from tensorize.capture.matmul import Matmul


def read_einsum(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    """The weight's axes split into summed and kept ones, which stand together, so that it is a
    matrix without a copy; one more axis in front stacks several, and so do any number behind.
    """
    if kwargs or len(args) < 2 or not isinstance(args[0], str):
        return None
    operands = args[1:] if len(args) > 2 else args[1]
    if not isinstance(operands, list | tuple):
        return None
    axes = _axes(args[0], operands)
    if axes is None or any(len(set(term)) != len(term) for term in axes):
        return None
    *terms, output = axes
    found = _others(terms, output, operands, weight)
    if found is None:
        return None
    w_axes, x_axes, x = found
    shared = [axis for axis in w_axes if axis in x_axes and axis in output]
    summed = [axis for axis in w_axes if axis in x_axes and axis not in output]
    kept = [axis for axis in w_axes if axis not in x_axes and axis in output]
    for axis in (*summed, *shared):
        if x.shape[x_axes.index(axis)] != weight.shape[w_axes.index(axis)]:
            return None  # einsum repeats an axis of size 1
    if shared and w_axes.endswith("".join(shared)):
        return _of_modes(x, x_axes, w_axes, summed, kept, shared, output)
    # Matrices for rows of their own each, or all for the same rows, as the heads of a projection.
    alike = [w_axes[0], *summed, w_axes[-1]] == list(w_axes) and kept == [w_axes[0], w_axes[-1]]
    stack = kept[:1] if alike else shared
    kept = kept[1:] if alike else kept
    matrix = w_axes[len(stack) :]
    if not summed or not kept or len(stack) > 1 or w_axes[: len(stack)] != "".join(stack):
        return None
    if stack and (len(summed), len(kept)) != (1, 1):
        return None
    if matrix not in ("".join(summed + kept), "".join(kept + summed)):
        return None
    lead = [axis for axis in x_axes if axis not in summed and axis not in stack]
    if stack and not lead:
        return None  # a row for each matrix, or one for all of them
    if stack:  # right before the rows: (..., E, rows, width)
        lead.insert(-1, stack[0])
    if {*lead, *kept} != set(output):
        return None
    sizes = [weight.shape[w_axes.index(axis)] for axis in kept]
    order = [*lead, *kept]
    to_output, to_rows = [order.index(a) for a in output], [output.index(a) for a in order]
    x = x.permute([x_axes.index(axis) for axis in (*lead, *summed) if axis in x_axes])
    if alike:
        x = x.unsqueeze(-3)
    if len(summed) > 1:
        x = x.flatten(-len(summed))
    return Matmul(
        "einsum",
        "rows" if matrix[0] == summed[0] else "columns",
        x,
        from_rows=lambda y: y.unflatten(-1, sizes).permute(to_output),
        to_rows=lambda y: y.permute(to_rows).flatten(-len(kept)),
        split=0 if len(matrix) == 2 else len(summed if matrix[0] == summed[0] else kept),
        stacked=bool(stack),
    )


def _of_modes(
    x: Tensor,
    x_axes: str,
    w_axes: str,
    summed: list[str],
    kept: list[str],
    modes: list[str],
    output: str,
) -> Matmul | None:
    """A matrix for every mode, as spectral convolutions have: (in, out, *modes).

    The modes are brought before the rows, as one axis: x (E, …, rows, in).
    """
    lead = [axis for axis in x_axes if axis not in summed and axis not in modes]
    if (len(summed), len(kept)) != (1, 1) or not lead or {*lead, *kept, *modes} != {*output}:
        return None
    if w_axes[:2] not in (summed[0] + kept[0], kept[0] + summed[0]):
        return None
    order = [*modes, *lead, *kept]
    to_output, to_rows = [order.index(a) for a in output], [output.index(a) for a in order]
    sizes = [x.shape[x_axes.index(axis)] for axis in (*modes, *lead)]
    count = len(modes)
    x = x.permute([x_axes.index(axis) for axis in (*modes, *lead, *summed)])
    return Matmul(
        "einsum",
        "rows" if w_axes[0] == summed[0] else "columns",
        x.flatten(0, count - 1).flatten(1, -2),
        from_rows=lambda y: y.reshape(*sizes, -1).permute(to_output),
        to_rows=lambda y: y.permute(to_rows).flatten(0, count - 1).flatten(1, -2),
        modes=count,
        stacked=True,
    )


def _axes(equation: str, operands: Sequence[Any]) -> list[str] | None:
    """An einsum's axes, a letter each: of every operand, then of the output.

    Dots stand for letters that the equation does not use, counted from the right; an output that is
    not given holds the axes that come once, in the order of the alphabet.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if inputs.count(",") + 1 != len(operands):
        return None
    if not arrow:
        once = [axis for axis in inputs if axis.isalpha() and inputs.count(axis) == 1]
        output = "..." * ("..." in inputs) + "".join(sorted(once))
    unused = "".join(axis for axis in ascii_letters if axis not in equation)
    terms, longest = [], 0
    for term, operand in zip(inputs.split(","), operands, strict=True):
        dots = operand.dim() - len(term.replace("...", ""))
        if dots < 0 or dots > len(unused) or (dots and "..." not in term):
            return None
        terms.append(term.replace("...", unused[len(unused) - dots :]))
        longest = max(longest, dots)
    return [*terms, output.replace("...", unused[len(unused) - longest :])]


def _others(
    terms: Sequence[str], output: str, operands: Sequence[Any], weight: Any
) -> tuple[str, str, Tensor] | None:
    """The weight's axes, and all other operands as one: its axes and its values.

    Several others are multiplied first, where that is no larger than one of them, or than the
    weight's product with the first of them.
    """
    own = [term for term, value in zip(terms, operands, strict=True) if value is weight]
    rest = [(t, v) for t, v in zip(terms, operands, strict=True) if v is not weight]
    if len(own) != 1 or not rest:
        return None
    x_axes, x = rest[0]
    if len(rest) == 1:
        return own[0], x_axes, x
    values = [v for _, v in rest]
    if not all(isinstance(v, Tensor) for v in values):
        return None
    every = "".join(dict.fromkeys("".join(t for t, _ in rest)))
    x_axes = "".join(axis for axis in every if axis in own[0] or axis in output)
    sizes: dict[str, int] = {}
    for term, value in zip(terms, operands, strict=True):
        for axis, size in zip(term, value.shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 1))
    beside = {*own[0], *rest[0][0]}
    product = [axis for axis in beside if axis in output or any(axis in t for t, _ in rest[1:])]
    bounds = [*(t for t, _ in rest), product]
    if not any(_numbers(x_axes, sizes) <= _numbers(axes, sizes) for axes in bounds):
        return None
    return own[0], x_axes, torch.einsum(f"{','.join(t for t, _ in rest)}->{x_axes}", *values)


def _numbers(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    total = 1
    for axis in axes:  # dynamo knows no math.prod of a generator
        total *= sizes[axis]
    return total


def read_tensordot(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    """A tensordot as the einsum that it is: axes of both, a pair of lists, are summed."""
    call = {"dims": 2, "out": None, **dict(zip(("a", "b", "dims", "out"), args, strict=False))}
    call |= kwargs
    if len(args) > 4 or call.keys() != {"a", "b", "dims", "out"} or call["out"] is not None:
        return None
    a, b, dims = call["a"], call["b"], call["dims"]
    if isinstance(dims, int):
        dims = list(range(a.dim() - dims, a.dim())), list(range(dims))
    letters = a.dim() + b.dim()
    if not isinstance(dims, list | tuple) or len(dims) != 2 or letters > len(ascii_letters):
        return None
    first = list(ascii_letters[: a.dim()])
    second = list(ascii_letters[a.dim() : letters])
    of_a, of_b = ([one] if isinstance(one, int) else list(one) for one in dims)
    for i, j in zip(of_a, of_b, strict=True):
        second[j] = first[i]
    output = [axis for axis in first + second if not (axis in first and axis in second)]
    return read_einsum((f"{''.join(first)},{''.join(second)}->{''.join(output)}", a, b), {}, weight)
