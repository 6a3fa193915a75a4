"""What parts of a model do once it is split over the ranks of ``tp``.

Each becomes one of a class of its own (``weight.become``) with the same parameters under the same
names, as DTensors; its forward takes and gives ordinary tensors, this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.distributed.experts import experts, router
from tensorize.distributed.matrices import Matrix, local
from tensorize.distributed.ranks import fanned, gathered, scattered, summed
from tensorize.weight.become import become, subclass
from tensorize.weight.low_rank import LowRankLinear


def turn(module: nn.Module, way: str, **state: Any) -> None:
    """Let a module work on this rank's part in one of the ``_WAYS``."""
    become(module, parted(way, type(module)), **state)


@cache
def parted(way: str, base: type[nn.Module]) -> type[nn.Module]:
    body = {"forward": _WAYS[way], "own_check": None, "sum_check": None}
    return subclass(base, body, parted, way, base)


# ------------------------------------------------------------------------------------------ norms


def _hand_on(self: Any, x: Tensor) -> Tensor:
    """An RMSNorm whose readers apply it: its statistic is reduced along with their product."""
    return x


def _summed_rms_norm(self: Any, x: Tensor) -> Tensor:
    """An RMSNorm whose statistic is summed at once: what reads it needs it whole."""
    part, squares = gained(self, x)
    squares = fanned(summed(squares, self.ranks), self.ranks)
    return (part * scale_of(self, squares)).to(x.dtype)


def gained(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x times the gain, and the sum of squares: this rank's part of both."""
    return local(norm.weight) * x, x.float().square().sum(-1, keepdim=True)


def scale_of(norm: Any, squares: Tensor) -> Tensor:
    """What an RMSNorm multiplies rows by, of the sums of their squares."""
    return torch.rsqrt(squares / norm.width + norm.variance_epsilon)


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    """A LayerNorm: the ranks' means and sums of squares about them are joined first (Chan)."""
    part = x.float()
    mean = part.mean(-1, keepdim=True)
    about = (part - mean).square().sum(-1, keepdim=True)
    joined = gathered(torch.stack([mean, about], -1), self.ranks, partial=True)
    means, abouts = joined.unflatten(-1, (self.ranks.count, 2)).unbind(-1)
    mean = means.mean(-1)
    spread = (means - means.mean(-1, keepdim=True)).square().sum(-1) * part.shape[-1]
    variance = (abouts.sum(-1) + spread) / self.width
    normed = (part - mean) * torch.rsqrt(variance + self.eps)
    normed = normed * local(self.weight).float()
    if self.bias is not None:
        normed = normed + local(self.bias).float()
    return normed.to(x.dtype)


def _head_norm(self: Any, x: Tensor) -> Tensor:
    """An RMSNorm of single heads: the gain serves the heads of all ranks."""
    return fanned(local(self.weight), self.ranks) * _of_length_one(self, x)


def _whole_rms_norm(self: Any, x: Tensor) -> Tensor:
    return local(self.weight) * _of_length_one(self, x)


def _of_length_one(self: Any, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return wide.to(x.dtype)


def _whole_layer_norm(self: Any, x: Tensor) -> Tensor:
    bias = None if self.bias is None else local(self.bias)
    return F.layer_norm(x, self.normalized_shape, local(self.weight), bias, self.eps)


# --------------------------------------------------------------------------------------- linears


def _factors(self: Any, x: Tensor) -> Tensor:
    """Two factors: the first one's product comes reduced from all who read x, the second is this
    rank's rows."""
    return _finished(self, _between(self, self.reading(self, x)))


def _dense_reader(self: Any, x: Tensor) -> Tensor:
    """A dense weight that reads the whole stream and gives this rank's columns of its output."""
    return _finished(self, self.reading(self, x))


def _dense_writer(self: Any, x: Tensor) -> Tensor:
    """A dense weight that reads this rank's columns, and gives its part of the stream."""
    if self.sum_check is None or torch.compiler.is_compiling():
        y = scattered(F.linear(x, self.last()), self.ranks)
    else:
        y = self.sum_check.scattered(x)
    return y if self.bias is None else y + local(self.bias)


def _summed_dense_writer(self: Any, x: Tensor) -> Tensor:
    """A dense weight that reads this rank's columns, and gives the whole stream."""
    y = summed(F.linear(x, self.last()), self.ranks)
    return y if self.bias is None else y + local(self.bias)


def _pair(self: Any, x: Tensor) -> Tensor:
    """Two factors split by their rank, of a whole input and with a whole output."""
    narrow = _between(self, F.linear(fanned(x, self.ranks), self.first_matrix()))
    y = summed(F.linear(narrow, self.last()), self.ranks)
    return y if self.bias is None else y + local(self.bias)


def _between(linear: nn.Module, narrow: Tensor) -> Tensor:
    """What a linear has between its factors."""
    return linear._between(narrow) if isinstance(linear, LowRankLinear) else narrow


def _finished(self: Any, narrow: Tensor) -> Tensor:
    """The product with this rank's rows of the last matrix, and the bias."""
    if self.own_check is None or torch.compiler.is_compiling():
        y = F.linear(narrow, *last_of(self))
    else:
        y = self.own_check.product(narrow)
    return gathered(y, self.ranks, partial=False) if self.whole else y


def last_of(self: Any) -> tuple[Tensor, Tensor | None]:
    """This rank's rows of the last matrix, and of the bias."""
    bias = None if self.bias is None else own_rows_of(self, local(self.bias))
    return own_rows_of(self, self.last()), bias


def own_rows_of(self: Any, held: Tensor) -> Tensor:
    """This rank's rows of what is split by rows or, with ``own_rows``, held by all."""
    if self.own_rows is None:
        return held
    own = [fanned(held, self.ranks).narrow(0, *rows) for rows in self.own_rows]
    return torch.cat(own) if len(own) > 1 else own[0]


# ------------------------------------------------------------------------------------ embeddings


def _embedding(self: Any, ids: Tensor) -> Tensor:
    """Split by columns: nothing is told to anybody."""
    return F.embedding(ids, self.last(), self.padding_idx)


def _embedding_of_rows(self: Any, ids: Tensor) -> Tensor:
    """Split by rows, as the head that shares the table has them."""
    return scattered(rows_held(self, self.last, ids), self.ranks)


def _embedding_factors(self: Any, ids: Tensor) -> Tensor:
    """Low rank: the table split by rows, what widens its rows by columns."""
    narrow = summed(rows_held(self, self.last, ids), self.ranks)
    return F.linear(fanned(narrow, self.ranks), self.first_matrix.columns().t())


def _summed_embedding_of_rows(self: Any, ids: Tensor) -> Tensor:
    """The same where every rank has the whole stream."""
    return summed(rows_held(self, self.last, ids), self.ranks)


def _embedding_pair(self: Any, ids: Tensor) -> Tensor:
    """Low rank, split by the rank, where every rank has the whole stream."""
    narrow = self.last.rows(ids, self.padding_idx)
    return summed(F.linear(narrow, self.first_matrix().t()), self.ranks)


def _whole_embedding(self: Any, ids: Tensor) -> Tensor:
    narrow = self.last.rows(ids, self.padding_idx)
    return narrow if self.first_matrix is None else F.linear(narrow, self.first_matrix().t())


def rows_held(self: Any, table: Matrix, ids: Tensor) -> Tensor:
    """The rows of ids that this rank holds, and zeros for the others."""
    count = self.num_embeddings // self.ranks.count
    first, padding = self.ranks.this * count, self.padding_idx
    at = ids - first
    held = (at >= 0) & (at < count)
    if padding is not None:
        padding = padding - first if 0 <= padding - first < count else None
    return table.rows(at.clamp(0, count - 1), padding) * held.unsqueeze(-1)


_WAYS: dict[str, Callable[..., Any]] = {
    "dense reader": _dense_reader,
    "dense writer": _dense_writer,
    "embedding": _embedding,
    "embedding factors": _embedding_factors,
    "embedding of rows": _embedding_of_rows,
    "embedding pair": _embedding_pair,
    "experts": experts,
    "factors": _factors,
    "head norm": _head_norm,
    "layer norm": _layer_norm,
    "pair": _pair,
    "rms norm": _hand_on,
    "router": router,
    "summed dense writer": _summed_dense_writer,
    "summed rms norm": _summed_rms_norm,
    "summed embedding of rows": _summed_embedding_of_rows,
    "whole embedding": _whole_embedding,
    "whole layer norm": _whole_layer_norm,
    "whole rms norm": _whole_rms_norm,
}
