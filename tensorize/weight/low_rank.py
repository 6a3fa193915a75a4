"""A linear layer of low rank, as two layers, and the product that several share."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from tensorize.capture.matmul import Frame
from tensorize.formats.low_rank import ordered, product
from tensorize.ir.spec import Spec
from tensorize.weight import contractions as weight_contractions
from tensorize.weight import products
from tensorize.weight.contractions import Contractions
from tensorize.weight.cores import check_tie, keep_indices, refuse_to_be_scripted
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
        if isinstance(x, fx.Proxy):  # the graph has the two layers, as any other two
            return self._by_layers(self.first, self.second, x)
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
            known = right if right is not None else first.weight
            # A layer that took the place of one of them (a quantized one) casts by itself.
            x = widened(x, known) if isinstance(known, Tensor) else x
            return self._by_layers(first, second, x)
        # What the two layers' own calls come to.
        x = widened(x, right)
        own = self.contractions
        if self.kernels and not own and type(right) is nn.Parameter:
            own = None if self._waits_for_product() else self.kernels
        # A product that serves other layers as well is computed by itself.
        alone = not self._shares(x, right)
        if self.nonlinearity is None and (own or (alone and in_float32(x, right.shape[0]))):
            cores = (left, right, self._order_in_common()) if pivoted else (left, right)
            return products.matmul(self.spec, own or {}, cores, x, "columns", bias)
        factor = (right, self._order_in_common()) if pivoted else (right,)
        if self.input_product is None or alone or torch.compiler.is_compiling():
            narrow = product(x, *factor)
        else:
            narrow = self.input_product(x, *factor)
        return F.linear(self._between(narrow), left, bias)

    def _by_layers(self, first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
        """What the two layers' own calls make of x."""
        if not self.spec.pivoted:
            return second(self._between(first(x)))
        kept, others = ordered(x, self.order, self.spec.ranks[0])
        narrow = first(others)
        if not isinstance(x, fx.Proxy) and narrow.shape != kept.shape:
            kept = _of_this_rank(kept, first.weight)
        return second(self._between(kept + narrow))

    __prepare_scriptable__ = refuse_to_be_scripted

    def _shares(self, x: Tensor, right: Tensor) -> bool:
        """Whether the product of this call may serve other layers, or be that of another one."""
        product = self.input_product
        return product is not None and (
            torch.compiler.is_compiling() or product.may_serve(x, right)
        )

    def _waits_for_product(self) -> bool:
        """Whether the input's product, once computed, serves other layers as well.

        In a compiled graph without gradients the backend makes one launch of their kernels.
        """
        compiled = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        return self.input_product is not None and not compiled

    def _order_in_common(self) -> Tensor:
        """The order of its columns: a graph sees by one tensor that layers compute the same."""
        if self.input_product is None or not torch.compiler.is_compiling():
            return self.order
        return self.input_product.buffers.get("order", self.order)

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
        keep_indices(self, spec, cores[2:])
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


def _of_this_rank(kept: Tensor, weight: Any) -> Tensor:
    """The columns of what all ranks hold that go with a rank's own rows of a weight."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # a second and a half

    shards = [Shard(kept.dim() - 1) if each.is_shard(0) else each for each in weight.placements]
    whole = DTensor.from_local(kept, weight.device_mesh, [Replicate()] * len(shards))
    return whole.redistribute(placements=shards).to_local()


def _is_bare(layer: nn.Module) -> bool:
    """Whether a layer's call is nothing but x Wᵀ + b: no hooks, and no forward of its own."""
    own = layer.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    alone = type(layer) is nn.Linear and "forward" not in own and "weight" in own["_parameters"]
    return alone and not (hooked or own["_backward_pre_hooks"])


class SharedProduct:
    """What layers with one first factor have in common: its product with their input.

    It is kept within one call of ``owner``, the innermost module that has all of the layers, and
    without gradients only. There the layers are called one after the other with the very same
    tensor; the first call computes the product, the others take it. It is computed anew wherever
    anything is not as it was then: another tensor, one that was written to, other modes, a first
    layer that became something else. Between two calls whatever may be written, by whatever means;
    and a graph in common would make two backward passes one.

    ``buffers`` are the first layer's: where V is the identity in some columns, their order is among
    them, of which the other layers have copies.
    """

    def __init__(self, layers: int, buffers: dict[str, Any] | None = None) -> None:
        self.layers, self.buffers = layers, {} if buffers is None else buffers
        self._now = _Now()

    def follow(self, owner: nn.Module) -> None:
        """Serve the layers within calls of a module."""
        owner.register_forward_pre_hook(self._begin)
        owner.register_forward_hook(self._end, always_call=True)

    def _begin(self, owner: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._now.open, self._now.last = True, None

    def _end(self, owner: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._now.open, self._now.last = False, None

    def forget(self) -> None:
        """Keep nothing: the next call computes it."""
        self._now.last = None

    def may_serve(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a product of these two can be kept."""
        if not self._now.open or type(x) is not Tensor:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
        # Writes to what inference mode made are not counted; under vmap nothing has a place.
        unknown = x.is_inference() or weight.is_inference()
        return not (unknown or torch._C._are_functorch_transforms_active())

    def __call__(self, x: Tensor, weight: Tensor, *order: Tensor) -> Tensor:
        state = (
            *(id(weight), weight._version, weight.data_ptr()),
            *(x._version, x.data_ptr()),
            torch.is_autocast_enabled(x.device.type),
        )
        now, last = self._now, self._now.last
        if last is not None and last[0]() is x and last[1] == state:
            now.left -= 1
            if now.left == 0:
                now.last = None  # nothing is kept alive once all have it
            return last[2]
        narrow = product(x, weight, *order)
        now.last, now.left = (weakref.ref(x), state, narrow), self.layers - 1
        return narrow

    def __deepcopy__(self, memo: dict) -> SharedProduct:
        # The copy of the first layer gets the very same dictionary.
        copied = memo[id(self)] = SharedProduct(self.layers, copy.deepcopy(self.buffers, memo))
        return copied

    def __reduce__(self) -> tuple:
        return SharedProduct, (self.layers, self.buffers)


class _Now(threading.local):
    """What a thread is at: whether it is in the owner's call, and the last product there."""

    open = False
    last: tuple[weakref.ref, tuple, Tensor] | None = None
    left = 0


def drop_products(model: nn.Module) -> None:
    """Let no module's layers share products any more."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), SharedProduct):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        if isinstance(module, LowRankLinear):
            vars(module).pop("input_product", None)
