"""One batch cut into parts, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorize.capture.batches import calibration_batches
from tensorize.ir.sites import Batch
from tensorize.passes.observe.parts import in_parts


class Scaled(nn.Module):
    """A linear, and things that look at all samples."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: Tensor, scale: Any = None, many: int = 0) -> Tensor:
        y = self.linear(x)
        if self.kind == "mean":
            return y - y.mean(0)
        if self.kind == "squeezed":
            return y.squeeze()
        if self.kind == "counts" and many != len(x):
            raise ValueError("another number of samples")
        return y if scale is None else y * scale


def cut(model: nn.Module, given: Any) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
    return in_parts(model, calibration_batches([given], model))


@pytest.mark.parametrize("samples", [2, 3, 16, 50])
def test_every_sample_is_in_one_part(samples: int) -> None:
    x = torch.arange(samples).float()[:, None].expand(-1, 4)
    for given in (x, (x, x[:, :3]), {"x": x, "scale": x[:, :3]}, {"x": x, "scale": 2.0}):
        parts, notes = cut(Scaled(), given)
        assert len(parts) == min(samples, 16)
        assert notes == ()
        seen = torch.cat([part.argument("x")[:, 0] for part in parts])
        assert sorted(seen.tolist()) == list(range(samples))
        assert {part.number for part in parts} == {0}
        for part in parts:
            other = part.argument("scale")
            assert not isinstance(other, Tensor) or len(other) == len(part.argument("x"))


def test_a_loss_of_the_caller_gets_the_same_part() -> None:
    x = torch.randn(8, 4)
    parts, _ = cut(Scaled(), {"x": x, "scale": x[:, :3]})
    for part in parts:
        assert torch.equal(part.given["x"], part.kwargs["x"])


def test_where_one_sample_loses_its_axis_parts_have_two() -> None:
    parts, notes = cut(Scaled("squeezed"), torch.randn(8, 4))
    assert [len(part.args[0]) for part in parts] == [2] * 4
    assert notes == ()


@pytest.mark.parametrize(
    ("model", "given", "why"),
    [
        (Scaled(), torch.randn(1, 4), "of one sample"),
        (Scaled(), (torch.randn(8, 4), torch.randn(3)), "not of one length"),
        (Scaled("mean"), torch.randn(8, 4), "depends on the others"),
        (Scaled("counts"), {"x": torch.randn(8, 4), "many": 8}, "depends on the others"),
    ],
)
def test_what_cannot_be_cut_stays_and_a_note_says_why(
    model: nn.Module, given: Any, why: str
) -> None:
    (part,), (note,) = cut(model, given)
    assert part.given is given
    assert why in note
    assert "nothing was held out" in note


def test_several_batches_stay_as_they_are() -> None:
    batches = calibration_batches([torch.randn(8, 4)] * 2, Scaled())
    assert in_parts(Scaled(), batches) == (batches, ())
