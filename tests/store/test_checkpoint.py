"""Save and load: the same bits back, damage is named, a crash leaves an artefact that loads."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tensorize.algebra.decompose import tt_svd
from tensorize.base.errors import CheckpointError
from tensorize.ir.plan import (
    Plan,
    Prediction,
    RankPlan,
    Totals,
)
from tensorize.ir.spec import TTSpec
from tensorize.reports.attach import known_report
from tensorize.reports.data import ReportTotals, SiteReport
from tensorize.reports.report import Report
from tensorize.store.load import load
from tensorize.store.manifest import MANIFEST, read_report
from tensorize.store.save import save
from tensorize.weight.install import factored, install, owner_of
from tensorize.weight.low_rank import LowRankLinear
from tensorize.weight.whole_model import settle


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 64)
        self.norm = nn.BatchNorm1d(64)
        self.down = nn.Linear(64, 12, bias=False)
        self.register_buffer("offset", torch.arange(12.0))
        self.register_buffer("scale", torch.full((12,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.norm(self.up(x)))) * self.scale + self.offset


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


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.out = nn.Conv1d(16, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.patches(x)).flatten(2))


def build(kind: type[nn.Module], seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return kind(**options).eval()


def factorize(
    model: nn.Module,
    names: list[str],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    rank: int,
) -> None:
    """Replace one parameter by the cores of its TT-SVD."""
    owner, leaf = owner_of(model, names[0])
    dense = owner._parameters[leaf]
    assert dense is not None
    spec, cores = tt_svd(dense.detach(), rows, columns, rank)
    install(model, names, spec, [nn.Parameter(core) for core in cores])


def attach_report(model: nn.Module) -> nn.Module:
    """A report with what the model really holds, as the api leaves it there."""
    chosen, sites = [], []
    for name, factors in factored(model):
        shape, spec = tuple(factors.shape), factors.spec
        count = math.prod(shape)
        chosen.append(RankPlan(name, "linear", shape, spec, 0.1, 0.0, "test"))
        sites.append(
            SiteReport(
                name, (), "linear", shape, spec.format, spec.ranks, count, spec.parameters, 0.1,
                0.1, 0.0, "test",
            )
        )  # fmt: skip
    size = sum(p.numel() for p in model.parameters())
    plan = Plan(
        tuple(chosen), "params=0.5", "frobenius", Prediction(size, 4 * size, 0, math.inf),
        Totals(2 * size, 8 * size, 0), (1, 16), 0, "fingerprint",
    )  # fmt: skip
    figures = Totals(2 * size, 8 * size, 0), Totals(size, 4 * size, 0)
    model.__dict__["_tensorize"] = Report(plan, tuple(sites), ReportTotals(*figures))
    return model


def compressed_mlp(seed: int = 0) -> nn.Module:
    model = build(Mlp, seed)
    with torch.no_grad():
        model.train()(torch.randn(32, 24))  # running statistics that are not the initial ones
    model.eval()
    factorize(model, ["up.weight"], (64, 1), (1, 24), 5)
    return attach_report(model)


def compressed_gpt() -> nn.Module:
    model = build(TinyGpt)
    factorize(model, ["tokens.weight", "head.weight"], (60, 1), (1, 16), 4)
    return attach_report(model)


def compressed_tt() -> nn.Module:
    model = build(Mlp)
    factorize(model, ["up.weight"], (4, 4, 4), (2, 3, 4), 3)
    factorize(model, ["down.weight"], (12, 1), (1, 64), 3)
    return attach_report(model)


def gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=40, vocab_size=99, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def compressed_gpt2(seed: int = 0) -> nn.Module:
    model = gpt2(seed)
    factorize(model, ["transformer.wte.weight", "lm_head.weight"], (99, 1), (1, 32), 6)
    for layer in range(2):
        for part, shape in (
            ("attn.c_attn", (32, 96)),
            ("mlp.c_fc", (32, 128)),
            ("mlp.c_proj", (128, 32)),
        ):
            name = f"transformer.h.{layer}.{part}.weight"
            factorize(model, [name], (shape[0], 1), (1, shape[1]), 5)
    return attach_report(model)


def compressed_pixels() -> nn.Module:
    model = build(Pixels)
    for name, count in (("patches.weight", 3 * 4 * 4), ("out.weight", 16 * 3)):
        dense = model.get_parameter(name)
        spec, cores = tt_svd(dense.detach().flatten(1), (len(dense), 1), (1, count), 4)
        install(model, [name], spec, [nn.Parameter(core) for core in cores])
    return attach_report(model)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
MLP_INPUT = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(30).reshape(2, 15)


def output(model: nn.Module) -> Tensor:
    given = {Mlp: MLP_INPUT, Pixels: IMAGES}.get(type(model), IDS)
    with torch.no_grad():
        result = model(given)
    return getattr(result, "logits", result)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


def assert_same_model(loaded: nn.Module, saved: nn.Module) -> None:
    mine, theirs = loaded.state_dict(), saved.state_dict()
    assert list(mine) == list(theirs)
    assert all(same_bits(mine[key], theirs[key]) for key in mine)
    flags = {name: p.requires_grad for name, p in saved.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    assert not loaded.training
    assert loaded.__dict__["_tensorize"] == saved.__dict__["_tensorize"]
    assert same_bits(output(loaded), output(saved))


class Allocations(TorchDispatchMode):
    """Sizes of the storages behind every real tensor that an operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


def weights_file(directory: Path) -> Path:
    (found,) = directory.glob("tensorize-*.safetensors")
    return found


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# ------------------------------------------------------------------------------- round trips


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


# ------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
def test_gpt2_without_a_model(tmp_path: Path) -> None:
    saved = compressed_gpt2()
    save(saved, tmp_path)
    state = torch.random.get_rng_state()
    with Allocations() as seen:
        loaded = load(tmp_path)
    assert torch.random.get_rng_state().equal(state)
    assert type(loaded) is type(saved)
    assert_same_model(loaded, saved)
    largest = max(p.numel() for p in saved.parameters())
    assert seen.largest == 4 * largest < 4 * 99 * 32
    ids = IDS[:, :5]
    assert loaded.generate(ids, max_new_tokens=8, do_sample=False).equal(  # type: ignore[operator]
        saved.generate(ids, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    )
    assert_same_model(load(tmp_path, gpt2(seed=5)), saved)
    attention = dict(loaded.named_modules())["transformer.h.0.attn.c_attn"]
    assert isinstance(attention, LowRankLinear)
    assert attention.stored_transposed


@pytest.mark.usefixtures("offline")
def test_a_dense_checkpoint_keeps_its_configuration(tmp_path: Path) -> None:
    dense = gpt2()
    dense.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    small = compressed_gpt2()
    with pytest.raises(CheckpointError, match=r"holds a dense checkpoint \(model\.safetensors\)"):
        save(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save(small, tmp_path / "small")
    save(small, tmp_path / "small")  # its own place


@pytest.mark.usefixtures("offline")
def test_config_files_are_for_other_tools(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    save(compressed_gpt2(), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["GPT2LMHeadModel"]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1
    save(compressed_gpt2(seed=1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", weights_file(tmp_path).name, MANIFEST,
        "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("cast", ["built", "moved"])
def test_bfloat16_with_rotary_tables(cast: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=99, max_position_embeddings=64,
        attn_implementation="eager",
    )  # fmt: skip
    if cast == "built":  # tables in float32
        saved = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    else:  # tables in bfloat16
        saved = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    factorize(saved, ["lm_head.weight"], (99, 1), (1, 32), 5)
    factorize(saved, ["model.layers.1.mlp.up_proj.weight"], (6, 8), (4, 8), 3)
    save(attach_report(saved), tmp_path)
    loaded = load(tmp_path)
    assert_same_model(loaded, saved)
    theirs = dict(saved.named_buffers())
    assert all(same_bits(b, theirs[name]) for name, b in loaded.named_buffers())
    assert loaded.config._attn_implementation == "eager"  # type: ignore[union-attr]


@pytest.mark.usefixtures("offline")
def test_infinity_in_a_config(tmp_path: Path) -> None:
    saved = compressed_gpt2()
    saved.config.limits = [0.0, math.inf]  # type: ignore[union-attr]
    save(saved, tmp_path)
    assert load(tmp_path).config.limits == [0.0, math.inf]  # type: ignore[union-attr]


@pytest.mark.usefixtures("offline")
def test_new_process(tmp_path: Path) -> None:
    saved = compressed_gpt2()
    save(saved, tmp_path)
    script = (
        "import sys, hashlib, torch, tensorize\n"
        "from tensorize.store.load import load\n"
        "model = load(sys.argv[1])\n"
        "with torch.no_grad(): logits = model(torch.arange(30).reshape(2, 15)).logits\n"
        "print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = hashlib.sha256(output(saved).numpy().tobytes()).hexdigest()
    assert done.stdout.split()[-1] == expected


def test_only_transformers_classes_are_built_by_name(tmp_path: Path) -> None:
    save(compressed_mlp(), tmp_path)
    with pytest.raises(CheckpointError, match=r"Mlp.*only Hugging Face(.|\n)*pass model="):
        load(tmp_path)
    save(compressed_gpt2(), tmp_path / "hf")
    edit_manifest(tmp_path / "hf", lambda d: d["model"].update({"class": "subprocess:Popen"}))
    with pytest.raises(CheckpointError, match="not in transformers"):
        load(tmp_path / "hf")
    edit_manifest(tmp_path / "hf", lambda d: d["model"].update({"class": "transformers:Nothing"}))
    with pytest.raises(CheckpointError, match="does not have"):
        load(tmp_path / "hf")
    edit_manifest(
        tmp_path / "hf", lambda d: d["model"].update({"class": "transformers:GPT2Config"})
    )
    with pytest.raises(CheckpointError, match="does not have"):
        load(tmp_path / "hf")


@pytest.mark.usefixtures("offline")
def test_config_that_does_not_fit(tmp_path: Path) -> None:
    save(compressed_gpt2(), tmp_path)
    edit_manifest(tmp_path, lambda d: d["model"]["config"].update({"n_layer": 3}))
    with pytest.raises(CheckpointError, match=r"artefact has no transformer.h.2"):
        load(tmp_path)
    edit_manifest(tmp_path, lambda d: d["model"]["config"].update({"n_embd": "wide"}))
    with pytest.raises(CheckpointError, match="cannot build"):
        load(tmp_path)


# ------------------------------------------------------------------------------------- damage


def cut(directory: Path, keep: float) -> None:
    path = weights_file(directory)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flip(directory: Path) -> None:
    path = weights_file(directory)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def foreign_weights(directory: Path) -> None:
    """A valid safetensors file of other tensors, with its checksum in the manifest."""
    path = weights_file(directory)
    save_file({"x": torch.zeros(3)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(directory, lambda d: d["weights"].update(sha256=digest))


def not_safetensors(directory: Path) -> None:
    path = weights_file(directory)
    path.write_bytes(b"not what it should be")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(directory, lambda d: d["weights"].update(sha256=digest))


def manifest_text(text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / MANIFEST).write_text(text) and None


def manifest_change(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_manifest(directory, change)


def half_manifest(directory: Path) -> None:
    path = directory / MANIFEST
    path.write_text(path.read_text()[:500])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), r"there is no tensorize\.json in it"),
    "no weights": (lambda d: weights_file(d).unlink(), r"safetensors is missing"),
    "empty weights": (lambda d: cut(d, 0.0), "damaged or cut short"),
    "cut weights": (lambda d: cut(d, 0.7), "damaged or cut short"),
    "one bit": (flip, "damaged or cut short"),
    "not safetensors": (not_safetensors, r"safetensors cannot be read"),
    "foreign weights": (foreign_weights, r"safetensors cannot be read"),
    "half a manifest": (half_manifest, r"tensorize\.json is not valid JSON"),
    "not JSON": (manifest_text("PK\x03\x04"), "not valid JSON"),
    "a list": (manifest_text("[1, 2]"), "not a tensorize manifest"),
    "foreign JSON": (manifest_text('{"model_type": "gpt2"}'), "not a tensorize manifest"),
    "newer": (
        manifest_change(lambda d: d.update(format_version=2)),
        r"format version 2, and this tensorize reads up to 1\n.*upgrade",
    ),
    "no version": (manifest_change(lambda d: d.pop("format_version")), "is damaged"),
    "no sites": (manifest_change(lambda d: d.pop("sites")), "damaged: KeyError"),
    "bad spec": (
        manifest_change(lambda d: d["sites"][0]["spec"].update(ranks=[0])), "damaged: ValueError",
    ),
    "bad dtype": (
        manifest_change(lambda d: d["tensors"]["offset"].update(dtype="load")), "is no dtype",
    ),
    "other dtype": (
        manifest_change(lambda d: d["tensors"]["offset"].update(dtype="float16")),
        r"offset is float32 .* says float16",
    ),
    "bad alias": (
        manifest_change(lambda d: d["aliases"].update({"x": "offset"})), "damaged: ValueError",
    ),
    "no report": (manifest_change(lambda d: d.update(report={})), "damaged: KeyError"),
    "path": (
        manifest_change(lambda d: d["weights"].update(file="../../etc/passwd")),
        "not the name of a weights file",
    ),
    "a tensor less": (
        manifest_change(lambda d: d["tensors"].pop("offset")), "artefact has no offset",
    ),
    "a site less": (manifest_change(lambda d: d["sites"].clear()), "the model has no up.first"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_model_untouched(kind: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    save(compressed_mlp(), tmp_path)
    damage(tmp_path)
    model = build(Mlp, seed=7).train()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, model)
    assert caught.value.way_out
    assert str(tmp_path) in str(caught.value)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert after[name].equal(value)
    assert model.training
    assert type(model.up) is nn.Linear
    assert "_tensorize" not in model.__dict__


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "nowhere", build(Mlp))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no such directory"):
        read_report(tmp_path / "file")


class Wider(Mlp):
    pass


class OtherMlp(nn.Module):
    pass


def widened(name: str) -> nn.Module:
    model = build(Mlp)
    if name == "up":
        model.up = nn.Linear(24, 65)
    else:
        model.down = nn.Linear(60, 12, bias=False)
    return model


def other_rank() -> nn.Module:
    model = build(Mlp)
    factorize(model, ["up.weight"], (64, 1), (1, 24), 6)
    return model


def other_kernel() -> nn.Module:
    model = build(Pixels)
    model.patches = nn.Conv2d(3, 16, (2, 8), stride=4)
    return model


def also_down() -> nn.Module:
    model = compressed_mlp()
    factorize(model, ["down.weight"], (12, 1), (1, 64), 3)
    return model


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "class": (lambda: build(OtherMlp), r"is of a .*Mlp, and the model passed is a .*OtherMlp"),
    "site's shape": (lambda: widened("up"), r"up\.weight has shape \(65, 24\) in the model"),
    "other shape": (lambda: widened("down"), r"down\.weight is a parameter of shape \(12, 60\)"),
    "rank": (other_rank, r"up\.weight is factorized as TTSpec.*\(6,\).* in the model"),
    "more factorized": (also_down, r"down\.weight is factorized in the model, and dense"),
    "no such module": (
        lambda: (m := build(Mlp), delattr(m, "up"))[0], "the model has no parameter up.weight",
    ),
    "more buffers": (
        lambda: (m := build(Mlp), m.register_buffer("extra", torch.ones(1)))[0],
        "the artefact has no extra",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_a_model_that_does_not_fit_is_left_alone(kind: str, tmp_path: Path) -> None:
    make, message = MISFITS[kind]
    save(compressed_mlp(), tmp_path)
    model = make()
    if kind == "class":
        model.__class__ = OtherMlp
    before, modules = dict(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, model)
    assert caught.value.way_out
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(same_bits(after[name], before[name]) for name in before)
    assert [type(m) for m in model.modules()] == modules


def test_a_convolution_with_another_kernel_does_not_fit(tmp_path: Path) -> None:
    save(compressed_pixels(), tmp_path)
    with pytest.raises(CheckpointError, match=r"patches.weight has shape \(16, 3, 2, 8\)"):
        load(tmp_path, other_kernel())


def test_interrupt_while_filling_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = build(Recurrent)
    factorize(saved, ["out.weight"], (6, 1), (1, 8), 2)
    save(attach_report(saved), tmp_path)
    model, x = build(Recurrent, seed=4), torch.randn(2, 5, 8)
    before = model(x)
    monkeypatch.setattr(nn.Module, "eval", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, model)
    assert same_bits(model(x), before)
    assert type(model.out) is nn.Linear


# -------------------------------------------------------------------------------------- saving


def test_a_model_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensorize report(.|\n)*tensorize\.compile"):
        save(build(Mlp), tmp_path / "out")
    within = torch.nn.Sequential(compressed_mlp(), torch.nn.ReLU())
    with pytest.raises(CheckpointError, match=r"model\.0"):
        save(within, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(torch.nn.DataParallel(compressed_mlp()), tmp_path / "out")  # is what it wraps
    assert known_report(load(tmp_path / "out", build(Mlp)))


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    model = compressed_mlp()
    model.register_buffer("pairs", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match=r"pairs: .*cannot store complex128"):
        save(model, tmp_path)
    model.pairs = torch.zeros(2, device="meta")
    with pytest.raises(CheckpointError, match=r"pairs: .*meta device"):
        save(model, tmp_path)
    model.pairs = torch.zeros(2, 2).to_sparse()
    with pytest.raises(CheckpointError, match=r"pairs: .*plain tensor|pairs: .*cannot be stored"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be written"):
        save(compressed_mlp(), tmp_path / "file")


def test_saving_twice_gives_the_same_weights_file(tmp_path: Path) -> None:
    model = compressed_mlp()
    save(model, tmp_path)
    name, text = weights_file(tmp_path).name, (tmp_path / MANIFEST).read_text()
    save(model, tmp_path)
    assert weights_file(tmp_path).name == name
    assert (tmp_path / MANIFEST).read_text() == text
    assert hashlib.sha256(weights_file(tmp_path).read_bytes()).hexdigest().startswith(name[10:26])


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    save(compressed_mlp(), tmp_path)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {usual}


def failures() -> Iterator[tuple[str, int, type[BaseException]]]:
    for error in (OSError, KeyboardInterrupt):
        for call in range(2):  # the weights, the manifest
            yield "replace", call, error
            yield "fsync", 2 * call, error


@pytest.mark.parametrize("killed", [False, True], ids=["raises", "killed"])
@pytest.mark.parametrize(("function", "call", "error"), list(failures()))
def test_a_crash_leaves_the_old_artefact(
    function: str,
    call: int,
    error: type[BaseException],
    killed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = compressed_mlp(), compressed_mlp(seed=1)
    save(old, tmp_path)
    real, calls = getattr(os, function), []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call + 1:
            raise error("the disk is full")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        if killed:  # nobody cleans up after a process that was killed
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        expected = CheckpointError if error is OSError else KeyboardInterrupt
        with pytest.raises(expected):
            save(new, tmp_path)
    assert_same_model(load(tmp_path, build(Mlp)), old)
    if not killed:
        assert not list(tmp_path.glob(".*"))
    save(new, tmp_path)
    assert_same_model(load(tmp_path, build(Mlp)), new)
    assert sorted(p.name for p in tmp_path.iterdir()) == [weights_file(tmp_path).name, MANIFEST]


def test_a_crash_between_two_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration that is read belongs to the weights, whatever config.json says by then."""
    from transformers import GPT2Config, GPT2LMHeadModel

    old = compressed_gpt2()
    save(old, tmp_path)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=40, vocab_size=99)
    new = attach_report(GPT2LMHeadModel(config).eval())
    real = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == MANIFEST:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        save(new, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_embd"] == 16
    assert_same_model(load(tmp_path), old)


def test_report_alone(tmp_path: Path) -> None:
    model = compressed_mlp()
    save(model, tmp_path)
    weights_file(tmp_path).unlink()
    report = read_report(tmp_path)
    assert report == model.__dict__["_tensorize"]
    assert report.plan.predicted.output_error == math.inf


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


def test_transposed_spec_is_told_of_the_parameter(tmp_path: Path) -> None:
    save(compressed_gpt2(), tmp_path)
    sites = json.loads((tmp_path / MANIFEST).read_text())["sites"]
    specs = {site["names"][0]: TTSpec.from_dict(site["spec"]) for site in sites}
    assert specs["transformer.h.0.attn.c_attn.weight"] == TTSpec.low_rank(32, 96, 5)
