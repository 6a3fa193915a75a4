"""Classes of the caller's that keep a registry, or are picky about subclasses, hear of none."""

from __future__ import annotations

import abc
import copy
import pickle
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

import tensorize

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
KNOWN: dict[str, type] = {}
T = TypeVar("T")


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Registered(Product):
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        KNOWN[cls.__name__] = cls


class Hears(Registered):
    pass


class Strict(Product):
    def __init_subclass__(cls, kind: str) -> None:
        super().__init_subclass__()
        KNOWN[kind] = cls


class NeedsKeyword(Strict, kind="needs"):
    pass


class Last(Product):
    def __init_subclass__(cls) -> None:
        raise TypeError("nothing may be derived from it")


class Keeps(type):
    def __new__(mcs, name: str, bases: Any, body: Any, *, key: str) -> Keeps:
        return super().__new__(mcs, name, bases, body)

    def __init__(cls, name: str, bases: Any, body: Any, *, key: str) -> None:
        super().__init__(name, bases, body)
        assert key not in KNOWN
        KNOWN[key] = cls


class OfMeta(Product, metaclass=Keeps, key="meta"):
    pass


class Abstract(Product, abc.ABC):
    @abc.abstractmethod
    def kind(self) -> str: ...


class Concrete(Abstract):
    def kind(self) -> str:
        return "concrete"


class OfAny(Product, Generic[T]):
    pass


class Slotted(Product):
    __slots__ = ("beside",)


@pytest.mark.parametrize(
    "kind", [Hears, NeedsKeyword, Last, OfMeta, Concrete, OfAny, Slotted], ids=lambda k: k.__name__
)
def test_a_class_is_not_registered_again(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    known = dict(KNOWN)
    model = nn.Sequential(kind(), nn.Tanh(), nn.Linear(32, 32))
    small = tensorize.compile(model, None, ranks={"0.weight": 8}, example_inputs=(X,))
    assert known == KNOWN
    assert tensorize.report(small).sites[0].format == "low_rank"
    assert isinstance(small[0], kind)
    assert isinstance(kind()(X), Tensor)
    dense = tensorize.densify(small)
    assert type(dense[0]) is kind
    assert torch.allclose(small(X), dense(X), atol=1e-5)
    for again in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert torch.equal(again(X), small(X))


def test_instances_of_an_abstract_class_are_told_from_its_factored_ones() -> None:
    model = nn.Sequential(Concrete(), nn.Linear(32, 32))
    small = tensorize.compile(model, None, ranks={"0.weight": 8}, example_inputs=(X,))
    assert isinstance(small[0], Abstract)
    assert not isinstance(Concrete(), type(small[0]))
