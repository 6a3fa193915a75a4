"""Masks and labels: by which names, in which layouts, of which values they hide rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.ir.sites import Batch
from tensorize.passes.observe.hidden import counted_rows, hides_rows
from tensorize.passes.observe.outputs import essential, outputs_of

RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)
WHOLE = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
SAME = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
model = nn.Identity()


def batch(**given: Any) -> Batch:
    return Batch((), given, given)


def rows(given: Batch, shape: tuple[int, ...] = (3, 4, 5), owner: nn.Module = model) -> Any:
    return counted_rows(torch.zeros(shape), given, owner, None)


@pytest.mark.parametrize("mask", [RIGHT, LEFT, WHOLE, SAME])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", lambda shown: shown),
        ("attention_mask", lambda shown: shown.long()),
        ("attention_mask", lambda shown: shown.float()),
        ("attention_mask", lambda shown: shown[:, None, None]),
        ("attention_mask", lambda shown: (~shown)[:, None, None] * -1e4),
        ("src_key_padding_mask", lambda shown: ~shown),
        ("key_padding_mask", lambda shown: torch.zeros(3, 4).masked_fill(~shown, -torch.inf)),
        ("padding_mask", lambda shown: ~shown),
        ("encoder_padding_mask", lambda shown: ~shown),
        ("pad_mask", lambda shown: shown.long()),
    ],
)
def test_names_and_values(name: str, value: Any, mask: Tensor) -> None:
    given = batch(**{name: value(mask)})
    assert torch.equal(rows(given), mask.reshape(-1))
    assert hides_rows(given, model)


@pytest.mark.parametrize("mask", [WHOLE, WHOLE.flip(1), RIGHT[:, :-1], LEFT[:, 1:]])
@pytest.mark.parametrize("name", ["padding_mask", "pad_mask"])
def test_names_that_do_not_tell_are_read_by_what_stands_in_them(name: str, mask: Tensor) -> None:
    for value in (mask, ~mask, mask.long(), (~mask).long()):
        got = rows(batch(**{name: value}), (*mask.shape, 5))
        assert torch.equal(got, mask.reshape(-1))


def test_outputs_may_have_time_first_or_one_axis_of_positions() -> None:
    given = batch(attention_mask=RIGHT)
    assert torch.equal(rows(given, (4, 3, 5)), RIGHT.t().reshape(-1))
    assert torch.equal(rows(given, (12, 5)), RIGHT.reshape(-1))
    assert rows(given, (3, 5)) is None  # one row a sample: none is hidden


def test_of_two_sequences_the_decoders_mask_counts() -> None:
    torch_like = batch(
        tgt=torch.zeros(3, 4), tgt_key_padding_mask=~LEFT, src_key_padding_mask=~RIGHT
    )
    assert torch.equal(rows(torch_like), LEFT.reshape(-1))
    assert rows(batch(tgt=torch.zeros(3, 4), src_key_padding_mask=~RIGHT)) is None
    owner = nn.Identity()
    owner.config = SimpleNamespace(is_encoder_decoder=True)
    assert rows(batch(attention_mask=RIGHT), owner=owner) is None
    assert hides_rows(batch(attention_mask=RIGHT), model)  # rows of the encoder
    both = batch(attention_mask=RIGHT, decoder_attention_mask=LEFT)
    assert torch.equal(rows(both, owner=owner), LEFT.reshape(-1))


def test_a_mask_that_hides_nothing_and_no_mask_are_one() -> None:
    assert bool(rows(batch(attention_mask=torch.ones(3, 4))).all())
    assert bool(rows(batch(attention_mask=torch.zeros(3, 1, 1, 4))).all())  # added to scores
    nothing = batch(attention_mask=torch.ones(3, 4), labels=torch.zeros(3, 4))
    assert not hides_rows(nothing, model)
    assert rows(batch()) is None


class Decoder(nn.Module):
    """Logits, and a loss that compares them with the same or with the next labels."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, logits: Tensor, labels: Tensor) -> Any:
        end = logits.shape[1] - self.by
        loss = F.cross_entropy(logits[:, :end].flatten(0, 1), labels[:, self.by :].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.mark.parametrize("by", [0, 1])
def test_a_models_own_loss_tells_whether_labels_are_shifted(by: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 4, 7, generator=draw), torch.full((3, 4), -100)
    labels[:, 2] = torch.tensor([1, 5, 3])
    given, owner = batch(logits=logits, labels=labels), Decoder(by)
    result = owner(logits, labels)
    for held in (result, essential(result)):
        (output,) = outputs_of(held, given, owner)
        assert torch.equal(output.rows, logits[:, 2 - by])


@pytest.mark.parametrize("name", ["image_token_id", "video_token_index", "sound_context_token_id"])
def test_what_comes_before_a_part_of_a_picture_is_read_by_nobody(name: str) -> None:
    """0 stands for a part of a picture: positions that predict one do not count; the last does."""
    ids = torch.tensor([[5, 0, 0, 6], [0, 7, 8, 9], [0, 0, 0, 0]])
    given, owner = batch(input_ids=ids), nn.Identity()
    owner.loss_type = "ForConditionalGeneration"  # type: ignore[assignment]
    owner.config = SimpleNamespace(**{name: 0, "image_size": 7, "vision_start_token_id": 8})
    wanted = [[False, False, True, True], [True] * 4, [False, False, False, True]]
    assert torch.equal(rows(given, owner=owner), torch.tensor(wanted).reshape(-1))
    assert hides_rows(given, owner)
    masked = batch(input_ids=ids, attention_mask=RIGHT)
    both = torch.tensor(wanted) & RIGHT
    assert torch.equal(rows(masked, owner=owner), both.reshape(-1))
    text = batch(input_ids=ids + 1)
    assert bool(rows(text, owner=owner).all())
    assert not hides_rows(text, owner)
    owner.config = SimpleNamespace(**{name: None})  # a shape that may take pictures, and does not
    assert rows(given, owner=owner) is None
    owner.config = SimpleNamespace(**{name: 0}, is_encoder_decoder=True)
    assert rows(given, owner=owner) is None  # its decoder has ids of its own
