"""Models that differentiate inside of their forward, and matmuls whose inputs carry gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import tensorize
from tensorize.base.errors import TensorizeError
from tensorize.capture.batches import calibration_batches
from tensorize.passes.observe.backward import backward, probing
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.stages import Given

DATA = [torch.randn(16, 12, generator=torch.Generator().manual_seed(k)) for k in range(8)]
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(99))


class Net(nn.Module):
    outputs = 1

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(12, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
        self.net = nn.Sequential(*layers, nn.Linear(48, self.outputs))


class Forces(Net):
    """An energy and its forces; gradients are on, or as the caller has them."""

    def __init__(self, own: bool = True, create_graph: bool = True) -> None:
        super().__init__()
        self.own, self.create_graph = own, create_graph

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.own or torch.is_grad_enabled()):
            x = x.detach().requires_grad_()
            energy = self.net(x)
            (g,) = torch.autograd.grad(energy.sum(), x, create_graph=self.create_graph)
        return {"e": energy, "f": -g}


class Backward(Net):
    """Forces by ``.backward()``, which leaves gradients at all parameters."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.net(x)
            energy.sum().backward()
        assert x.grad is not None
        return {"e": energy, "f": -x.grad}


class Curvature(Net):
    """Forces, stress, and a product with the Hessian."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            strain, x = torch.zeros(3, 3, requires_grad=True), x.detach().requires_grad_()
            moved = (x.reshape(-1, 4, 3) @ (torch.eye(3) + strain)).reshape(-1, 12)
            energy = self.net(moved).sum()
            g, stress = torch.autograd.grad(energy, (x, strain), create_graph=True)
            (second,) = torch.autograd.grad((g * x.detach()).sum(), x, create_graph=True)
        return {"f": -g, "stress": stress, "second": second}


class Jacobian(Net):
    outputs = 3

    def forward(self, x: Tensor) -> Tensor:
        return vmap(jacrev(self.net))(x).flatten(1)


class Mapped(Net):
    outputs = 8

    def forward(self, x: Tensor) -> Tensor:
        return vmap(self.net)(x)


class Descends(Net):
    """A layer whose output is where a few steps down an energy lead to."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = torch.zeros_like(x).requires_grad_()
            for _ in range(3):
                energy = self.net(x + z).square().sum() + z.square().sum()
                z = z - 0.2 * torch.autograd.grad(energy, z, create_graph=True)[0]
        return z


class Residual(Net):
    """The residual of a differential equation."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.net(x)
            (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return u, second[:, :1] + u


KINDS: dict[str, Callable[[], nn.Module]] = {
    "own": Forces,
    "ambient": lambda: Forces(own=False),
    "no graph": lambda: Forces(create_graph=False),
    "backward": Backward,
    "curvature": Curvature,
    "jacobian": Jacobian,
    "vmap": Mapped,
    "descends": Descends,
    "residual": Residual,
}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def outputs(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return list(result.values()) if isinstance(result, dict) else list(result)


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return tensorize.compile(model, 0.6, progress=False, **options)


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_they_are_compressed_by_what_their_outputs_lose(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    by_loss = compiled(model, calibration=DATA)
    by_weights = compiled(model, example_inputs=(X,), metric="frobenius")
    assert not any("counted" in note for note in tensorize.report(by_loss).notes)
    with torch.enable_grad():
        wanted, by_loss_gives, by_weights_gives, dense = (
            torch.cat([part.detach().flatten() for part in outputs(m(X))])
            for m in (model, by_loss, by_weights, tensorize.densify(by_loss))
        )
    lost = float((by_loss_gives - wanted).norm())
    assert lost < 0.6 * float((by_weights_gives - wanted).norm())
    assert float((by_loss_gives - dense).norm()) < 1e-4 * float(dense.norm())


def test_under_no_grad_of_the_caller_the_result_is_the_same() -> None:
    model = made(KINDS["ambient"])
    outside = compiled(model, calibration=DATA)
    with torch.no_grad():
        inside = compiled(model, calibration=DATA)
    assert all(
        torch.equal(a, b) for a, b in zip(outside.parameters(), inside.parameters(), strict=True)
    )


def test_forces_count_whether_or_not_the_model_keeps_their_graph() -> None:
    plans = [
        tensorize.analyze(made(KINDS[kind]), calibration=DATA, progress=False).plan(0.6)
        for kind in ("own", "no graph", "backward")
    ]
    assert plans[0].sites == plans[1].sites == plans[2].sites


def test_factors_have_second_derivatives_and_they_are_those_of_densify() -> None:
    small = compiled(made(Forces), calibration=DATA).double()
    dense = tensorize.densify(small)
    found = []
    for model in (small, dense):
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        force = model(X.double())["f"]
        found.append(torch.autograd.grad(force.square().sum(), biases, allow_unused=True))
        cores = [p for name, p in model.named_parameters() if "first" in name or "cores" in name]
        if cores:
            again = torch.autograd.grad(model(X.double())["f"].square().sum(), cores)
            assert all(bool(g.any()) for g in again)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-9)


def test_a_whole_gradient_goes_through_the_inner_one() -> None:
    """Against autograd on the real weights, in float64."""

    def squares(result: Any, batch: Any) -> Tensor:
        return result["f"].square().mean() + result["e"].square().mean()

    model = made(lambda: Forces(create_graph=False)).double()
    (batch,) = calibration_batches([X.double()], model)
    found = FindSites().run(Given(model=model, inputs=batch))
    wanted = [(site.name, model.get_parameter(site.name)) for site in found.sites]
    got: dict[str, Tensor] = {}
    takes = {name: (lambda g, name=name: got.update({name: g})) for name, _ in wanted}
    loss = PreservedLoss(squares, {}, "loss_fn")
    probe = probing(loss, batch, model, torch.Generator())
    rows = backward(model, batch, wanted, _no_rows, probe, whole=takes)
    model.create_graph = True
    truth = torch.autograd.grad(squares(model(X.double()), None) * rows, [p for _, p in wanted])
    for (name, _), gradient in zip(wanted, truth, strict=True):
        assert torch.allclose(got[name], gradient, rtol=1e-10)


def _no_rows(*_: Any) -> None:
    raise AssertionError("their rows do not tell all")


class Carried(Net):
    """Its input carries the gradient of a tensor that is no weight: made here, or held."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.held = torch.linspace(0.5, 2.0, 12).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "made":
            x = x.detach().requires_grad_()
        scale = self.held if self.how == "held" else self.held.detach()
        return self.net(x * scale)


@pytest.mark.parametrize("how", ["made", "held"])
def test_a_matmul_has_its_gradient_whether_or_not_its_input_carries_one(how: str) -> None:
    plain, carried = (
        tensorize.analyze(made(lambda h=h: Carried(h)), calibration=DATA, progress=False).plan(0.6)
        for h in ("plain", how)
    )
    assert plain.sites == carried.sites


def test_a_held_tensor_gets_no_gradient_of_ours() -> None:
    model: Any = made(lambda: Carried("held"))
    tensorize.analyze(model, calibration=DATA, progress=False)
    assert model.held.grad is None


class Adapts(Net):
    """A step of training inside of the forward, on its own weights."""

    outputs = 4

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            own = dict(self.net.named_parameters())
            loss = self.net(x).square().mean()
            steps = torch.autograd.grad(loss, tuple(own.values()), create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(own.items(), steps, strict=True)}
        return functional_call(self.net, moved, (x,))


@pytest.mark.parametrize("way", [{"calibration": DATA}, {"example_inputs": (X,)}])
def test_weights_that_a_model_differentiates_by_stay_dense(way: dict[str, Any]) -> None:
    with pytest.raises(TensorizeError, match=r"net\.0\.weight(.|\n)*used by grad"):
        compiled(made(Adapts), **way)


@pytest.mark.parametrize("build", [Jacobian, Mapped])
def test_rows_under_a_transform_are_not_to_be_had_and_the_way_out_works(
    build: Callable[[], nn.Module],
) -> None:
    with pytest.raises(TensorizeError, match=r'net\.0\.weight(.|\n)*transform(.|\n)*metric="loss"'):
        compiled(made(build), calibration=DATA, metric="input")
    compiled(made(build), calibration=DATA, metric="loss")
