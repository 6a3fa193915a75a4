"""Coded artefacts: the same model, or one within the bound; damage is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tensorize
from tensorize.base.errors import BudgetError, CheckpointError
from tensorize.store.coded import decoded, opened
from tensorize.store.manifest import MANIFEST, PLAIN_VERSION
from tests.store.saved_models import (
    Mlp,
    Pixels,
    assert_same_model,
    build,
    compressed_gpt2,
    compressed_mlp,
    compressed_pixels,
    edit_manifest,
    gpt2,
    output,
    weights_file,
)
from tests.weight.quantized_models import FORMS, compressed, net

MADE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "mlp": (compressed_mlp, lambda: build(Mlp, 1)),
    "convolutions": (compressed_pixels, lambda: build(Pixels, 1)),
    "tied gpt2": (compressed_gpt2, lambda: gpt2(1)),
}
EACH = pytest.mark.parametrize("name", MADE)


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST).read_text())


def farthest(one: nn.Module, other: nn.Module) -> float:
    """The largest error of an entry of any stored tensor."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    return max(float((mine[key].double() - theirs[key].double()).abs().max()) for key in mine)


@EACH
def test_lossless_is_the_same_model(name: str, tmp_path: Path) -> None:
    small, other = (make() for make in MADE[name])
    tensorize.save(small, tmp_path, coded="lossless")
    assert_same_model(tensorize.load(tmp_path, model=other), small)


@EACH
def test_no_entry_passes_the_bound(name: str, tmp_path: Path) -> None:
    small, other = (make() for make in MADE[name])
    tensorize.save(small, tmp_path, coded=tensorize.Budget(entry_error=1e-3))
    again = tensorize.load(tmp_path, model=other)
    assert 5e-4 < farthest(again, small) <= 1e-3
    told = manifest(tmp_path)["coding"]
    assert told["entry_error"] == 1e-3
    found = max(each["found"] for each in told["tensors"].values())
    assert found == farthest(again, small)
    assert torch.allclose(output(again), output(small), atol=0.1)


def test_a_relative_bound_is_one_of_every_tensor(tmp_path: Path) -> None:
    small = compressed_mlp()
    tensorize.save(small, tmp_path, coded=tensorize.Budget(entry_error="1e-2 relative"))
    again = tensorize.load(tmp_path, model=build(Mlp, 1))
    for key, before in small.state_dict().items():
        error = (again.state_dict()[key].double() - before.double()).abs().max()
        assert float(error) <= 1e-2 * float(before.max() - before.min())
    assert farthest(again, small) > 1e-3


def test_entries_that_are_no_numbers_stay(tmp_path: Path) -> None:
    small = compressed_mlp()
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1e-40])
    small.get_parameter("down.weight").data[0, :4] = odd
    tensorize.save(small, tmp_path, coded=tensorize.Budget(entry_error=1e-2))
    found = tensorize.load(tmp_path, model=build(Mlp, 1)).get_parameter("down.weight")[0, :4]
    assert found[0].isnan()
    assert found[1:3].tolist() == [math.inf, -math.inf]
    assert found[3].item() == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("coded", ["lossless", tensorize.Budget(entry_error=1e-3)])
def test_codes_of_few_bits_are_kept(coded: Any, tmp_path: Path) -> None:
    small = compressed(FORMS[0])
    tensorize.save(small, tmp_path, coded=coded)
    again = tensorize.load(tmp_path, model=net())
    for key, value in small.state_dict().items():
        same = again.state_dict()[key]
        assert same.dtype == value.dtype
        if not value.is_floating_point() or coded == "lossless":
            assert same.equal(value)


@pytest.mark.parametrize("coded", ["lossless", tensorize.Budget(entry_error=1e-4)])
def test_transformers_reads_it(coded: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    small = compressed_gpt2()
    tensorize.save(small, tmp_path, coded=coded)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = tensorize.load(tmp_path)
    assert torch.equal(output(again), output(ours))
    assert farthest(ours, small) <= (0 if coded == "lossless" else 1e-4)
    assert tensorize.report(again) == tensorize.report(small)
    assert (
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"]
        == (manifest(tmp_path)["format_version"])
    )


def test_engines_that_read_the_file_themselves_get_what_is_in_it(tmp_path: Path) -> None:
    small = compressed_mlp()
    tensorize.save(small, tmp_path, coded=tensorize.Budget(entry_error=1e-3))
    with safe_open(weights_file(tmp_path), framework="pt") as file:
        stream = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    with opened(weights_file(tmp_path)) as file:
        wanted = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    other = ("norm", torch.ones(3))
    found = dict(decoded([other, *stream]))
    assert torch.equal(found.pop("norm"), other[1])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert dict(decoded([other])).keys() == {"norm"}
    with pytest.raises(ValueError, match="alone"):
        dict(decoded(stream[:2]))


def test_what_is_not_coded_has_the_version_that_older_releases_read(tmp_path: Path) -> None:
    small = compressed_gpt2()
    tensorize.save(small, tmp_path / "plain")
    tensorize.save(small, tmp_path / "coded", coded="lossless")
    assert manifest(tmp_path / "plain")["format_version"] == PLAIN_VERSION
    assert manifest(tmp_path / "coded")["format_version"] > PLAIN_VERSION


def test_one_takes_the_place_of_the_other(tmp_path: Path) -> None:
    small = compressed_mlp()
    for coded in (None, "lossless", None):
        tensorize.save(small, tmp_path, coded=coded)
        assert_same_model(tensorize.load(tmp_path, model=build(Mlp, 1)), small)
        weights_file(tmp_path)  # there is one


def test_it_is_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 256))
    small = tensorize.compile(layer, 0.5, example_inputs=(torch.randn(2, 256),)).bfloat16()
    sizes = []
    for k, coded in enumerate((None, "lossless", tensorize.Budget(entry_error="1e-2 relative"))):
        tensorize.save(small, tmp_path / str(k), coded=coded)
        sizes.append(weights_file(tmp_path / str(k)).stat().st_size)
    assert sizes[1] < 0.75 * sizes[0]
    assert sizes[2] < 0.45 * sizes[0]


def test_damage_is_refused(tmp_path: Path) -> None:
    """Whatever bit of the file is another: by its sha256, and without that by what is inside."""
    small = compressed_mlp()
    tensorize.save(small, tmp_path, coded=tensorize.Budget(entry_error=1e-3))
    good = output(tensorize.load(tmp_path, model=build(Mlp, 1)))
    path = weights_file(tmp_path)
    data, draw = path.read_bytes(), random.Random(0)
    from tests.store.test_damage import note_weights

    for _ in range(40):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            tensorize.load(tmp_path, model=build(Mlp, 1))
        note_weights(tmp_path, bytes(damaged))  # as if it had been saved so
        try:
            found = output(tensorize.load(tmp_path, model=build(Mlp, 1)))
        except CheckpointError:
            pass
        else:
            assert torch.equal(found, good)
        weights_file(tmp_path).unlink()
        path.write_bytes(data)
        note_weights(tmp_path, data)
        path = weights_file(tmp_path)


def test_a_manifest_of_coded_weights_may_not_say_that_they_are_larger(tmp_path: Path) -> None:
    tensorize.save(compressed_mlp(), tmp_path, coded="lossless")
    edit_manifest(tmp_path, lambda data: data["tensors"]["down.weight"].update(shape=[2**50]))
    with pytest.raises(CheckpointError):
        tensorize.load(tmp_path, model=build(Mlp, 1))


@pytest.mark.parametrize(
    "coded",
    ["zip", 0.5, tensorize.Budget(params=0.5), tensorize.Budget(entry_error=1.0, bytes=0.5)],
)
def test_what_no_file_can_be_is_refused(coded: Any, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="coded="):
        tensorize.save(compressed_mlp(), tmp_path / "out", coded=coded)
    assert not (tmp_path / "out").exists()
