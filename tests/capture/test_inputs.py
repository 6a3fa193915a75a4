"""Inputs made ready: texts padded together where a mask says what is padding; no caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.capture.batches import tokenized
from tensorize.capture.inputs import batch_of, without_cache

TEXTS = ["a", "a longer text", "two words", "b"]


class Tokenizer:
    """Characters as tokens, with the parts of transformers' interface that are used."""

    def __init__(self, pad: str | None = "\0", eos: str | None = "\n") -> None:
        self.pad_token, self.eos_token = pad, eos
        self.padding_side, self.model_max_length = "left", 8

    def __call__(
        self, texts: list[str], *, padding: bool, truncation: bool, max_length: int, **_: Any
    ) -> dict[str, Tensor]:
        assert truncation
        rows = [[ord(c) for c in text[:max_length]] for text in texts]
        longest = max(map(len, rows))
        assert padding or len({len(row) for row in rows}) == 1
        assert self.padding_side == "right"
        assert not padding or self.pad_token is not None
        fill = ord(self.pad_token or "\0")
        ids = [row + [fill] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


class Masked(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids)


def test_where_forward_takes_a_mask_texts_are_padded_together() -> None:
    (batch,) = tokenized(TEXTS, Masked(), Tokenizer())
    assert batch["input_ids"].shape == (4, 8)
    assert batch["attention_mask"].sum(1).tolist() == [1, 8, 8, 1]


def test_where_it_takes_none_no_text_is_padded() -> None:
    """What stands in padding would count as text."""
    batches = tokenized(TEXTS, Plain(), Tokenizer())
    assert [tuple(b["input_ids"].shape) for b in batches] == [(1, 1), (1, 8), (1, 8), (1, 1)]
    assert all(b.keys() == {"input_ids"} for b in batches)


@pytest.mark.parametrize(("eos", "batches"), [("\n", 1), (None, 4)])
def test_without_a_token_to_pad_with_that_of_the_end_serves(eos: str | None, batches: int) -> None:
    tokenizer = Tokenizer(pad=None, eos=eos)
    assert len(tokenized(TEXTS, Masked(), tokenizer)) == batches
    assert tokenizer.pad_token is None  # the caller's stays as it is
    assert tokenizer.padding_side == "left"


def test_texts_go_wherever_calibration_data_do() -> None:
    torch.manual_seed(0)
    model, tokenizer = Masked(), Tokenizer()
    whole = tensorize.compile(model, 0.5, calibration=TEXTS, tokenizer=tokenizer)
    analysis = tensorize.analyze(model, calibration=TEXTS, tokenizer=tokenizer)
    kept = tensorize.Plan.from_json(analysis.plan(0.5).to_json())
    again = tensorize.apply(model, kept, calibration=TEXTS, tokenizer=tokenizer)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------ caches


class Caching(nn.Module):
    def forward(self, ids: Tensor, past: Any = None, use_cache: bool | None = None) -> Any:
        return ids, past, use_cache


def test_a_run_keeps_no_cache_unless_the_batch_says_so() -> None:
    model, ids = Caching(), torch.zeros(1, 2)
    assert without_cache(model, batch_of(ids)).kwargs == {"use_cache": False}
    for asked in (batch_of({"ids": ids, "use_cache": True}), batch_of((ids, None, True))):
        assert without_cache(model, asked) is asked
    other = batch_of(ids)
    assert without_cache(nn.Linear(2, 2), other) is other, "forward has no such argument"
