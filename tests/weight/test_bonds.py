"""Trains and blocks that store no identity: the same model with fewer numbers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize import TTSpec
from tensorize.weight.install import factored
from tests.models import parameters, relative

IDS = torch.arange(12).reshape(3, 4)
FORMS = {
    "train": (TTSpec((6, 4), (4, 5), (9,)), TTSpec((5, 4), (4, 6), (9,))),
    "three cores": (TTSpec((4, 2, 3), (2, 2, 5), (5, 6)), TTSpec((5, 2, 2), (2, 3, 4), (6, 5))),
    "block": (TTSpec.block((8, 3), (4, 5), 3), TTSpec.block((5, 4), (3, 8), 3)),
}


class Net(nn.Module):
    """A table, a linear, and a parameter that is multiplied from its other side."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(24, 20, padding_idx=0), nn.Linear(20, 24)
        self.turned = nn.Parameter(torch.randn(20, 24) / 5)
        self.out = nn.Linear(20, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.up(self.table(ids)))
        return self.out(x @ self.turned.t()) + x


def small_of(form: str, *, pivoted: bool = True) -> Any:
    wide, flat = FORMS[form]
    torch.manual_seed(0)
    model = Net()
    formats = {"up.weight": wide, "turned": flat, "out.weight": wide}
    small = tensorize.initialize(model, 1.0, formats=formats, include=list(formats))
    return tensorize.weight.pivoted(small) if pivoted else small


def specs(model: nn.Module) -> dict[str, Any]:
    return {name: weight.spec for name, weight in factored(model)}


@pytest.mark.parametrize("form", FORMS)
def test_the_two_forms_are_images_of_each_other(form: str) -> None:
    small = small_of(form, pivoted=False)
    want, before, plain = small(IDS).detach(), parameters(small), specs(small)
    assert tensorize.weight.pivoted(small) is small
    now = specs(small)
    assert [spec.pivoted for spec in now.values()] == [1, 1, 1]
    assert before - parameters(small) == sum(spec.removable for spec in plain.values())
    sites = {site.name: site for site in tensorize.report(small).sites}
    assert all(sites[name].parameters_after == spec.parameters for name, spec in now.items())
    found = tensorize.report(small).totals.after
    indices = sum(index.bytes for spec in now.values() for index in spec.indices)
    assert found.bytes == 4 * parameters(small) + indices
    with torch.no_grad():
        assert relative(small(IDS), want) < 1e-5
        assert relative(tensorize.densify(small)(IDS), want) < 1e-5
        tensorize.weight.plain(small)
        assert specs(small) == plain
        assert relative(small(IDS), want) < 1e-5


@pytest.mark.parametrize(
    ("form", "dtype"), [("block", torch.bfloat16), ("three cores", torch.float32)]
)
def test_it_is_saved_loaded_copied_and_pickled(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    small = small_of(form).to(dtype)
    tensorize.save(small, tmp_path)
    for again in (
        tensorize.load(tmp_path, model=Net().to(dtype)),
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
    ):
        assert torch.equal(again(IDS), small(IDS))
        assert specs(again) == specs(small)


def test_an_artefact_of_whole_cores_is_loaded_and_made_smaller(tmp_path: Path) -> None:
    small = small_of("block", pivoted=False)
    tensorize.save(small, tmp_path)
    again = tensorize.load(tmp_path, model=Net())
    assert torch.equal(again(IDS), small(IDS))
    assert parameters(tensorize.weight.pivoted(again)) < parameters(small)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_whole_cores(form: str) -> None:
    small = small_of(form)
    small(IDS).square().sum().backward()
    plain = tensorize.weight.plain(copy.deepcopy(small))
    plain(IDS).square().sum().backward()
    for name, weight in factored(small):
        whole = dict(factored(plain))[name].cores
        made = weight.format.computed(weight.spec, weight.cores + weight.indices)
        wanted = torch.autograd.grad(made, weight.cores, [core.grad for core in whole])
        for core, grad in zip(weight.cores, wanted, strict=True):
            torch.testing.assert_close(core.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_graphs_of_it_are_whole(form: str) -> None:
    small = small_of(form).eval()
    with torch.no_grad():
        want = small(IDS)
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        assert relative(compiled(IDS), want) < 1e-6
        exported = torch.export.export(small, (IDS,))
        assert relative(exported.module()(IDS), want) < 1e-6


def test_rows_of_padding_stay_zero_and_tables_are_looked_up() -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.table.weight[0] = 0
    spec = TTSpec((24, 1), (4, 5), (3,))
    small: Any = tensorize.initialize(
        model, 1.0, formats={"table.weight": spec}, include="table.weight"
    )
    want = small.table(IDS).detach()
    tensorize.weight.pivoted(small)
    assert specs(small)["table.weight"].pivoted
    assert relative(small.table(IDS).detach(), want) < 1e-6
    assert not small.table(torch.zeros(2, dtype=torch.long)).any()


def test_what_gets_no_smaller_stays_as_it_is() -> None:
    spec = TTSpec((6, 4), (4, 5), (1,))  # one number less, and an index more
    small = tensorize.initialize(
        nn.Sequential(nn.Linear(20, 24)), 1.0, formats={"0.weight": spec}, include="0.weight"
    )
    ((_, before),) = factored(small)
    tensorize.weight.pivoted(small)
    ((_, after),) = factored(small)
    assert after.spec == spec
    assert all(a is b for a, b in zip(after.cores, before.cores, strict=True))
