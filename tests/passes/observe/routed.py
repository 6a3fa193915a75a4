"""Small models that move their rows about in every way, and padded data for them.

Each takes ``ids`` (B, T) and what tells of padding: ``attention_mask``, ``lengths`` or ``labels``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

WORDS, PADDING, D, T = 30, 29, 8, 6


class Routed(nn.Module):
    """A table, two linears and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, D)
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 5)

    def rows(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.relu(self.first(x))))


class TimeFirst(Routed):
    """Torch's attention, of time first, and rows in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(ids).transpose(0, 1)
        hidden = attention_mask == 0
        x = x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        flat = self.rows(x.reshape(-1, D))
        return self.head(flat.reshape(x.shape).transpose(0, 1))


class Encoder(Routed):
    """Torch's encoder, which without gradients has a way of its own, of nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, ids: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        x = self.encoder(self.rows(self.table(ids)), src_key_padding_mask=src_key_padding_mask)
        return self.head(x)


class Packed(Routed):
    """A recurrent layer on packed rows; what it says last is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(D, D, batch_first=True)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = torch.relu(self.first(self.table(ids)))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(torch.tanh(self.second(self.recurrent(packed)[1][-1])))


class Repacked(Packed):
    """The same with an output at every position."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        x, lengths = torch.relu(self.first(self.table(ids))), attention_mask.sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.recurrent(packed)[0], True, total_length=ids.shape[1])
        return self.head(torch.tanh(self.second(y)))


class Pooled(Routed):
    """A mean over what lengths show: no mask is an argument, and every output counts."""

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        shown = torch.arange(ids.shape[1]) < lengths[:, None]
        x = self.rows(self.table(ids)) * shown[..., None]
        return self.head(x.sum(1) / lengths[:, None])


class Unpadded(Routed):
    """Only the rows that are shown go through the layers."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, shown = self.table(ids), attention_mask.bool()
        return self.head(x.masked_scatter(shown[..., None], self.rows(x[shown])))


class Experts(Routed):
    """Rows sorted by expert, gathered and added back."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(ids).reshape(-1, D)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        order, y = chosen.argsort(), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            at = order[chosen[order] == k]
            y = y.index_add(0, at, expert(x[at]) * weight[at, None])
        return self.head(self.rows(x + y)).reshape(*ids.shape, -1)


class Masked(Routed):
    """Attention whose mask is a number that is added to the scores."""

    low = -1e4

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(ids)
        scores = self.q(x) @ self.k(x).mT / D**0.5
        scores = scores + (1 - attention_mask[:, None].to(x)) * self.low
        return self.head(self.rows(x + scores.softmax(-1) @ self.v(x)))


class Soft(Masked):
    """What it adds leaves a weight of e⁻¹⁰⁰: no zero, and nothing."""

    low = -100.0


class Fourier(Routed):
    """A causal convolution by way of frequencies: rounding alone brings in what comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(T, D) / 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = torch.relu(self.first(self.table(ids)))
        kernel = torch.fft.rfft(self.kernel, n=2 * T, dim=0)
        y = torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * kernel, n=2 * T, dim=1)
        return self.head(torch.tanh(self.second(x + y[:, :T])))


class Shifted(Routed):
    """A decoder that compares a position with the next label, as only its loss tells."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, WORDS)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        x = self.head(self.rows(x + x.cumsum(1)))
        loss = F.cross_entropy(x[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": x}


class Dropped(Routed):
    """The first rows, as those of an image, are dropped from the output."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.rows(torch.cat([self.table(ids[:, :2] % 7), self.table(ids)], 1))
        return self.head(x[:, 2:])


EVERY: list[Callable[[], Routed]] = [
    TimeFirst,
    Encoder,
    Packed,
    Repacked,
    Pooled,
    Unpadded,
    Experts,
    Masked,
    Soft,
    Fourier,
    Shifted,
    Dropped,
]


def build(kind: Callable[[], Routed]) -> Routed:
    """The model, seeded, with a huge row in its table that only padding looks up."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        model.table.weight[PADDING] *= 50
    return model


def shown(seed: int, left: bool = False, batch: int = 4) -> Tensor:
    """A mask (B, T) of at least one position of every sample."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (batch, 1), generator=draw)
    at = torch.arange(T)
    return (at >= T - lengths if left else at < lengths).long()


def data(
    model: nn.Module, padding: int, batches: int = 4, left: bool = False
) -> list[dict[str, Any]]:
    """Batches of what the model takes, ``padding`` standing where nothing is shown."""
    takes = inspect.signature(model.forward).parameters
    found = []
    for seed in range(batches):
        draw, mask = torch.Generator().manual_seed(seed), shown(seed, left)
        ids = torch.randint(1, PADDING, mask.shape, generator=draw)
        ids[mask == 0] = padding
        given = {
            "attention_mask": mask,
            "src_key_padding_mask": mask == 0,
            "lengths": mask.sum(1),
            "labels": ids.masked_fill(mask == 0, -100),
        }
        found.append({"ids": ids} | {n: v for n, v in given.items() if n in takes})
    return found
