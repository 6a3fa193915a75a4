"""What padding and labels of minus 100 leave out of the moments.

Shapes: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.capture.inputs import batch_of
from tensorize.ir.sites import Batch
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import call
from tests.passes.observe.moments import Logits, collect, draw, same, the_term

V, D, T = 11, 8, 6


class Encoder(nn.Module):
    """Attention over what the mask shows, positions in a table, logits or hidden states."""

    def __init__(self, logits: bool, causal: bool = False) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(V, D), nn.Embedding(16, D)
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, V)
        self.logits, self.causal = logits, causal
        self.double()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        time = input_ids.shape[1]
        x = self.table(input_ids) + self.places(torch.arange(time))
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        shown = torch.ones(1, 1, time, time, dtype=torch.bool)
        if self.causal:
            shown = shown.tril()
        if attention_mask is not None:
            shown = shown & (attention_mask[:, None, None] != 0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=shown).squeeze(1)
        y = self.head(torch.tanh(x + self.out(mixed)))
        return Logits(y) if self.logits else y


def ids(batch: int = 4, time: int = T, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("metric", ["input", "loss"])
def test_padding_on_the_right_changes_nothing(metric: str, logits: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(logits)
    plain = [{"input_ids": ids(seed=s)} for s in range(3)]
    padded = []
    for seed in range(3):
        tokens = torch.cat([ids(seed=seed), ids(time=4, seed=99)], 1)
        mask = torch.ones(4, T + 4, dtype=torch.long)
        mask[:, T:] = 0
        padded.append({"input_ids": tokens, "attention_mask": mask})
    same(collect(model, padded, metric), collect(model, plain, metric), torch.float32)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("metric", ["input", "loss"])
def test_what_stands_at_padded_positions_changes_nothing(metric: str, logits: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(logits)
    mask = torch.ones(4, T, dtype=torch.bool)
    mask[1, 4:], mask[2, :2], mask[3, 1:] = False, False, False
    one, two = ids(seed=1), ids(seed=1)
    two[~mask] = ids(seed=2)[~mask]
    assert not torch.equal(one, two)
    found = [
        collect(model, [{"input_ids": tokens, "attention_mask": mask}], metric)
        for tokens in (one, two)
    ]
    # Zero gradients are zero only up to what rounding leaves of hidden positions: nothing.
    same(*found, torch.float64)
    assert the_term(found[0]["table.weight"]).input_rows == int(mask.sum())


@pytest.mark.parametrize("causal", [True, False])
def test_positions_labelled_minus_100_count_in_nothing(causal: bool) -> None:
    """No output there is preserved; of the inputs, those count that a counted output needs."""
    torch.manual_seed(0)
    model = Encoder(logits=True, causal=True)
    if causal:
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    tokens = ids()
    labels = tokens.clone()
    labels[:, 4:] = -100
    # In a causal language model position t predicts label t + 1.
    seen = 3 if causal else 4
    found = collect(model, [{"input_ids": tokens, "labels": labels}])
    want = collect(model, [{"input_ids": tokens[:, :seen]}])
    same(found, want, torch.float32)


@pytest.mark.parametrize("logits", [True, False])
def test_the_loss_itself_counts_neither_padding_nor_labels_of_minus_100(logits: bool) -> None:
    torch.manual_seed(0)
    model, other = Encoder(logits), Encoder(logits)
    mask = torch.ones(4, T, dtype=torch.long)
    mask[:, 5:] = 0
    labels = torch.zeros(4, T, dtype=torch.long)
    labels[:, 4] = -100
    tokens = ids()
    hidden = tokens.clone()
    hidden[:, 5] = (hidden[:, 5] + 1) % V
    rises = []
    for given in (tokens, hidden):
        kwargs = {"input_ids": given, "attention_mask": mask, "labels": labels}
        batch = batch_of(kwargs)
        loss = PreservedLoss.fit(model, [batch], None)
        with torch.no_grad():
            dense, changed = call(model, batch), call(other, batch)
            rises.append(loss.rise(dense, changed, batch, model))
    assert rises[0][1] == rises[1][1] == 4 * 4
    assert rises[0][0] == pytest.approx(rises[1][0], rel=1e-6)
    assert rises[0][0] > 0


def test_logits_of_minus_infinity_are_no_loss() -> None:
    """Forbidden classes: chance zero before and after."""
    batch, model = Batch((), {}, None), nn.Linear(1, 1)
    dense, changed = draw((5, 4)), draw((5, 4), 1)
    allowed = PreservedLoss.fit(Constant(dense), [batch], None).rise(
        Logits(dense), Logits(changed), batch, model
    )
    forbidden = torch.full((5, 2), -math.inf, dtype=torch.float64)
    wide, wide_changed = (torch.cat([z, forbidden], 1) for z in (dense, changed))
    loss = PreservedLoss.fit(Constant(wide), [batch], None)
    rise = loss.rise(Logits(wide), Logits(wide_changed), batch, model)
    assert rise == pytest.approx(allowed, rel=1e-6)
    scalar, rows = loss.probe(
        Logits(wide.requires_grad_()), batch, model, torch.Generator().manual_seed(0)
    )
    (gradient,) = torch.autograd.grad(scalar, wide)
    assert rows == 5
    assert torch.isfinite(gradient).all()


class Constant(nn.Module):
    """Logits that depend on nothing."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.value = logits

    def forward(self) -> Logits:
        return Logits(self.value)
