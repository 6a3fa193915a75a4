"""Equivariant models of other people's packages, where these are installed: what a rotation of the
inputs does, and gradients of gradients."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from benchmarks.graph_models import SevenNet, graphs_of, in_vectors, rotation


def _missing(*packages: str) -> pytest.MarkDecorator:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


class Layers(nn.Module):
    """An equivariant layer, a gate and another one of matrices in vectors, as e3nn has them: the
    components of a vector (v, 3) all meet the same matrix."""

    def __init__(self, scalars: int = 24, vectors: int = 16) -> None:
        super().__init__()
        self.scalars, self.vectors = scalars, vectors
        size = scalars * (scalars + vectors) + vectors * vectors
        self.first = nn.Parameter(torch.randn(size) / 5)
        self.second = nn.Parameter(torch.randn(vectors * vectors) / 4)

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        m, n = self.scalars, self.vectors
        of_scalars = self.first[: m * (m + n)].reshape(m, m + n)
        of_vectors = self.first[m * (m + n) :].reshape(n, n)
        x, gates = (x @ of_scalars).split([m, n], -1)
        v = torch.einsum("uw,zui->zwi", of_vectors, v) * gates.sigmoid().unsqueeze(-1)
        return x, torch.einsum("uw,zui->zwi", self.second.reshape(n, n), v)


def test_vectors_turn_with_their_inputs_and_scalars_stay() -> None:
    torch.manual_seed(0)
    model = Layers().double().eval()
    data = [(torch.randn(64, 24).double(), torch.randn(64, 16, 3).double()) for _ in range(5)]
    apart = tensorize.separate(model, data[0])
    small = tensorize.compile(apart, 0.5, calibration=data, refine=None)
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(
        p.numel() for p in model.parameters()
    )
    x, v = data[0]
    scalars, vectors = (found.detach() for found in small(x, v))
    same, turned = small(x, v @ rotation().double().T)
    torch.testing.assert_close(same.detach(), scalars)
    torch.testing.assert_close(turned.detach(), vectors @ rotation().double().T)
    # The factors are no idle ones: other numbers than the dense model's.
    assert not torch.allclose(scalars, model(x, v)[0], atol=1e-3)


def test_gradients_of_gradients_pass_the_factors() -> None:
    """A force is a derivative by a position; to train on it is to differentiate it by a factor."""
    torch.manual_seed(0)
    model = Layers(8, 6).double()
    x, v = torch.randn(4, 8).double(), torch.randn(4, 6, 3, dtype=torch.double)
    apart = tensorize.separate(model, (x, v))
    how = {"example_inputs": (x, v), "metric": "frobenius", "refine": None}
    exact = tensorize.compile(apart, None, ranks={"*": "full"}, **how)
    v.requires_grad_()

    def forces(of: nn.Module) -> Tensor:
        energy = of(x, v)[1].square().sum()
        (force,) = torch.autograd.grad(energy, v, create_graph=True)
        return force

    torch.testing.assert_close(forces(exact), forces(model))
    (wanted,) = torch.autograd.grad(forces(model).square().sum(), v)
    (found,) = torch.autograd.grad(forces(exact).square().sum(), v)
    torch.testing.assert_close(found, wanted)
    forces(exact).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in exact.parameters())


# ------------------------------------------------------------------------------------------- e3nn


@pytest.fixture
def e3nn() -> Iterator[Any]:
    """The package, making models that run without TorchScript."""
    package = importlib.import_module("e3nn")
    before = package.get_optimization_defaults()
    package.set_optimization_defaults(jit_mode="eager")
    yield package
    package.set_optimization_defaults(**before)


@pytest.mark.slow
@_missing("e3nn")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimize", [False, True], ids=["einsum", "tensordot"])
def test_an_e3nn_network_turns_with_its_inputs(e3nn: Any, optimize: bool) -> None:
    """Two layers of messages and gates: scalars of a molecule stay, its vectors turn."""
    e3nn.set_optimization_defaults(optimize_einsums=optimize)
    network = importlib.import_module("e3nn.nn.models.gate_points_2101").Network
    torch.manual_seed(0)
    model = network(
        irreps_in="4x0e", irreps_hidden="16x0e+8x1o", irreps_out="2x0e+2x1o", irreps_node_attr="0e",
        irreps_edge_attr="1x0e+1x1o", layers=2, max_radius=1.5, number_of_basis=8, radial_layers=1,
        radial_neurons=32, num_neighbors=4.0, num_nodes=6.0, reduce_output=True,
    ).double().eval()  # fmt: skip

    def draw() -> dict[str, Tensor]:
        molecule = torch.arange(4).repeat_interleave(6)
        return {"pos": torch.randn(24, 3).double(), "x": torch.randn(24, 4).double(),
                "batch": molecule}  # fmt: skip

    data = [({**draw()},) for _ in range(6)]
    apart = tensorize.separate(model, data[0])
    torch.testing.assert_close(apart(*data[0]), model(*data[0]))
    assert in_vectors(apart) < 0.02
    small = tensorize.compile(apart, 0.5, calibration=data, refine=None)
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(
        p.numel() for p in model.parameters()
    )
    _turns(small, data[0][0])
    _differentiates_twice(lambda pos: small({**data[0][0], "pos": pos}).square().sum(), small, data)


def _turns(small: nn.Module, inputs: dict[str, Tensor]) -> None:
    found = small(inputs)
    turned = small({**inputs, "pos": inputs["pos"] @ rotation().double().T})
    torch.testing.assert_close(turned[:, :2], found[:, :2])
    vectors = found[:, 2:].unflatten(1, (2, 3)) @ rotation().double().T
    torch.testing.assert_close(turned[:, 2:], vectors.flatten(1))
    assert float(found[:, 2:].abs().max()) > 0


def _differentiates_twice(
    energy: Callable[[Tensor], Tensor], small: nn.Module, data: list[Any]
) -> None:
    pos = data[0][0]["pos"].clone().requires_grad_()
    (force,) = torch.autograd.grad(energy(pos), pos, create_graph=True)
    force.square().sum().backward()
    assert pos.grad is not None
    grads = {name: p.grad for name, p in small.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for g in grads.values())


# --------------------------------------------------------------------------------------- SevenNet


def _crystals() -> list[Any]:
    """Crystals of two elements, displaced at random."""
    build = importlib.import_module("ase.build").bulk
    kinds = [("NaCl", "rocksalt", 5.64), ("GaAs", "zincblende", 5.65), ("MgO", "rocksalt", 4.21),
             ("KBr", "rocksalt", 6.6), ("ZnS", "zincblende", 5.41), ("CaO", "rocksalt", 4.81),
             ("LiF", "rocksalt", 4.03), ("InP", "zincblende", 5.87)]  # fmt: skip
    made = []
    for k, (name, structure, side) in enumerate(kinds):
        atoms = build(name, structure, a=side, cubic=True)
        atoms.rattle(0.08, seed=k)
        made.append(atoms)
    return made


@pytest.mark.slow
@_missing("sevenn", "e3nn", "ase", "torch_geometric")
@pytest.mark.filterwarnings("ignore")
def test_sevennet_is_compressed_whole_and_stays_equivariant(e3nn: Any) -> None:
    model, crystals = SevenNet().eval(), _crystals()
    cutoff = model.network.cutoff
    graphs = [graphs_of(crystals[k : k + 2], cutoff) for k in range(0, len(crystals), 2)]
    total = sum(p.numel() for p in model.parameters())
    assert in_vectors(model) > 0.7
    apart = tensorize.separate(model, (graphs[0],))
    assert in_vectors(apart) < 0.002
    data = [{"graph": graph} for graph in graphs]
    small = tensorize.compile(apart, 0.75, calibration=data, refine=None)
    assert sum(p.numel() for p in small.parameters()) <= 0.75 * total
    found, wanted = small(graphs[0]), model(graphs[0])
    turned = small(graphs_of(crystals[:2], cutoff, rotation()))
    # Edges come in another order after a turn, and sums of float32 with them.
    bound = 1e-4 * float(wanted["forces"].abs().max())
    torch.testing.assert_close(turned["energy"], found["energy"], atol=1e-4, rtol=0)
    rotated = found["forces"] @ rotation().T
    torch.testing.assert_close(turned["forces"], rotated, atol=bound, rtol=0)
    assert float((found["energy"] - wanted["energy"]).abs().max()) > 1e-4  # it was compressed
    small.train()
    small(graphs[0])["forces"].square().sum().backward()
    grads = [p.grad for p in small.parameters() if p.requires_grad and p.grad is not None]
    assert len(grads) > 50
    assert all(bool(g.isfinite().all()) for g in grads)
