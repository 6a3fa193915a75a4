"""Small compressed models to save, and what it is that two models are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tensorize.algebra.decompose import tt_svd
from tensorize.ir.plan import Plan, Prediction, RankPlan, Totals
from tensorize.reports.data import ReportTotals, SiteReport
from tensorize.reports.report import Report
from tensorize.store.manifest import MANIFEST, signed
from tensorize.weight.install import factored, install, owner_of


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


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a manifest says, its checksum with it."""
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    del data["sha256"]
    change(data)
    path.write_text(signed(data))
