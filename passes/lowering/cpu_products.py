"""Choose what multiplies by each weight, on a CPU.

A dense library is tuned for products that are large in every direction. The factors of a low-rank
weight are thin, and there what a product costs hangs on the library and on how the weight lies in
memory. Measured on one Zen 4 core, for weights (out x in) that no cache holds, in microseconds:

| rows | weight | ``F.linear`` | transposed weight | oneDNN |
|---|---|---|---|---|
| 1 | 768 x 96 | 22 | 22 | 40 |
| 1 | 96 x 768 | 25 | 27 | 31 |
| 1 | 2048 x 139 | 146 | 59 | 138 |
| 1 | 32000 x 187 | 2900 | 895 | 2219 |
| 16 | 2048 x 139 | 256 | 228 | 260 |
| 256 | 96 x 768 | 407 | 404 | 381 |
| 256 | 139 x 768 | 717 | 723 | 558 |
| 256 | 2048 x 139 | 1641 | 1612 | 1543 |
| 256 | 32000 x 187 | 47066 | 45566 | 30557 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from tensorize.base.dynamo import value_of
from tensorize.passes.lowering.graph import Lowered, Packed
from tensorize.passes.lowering.group import arguments_of, is_linear, rows_of
from tensorize.passes.lowering.packed import add_packed
from tensorize.weight.onednn import HAS_ONEDNN, onednn_linear

_TALL = 2
"""Outputs for each input from which one row against the transposed weight is faster."""

_MANY_ROWS = 64


@dataclass(frozen=True)
class ChooseProducts:
    """Lowered with linears in float32 computed in the way that is fastest for their rows.

    ``gradients``: whether they are asked for. Else transposed copies of weights, which would get
    none, may be further inputs.
    """

    gradients: bool = False
    name: str = "products"

    def run(self, program: Lowered) -> Lowered:
        counts = {"by oneDNN": 0, "of transposed weights": 0}
        for node in list(program.graph.graph.nodes):
            if not is_linear(node, program.parameters) or not _in_float32(node):
                continue
            x, (weight, bias) = node.args[0], arguments_of(node)
            (out, into), rows = program.parameters[weight.name].shape, rows_of(x)
            if HAS_ONEDNN and (rows is None or rows >= _MANY_ROWS):
                plain = torch.ops.tensorize.onednn_linear.default
                node.target = onednn_linear if self.gradients else plain
                node.args, node.kwargs = (x, weight, bias), {}
                counts["by oneDNN"] += 1
            elif not self.gradients and rows == 1 and out >= _TALL * into:
                program = _take_transposed(program, node)
                counts["of transposed weights"] += 1
        return replace(program, summary=", ".join(f"{n} {how}" for how, n in counts.items()))


def _in_float32(node: fx.Node) -> bool:
    """Whether all that meets there is in float32: under autocast weights are, and results not."""
    values = [value_of(each) for each in (node, node.args[0], arguments_of(node)[0])]
    return all(value is not None and value.dtype == torch.float32 for value in values)


def _take_transposed(program: Lowered, node: fx.Node) -> Lowered:
    weight, _ = arguments_of(node)
    name = f"{weight.name}_transposed"
    program, copy = add_packed(program, name, Packed((weight.name,), transposed))
    with program.graph.graph.inserting_before(node):
        turned = program.graph.graph.call_method("t", (copy,))
    node.replace_input_with(weight, turned)
    return program


def transposed(weights: Sequence[Tensor]) -> Tensor:
    """A weight (out, in) as (in, out) in memory."""
    (weight,) = weights
    return weight.t().contiguous()
