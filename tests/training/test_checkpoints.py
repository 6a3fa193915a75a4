"""Checkpoints of training: the same bits, or within the bound that is stated."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tensorize
from tensorize.base.errors import BudgetError, CheckpointError
from tensorize.coding.digits import rounded
from tensorize.training import load_checkpoint, save_checkpoint


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(40, 24), nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.table(ids)))


def trained(steps: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    return on(model, torch.optim.AdamW(model.parameters(), 1e-2), steps)


def on(model: nn.Module, optimizer: Any, steps: int) -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(40, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
        optimizer.step()
    return model, optimizer


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, optimizer = trained()
    extra = {"step": 5, "betas": (0.9, 0.99), "best": [math.inf, 0.1, None], "rng": torch.arange(7)}
    save_checkpoint(tmp_path / "a", model, optimizer, extra=extra)
    other, fresh = trained(1)
    found = load_checkpoint(tmp_path / "a", other, fresh)
    assert torch.equal(found.pop("rng"), extra.pop("rng"))
    assert found == extra
    on(model, optimizer, 3)
    on(other, fresh, 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_a_bound_is_kept_and_stated(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path / "exact", model, optimizer)
    save_checkpoint(
        tmp_path / "a", model, optimizer, coded=tensorize.Budget(entry_error="1e-3 relative")
    )
    assert (tmp_path / "a").stat().st_size < 0.7 * (tmp_path / "exact").stat().st_size
    other, fresh = trained(1)
    load_checkpoint(tmp_path / "a", other, fresh)
    assert other.get_parameter("head.weight") is other.get_parameter("table.weight")
    for key, value in model.state_dict().items():
        width = float(value.max() - value.min()) if value.numel() > 1 else 0.0
        assert float((value - other.state_dict()[key]).abs().max()) <= 1e-3 * width, key
    for mine, theirs in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert torch.equal(mine["step"], theirs["step"])
        squares, found = mine["exp_avg_sq"], theirs["exp_avg_sq"]
        assert bool(((squares - found).abs() <= 1e-3 * squares).all())
        assert torch.equal(squares == 0, found == 0)
    with safe_open(tmp_path / "a", framework="pt") as file:
        told = json.loads(file.metadata()["tensorize.bounds"])
    assert told["entry_error"] == "1e-3 relative"
    assert all(each["found"] <= each["bound"] for each in told["tensors"].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.3, 1e-2, 1e-3, 1e-6])
def test_fewer_digits_are_within_a_share_of_each_entry(dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(4000, generator=generator, dtype=torch.float64).mul_(20).exp_()
    limits = torch.finfo(dtype)
    odd = [0.0, math.inf, math.nan, limits.max, limits.tiny, limits.tiny / 4]
    entries = torch.cat([sizes, torch.tensor(odd, dtype=torch.float64)]).to(dtype)
    found = rounded(entries, share)
    off = (found.double() - entries.double()).abs()
    finite = entries.isfinite()
    assert bool((off <= share * entries.double())[finite].all())
    assert torch.equal(found.isfinite(), finite)
    assert torch.equal(found == 0, entries == 0)


def test_what_is_damaged_or_foreign_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "a"
    save_checkpoint(path, model)
    other, fresh = trained(1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="no optimizer"):
        load_checkpoint(path, other, fresh)
    save_checkpoint(path, nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(path, other)
    save_checkpoint(path, model, optimizer)
    data = bytearray(path.read_bytes())
    for place in (len(data) // 2, len(data) - 9, 3, data.index(b"betas") + 40):
        torn = bytearray(data)
        torn[place] ^= 255
        path.write_bytes(torn)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path, other, fresh)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path, other, fresh)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_what_no_checkpoint_can_be_is_said(tmp_path: Path) -> None:
    model, _ = trained(1)
    with pytest.raises(BudgetError, match="entry_error"):
        save_checkpoint(tmp_path / "a", model, coded=tensorize.Budget(file=0.1))
    both = tensorize.Budget(entry_error=1e-3, loss=0.1)
    with pytest.raises(BudgetError, match="entry_error"):
        save_checkpoint(tmp_path / "a", model, coded=both)
    with pytest.raises(CheckpointError, match=r"extra\.f is a function"):
        save_checkpoint(tmp_path / "a", model, extra={"f": trained})
    assert not list(tmp_path.iterdir())
