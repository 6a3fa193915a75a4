"""The rows that one call multiplies a weight by, and what arrives at each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensorize.capture.matmul import Matmul
from tensorize.capture.uses import patches
from tensorize.ir.sites import Site


def input_rows(site: Site, matmul: Matmul) -> Tensor:
    """The rows (rows, width) that a call multiplies the matrix by."""
    return matmul_rows(site, matmul, None)[0]


def matmul_rows(
    site: Site, matmul: Matmul, gradient: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows that one call multiplies the matrix by, and what arrives at each product."""
    x = matmul.x.detach()
    if matmul.bag is not None:
        ids, _ = _bag_rows(x, matmul.bag, site.matrix[0], None)
    elif matmul.convolution is None:
        ids = x.reshape(-1) if matmul.contract == "lookup" else _as_rows(x)
    else:
        ids = patches(matmul, site.shape[2:]).detach()
    return ids, None if gradient is None else gradient_rows(site, matmul, gradient)


def gradient_rows(site: Site, matmul: Matmul, gradient: Tensor) -> Tensor:
    """What arrives at each row that one call multiplies."""
    call = matmul.convolution
    if matmul.bag is not None:
        arrived = _bag_rows(matmul.x.detach(), matmul.bag, site.matrix[0], gradient)[1]
        assert arrived is not None
        return arrived
    if call is None:
        return _as_rows(gradient)
    if call.output_padding is None:
        return gradient.reshape(-1, site.matrix[0])
    # Transposed: a pixel's product is a patch of the output.
    forward = replace(matmul, x=gradient, convolution=replace(call, output_padding=None))
    return patches(forward, site.shape[2:])


def rows_by_matrix(
    matmul: Matmul, gradient: Tensor | None, matrices: int, counted: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x and g (E, rows, width) of one call with a stack; zeros where a row does not count."""

    def apart(rows: Tensor) -> Tensor:
        rows = rows.expand(*rows.shape[:-3], matrices, *rows.shape[-2:])
        return rows.movedim(-3, 0).flatten(1, -2)

    x = apart(matmul.x.detach())
    g = None if gradient is None else apart(gradient)
    if counted is not None and g is not None and counted.numel() == g[..., 0].numel():
        mask = apart(counted.to(g.device).reshape(*gradient.shape[:-1], 1))  # type: ignore[union-attr]
        x, g = x * mask, g * mask
    return x, g


def rows_by_sample(
    site: Site,
    matmul: Matmul,
    gradient: Tensor,
    samples: int,
    counted: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """x and g (samples, T, width) of one call, the rows of a sample together, and which count.

    ``counted`` is a mask over all rows; None: all count.

    None where a sample has one row (a head's), where rows cannot be told apart by samples, and for
    lookups, whose inputs' moment is a diagonal.
    """
    if matmul.contract == "lookup" or site.experts or site.reals > 1:
        return None
    x, g = matmul_rows(site, matmul, gradient)
    if g is None or len(x) != len(g) or len(x) <= samples or len(x) % samples:
        return None
    mask = torch.ones(len(x), dtype=torch.bool) if counted is None else counted
    mask = mask.to(x.device)
    parts = x, g, mask.unsqueeze(-1)
    lead = tuple(matmul.x.shape[:-1])
    if matmul.convolution is None and lead[0] != samples and lead[1:2] == (samples,):
        # Time comes first, as in torch's own recurrent and attention modules.
        parts = tuple(t.reshape(*lead[:2], -1, t.shape[-1]).transpose(0, 1) for t in parts)
    x, g, mask = (t.reshape(samples, -1, t.shape[-1]) for t in parts)
    return x, g, mask.squeeze(-1)


def _bag_rows(
    ids: Tensor, bag: Mapping[str, Any], rows: int, gradient: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Row numbers in all bags, and what arrives at each of them: its share of the bag's."""
    if ids.dim() == 2:
        owner = torch.arange(ids.numel(), device=ids.device) // ids.shape[1]
    else:
        places = torch.arange(ids.numel(), device=ids.device)
        owner = torch.bucketize(places, bag["offsets"], right=True) - 1
    ids, padding = ids.reshape(-1), bag["padding_idx"]
    kept = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding % rows
    ids, owner = ids[kept], owner[kept]
    if gradient is None:
        return ids, None
    g = gradient[owner]
    if bag["mode"] == "mean":
        g = g / torch.bincount(owner).to(g.dtype)[owner].unsqueeze(-1)
    elif bag["per_sample_weights"] is not None:
        g = g * bag["per_sample_weights"].detach().reshape(-1)[kept].unsqueeze(-1)
    return ids, g


def _as_rows(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return dense.reshape(-1, tensor.shape[-1])
