"""Bodies of kernels put together to a module that runs alone: ``dot``, the kernel, ``launch``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tensorize.codegen.triton.guard import Outputs
from tensorize.codegen.triton.roles import NotCovered, Tiles, flops_a_row, roles
from tensorize.codegen.triton.text import Lines, Operand
from tensorize.ir.orders import Tree
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work

MOST_PROGRAMS = 65535
"""Of the second axis of a grid, on NVIDIA."""


@dataclass(frozen=True)
class Argument:
    """Of a kernel: ``kind`` is the dtype that it points to, or "size" of an integer.

    ``aligned``: it is a multiple of 16 where tensors are contiguous.
    """

    name: str
    kind: str
    aligned: bool = False


@dataclass(frozen=True)
class Source:
    """The text of a kernel and how it is called.

    ``name`` is the kernel's function; ``text`` also defines ``launch(*tensors, precision, widen)``,
    whose tensors are ``inputs`` then ``outputs``. ``checked``: which outputs of every weight the
    programs have, whose sums they are to be given.
    """

    name: str
    text: str
    arguments: tuple[Argument, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tiles: Tiles
    programs: int
    counters: int = 0
    checked: tuple[Outputs, ...] = ()

    def __str__(self) -> str:
        return self.text


_DOT = '''@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b + c in float32. WIDEN is for the interpreter, which multiplies bfloat16 as integers."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)
'''


@dataclass(frozen=True)
class Body:
    """A part of a kernel that ``programs`` programs of a row block run, each for its ``part``."""

    lines: tuple[str, ...]
    operands: tuple[Operand, ...]
    programs: int


def assemble(
    name: str,
    about: Sequence[str],
    bodies: Sequence[Body],
    *,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    tiles: Tiles,
    blocks: bool = True,
    scratch: Mapping[str, str] | None = None,
    counters: int = 0,
    rows_of: str = "x",
    checked: Sequence[Outputs] = (),
) -> Source:
    """The module's text: docstring, ``dot``, the bodies, the kernel and its ``launch``.

    Args:
        blocks: whether axis 0 of the grid runs over row blocks, and axis 1 over the programs of
            each; else the programs are all that there is.
        scratch: workspaces by name, and the shape of each (in terms of ``rows``).
        counters: int32 zeros that the kernel needs a row block, and leaves as zeros.
        rows_of: the input whose first size is the number of rows.
        checked: the outputs of every program, for checks.
    """
    scratch = dict(scratch or {})
    operands = list(dict.fromkeys(o for body in bodies for o in body.operands))
    order = {o.name: k for k, o in enumerate((*inputs, *outputs))}
    operands.sort(key=lambda o: order.get(o.name, len(order)))
    arguments = [Argument(o.name, o.dtype, o.dtype == "element") for o in operands]
    if counters:
        arguments.append(Argument("arrived", "int32"))
    arguments.append(Argument("rows", "size"))
    arguments += [
        Argument(o.row_stride, "size", o.width % 16 == 0) for o in operands if o.row_stride
    ]
    names = [argument.name for argument in arguments]
    text = Lines(0)
    text('"""' + about[0])
    for line in about[1:]:
        text(line)
    text('"""')
    torch_too = ["import torch"] if scratch or counters else []
    for line in ("", *torch_too, "import triton", "import triton.language as tl", "", ""):
        text(line)
    text.lines += _DOT.splitlines()
    known = ["PRECISION", "WIDEN", *(["WAVE"] if counters else [])]
    flags = [f"{flag}: tl.constexpr" for flag in known]
    whole = len(bodies) == 1
    for k, body in enumerate(bodies):
        if whole:
            break
        text.lines += ["", "", "@triton.jit"]
        text.call(f"def part_{k}", ["part", *names, *flags], ":")
        text.lines += body.lines
    # Else it would be compiled again for one row, and for each multiple of 16 that comes first.
    text.lines += ["", "", '@triton.jit(do_not_specialize=["rows"])']
    text.call(f"def {name}", [*names, *flags], ":")
    text.depth = 1
    if not whole or any("part" in line for line in bodies[0].lines):
        text(f"part = tl.program_id({1 if blocks else 0})")
    first = 0
    for k, body in enumerate(bodies):
        if whole:
            text.lines += body.lines
            break
        last = k == len(bodies) - 1
        header = "else" if last else f"{'if' if k == 0 else 'elif'} part < {first + body.programs}"
        with text.block(header):
            offset = f"part - {first}" if first else "part"
            text.call(f"part_{k}", [offset, *names, *known])
        first += body.programs
    programs = sum(body.programs for body in bodies)
    if blocks and programs > MOST_PROGRAMS:
        raise NotCovered(f"{programs} programs a row block are more than a grid takes")
    _launch(text, name, inputs, outputs, tiles, programs, blocks, scratch, counters, rows_of, names)
    return Source(
        name,
        "\n".join(text.lines) + "\n",
        tuple(arguments),
        tuple(o.name for o in inputs),
        tuple(o.name for o in outputs),
        tiles,
        programs,
        counters,
        tuple(checked) if any(o.name == "wrong" for o in inputs) else (),
    )


def _launch(
    text: Lines,
    name: str,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    tiles: Tiles,
    programs: int,
    blocks: bool,
    scratch: Mapping[str, str],
    counters: int,
    rows_of: str,
    names: Sequence[str],
) -> None:
    tensors = [o.name for o in (*inputs, *outputs)]
    text.depth = 0
    text.lines += ["", ""]
    options = ['precision="ieee"', "widen=False", f"num_stages={tiles.stages}"]
    own = ["arrived=None", "wave=64"] if counters else []
    text.call("def launch", [*tensors, *own, *options], ":")
    text.depth = 1
    text(f'"""Writes {", ".join(o.name for o in outputs)}; a row\'s entries stand together."""')
    text(f"rows = {rows_of}.shape[0]")
    if blocks:
        text("if rows == 0:")
        text("    return")
        text(f"grid = (triton.cdiv(rows, {tiles.rows}), {programs})")
    else:
        text(f"grid = ({programs},)")
    for workspace, shape in scratch.items():
        text.call(
            f"{workspace} = torch.empty",
            [f"({shape})", "dtype=torch.float32", f"device={rows_of}.device"],
        )
    if counters:
        text("if arrived is None:")
        text.call(
            "    arrived = torch.zeros",
            [f"grid[0] * {counters}", "dtype=torch.int32", f"device={rows_of}.device"],
        )
    values = [f"{n.removesuffix('_row')}.stride(0)" if n.endswith("_row") else n for n in names]
    text(f"{name}[grid](")
    text.depth += 1
    for value in values:
        text(f"{value},")
    waves = ("WAVE=wave",) if counters else ()
    for flag in ("PRECISION=precision", "WIDEN=widen", *waves, f"num_warps={tiles.warps}"):
        text(f"{flag},")
    text("num_stages=num_stages,")
    text.depth -= 1
    text(")")


def row_block(text: Lines, tiles: Tiles, *, narrow: bool = False) -> None:
    """Positions of rows: 64 bits, so that no offset overflows, or ``narrow``, for few rows."""
    first = "tl.program_id(0)" if narrow else "tl.program_id(0).to(tl.int64)"
    text(f"b = {first} * {tiles.rows} + tl.arange(0, {tiles.rows})")


def _order(spec: TTSpec, contract: str) -> str:
    """The contraction tree, as ``plan_contraction`` writes it."""
    cores = range(len(spec.cores) - 1, -1, -1)
    if len(spec.cores) == 2:
        role = roles(spec, contract)
        cores = (role.first, role.second)
    tree: Tree = "x"
    for core in cores:
        tree = (tree, core)
    return str(tree)


def title(work: Work, what: str, *, planned: bool = True) -> list[str]:
    """The first lines of a kernel's docstring: what it computes, shapes, and the plan."""
    lines = [f"{what}.", ""]
    for k, spec in enumerate(work.specs):
        name = f"W_{k}" if len(work.specs) > 1 else "W"
        sizes = ", ".join(f"{axis}={size}" for axis, size in spec.sizes)
        cores = ", ".join(f"c{c} ({', '.join(axes)})" for c, axes in enumerate(spec.cores))
        lines.append(f"{name} {spec.shape}: {cores}; {sizes}.")
    if work.shared:
        lines.append("All have the first factor of W_0, whose product with x is computed once.")
    if any(spec.pivoted for spec in work.specs):
        lines.append("V is the identity in the columns that order names first: they are not in c1.")
    if work.guarded:
        lines.append("Rows that are off by more than the limits are counted in wrong, by weight.")
    if work.norm is not None:
        lines.append(f"x goes through a {work.norm.kind} norm (eps {work.norm.eps}) on the way in.")
    specs = work.specs if planned else ()
    orders = {flops_a_row(spec, work.contract): _order(spec, work.contract) for spec in specs}
    lines += [f"Plan: {order}, {flops} FLOPs a row." for flops, order in orders.items()]
    lines += work.notes
    return [part for line in lines for part in (textwrap.wrap(line, 96) or [""])]
