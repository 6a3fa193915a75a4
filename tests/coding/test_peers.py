"""Other coders: bounds hold whatever the entries are, what they cannot hold is for ours."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import CheckpointError
from tensorize.coding.peers import PEERS
from tensorize.coding.tensors import coder_of, decode, encode_by, range_of
from tensorize.store.manifest import MANIFEST
from tests.coding.test_tensors import FLOATS, OTHERS, bits, draw_tensor, farthest
from tests.store.saved_models import Mlp, build, compressed_mlp


def installed(name: str) -> Any:
    package = PEERS[name].package
    there = importlib.util.find_spec(package) is not None
    why = f"the package {package} is not installed"
    return pytest.param(name, marks=() if there else pytest.mark.skip(reason=why))


EACH = pytest.mark.parametrize("name", [installed(name) for name in PEERS])


def there_and_back(name: str, tensor: Tensor, bound: float) -> tuple[Tensor, str | None]:
    coding, data = encode_by(name, tensor, bound)
    assert len(data) == coding.bytes
    assert coding.found <= coding.bound == bound
    return decode(coding, memoryview(data)), coder_of(coding)


@EACH
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128])
def test_it_holds_a_smooth_field_within_the_bound(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(0, 3, 40, dtype=torch.float64)
    field = torch.sin(x)[:, None, None, None] * torch.cos(x[:20]) * x[:3, None, None]
    before = (field * (1 - 2j) if dtype.is_complex else field)[None].to(dtype)  # five dimensions
    after, coder = there_and_back(name, before, 0.01)
    assert coder == name
    assert after.dtype == dtype
    assert after.shape == before.shape
    assert 0 < float((after.cdouble() - before.cdouble()).abs().max()) <= 0.01


@EACH
def test_no_entry_of_any_tensor_passes_the_bound(name: str) -> None:
    draw = random.Random(0)
    for _ in range(200):
        before = draw_tensor(draw, draw.choice(FLOATS))
        bound = range_of(before) * 10 ** draw.uniform(-9, 0) or 10 ** draw.uniform(-9, 0)
        after, _ = there_and_back(name, before, bound)
        assert farthest(before, after) <= bound


@EACH
@pytest.mark.parametrize("dtype", [dtype for dtype in OTHERS if not dtype.is_complex])
def test_what_it_cannot_hold_is_kept_by_ours(name: str, dtype: torch.dtype) -> None:
    before = torch.ones(10, 10).to(dtype)
    after, coder = there_and_back(name, before, 1e-3)
    assert coder is None
    assert torch.equal(bits(before), bits(after))


@EACH
@pytest.mark.parametrize("paired", [False, True])
def test_infinities_are_kept_by_ours(name: str, paired: bool) -> None:
    torch.manual_seed(0)
    before = torch.randn(40, 40, dtype=torch.float64)
    before[0, 0] = float("inf")
    before = torch.complex(before, before) if paired else before
    after, coder = there_and_back(name, before, 1e-3)
    assert coder is None
    assert torch.equal(before.real.isfinite(), after.real.isfinite())
    off = (after[1:].cdouble() - before[1:].cdouble()).abs()
    assert float(off.max()) <= 1e-3


@EACH
def test_damage_is_refused(name: str) -> None:
    coding, data = encode_by(name, torch.randn(30, 30), 1e-3)
    for place in (0, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match="damaged"):
            decode(coding, memoryview(damaged))


@EACH
def test_a_model_is_saved_by_it(name: str, tmp_path: Path) -> None:
    small = compressed_mlp()
    tensorize.save(small, tmp_path, coded=tensorize.Budget(entry_error=1e-3), coder=name)
    again = tensorize.load(tmp_path, model=build(Mlp, 1)).state_dict()
    told = json.loads((tmp_path / MANIFEST).read_text())["coding"]
    assert told["coder"] == name
    assert set(told["own"]) < set(told["tensors"])
    for key, before in small.state_dict().items():
        assert farthest(before, again[key]) <= 1e-3


def test_where_it_is_not_installed_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pysz", None)
    with pytest.raises(CheckpointError, match="pip install pysz"):
        save(compressed_mlp(), tmp_path / "out", "sz3")
    assert not (tmp_path / "out").exists()


@EACH
def test_where_it_is_gone_loading_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(compressed_mlp(), tmp_path, name)
    monkeypatch.setitem(sys.modules, PEERS[name].package, None)
    with pytest.raises(CheckpointError, match=f"pip install {PEERS[name].package}"):
        tensorize.load(tmp_path, model=build(Mlp, 1))


@pytest.mark.parametrize("coded", [None, "lossless", True, tensorize.Budget(file=0.2)])
def test_it_keeps_no_other_limit(coded: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="entry_error"):
        tensorize.save(compressed_mlp(), tmp_path / "out", coded=coded, coder="zfp")
    with pytest.raises(CheckpointError, match="'sz3', 'zfp'"):
        tensorize.save(compressed_mlp(), tmp_path / "out", coder="gzip")
    assert not (tmp_path / "out").exists()


def save(small: nn.Module, folder: Path, coder: str) -> None:
    tensorize.save(small, folder, coded=tensorize.Budget(entry_error=1e-2), coder=coder)
