"""Training plans as torch source: a forward function, and a backward one, as ``aten`` writes them.

``forward(x, cores)`` returns y, the input where the backward pass needs it (else None), and the
other values that are saved. ``backward(g, x, cores, saved)`` returns the gradients of x and of
every core, None for those that the plan does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tensorize.codegen.aten import emit as aten
from tensorize.codegen.aten.emit import Emitter
from tensorize.codegen.aten.layouts import (
    Layouts,
    Value,
    core_values,
    rows_value,
    sides,
)
from tensorize.ir.orders import TrainingPiece, TrainingPlan, typical_batch


def emit(plan: TrainingPlan) -> str:
    """Source text of ``forward`` and ``backward``; inputs and cores as ``aten.emit`` takes them."""
    spec = plan.spec
    x_axes, y_axes = sides(spec, plan.contract)
    saved: dict[int, dict[str, Value]] = {}
    forward = [
        *aten.opening("forward", spec, plan.contract),
        "    given = x",
        *aten.flattened("x", spec, x_axes),
        *aten.by_rows("x", spec, plan.pieces, lambda piece: _forward(plan, piece, saved)),
    ]
    wrt = ", ".join("x" if operand == "x" else f"core {operand}" for operand in plan.gradients)
    backward = [
        "def backward(g, x, cores, saved):",
        f'    """Gradients of {wrt}, from that at y.',
        "",
        "    Cores and sizes are those of forward.",
        '    """',
        f"    {aten.unpacked([f'c{k}' for k in range(len(spec.cores))])} = cores",
        "    lead = g.shape[:-1]",
        *aten.flattened("g", spec, y_axes),
        *aten.by_rows("g", spec, plan.pieces, lambda piece: _backward(plan, piece, saved)),
    ]
    return aten.with_imports("\n".join([*forward, "", "", *backward]) + "\n")


@lru_cache(maxsize=4096)
def build(plan: TrainingPlan) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compile what ``emit`` writes, once for each plan: ``forward`` and ``backward``."""
    names = aten.compiled(emit(plan), "training")
    return names["forward"], names["backward"]


def _forward(
    plan: TrainingPlan, piece: TrainingPiece, saved: dict[int, dict[str, Value]]
) -> list[str]:
    """The body of one piece; the layouts of what is saved go into ``saved``."""
    x_axes, y_axes = sides(plan.spec, plan.contract)
    leaves = {**core_values(plan.spec), "x": rows_value(plan.spec, "x", x_axes)}
    steps = {step.name: step for step in piece.forward}
    layouts = Layouts(plan.spec, typical_batch(piece.first_batch, piece.last_batch), leaves, steps)
    emitter = Emitter(layouts, keep_copies=True)
    y = emitter.result(steps["y"].tree, y_axes)
    # Of a value and a copy of it in the order that y needed, the copy: its gradient needs the same.
    last = {name: layouts.leaves[name][-1] for name in piece.saved if name != "x"}
    saved[piece.first_batch] = {n: Value(value.blocks, n) for n, value in last.items()}
    given = "given" if "x" in piece.saved else None
    names = _tuple([str(value.source) for value in last.values()])
    return [
        f"# {aten.rows_of(piece)}: {piece.constant} + {piece.slope} B FLOPs in both passes",
        f"# {piece.saved_constant} + {piece.saved_slope} B elements saved",
        *emitter.body,
        f"y = {y}.reshape(*lead, {aten.width(plan.spec, y_axes)})",
        f"return y, {given}, {names}",
    ]


def _backward(
    plan: TrainingPlan, piece: TrainingPiece, saved: dict[int, dict[str, Value]]
) -> list[str]:
    spec = plan.spec
    x_axes, y_axes = sides(spec, plan.contract)
    known = saved[piece.first_batch]
    leaves = {
        **core_values(spec),
        "x": rows_value(spec, "x", x_axes),
        "g": rows_value(spec, "g", y_axes),
        **known,
    }
    steps = {step.name: step for step in piece.backward}
    layouts = Layouts(spec, typical_batch(piece.first_batch, piece.last_batch), leaves, steps)
    emitter = Emitter(layouts, keep_copies=True)
    if "x" in piece.saved:
        emitter.body += [line.strip() for line in aten.flattened("x", spec, x_axes)]
    if known:
        emitter.body.append(f"{aten.unpacked(list(known))} = saved")
    for operand in plan.gradients:
        name = f"d{operand}"
        axes = x_axes if operand == "x" else spec.cores[int(operand)]
        text = emitter.result(steps[name].tree, axes)
        if operand == "x":
            shape = f"*lead, {aten.width(spec, x_axes)}"
        else:
            shape = ", ".join(map(str, spec.core_shapes[int(operand)]))
        emitter.body.append(f"{name} = {text}.reshape({shape})")
    operands = ("x", *range(len(spec.cores)))
    results = [f"d{operand}" if operand in plan.gradients else "None" for operand in operands]
    return [
        f"# {aten.rows_of(piece)}",
        *emitter.body,
        f"return {', '.join(results)}",
    ]


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"
