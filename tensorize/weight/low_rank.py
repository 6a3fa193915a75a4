"""A linear layer of low rank, as two layers, and the product that several share."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from tensorize.capture.matmul import Frame
from tensorize.formats.low_rank import ordered, product
from tensorize.ir.spec import Spec
from tensorize.weight import contractions as weight_contractions
from tensorize.weight import products
from tensorize.weight.contractions import Contractions
from tensorize.weight.cores import check_tie, keep_order
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.precision import in_float32, widened


class LowRankLinear(nn.Module):
    """A linear layer y = second(first(x)) whose weight has rank ``first.out_features``.

    ``stored_transposed`` is True where the dense layer kept its weight as (in, out).
    ``input_product`` is there where others have the same first factor; ``kernels`` are then used in
    compiled graphs only. With ``contractions`` (see
    ``limit_saved``) the two layers' weights are used, and their hooks are not. ``nonlinearity`` is
    the name of a function of ``torch.nn.functional`` between the two (CoLA, Liu et al. 2025): then
    the layer stands for no matrix. Where the spec is pivoted, ``order`` says which of its columns
    the weight is the identity in: these are added to what ``first`` makes of the others.
    """

    input_product: SharedProduct | None = None
    contractions: Contractions | None = None
    kernels: Contractions | None = None
    memory_limit: int | None = None
    nonlinearity: str | None = None
    first: nn.Linear
    second: nn.Linear
    in_features: int
    out_features: int
    spec: Spec
    stored_transposed: bool
    order: Tensor
    _watched: tuple[RemovableHandle, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a graph names weights by the attributes that lead there
            first, second = self.first, self.second
            right, left, bias = first.weight, second.weight, second.bias
        else:  # through ``nn.Module`` they are found in more time than a product of one row takes
            modules: Any = self._modules
            first, second = modules["first"], modules["second"]
            right, held = first._parameters.get("weight"), second._parameters
            left, bias = held.get("weight"), held.get("bias")
        pivoted = self.spec.pivoted
        if not (_is_bare(first) and _is_bare(second)) or _has_any_global_hook():
            x = widened(x, first.weight)
            if not pivoted:
                return second(self._between(first(x)))
            kept, others = ordered(x, self.order, self.spec.ranks[0])
            return second(self._between(kept + first(others)))
        # What the two layers' own calls come to.
        x = widened(x, right)
        own = self.contractions
        if self.kernels and not own and type(right) is nn.Parameter:
            own = None if self._waits_for_product() else self.kernels
        # A product that serves other layers as well is computed by itself.
        alone = self.input_product is None
        if self.nonlinearity is None and (own or (alone and in_float32(x, right.shape[0]))):
            cores = (left, right, self.order) if pivoted else (left, right)
            return products.matmul(self.spec, own or {}, cores, x, "columns", bias)
        if pivoted:
            narrow = product(x, right, self.order)
        elif self.input_product is None or torch.compiler.is_compiling():
            narrow = F.linear(x, right)
        else:
            narrow = self.input_product(first, x)
        return F.linear(self._between(narrow), left, bias)

    def _waits_for_product(self) -> bool:
        """Whether the input's product, once computed, serves other layers as well.

        In a compiled graph without gradients the backend makes one launch of their kernels.
        """
        compiled = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        return self.input_product is not None and not compiled

    def _between(self, product: Tensor) -> Tensor:
        return product if self.nonlinearity is None else getattr(F, self.nonlinearity)(product)

    @property
    def weight(self) -> FactoredWeight:
        """The dense layer's weight, lazily."""
        cores = (self.second.weight, self.first.weight)
        frame = Frame(transposed=self.stored_transposed)
        indices = (self.order,) if self.spec.pivoted else ()
        return FactoredWeight(self.spec, cores, frame, None, self.nonlinearity, indices)

    def resize(self, spec: Spec, cores: Sequence[Tensor]) -> None:
        """Take other factors, and the order of the columns that may come after them."""
        self.spec = spec
        self.second.weight, self.first.weight = cores[:2]  # type: ignore[assignment]
        keep_order(self, cores[2:])
        self.first.in_features = self.first.weight.shape[1]
        self.first.out_features = self.second.in_features = spec.ranks[0]
        if self.memory_limit is not None:
            self.limit_saved(self.memory_limit)

    def limit_saved(self, memory_limit: int | None) -> None:
        """One order for all batches, that of the two layers."""
        how = str(self.first.weight.device), self.first.weight.dtype, (), memory_limit
        self.memory_limit = memory_limit
        self.contractions = weight_contractions.contractions(self.spec, *how)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            check_tie(self.weight, value, f"weight of {type(self).__name__}")
        elif name == "bias":
            self.second.bias = value
        else:
            super().__setattr__(name, value)


def _is_bare(layer: nn.Module) -> bool:
    """Whether a layer's call is nothing but x Wᵀ + b: no hooks, and no forward of its own."""
    own = layer.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    alone = type(layer) is nn.Linear and "forward" not in own and "weight" in own["_parameters"]
    return alone and not (hooked or own["_backward_pre_hooks"])


class SharedProduct:
    """What layers with one first factor have in common: its product with their input.

    The layers are called one after the other with the very same tensor; the first call computes
    the product, the others take it. It is computed anew wherever anything is not as it was then:
    another tensor, one that was written to, other modes, a first layer that became something else.
    With gradients the layers have a node of the graph in common: they are to be in one backward
    pass (or ``retain_graph``), and in one part where parts are checkpointed.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._forget()

    def _forget(self) -> None:
        self._last: tuple[weakref.ref, tuple, Tensor] | None = None
        self._left = 0

    def __call__(self, first: nn.Module, x: Tensor) -> Tensor:
        weight: Any = first.weight
        if x.is_inference() or weight.is_inference():
            return first(x)  # writes to them are not counted
        state = (
            id(weight),
            weight._version,
            x._version,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(x.device.type),
        )
        last = self._last
        if last is not None and last[0]() is x and last[1] == state:
            self._left -= 1
            if self._left == 0:
                self._forget()  # nothing is kept alive once all have it
            return last[2]
        product = first(x)
        self._last, self._left = (weakref.ref(x), state, product), self.layers - 1
        return product

    def __deepcopy__(self, memo: dict) -> SharedProduct:
        copy = memo[id(self)] = SharedProduct(self.layers)
        return copy

    def __reduce__(self) -> tuple:
        return SharedProduct, (self.layers,)
