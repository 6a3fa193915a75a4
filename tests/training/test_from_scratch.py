"""A compressed model to train from scratch: scale, shares, meta, formats, what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import tensorize
from examples.gpt import GPT, GPTConfig
from tensorize import TTSpec
from tensorize.algebra.reconstruct import reconstruct
from tensorize.formats.registry import format_of
from tensorize.passes.rewrite.fresh_cores import core_scales, root_mean_square, scaled_cores
from tensorize.weight.install import factored
from tensorize.weight.low_rank import LowRankLinear
from tests.models import CASES
from tests.paths import ROOT

SPECS = (
    TTSpec.low_rank(60, 48, 12),
    TTSpec.block((15, 4), (4, 12), 6),
    TTSpec((6, 10), (8, 6), (9,)),
    TTSpec((3, 4, 5), (4, 4, 3), (6, 5)),
    TTSpec((3, 2, 2, 5), (2, 2, 4, 3), (4, 6, 5)),
    TTSpec.low_rank(20, 16, 5, experts=3),
)
PIVOTED = tuple(
    TTSpec.low_rank(*sizes, pivoted=True)
    for sizes in ((60, 48, 12), (20, 90, 15), (90, 20, 19), (40, 40, 4), (30, 30, 30))
)
FORMS = (
    {"formats": "low_rank"}, {"formats": "block"}, {"formats": "tt"}, {"pivoted": True},
)  # fmt: skip


def llama(**sizes: Any) -> hf.LlamaForCausalLM:
    small = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    }  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**small, **sizes}))


def on_meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        return build()


# ------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_weight_has_the_variance_that_was_asked_for(spec: TTSpec) -> None:
    torch.manual_seed(0)
    like = torch.empty(0, dtype=torch.float64)
    squares = []
    for _ in range(200):
        cores = scaled_cores(spec, 0.05, like)
        w = torch.matmul(*cores) if spec.batch else reconstruct(spec, cores)
        squares.append(float(w.square().mean()))
    mean = sum(squares) / len(squares)
    assert mean == pytest.approx(0.05**2, rel=0.12)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_core_has_the_same_norm(spec: TTSpec) -> None:
    sizes = [torch.Size(shape).numel() for shape in spec.single.core_shapes]
    norms = [s * scale**2 for s, scale in zip(sizes, core_scales(spec, 0.05), strict=True)]
    assert norms == pytest.approx([norms[0]] * len(norms))


@pytest.mark.parametrize("spec", PIVOTED, ids=str)
def test_columns_that_are_kept_have_the_variance_of_the_others(spec: TTSpec) -> None:
    torch.manual_seed(0)
    like, n = torch.empty(0, dtype=torch.float64), spec.shape[1]
    squares, often = torch.zeros(2, n, dtype=torch.float64), torch.zeros(2, n)
    for _ in range(200):
        *cores, order = scaled_cores(spec, 0.05, like)
        kept, others = order.split([spec.ranks[0], n - spec.ranks[0]])
        assert torch.equal(order.sort().values, torch.arange(n, dtype=torch.int32))
        assert torch.equal(torch.cat([kept.sort().values, others.sort().values]), order)
        w = format_of(spec).reconstruct(spec, (*cores, order))
        for k, columns in enumerate((kept, others)):
            squares[k, columns] += w[:, columns].square().mean(0)
            often[k, columns] += 1
    for k, share in enumerate((spec.ranks[0] / n, 1 - spec.ranks[0] / n)):
        assert float(often[k].mean() / 200) == pytest.approx(share)
        if share:
            assert float(squares[k].sum() / often[k].sum()) == pytest.approx(0.05**2, rel=0.12)
            assert (often[k] > 0.2 * share * 200).all()  # none is preferred


@pytest.mark.parametrize("spec", SPECS[1:5], ids=str)
def test_trains_and_blocks_without_identities_have_it_too(spec: TTSpec) -> None:
    torch.manual_seed(0)
    bare, like = spec.in_order_of(1), torch.empty(0, dtype=torch.float64)
    form, total = format_of(bare), 0.0
    for _ in range(100):
        cores = scaled_cores(bare, 0.05, like)
        assert all(torch.equal(kept, kept.sort(-1).values) for kept in cores[len(spec.cores) :])
        total += float(form.reconstruct(bare, cores).square().mean()) / 100
    assert total == pytest.approx(0.05**2, rel=0.12)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("method", ["scaled", "spectral"])
def test_outputs_and_gradients_have_the_dense_scale(form: dict[str, Any], method: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 512, bias=False))
    x = torch.randn(256, 256, requires_grad=True)
    g = torch.randn(256, 512)
    (wanted,) = torch.autograd.grad(dense(x), x, g)
    y, gradient = [], []
    for seed in range(4):
        small = tensorize.initialize(dense, 0.25, method=method, seed=seed, **form)
        out = small(x)
        y.append(out.detach().square().mean())
        gradient.append(torch.autograd.grad(out, x, g)[0].square().mean())
    size = float(dense(x).detach().square().mean())
    assert float(sum(y) / 4) == pytest.approx(size, rel=0.1)
    assert float(sum(gradient) / 4) == pytest.approx(float(wanted.square().mean()), rel=0.1)


def test_a_nonlinearity_between_the_factors_keeps_the_scale() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 512, bias=False))
    small = tensorize.initialize(dense, 0.25, nonlinearity="silu")
    x = torch.randn(512, 256)
    with torch.no_grad():
        assert float(small(x).std()) == pytest.approx(float(dense(x).std()), rel=0.1)
    first, second = small[0].first, small[0].second
    torch.testing.assert_close(small(x), second(F.silu(first(x))))


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_weight_that_starts_at_zero_starts_at_zero_and_learns(pivoted: bool) -> None:
    dense = nn.Sequential(nn.Linear(32, 32, bias=False))
    nn.init.zeros_(dense[0].weight)
    small = tensorize.initialize(dense, 0.5, pivoted=pivoted)
    tensorize.training.parameter_groups(small, 1e-3)
    y = small(torch.randn(4, 32))
    assert not y.any()
    y.backward(torch.randn(4, 32))
    assert any(bool(p.grad.any()) for p in small.parameters() if p.grad is not None)


@pytest.mark.parametrize("pivoted", [False, True])
def test_deep_models_keep_the_scale_of_their_logits(pivoted: bool) -> None:
    torch.manual_seed(0)
    dense = GPT(GPTConfig(layers=4, width=96, heads=4))
    ids = torch.randint(1024, (4, 64))
    with torch.no_grad():
        several = (tensorize.initialize(dense, 0.3, pivoted=pivoted, seed=s) for s in range(4))
        found = [small(ids).logits.std() for small in several]
        # Its head is its table: of low rank, their rows are less independent of each other.
        assert float(sum(found) / 4) == pytest.approx(float(dense(ids).logits.std()), rel=0.25)


# ------------------------------------------------------------------------------------ shares


@pytest.mark.parametrize("pivoted", [False, True])
def test_every_weight_keeps_the_same_share_and_tables_a_larger_one(pivoted: bool) -> None:
    torch.manual_seed(0)
    small = tensorize.initialize(GPT(GPTConfig()), 0.25, pivoted=pivoted)
    report = tensorize.report(small)
    assert 0.24 < report.totals.share.parameters <= 0.25
    assert {weight.spec.pivoted for _, weight in factored(small)} == {pivoted}
    assert report.totals.after.parameters == sum(p.numel() for p in small.parameters())
    linear = [site.share for site in report.sites if "embedding" not in site.kind]
    tables = [site.share for site in report.sites if "embedding" in site.kind]
    assert max(linear) - min(linear) < 0.12  # ranks are multiples of 8
    assert min(tables) > max(linear)
    assert all(rank % 8 == 0 for site in report.sites for rank in site.ranks)
    for names in ("qkv", "projection", "expand", "contract"):
        assert len({site.ranks for site in report.sites if names in site.name}) == 1


def test_budgets_of_flops_and_patterns() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2))
    small = tensorize.initialize(
        model,
        tensorize.Budget(params=0.7, flops=0.8),
        exclude="*embedding*",
        formats={"*.expand": "block", "*.contract": TTSpec((8, 24), (24, 32), (16,))},
    )
    report = tensorize.report(small)
    assert report.totals.share.flops <= 0.8
    formats = {site.name.split(".")[-2]: site.format for site in report.sites}
    assert formats["embedding"] == "dense"
    assert (formats["qkv"], formats["expand"]) == ("low_rank", "block")
    contract = [site for site in report.sites if "contract" in site.name]
    assert all((site.format, site.ranks) == ("tt", (16,)) for site in contract)


def test_without_an_identity_the_same_budget_buys_larger_ranks() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
    whole, small = (
        tensorize.report(tensorize.initialize(dense, 0.5, pivoted=pivoted)).sites
        for pivoted in (False, True)
    )
    assert {site.ranks for site in whole} == {(32,)}
    assert {site.ranks for site in small} == {(32,)}  # 40 is above the budget
    small = tensorize.report(tensorize.initialize(dense, 0.9, pivoted=True)).sites
    assert {site.ranks for site in small} == {(80,)}  # 88 is above it
    assert all(site.parameters_after == 80 * (256 - 80) for site in small)


def test_this_very_factorization_without_an_identity() -> None:
    spec = TTSpec.low_rank(64, 48, 10, pivoted=True)
    small = tensorize.initialize(nn.Sequential(nn.Linear(48, 64)), None, formats=spec)
    ((_, weight),) = factored(small)
    assert weight.spec == spec


def test_ranks_by_hand() -> None:
    small = tensorize.initialize(nn.Sequential(nn.Linear(64, 64)), None, ranks={"*": 5})
    assert isinstance(small[0], LowRankLinear)
    assert small[0].first.out_features == 5


def test_the_model_is_left_as_it_was_and_the_random_state_too() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    one, two = (tensorize.initialize(model, 0.3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    other = tensorize.initialize(model, 0.3, seed=1)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert tensorize.initialize(model, 0.3, inplace=True) is model


@pytest.mark.parametrize("form", [{"nonlinearity": "silu"}, {"pivoted": True}], ids=str)
def test_it_trains_is_saved_and_loaded(tmp_path: Any, form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    build = lambda: GPT(GPTConfig(layers=1, width=48, heads=2, vocabulary=128))  # noqa: E731
    small = tensorize.initialize(build(), 0.4, **form)
    optimizer = torch.optim.AdamW(tensorize.training.parameter_groups(small, 1e-2, 0.1))
    ids = torch.randint(128, (8, 33))

    def loss() -> Tensor:
        return F.cross_entropy(small(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())

    first = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * first
    tensorize.save(small, tmp_path)
    again = tensorize.load(tmp_path, build())
    assert torch.equal(again(ids).logits, small.eval()(ids).logits)


# -------------------------------------------------------------------------------------- meta


@pytest.mark.parametrize(
    "build",
    [
        llama,
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=64, n_layer=2, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0
            )
        ),
        lambda: hf.BertModel(
            hf.BertConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                vocab_size=256,
            )
        ),
        lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64)),
    ],
    ids=["llama", "gpt2", "bert", "plain"],
)
@pytest.mark.parametrize("pivoted", [False, True])
def test_a_model_on_meta_gets_the_values_of_its_own_initialisers(build: Any, pivoted: bool) -> None:
    small = tensorize.initialize(on_meta(build), 0.5, pivoted=pivoted)
    torch.manual_seed(0)
    dense = build()
    assert not any(t.is_meta for t in (*small.parameters(), *small.buffers()))
    weights = dict(factored(small))
    assert weights
    buffers = dict(dense.named_buffers())
    for name, buffer in small.named_buffers():
        assert name not in buffers or torch.equal(buffer, buffers[name]), name
    own = dict(small.named_parameters())
    for name, parameter in dense.named_parameters():
        wanted = root_mean_square(parameter.detach())
        if name in weights:
            found = root_mean_square(weights[name].dense().detach())
            few = min(parameter.shape) <= 2  # so few entries say little of their scale
            assert found == pytest.approx(wanted, rel=1.0 if few else 0.25), name
        elif name in own:
            assert root_mean_square(own[name].detach()) == pytest.approx(wanted, rel=0.25), name


PEAK = """
import resource, torch, tensorize
from torch import nn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def made(layers, width):
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    return tensorize.initialize(model, 0.1)

made(2, 64)  # what is imported on the way
before = peak()
small = made(40, 1024)
print(peak() - before, sum(p.nbytes for p in small.parameters()))
"""


def test_no_more_than_a_module_of_dense_weights_exists_at_a_time() -> None:
    # The C library gives blocks from this size on back when they are freed. By itself it learns a
    # size, of at most 32 MB, and keeps smaller ones where another block lies behind them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        **{"capture_output": True, "text": True, "cwd": ROOT, "check": False, "env": environment},
    )
    assert done.returncode == 0, done.stderr
    grown, own = map(int, done.stdout.split())
    dense = 4 * 1024 * 1024
    assert own <= 0.1 * 40 * dense
    # Its own size, one dense weight twice (where cores are drawn), and what the allocator leaves.
    assert grown < own + 2 * dense + 16e6 < 40 * dense / 3


def test_what_does_not_run_on_meta_is_seen_with_weights_of_zero() -> None:
    """Grouped products of experts are float32's on no meta device."""
    build = CASES["mixtral"].build
    want = tensorize.initialize(build(), 0.5)
    small = tensorize.initialize(on_meta(build), 0.5)
    assert [w.spec for _, w in factored(small)] == [w.spec for _, w in factored(want)]
    assert any(weight.spec.batch for _, weight in factored(small))


def test_tied_weights_on_meta_stay_tied() -> None:
    small: Any = tensorize.initialize(on_meta(lambda: llama(tie_word_embeddings=True)), 0.4)
    head, table = small.lm_head.weight, small.model.embed_tokens.weight
    assert [id(c) for c in head.cores] == [id(c) for c in table.cores]


def test_what_nothing_initialises_is_an_error_that_names_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.scale = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    with pytest.raises(tensorize.CaptureError, match=r"scale of this Scaled"):
        tensorize.initialize(on_meta(Scaled), 0.6)

    def initializer(module: nn.Module) -> None:
        if isinstance(module, Scaled):
            nn.init.ones_(module.scale)
        else:
            module.reset_parameters()  # type: ignore[operator]

    model: Any = tensorize.initialize(on_meta(Scaled), 0.7, initializer=initializer)
    assert torch.equal(model.scale, torch.ones(16))


@pytest.mark.parametrize("method", ["scaled", "spectral"])
def test_a_weight_that_begins_as_zero_can_learn(method: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48))
    nn.init.zeros_(dense[1].weight)
    small = tensorize.initialize(dense, 0.5, method=method)
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    for _ in range(3):
        (small(torch.randn(8, 48)) - 1).square().mean().backward()
        optimizer.step()
    assert small[1].weight.dense().abs().max() > 0


# ----------------------------------------------------------------------------------- refused


def test_a_layer_with_a_nonlinearity_stands_for_no_matrix() -> None:
    small = tensorize.initialize(nn.Sequential(nn.Linear(64, 64)), 0.3, nonlinearity="gelu")
    with pytest.raises(tensorize.TensorizeError, match=r"0\.weight: there is a gelu between"):
        tensorize.densify(small)


@pytest.mark.parametrize("look", [lambda w: w.t(), lambda w: w.detach().t(), lambda w: w[:3].T])
def test_nor_does_a_view_of_it(look: Callable[[Any], Any]) -> None:
    small = tensorize.initialize(nn.Sequential(nn.Linear(64, 64)), 0.3, nonlinearity="gelu")
    weight = small.get_submodule("0").weight
    with pytest.raises(tensorize.TensorizeError, match="there is a gelu between"):
        torch.randn(2, 64) @ look(weight)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"budget": tensorize.Budget(loss=0.1)}, "not trained yet"),
        ({"budget": tensorize.Budget(error=0.1)}, "not trained yet"),
        ({"budget": 2.0}, "a float above 1"),
        ({"budget": 0.001}, "smallest feasible"),
        ({"budget": None}, "needs ranks="),
        ({"formats": "shared"}, "chosen by trained weights"),
        ({"formats": TTSpec.low_rank(8, 8, 2)}, "stands for a weight of"),
        ({"formats": {"nothing": "tt"}}, "matches no weight"),
        ({"nonlinearity": "sine"}, "is not one of"),
        ({"method": "zeros"}, "is not one of"),
        ({"pivoted": True, "nonlinearity": "silu"}, "no change of basis can remove anything"),
        ({"rank_multiple": 0}, "positive integer"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], cause: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tensorize.TensorizeError, match=cause):
        tensorize.initialize(model, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
