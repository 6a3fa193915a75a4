"""Save and load: the same bits back."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tensorize.base.errors import CheckpointError
from tensorize.store.load import load
from tensorize.store.manifest import MANIFEST
from tensorize.store.save import save
from tensorize.weight.low_rank import LowRankLinear
from tensorize.weight.whole_model import settle
from tests.store.saved_models import (
    IDS,
    Allocations,
    Mlp,
    Pixels,
    Recurrent,
    assert_same_model,
    attach_report,
    build,
    compressed_mlp,
    compressed_pixels,
    factorize,
    output,
    same_bits,
    weights_file,
)


class TinyGpt(nn.Module):
    """An embedding whose weight is the head's as well."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(60, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 60, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.tokens(ids))))


def compressed_gpt() -> nn.Module:
    model = build(TinyGpt)
    factorize(model, ["tokens.weight", "head.weight"], (60, 1), (1, 16), 4)
    return attach_report(model)


def compressed_tt() -> nn.Module:
    model = build(Mlp)
    factorize(model, ["up.weight"], (4, 4, 4), (2, 3, 4), 3)
    factorize(model, ["down.weight"], (12, 1), (1, 64), 3)
    return attach_report(model)


# -------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("make", "fresh"),
    [
        (compressed_mlp, Mlp),
        (compressed_gpt, TinyGpt),
        (compressed_tt, Mlp),
        (compressed_pixels, Pixels),
    ],
    ids=["low rank", "tied", "tt", "convolution"],
)
@pytest.mark.parametrize("target", ["dense", "alike"])
def test_round_trip_to_the_same_bits(
    make: Callable[[], nn.Module], fresh: type[nn.Module], target: str, tmp_path: Path
) -> None:
    saved = make()
    save(saved, tmp_path)
    model = build(fresh, seed=9) if target == "dense" else copy.deepcopy(saved)
    if target == "alike":
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(3)
        if isinstance(model, Mlp):
            model.scale.fill_(0.5)  # not in the state dict: the model's own
        model.__dict__.pop("_tensorize")
    assert load(tmp_path, model) is model
    assert_same_model(model, saved)


def test_buffers_and_flags_come_back(tmp_path: Path) -> None:
    saved = compressed_mlp()
    saved.get_parameter("norm.bias").requires_grad_(False)
    saved.get_parameter("up.first.weight").requires_grad_(False)
    save(saved, tmp_path)
    loaded = load(tmp_path, build(Mlp, seed=9).train())
    assert_same_model(loaded, saved)
    assert loaded.get_buffer("norm.num_batches_tracked").item() == 1
    assert not loaded.get_parameter("up.first.weight").requires_grad
    assert isinstance(dict(loaded.named_modules())["up"], LowRankLinear)


def test_ties_are_one_object_stored_once(tmp_path: Path) -> None:
    save(compressed_gpt(), tmp_path)
    for fresh in (build(TinyGpt), build(TinyGpt, tied=False)):
        loaded = load(tmp_path, fresh)
        head, cores = dict(loaded.named_modules())["head"], loaded.tokens.weight_cores  # type: ignore[union-attr]
        assert head.second.weight is cores.core_0
        assert head.first.weight is cores.core_1
    stored = load_file(weights_file(tmp_path))
    assert sorted(stored) == [
        "mix.bias", "mix.weight", "tokens.weight_cores.core_0", "tokens.weight_cores.core_1",
    ]  # fmt: skip
    aliases = json.loads((tmp_path / MANIFEST).read_text())["aliases"]
    assert aliases["head.second.weight"] == "tokens.weight_cores.core_0"


def test_shared_memory_of_two_objects_stays_shared(tmp_path: Path) -> None:
    saved = compressed_mlp()
    saved.register_parameter("twin", nn.Parameter(saved.get_parameter("norm.weight").data))
    save(saved, tmp_path)
    fresh = build(Mlp, seed=3)
    fresh.register_parameter("twin", nn.Parameter(torch.zeros(64)))
    loaded = load(tmp_path, fresh)
    twin, first = loaded.get_parameter("twin"), loaded.get_parameter("norm.weight")
    assert twin is not first
    assert twin.data_ptr() == first.data_ptr()
    assert_same_model(loaded, saved)


def test_overlapping_and_strided_tensors(tmp_path: Path) -> None:
    saved = compressed_mlp()
    wide = torch.randn(6, 4)
    saved.register_buffer("wide", wide)
    saved.register_buffer("part", wide[2:5])
    saved.register_buffer("turned", torch.randn(5, 3).t())
    saved.register_buffer("empty", torch.empty(0, 3))
    saved.register_buffer("point", torch.tensor(2.5, dtype=torch.float64))
    saved.register_buffer("brain", torch.randn(3).bfloat16())
    saved.register_buffer("flags", torch.tensor([True, False]))
    save(saved, tmp_path)
    fresh = copy.deepcopy(saved)
    for name in ("wide", "part", "turned", "point", "brain", "flags"):
        fresh._buffers[name] = torch.zeros_like(saved.get_buffer(name))
    loaded = load(tmp_path, fresh)
    assert_same_model(loaded, saved)
    assert loaded.get_buffer("turned").stride() == saved.get_buffer("turned").stride()


def test_recurrent_layers_use_what_was_loaded(tmp_path: Path) -> None:
    saved = build(Recurrent)
    factorize(saved, ["out.weight"], (6, 1), (1, 8), 2)
    save(attach_report(saved), tmp_path)
    x = torch.randn(2, 5, 8)
    loaded = load(tmp_path, build(Recurrent, seed=4))
    with torch.no_grad():
        assert same_bits(loaded(x), saved(x))


def test_loaded_model_trains_and_is_saved_again(tmp_path: Path) -> None:
    save(compressed_gpt(), tmp_path / "a")
    loaded = load(tmp_path / "a", build(TinyGpt))
    before = output(loaded)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    loaded(IDS).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    optimizer.step()
    assert not output(loaded).equal(before)
    save(loaded, tmp_path / "b")
    assert_same_model(load(tmp_path / "b", build(TinyGpt)), loaded)


def test_loading_from_meta_is_free_of_dense_weights(tmp_path: Path) -> None:
    saved = compressed_gpt()
    save(saved, tmp_path)
    with torch.device("meta"):
        blank = TinyGpt()
    with Allocations() as seen:
        loaded = load(tmp_path, blank)
    assert_same_model(loaded, saved)
    assert 0 < seen.largest < 60 * 16 * 4


def test_non_persistent_buffer_on_meta_is_an_error(tmp_path: Path) -> None:
    save(compressed_mlp(), tmp_path)
    with torch.device("meta"):
        blank = Mlp()
    with pytest.raises(CheckpointError, match=r"scale: .*meta device.*\n.*way out"):
        load(tmp_path, blank)
    assert isinstance(blank.up, nn.Linear)
    blank.scale = torch.full((12,), 0.5)
    assert_same_model(load(tmp_path, blank), compressed_mlp())


# ------------------------------------------------------------------------------------------- saving


def test_random_models_come_back(tmp_path: Path) -> None:
    """Formats, ranks and ties drawn at random (fixed seed): nothing but what is checked matters."""
    draw = random.Random(0)
    for case in range(8):
        model = build(TinyGpt, tied=(tied := draw.random() < 0.5))
        names = ["tokens.weight", "head.weight"] if tied else ["head.weight"]
        modes = draw.choice([((60, 1), (1, 16)), ((6, 10), (4, 4)), ((3, 4, 5), (2, 2, 4))])
        factorize(model, names, *modes, draw.randint(1, 6))
        if draw.random() < 0.5:
            factorize(model, ["mix.weight"], (4, 4), (4, 4), draw.randint(1, 4))
        settle(model)
        save(attach_report(model), tmp_path / str(case))
        fresh = build(TinyGpt, seed=case, tied=draw.random() < 0.5)
        assert_same_model(load(tmp_path / str(case), fresh), model)
