"""One first factor for weights that read the same input: when it is taken, and that it is right."""

from __future__ import annotations

import copy
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tensorize
from tensorize.algebra.metric import Metric
from tensorize.formats.registry import names
from tensorize.ir.spec import DENSE, LOW_RANK, SHARED
from tensorize.passes.allocate.candidates import curve_points
from tensorize.passes.allocate.groups import group_points
from tensorize.passes.curves.joint import joint_factors
from tensorize.weight.low_rank import LowRankLinear
from tests.models import CASES, relative


class Gated(nn.Module):
    """A gated feed-forward layer; ``alike``: gate and up read the same few directions of x."""

    def __init__(self, *, alike: bool, width: int = 24, inner: int = 40, rank: int = 6) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width)
        basis = torch.linalg.qr(torch.randn(width, width))[0]
        spaces = basis[:rank], basis[:rank] if alike else basis[rank : 2 * rank]
        with torch.no_grad():
            for layer, space in zip((self.gate, self.up), spaces, strict=True):
                layer.weight.copy_(torch.randn(inner, rank) @ space)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gated(*, alike: bool) -> Gated:
    torch.manual_seed(0)
    return Gated(alike=alike)


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(1))


def shared_names(model: nn.Module) -> list[str]:
    return [s.name for s in tensorize.report(model).plan.sites if s.shared is not None]


# ------------------------------------------------------------------------------ who reads what


def test_linears_of_one_input_know_each_other() -> None:
    model = CASES["llama"].model()
    analysis = tensorize.analyze(model, example_inputs=CASES["llama"].batch())
    groups = {s.name.rpartition("layers.0.")[2]: s.input_group for s in analysis.program.sites}
    q, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert {groups[f"self_attn.{k}_proj.weight"] for k in "qkv"} == {q}
    assert {groups[f"mlp.{k}_proj.weight"] for k in ("gate", "up")} == {gate}
    assert groups["self_attn.o_proj.weight"] is None
    assert groups["mlp.down_proj.weight"] is None


def test_what_reads_a_copy_is_apart() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.clone())

    analysis = tensorize.analyze(Copies(), example_inputs=(torch.randn(2, 8),))
    assert [site.input_group for site in analysis.program.sites] == [None, None]


_SHARES = 0.555  # as much of a gated model as one first factor needs


@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_what_is_trained_and_what_is_frozen_share_nothing(frozen: str) -> None:
    model = gated(alike=True)
    assert shared_names(tensorize.compile(model, _SHARES, example_inputs=(rows(),)))
    model.get_submodule(frozen).requires_grad_(False)
    small = tensorize.compile(model, _SHARES, example_inputs=(rows(),), formats="shared")
    assert shared_names(small) == []
    before = small.get_submodule(frozen)(rows()).detach()
    trained = [p for p in small.parameters() if p.requires_grad]
    small(rows()).sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert small.get_submodule(frozen)(rows()).equal(before)
    assert not any(p.requires_grad for p in small.get_submodule(frozen).parameters())
    other = small.get_submodule("up" if frozen == "gate" else "gate")
    assert all(p.requires_grad and p.grad is not None for p in other.parameters())


def test_frozen_weights_share_among_themselves() -> None:
    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.layers[1].requires_grad_(False)
            self.layers[3].requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x) for layer in self.layers)  # type: ignore[return-value]

    analysis = tensorize.analyze(Four(), example_inputs=(torch.randn(2, 8),))
    groups = {site.name: site.input_group for site in analysis.program.sites}
    first, second = "layers.0.weight", "layers.1.weight"
    assert list(groups.values()) == [first, second, first, second]


def test_a_weight_that_was_frozen_after_the_analysis() -> None:
    """The plan shares, and can no more: said before anything is changed, with a way that works."""
    model = gated(alike=True)
    plan = tensorize.analyze(model, example_inputs=(rows(),), formats="shared").plan(_SHARES)
    assert {site.shared for site in plan.sites} >= {"gate.weight"}
    model.up.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tensorize.AnalysisError, match=r"up\.weight: .*one of them is frozen"):
        tensorize.apply(model, plan, inplace=True)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    again = tensorize.analyze(model, example_inputs=(rows(),)).plan(_SHARES)
    assert {site.shared for site in tensorize.report(tensorize.apply(model, again)).plan.sites} == {
        None
    }


def test_excluded_weights_are_in_no_group() -> None:
    analysis = tensorize.analyze(gated(alike=True), example_inputs=(rows(),), exclude="up")
    assert all(site.input_group is None for site in analysis.program.sites)


# --------------------------------------------------------------------------------- the curve


def test_the_common_factor_is_the_best_for_the_stacked_weights() -> None:
    """Against the truncated SVD of the whitened weights on each other, in float64."""
    torch.manual_seed(0)
    weights = [torch.randn(m, 12, dtype=torch.float64) for m in (20, 7)]
    root = torch.linalg.cholesky(torch.cov(torch.randn(12, 50, dtype=torch.float64)))
    lefts = [torch.linalg.cholesky(torch.cov(torch.randn(m, 90))).double() for m in (20, 7)]
    metrics = [Metric(0.5, left, root) for left in lefts]
    white = [left.T @ w @ root for left, w in zip(lefts, weights, strict=True)]
    sigma = 0.5**0.5 * torch.linalg.svdvals(torch.cat(white))
    for rank in (1, 4, 9):
        shared, reader = joint_factors(weights, metrics, rank)
        lost = sum(m.norm(w - w @ reader @ shared) for w, m in zip(weights, metrics, strict=True))
        assert lost == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_curve_says_what_each_weight_loses(calibrated: bool) -> None:
    model = gated(alike=False)
    data: Any = {"calibration": [rows(64) for _ in range(4)]} if calibrated else {}
    analysis = tensorize.analyze(model, example_inputs=(rows(),), refine=None, **data)
    for name in ("gate.weight", "up.weight"):
        curve = analysis.program.spectra[name]
        weight = dict(model.named_parameters())[name].detach()
        assert curve.shared is not None
        for rank in (1, 5, 9):
            cores = curve.factors(tensorize.TTSpec.low_rank(40, 24, rank), weight, shared=True)
            lost = sum(m.norm(cores[0] @ cores[1] - weight) for m in curve.metrics)
            assert lost == pytest.approx(float(curve.shared.distortion[rank]), rel=1e-4)


# ------------------------------------------------------------------------------ the allocation


def test_a_first_factor_in_common_is_a_kind_of_low_rank() -> None:
    """Naming it alone allows weights of one input that; others are low rank by themselves."""
    model, x = gated(alike=True), rows()
    shared, both = (
        tensorize.analyze(model, example_inputs=(x,), formats=formats).plan(0.5)
        for formats in ("shared", ("shared", "low_rank"))
    )
    assert shared == both
    assert all(site.spec is not None for site in shared.sites)


def test_the_choice_of_a_group_is_the_best_of_all_combinations() -> None:
    model = gated(alike=True)
    with torch.no_grad():
        model.up.weight += 0.1 * torch.randn(40, 24)
    analysis = tensorize.analyze(model, example_inputs=(rows(),))
    curves = [analysis.program.spectra[name] for name in ("gate.weight", "up.weight")]
    members = [curve_points(c, (DENSE, LOW_RANK), 4, (1,)) for c in curves]
    group = group_points(members, curves, [1.0] * len(curves), batch_sizes=(1,))
    assert group is not None
    for price in np.geomspace(1e-6, 1.0, 60):
        apart = sum((p.objective + price * p.costs[:, 0]).min() for p in members)
        ranks = range(1, 19)
        lost = [
            sum(
                p.objective[0] * (c.error(float(c.shared.distortion[r])) / p.errors[0]) ** 2
                for p, c in zip(members, curves, strict=True)
                if c.shared is not None
            )
            for r in ranks
        ]
        together = min(v + price * r * (80 + 24) for v, r in zip(lost, ranks, strict=True))
        best = (group.objective + price * group.costs[:, 0]).min()
        assert best == pytest.approx(min(apart, together), rel=1e-6)


def test_common_directions_are_stored_once() -> None:
    model, x = gated(alike=True), rows()
    whole = sum(p.numel() for p in model.parameters())
    needed = 6 * (24 + 40 + 40) + 24 * 40 + 24  # V once, two U, and down as it is
    small = tensorize.compile(model, needed / whole + 1e-6, example_inputs=(x,))
    assert shared_names(small) == ["gate.weight", "up.weight"]
    assert sum(p.numel() for p in small.parameters()) == needed
    assert relative(small(x).detach(), model(x).detach()) < 1e-5
    after = [site.parameters_after for site in tensorize.report(small).sites[:2]]
    assert after == [6 * (24 + 40), 6 * 40]
    assert "one first factor for gate.weight, up.weight" in str(tensorize.report(small).to_dict())


@pytest.mark.parametrize("formats", [("dense", "low_rank"), "low_rank"])
def test_it_is_not_taken_where_formats_do_not_name_it(formats: Any) -> None:
    model, x = gated(alike=True), rows()
    small = tensorize.compile(model, 0.5, example_inputs=(x,), formats=formats)
    assert shared_names(small) == []


def test_it_is_not_taken_where_it_gains_nothing() -> None:
    model, x = gated(alike=False), rows()
    whole = sum(p.numel() for p in model.parameters())
    apart = 2 * 6 * (24 + 40) + 24 * 40 + 24
    small = tensorize.compile(model, apart / whole + 1e-6, example_inputs=(x,))
    assert shared_names(small) == []
    assert relative(small(x).detach(), model(x).detach()) < 1e-5


def test_given_ranks_are_of_weights_by_themselves() -> None:
    small = tensorize.compile(
        gated(alike=True), None, example_inputs=(rows(),), ranks={"gate": 6, "up": 6}
    )
    assert shared_names(small) == []


# ---------------------------------------------------------------------------------- the model


def compressed(budget: float = 0.6, **options: Any) -> tuple[Gated, Any]:
    model = gated(alike=True)
    small = tensorize.compile(model, budget, example_inputs=(rows(),), **options)
    assert shared_names(small) == ["gate.weight", "up.weight"]
    return model, small


def calls(small: Any, x: Tensor) -> int:
    """How many matmuls of a first factor a call makes."""
    count = 0
    shape = tuple(small.gate.first.weight.shape)

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal count
            shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
            count += "mm" in str(func) and (shape in shapes or shape[::-1] in shapes)
            return func(*args, **(kwargs or {}))

    with Counting():
        small(x)
    return count


@torch.no_grad()
def test_the_product_with_the_input_is_computed_once() -> None:
    _, small = compressed()
    assert calls(small, rows()) == 1
    assert small.gate.input_product is small.up.input_product


def test_what_reads_its_input_after_a_hidden_write_is_apart() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            y = self.a(x)
            x.data.mul_(2)  # no version counts it
            return y + self.b(x)

    analysis = tensorize.analyze(Written(), example_inputs=(torch.randn(2, 8),))
    assert [site.input_group for site in analysis.program.sites] == [None, None]


class Interrupted(Gated):
    """Something happens between the two that read one input."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        self.between(x)
        return self.down(F.silu(gate) * self.up(x))

    def between(self, x: Tensor) -> None:
        pass


def _swap_weight(small: Any) -> None:
    small.gate.first.weight.data = small.gate.first.weight.data * 2


def _write_weight(small: Any) -> None:
    small.gate.first.weight.data.mul_(2)


def _load_weight(small: Any) -> None:
    small.load_state_dict({k: 2 * v for k, v in small.state_dict().items()})


def _through_numpy(small: Any) -> None:
    small.gate.first.weight.detach().numpy()[:] *= 2


@pytest.mark.parametrize("change", [_swap_weight, _write_weight, _load_weight, _through_numpy])
@pytest.mark.parametrize("called", ["model", "layers"])
@torch.no_grad()
def test_weights_that_changed_between_calls_are_used(change: Any, called: str) -> None:
    """By whatever means, whether versions count it or not, and one tensor is the input of all."""
    _, small = compressed()
    x = rows()
    run = small if called == "model" else lambda x: torch.cat([small.gate(x), small.up(x)])
    before = run(x)
    small.gate(x)  # one of the layers is called alone: the other has not had its product
    change(small)
    after = run(x)
    fresh = copy.deepcopy(small)
    want = fresh(x) if called == "model" else torch.cat([fresh.gate(x), fresh.up(x)])
    assert torch.equal(after, want)
    assert not torch.allclose(after, before)


@torch.no_grad()
def test_an_input_that_is_filled_anew_is_read_again() -> None:
    """By numpy and by ``.data``: a layer that one call skips has no product of an older input."""
    _, small = compressed()
    buffer = np.ones((4, 24), dtype="float32")
    x = torch.from_numpy(buffer)
    small(x)
    small.gate(x)
    buffer[:] = 2
    assert torch.equal(small.up(x), small.up(torch.full((4, 24), 2.0)))
    x.data = torch.full((4, 24), 3.0)
    assert torch.equal(small.up(x), small.up(torch.full((4, 24), 3.0)))


@torch.no_grad()
def test_within_a_call_writes_are_seen() -> None:
    _, small = compressed()
    small.__class__ = Interrupted
    x = rows()
    small.between = lambda x: x.mul_(2)
    got = small(x.clone())
    want = small.down(F.silu(small.gate(x)) * small.up(2 * x))
    assert torch.equal(got, want)
    small.between = lambda x: _swap_weight(small)
    gate = small.gate(x)
    got = small(x)
    assert torch.equal(got, small.down(F.silu(gate) * small.up(x)))


@torch.no_grad()
def test_a_call_that_fails_leaves_no_product() -> None:
    _, small = compressed()
    small.__class__ = Interrupted

    def fail(x: Tensor) -> None:
        raise ValueError("between")

    small.between = fail
    x = rows()
    with pytest.raises(ValueError, match="between"):
        small(x)
    assert small.gate.input_product._now.last is None
    x.data.mul_(2)
    assert torch.equal(small.up(x), small.up(x.clone()))


def test_losses_of_one_input_have_backward_passes_of_their_own() -> None:
    """Two losses of one call, calls one after the other, and parts that are checkpointed."""
    _, small = compressed()
    dense, x = tensorize.densify(small), rows()

    def two_losses(model: Any) -> None:
        gate, up = model.gate(x), model.up(x)
        gate.sum().backward()
        up.square().sum().backward()

    def alone(model: Any) -> None:
        for _ in range(2):
            model.gate(x).sum().backward()

    def checkpointed(model: Any) -> None:
        outputs = [checkpoint(layer, x, use_reentrant=False) for layer in (model.gate, model.up)]
        sum(outputs).square().sum().backward()

    for losses in (two_losses, alone, checkpointed):
        for model in (small, dense):
            model.zero_grad()
            losses(model)
        of_dense = dense.gate.weight.grad
        want = of_dense @ small.gate.first.weight.detach().T
        assert relative(small.gate.second.weight.grad, want) < 1e-5, losses.__name__


@torch.no_grad()
def test_threads_have_products_of_their_own() -> None:
    _, small = compressed()
    small.__class__ = Interrupted
    other = threading.Thread(target=lambda: small(rows(3)))

    def between(x: Tensor) -> None:
        small.between = lambda x: None
        other.start()
        other.join()

    small.between = between
    x = rows()
    got = small(x)
    assert torch.equal(got, small(x))


def test_it_is_computed_again_under_other_modes() -> None:
    _, small = compressed()
    x = rows()
    with torch.no_grad():
        small.gate(x)
    assert small.up(x).grad_fn is not None
    small.gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small.up(x).dtype == torch.bfloat16
    with torch.inference_mode():
        y = rows()
        assert torch.equal(small.gate(y), small.gate.second(small.gate.first(y)))
    with torch.no_grad():
        assert relative(torch.func.vmap(small)(x), small(x)) < 1e-6


def test_a_replaced_first_layer_answers_for_itself() -> None:
    _, small = compressed()
    x = rows()

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    before = small.up(x).detach()
    small.up.first.__class__ = Doubled
    small.gate(x)
    assert relative(small.up(x).detach(), 2 * before) < 1e-6


def test_nothing_is_kept_alive_after_a_call() -> None:
    _, small = compressed()
    with torch.no_grad():
        small(rows())
    assert small.gate.input_product._now.last is None


def test_gradients_are_those_of_the_dense_model() -> None:
    _, small = compressed()
    dense, x = tensorize.densify(small), rows()
    small(x).square().sum().backward()
    dense(x).square().sum().backward()
    first, second = small.gate.first.weight, (small.gate.second.weight, small.up.second.weight)
    of_dense = [dense.gate.weight.grad, dense.up.weight.grad]
    second, first_grad = [u.detach() for u in second], first.grad
    want = sum(u.T @ g for u, g in zip(second, of_dense, strict=True))
    assert relative(first_grad, want) < 1e-5
    for layer, g in zip((small.gate, small.up), of_dense, strict=True):
        assert relative(layer.second.weight.grad, g @ first.detach().T) < 1e-5


def test_copies_share_among_themselves() -> None:
    _, small = compressed()
    twin = copy.deepcopy(small)
    assert twin.gate.first.weight is twin.up.first.weight
    assert twin.gate.input_product is twin.up.input_product
    assert twin.gate.input_product is not small.gate.input_product
    with torch.no_grad():
        assert calls(twin, rows()) == 1


def test_a_saved_model_shares_again(tmp_path: Path) -> None:
    model, small = compressed()
    tensorize.save(small, tmp_path)
    loaded: Any = tensorize.load(tmp_path, copy.deepcopy(model))
    assert torch.equal(loaded(rows()), small(rows()))
    assert loaded.gate.first.weight is loaded.up.first.weight
    with torch.no_grad():
        assert calls(loaded, rows()) == 1


def test_transformers_saves_and_loads_it(tmp_path: Path) -> None:
    case = CASES["llama"]
    model: Any = case.model()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data = layer.mlp.gate_proj.weight.detach().flip(0)
    small: Any = tensorize.compile(model, 0.6, example_inputs=case.batch())
    assert any("gate_proj" in name for name in shared_names(small))
    small.save_pretrained(tmp_path)
    loaded: Any = type(model).from_pretrained(tmp_path)
    assert torch.equal(case.output(loaded), case.output(small))
    first = [m.first.weight for m in loaded.modules() if isinstance(m, LowRankLinear)]
    assert len({id(w) for w in first}) < len(first)


def test_torch_compile_gives_the_same() -> None:
    _, small = compressed()
    x = rows()
    with torch.no_grad():
        assert relative(torch.compile(small, backend="aot_eager")(x), small(x)) < 1e-6


def test_a_dense_model_is_made_of_it_again() -> None:
    _, small = compressed()
    dense = tensorize.densify(small)
    assert type(dense.gate) is nn.Linear
    assert "input_product" not in dense.gate.__dict__
    assert not [*dense._forward_hooks, *dense._forward_pre_hooks]
    with torch.no_grad():
        assert relative(dense(rows()), small(rows())) < 1e-6


# ---------------------------------------------------------------------------- refit, cache, plans


def test_a_refit_solves_the_group_together() -> None:
    """What comes before the group is off, so that it is solved for other inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), Gated(alike=True))
    with torch.no_grad():
        model[2].up.weight += 0.05 * torch.randn(40, 24)
    data = [torch.randn(64, 24) for _ in range(24)]
    analysis = tensorize.analyze(model, calibration=data)
    plan = analysis.plan(0.5, refine="refit")
    assert [s.name for s in plan.sites if s.shared] == ["2.gate.weight", "2.up.weight"]
    refitted, plain = (tensorize.apply(model, plan, refine=r) for r in ("refit", None))
    assert refitted[2].gate.first.weight is refitted[2].up.first.weight
    x = torch.randn(512, 24)
    with torch.no_grad():
        errors = [relative(small(x), model(x)) for small in (refitted, plain)]
    assert errors[0] < errors[1]


def test_a_kept_analysis_gives_the_same_plan_and_model(tmp_path: Path) -> None:
    made = [compressed(cache_dir=tmp_path)[1] for _ in range(2)]
    assert tensorize.report(made[0]).plan == tensorize.report(made[1]).plan
    assert all(map(torch.equal, made[0].parameters(), made[1].parameters()))


def test_a_plan_from_json_still_shares(tmp_path: Path) -> None:
    model, small = compressed()
    text = tensorize.report(small).plan.to_json()
    again = tensorize.apply(model, tensorize.Plan.from_json(text))
    assert shared_names(again) == shared_names(small)
    assert torch.equal(again(rows()), small(rows()))


def test_formats_are_known_by_name() -> None:
    assert SHARED in names()
    for order in itertools.permutations(("dense", "low_rank", "shared")):
        tensorize.compile(gated(alike=True), 0.6, example_inputs=(rows(),), formats=order)
