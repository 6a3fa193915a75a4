"""Linear layers by oneDNN, differentiable."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether torch was built with oneDNN."""

# Inductor takes torch's own operation with weights that are constants only, so it is wrapped; by a
# library and not ``custom_op``, whose checks take as long as a small product.
library = torch.library.Library("tensorize", "FRAGMENT")
library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(library, "onednn_linear", "CPU")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b by oneDNN, in float32, without gradients."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """The operation with its gradients, apart: asking for them costs as much as a small product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.tensorize.onednn_linear.default(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        g_rows, x_rows = g.flatten(0, -2), x.flatten(0, -2)
        grad_weight = None
        if of_weight:
            # By oneDNN in 5 to 8 % less time for a wide weight, up to 65 % more for others.
            wide = weight.shape[1] >= weight.shape[0]
            product = onednn_linear if wide else F.linear
            grad_weight = product(g_rows.t(), x_rows.t(), None)
        grad_x = onednn_linear(g, weight.t(), None) if of_x else None
        return grad_x, grad_weight, g_rows.sum(0) if of_bias else None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b by oneDNN, in float32, with gradients."""
    return cast(Tensor, _OneDnnLinear.apply(x, weight, bias))
