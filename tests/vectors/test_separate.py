"""Vectors that hold matrices: each matrix is found, compressed, and used where it was cut out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import BudgetError, CaptureError
from tests.models import relative

SCALARS, VECTORS = 24, 16


class Equivariant(nn.Module):
    """As of e3nn: a matrix for scalars, a number between, and one for vectors, in one vector."""

    def __init__(self) -> None:
        super().__init__()
        of_scalars, of_vectors = SCALARS**2, VECTORS**2
        self.flat = nn.Parameter(torch.randn(of_scalars + 1 + of_vectors) / 4)
        self.out = nn.Linear(SCALARS, 16)

    def forward(self, x: Tensor) -> Tensor:
        scalars, vectors = x[:, :SCALARS], x[:, SCALARS:].unflatten(1, (VECTORS, 3))
        first = self.flat.reshape(1, -1)[:, : SCALARS**2].reshape(SCALARS, SCALARS)
        between = self.flat[SCALARS**2]
        second = self.flat.narrow(0, SCALARS**2 + 1, VECTORS**2).view(VECTORS, VECTORS)
        mixed = torch.einsum("uv,bui->bvi", second * 0.5, vectors)
        return self.out((scalars @ first).tanh()) + between * mixed.square().sum((1, 2))[:, None]


def batches(count: int = 6, rows: int = 64) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, SCALARS + 3 * VECTORS) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Equivariant().eval()


@pytest.fixture(scope="module")
def apart(model: nn.Module) -> nn.Module:
    return tensorize.separate(model, (batches()[0],))


def test_every_matrix_of_a_vector_is_a_parameter_of_its_own(
    model: nn.Module, apart: nn.Module
) -> None:
    shapes = {name: tuple(p.shape) for name, p in apart.named_parameters()}
    assert shapes == {
        "out.weight": (16, SCALARS),
        "out.bias": (16,),
        "flat_matrices.from_0": (SCALARS, SCALARS),
        "flat_matrices.from_576": (1,),
        "flat_matrices.from_577": (VECTORS, VECTORS),
    }
    assert type(apart).__name__ == "Equivariant"
    assert isinstance(apart, Equivariant)
    x = batches()[0]
    torch.testing.assert_close(apart(x), model(x))
    assert isinstance(model.flat, nn.Parameter)


def test_a_model_is_separated_in_place_or_a_copy_is() -> None:
    torch.manual_seed(0)
    model = Equivariant()
    assert tensorize.separate(model, (batches()[0],), inplace=True) is model
    assert not isinstance(model.flat, Tensor)


def test_factors_take_the_place_of_the_matrices(model: nn.Module, apart: nn.Module) -> None:
    data = batches()
    exact = tensorize.compile(apart, None, ranks={"flat*": "full"}, calibration=data, refine=None)
    torch.testing.assert_close(exact(data[0]), model(data[0]), atol=1e-4, rtol=1e-4)
    small = tensorize.compile(apart, 0.5, calibration=data, refine=None)
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(
        p.numel() for p in model.parameters()
    )
    by_name = {site.name: site for site in tensorize.report(small).sites}
    kinds = {name: by_name[f"flat_matrices.{name}"].kind for name in ("from_0", "from_577")}
    assert kinds == {"from_0": "matmul", "from_577": "einsum"}
    dense = tensorize.densify(small)
    torch.testing.assert_close(dense(data[0]), small(data[0]), atol=1e-4, rtol=1e-4)


def test_it_is_copied_pickled_saved_and_trained(apart: nn.Module, tmp_path: Path) -> None:
    data = batches()
    small = tensorize.compile(apart, 0.6, calibration=data, refine=None)
    wanted = small(data[0])
    assert torch.equal(copy.deepcopy(small)(data[0]), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(small))(data[0]), wanted)
    tensorize.save(small, tmp_path / "small")
    fresh = tensorize.separate(Equivariant().eval(), (data[0],))
    assert torch.equal(tensorize.load(tmp_path / "small", fresh)(data[0]), wanted)
    small(data[0]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_any_other_function_gets_the_vector(model: nn.Module, apart: nn.Module) -> None:
    flat: Any = apart.flat
    wanted: Any = model.flat
    assert (flat.shape, flat.dtype, flat.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert (flat.dim(), flat.ndim, flat.numel(), len(flat)) == (1, 1, 833, 833)
    assert flat.requires_grad
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.square().sum(),
        lambda w: torch.cat([w, w]),
        lambda w: 2 * w + 1,
        lambda w: w[3:10] @ torch.ones(7),
        lambda w: w[:20].reshape(4, 5).t(),
        lambda w: w[1::2].exp(),
        lambda w: w.split(400)[1] - 1,
        lambda w: F.relu(w.view(7, 119)),
    ]
    for function in functions:
        torch.testing.assert_close(function(flat), function(wanted))


@pytest.mark.slow
def test_a_compiled_graph_and_an_exported_one_cut_the_vector_up_alike(apart: nn.Module) -> None:
    data = batches()
    small = tensorize.compile(apart, 0.6, calibration=data, refine=None)
    torch.compiler.reset()
    traced = torch.compile(small, fullgraph=True, backend="eager")
    exported = torch.export.export(small, (data[0],)).module()
    with torch.no_grad():
        wanted = small(data[0])
        torch.testing.assert_close(traced(data[0]), wanted)
        torch.testing.assert_close(exported(data[0]), wanted)


def _used(use: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.randn(64))

        def forward(self, x: Tensor) -> Tensor:
            return use(x, self.flat)

    return Own()


NOT_MATRICES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "a scale": (lambda x, w: x.repeat(1, 8) * w, "used by mul"),
    "elsewhere too": (lambda x, w: (x @ w.view(8, 8)) * w.sum(), "used by sum"),
    "overlapping": (
        lambda x, w: x @ w[:32].view(8, 4) + x @ w[16:48].view(8, 4),
        "numbers in common",
    ),
    "a single row": (lambda x, w: x @ w[:8].view(8, 1), "single rows"),
    "a copy": (lambda x, w: x @ w.clone().view(8, 8), "used by clone"),
}


@pytest.mark.parametrize("name", NOT_MATRICES)
def test_a_vector_that_holds_no_matrices_alone_is_left_with_the_reason(name: str) -> None:
    use, why = NOT_MATRICES[name]
    with pytest.raises(CaptureError, match=f"flat: no vector.*{why}"):
        tensorize.separate(_used(use), (torch.randn(4, 8),))


def test_torchscript_is_named_as_what_hides_a_matrix() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return x @ w.view(8, 8)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.run = nn.Parameter(torch.randn(64)), torch.jit.script(Inner())

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x, self.flat)

    with pytest.raises(CaptureError, match="TorchScript") as raised:
        tensorize.separate(Own(), (torch.randn(4, 8),))
    assert 'jit_mode="eager"' in (raised.value.way_out or "")


def test_vectors_that_are_cut_up_have_a_note_with_their_share(model: nn.Module) -> None:
    whole = tensorize.analyze(model, calibration=batches(), refine=None)
    (note,) = [note for note in whole.plan(0.9).notes if "vectors" in note]
    assert note.startswith("67.6 % of the parameters are vectors that are cut up")
    assert "tensorize.separate(model, inputs)" in note
    apart = tensorize.separate(model, (batches()[0],))
    plan = tensorize.analyze(apart, calibration=batches(), refine=None).plan(0.9)
    assert not any("vectors" in note for note in plan.notes)


def test_a_vector_in_a_budgets_way_is_named_with_the_way_out(model: nn.Module) -> None:
    data = batches()
    with pytest.raises(BudgetError, match="the largest is flat, a vector of 833 numbers") as raised:
        tensorize.compile(model, 0.25, calibration=data)
    assert "tensorize.separate(model, inputs)" in str(raised.value)
    small = tensorize.compile(
        tensorize.separate(model, (data[0],)), 0.25, calibration=data, refine=None
    )
    with torch.no_grad():
        assert relative(small(data[0]), model(data[0])) < 0.5
