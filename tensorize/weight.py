"""What a module holds in place of its dense weight.

``install`` rewrites the modules that own a parameter: the parameter is deleted, its cores are
attached, and the module object stays the same one (so hooks, references and its name stay). Two
forms cover everything:

* a plain linear with a low-rank weight becomes a ``LowRankLinear`` with two real ``nn.Linear``
  children, so that other tools find what they look for;
* every other owner keeps its own forward (a linear in the form of a train becomes a
  ``FactoredLinear``) and gets a ``weight`` that is a ``FactoredWeight``: not a tensor, but
  something that answers ``F.linear``, ``embedding``, ``matmul`` … by a contraction. Any other
  function gets the dense matrix, built for that call.

Tied weights share their cores as they shared the dense weight.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tensorize import ops, ties
from tensorize.ir import LOW_RANK, TTSpec
from tensorize.lazy import FactoredWeight, cannot_be_assigned
from tensorize.uses import Frame


class Cores(nn.Module):
    """The cores of one weight, as parameters ``core_0``, ``core_1``, … in the stored shapes.

    ``frame`` says how the owner sees the matrix (a convolution in its own shape); ``breakpoints``
    are the batches at which another order of contraction begins, in this and in all weights of the
    model (None: nothing is known of the others). ``memory_limit``: see ``limit_saved``.
    """

    breakpoints: tuple[int, ...] | None = None
    memory_limit: int | None = None

    def __init__(
        self, spec: TTSpec, cores: Sequence[nn.Parameter], frame: Frame | None = None
    ) -> None:
        super().__init__()
        self.spec, self.frame = spec, frame or Frame()
        for k, core in enumerate(cores):
            self.register_parameter(f"core_{k}", core)
        self._choose_orders()

    def forward(self) -> FactoredWeight:
        cores = tuple(getattr(self, f"core_{k}") for k in range(len(self.spec.cores)))
        return FactoredWeight(self.spec, cores, self.frame, self.contractions)

    def resize(self, spec: TTSpec, cores: Sequence[nn.Parameter]) -> None:
        """Take cores of other ranks."""
        self.spec = spec
        for k, core in enumerate(cores):
            self._parameters[f"core_{k}"] = core
        self._choose_orders()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cores:
        super()._apply(fn, recurse)
        if "core_0" in self._parameters:
            self._choose_orders()  # for another device or dtype they may be others
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The contractions are compiled functions: they are found again by the spec.
        return {k: v for k, v in self.__dict__.items() if k != "contractions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose_orders()

    def _choose_orders(self) -> None:
        core = self.get_parameter("core_0")
        how = str(core.device), core.dtype, self.breakpoints, self.memory_limit
        planned = ops.contractions(self.spec, *how)
        kernels = self.__dict__.get("kernels") if self.memory_limit is None else None
        self.contractions = (
            {k: v.beside(planned) for k, v in kernels.items()} if kernels else planned
        )

    def extra_repr(self) -> str:
        return repr(self.spec)


class LowRankLinear(nn.Module):
    """A linear layer y = second(first(x)) whose weight has rank ``first.out_features``.

    ``stored_transposed`` is True where the dense layer kept its weight as (in, out).
    ``input_product`` is there where others have the same first factor; ``kernels`` are then used in
    compiled graphs only. With ``contractions`` (see
    ``limit_saved``) the two layers' weights are used, and their hooks are not. ``nonlinearity`` is
    the name of a function of ``torch.nn.functional`` between the two (CoLA, Liu et al. 2025): then
    the layer stands for no matrix.
    """

    input_product: SharedProduct | None = None
    contractions: ops.Contractions | None = None
    kernels: ops.Contractions | None = None
    nonlinearity: str | None = None
    first: nn.Linear
    second: nn.Linear
    in_features: int
    out_features: int
    spec: TTSpec
    stored_transposed: bool

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a graph names weights by the attributes that lead there
            first, second = self.first, self.second
            right, left, bias = first.weight, second.weight, second.bias
        else:  # through ``nn.Module`` they are found in more time than a product of one row takes
            modules: Any = self._modules
            first, second = modules["first"], modules["second"]
            right, held = first._parameters.get("weight"), second._parameters
            left, bias = held.get("weight"), held.get("bias")
        if not (_is_bare(first) and _is_bare(second)) or _has_any_global_hook():
            return second(self._between(first(ops.widened(x, first.weight))))
        # What the two layers' own calls come to.
        x = ops.widened(x, right)
        own = self.contractions
        if self.kernels and not own and type(right) is nn.Parameter:
            own = None if self._waits_for_product() else self.kernels
        # A product that serves other layers as well is computed by itself.
        alone = self.input_product is None
        if self.nonlinearity is None and (own or (alone and ops.in_float32(x, right.shape[0]))):
            return ops.matmul(own or {}, (left, right), x, "columns", bias)
        if self.input_product is None or torch.compiler.is_compiling():
            product = F.linear(x, right)
        else:
            product = self.input_product(first, x)
        return F.linear(self._between(product), left, bias)

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
        return FactoredWeight(self.spec, cores, frame, nonlinearity=self.nonlinearity)

    def resize(self, spec: TTSpec, cores: Sequence[nn.Parameter]) -> None:
        """Take factors of another rank."""
        self.__dict__["spec"] = spec
        self.second.weight, self.first.weight = cores
        self.first.out_features = self.second.in_features = spec.ranks[0]
        limit = self.__dict__.pop("memory_limit", None)
        if limit is not None:
            self.limit_saved(limit)

    def limit_saved(self, memory_limit: int | None) -> None:
        """One order for all batches, that of the two layers."""
        how = str(self.first.weight.device), self.first.weight.dtype, (), memory_limit
        self.__dict__["memory_limit"] = memory_limit
        self.__dict__["contractions"] = ops.contractions(self.spec, *how)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            _check_tie(self.weight, value, f"weight of {type(self).__name__}")
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


def use_kernels(model: nn.Module, build: Callable[[TTSpec], ops.Contractions]) -> int:
    """Run the weights that ``build`` has kernels for by those, all others without; how many."""
    count = 0
    for module in model.modules():
        if isinstance(module, LowRankLinear | Cores):
            bent = isinstance(module, LowRankLinear) and module.nonlinearity is not None
            kernels = {} if bent else build(module.spec)
            _set_kernels(module, kernels)
            count += bool(kernels)
    return count


@contextlib.contextmanager
def other_kernels(model: nn.Module, build: Callable[[TTSpec], ops.Contractions]) -> Iterator[None]:
    """``use_kernels``, until the end; then a model runs by what it ran by."""
    modules = [m for m in model.modules() if isinstance(m, LowRankLinear | Cores)]
    before = [module.__dict__.get("kernels") for module in modules]
    try:
        use_kernels(model, build)
        yield
    finally:
        for module, kernels in zip(modules, before, strict=True):
            _set_kernels(module, kernels)


def _set_kernels(module: LowRankLinear | Cores, kernels: ops.Contractions | None) -> None:
    module.__dict__.pop("kernels", None)
    if kernels:
        module.__dict__["kernels"] = kernels
    if isinstance(module, Cores):
        module._choose_orders()


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


def settle(model: nn.Module) -> None:
    """What the factorized weights of a whole model have in common: products, and breakpoints."""
    _share_products(model)
    holders = [module for module in model.modules() if isinstance(module, Cores)]
    cores = [holder.get_parameter("core_0") for holder in holders]
    device = str(cores[0].device) if cores else "cpu"
    uses = [(holder.spec, core.dtype) for holder, core in zip(holders, cores, strict=True)]
    breakpoints = ops.common_breakpoints(uses, device)
    for holder in holders:
        holder.breakpoints = breakpoints
        holder._choose_orders()


def breakpoints(model: nn.Module) -> tuple[int, ...] | None:
    """The batches at which the weights of a model change their order (None: not settled)."""
    return next((m.breakpoints for m in model.modules() if isinstance(m, Cores)), None)


def _share_products(model: nn.Module) -> None:
    """Let layers whose first factor is one parameter compute its product with their input once."""
    groups: dict[int, dict[str, LowRankLinear]] = defaultdict(dict)
    for path, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            groups[id(module.first.weight)][path] = module
    same: dict[str, str] = {}
    for layers in groups.values():
        if len({id(layer.second.weight) for layer in layers.values()}) > 1:
            product = SharedProduct(len(layers))
            first = next(iter(layers))
            for path, layer in layers.items():
                layer.__dict__["input_product"] = product
                if path != first:
                    same[f"{path}.first.weight"] = f"{first}.first.weight"
    ties.add(model, same)


def limit_saved(model: nn.Module, memory_limit: int | None = 0) -> None:
    """Limit what each use of a factorized weight saves for its backward pass.

    Args:
        model: its modules are changed in place.
        memory_limit: the most elements, the input among them; 0 saves as few as possible (the
            input, where a core is trained), and the rest is computed again. None: no limit.

    Stacks of experts, convolutions and slices of packed weights save what they did.
    """
    for module in model.modules():
        if isinstance(module, Cores) and not module.spec.batch:
            module.memory_limit = memory_limit
            module._choose_orders()
        elif isinstance(module, LowRankLinear) and module.nonlinearity is None:
            module.limit_saved(memory_limit)


class FactoredLinear(nn.Module):
    """A linear layer y = x Wᵀ + b with a lazy weight.

    It is no ``nn.Linear``: tools that look for those want to read and replace a dense weight.
    """

    in_features: int
    out_features: int
    weight: FactoredWeight
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


# --------------------------------------------------------------- owners with their own forward


def _cores_name(parameter: str) -> str:
    return f"{parameter}_cores"


def _lazy_weight(parameter: str) -> property:
    holder = _cores_name(parameter)

    def get(owner: nn.Module) -> FactoredWeight:
        # It is called, so that hooks which fetch offloaded parameters do so.
        return owner._modules[holder]()  # type: ignore[misc]

    return property(get)


def _weight_of(owner: nn.Module, parameter: str) -> FactoredWeight:
    """The lazy weight of the very parameters, whatever hooks there are."""
    holder: Cores = owner._modules[_cores_name(parameter)]  # type: ignore[assignment]
    return holder.forward()


def _check_tie(own: FactoredWeight, value: Any, what: str) -> None:
    """Code that ties weights assigns one module's to another; here the tie must be there already.

    Raises:
        TypeError: it is any other value.
    """
    cores = value.cores if isinstance(value, FactoredWeight) else ()
    if [id(core) for core in cores] != [id(core) for core in own.cores]:
        raise cannot_be_assigned(what)


@cache
def factored_class(
    dense: type[nn.Module], parameters: tuple[str, ...], base: type[nn.Module]
) -> type[nn.Module]:
    """``base`` with lazy weights in place of the ``parameters`` of a module of class ``dense``."""

    def reduce(owner: nn.Module, protocol: int) -> tuple:
        return _blank, (dense, parameters, base), owner.__getstate__()

    def assign(owner: nn.Module, name: str, value: Any) -> None:
        if name in parameters:
            _check_tie(_weight_of(owner, name), value, f"{name} of {base.__name__}")
        else:
            base.__setattr__(owner, name, value)

    body: dict[str, Any] = {name: _lazy_weight(name) for name in parameters}
    body |= {
        "__reduce_ex__": reduce,
        "__setattr__": assign,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_dense_class": dense,
        "_factored_parameters": parameters,
    }
    if issubclass(dense, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, _drop)
    return type(base.__name__, (base,), body)


def _flat_weights(owner: nn.RNNBase) -> list[Any]:
    """All weights in the order of a recurrent layer's kernel, which keeps a list of them."""
    return [getattr(owner, name, None) for name in owner._flat_weights_names]


def _drop(owner: nn.Module, value: Any) -> None:
    """Nothing is kept: the list is made from what is there."""


def _blank(dense: type[nn.Module], parameters: tuple[str, ...], base: type[nn.Module]) -> nn.Module:
    """An empty instance for pickle and deepcopy, which fill it."""
    cls = factored_class(dense, parameters, base)
    return cls.__new__(cls)


# ------------------------------------------------------------------------- install, restore


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter ``name``, and the parameter's own name in it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _is_plain_linear(owner: nn.Module, parameter: str) -> bool:
    """Whether the owner does nothing but x Wᵀ + b, or x W + b as GPT-2's Conv1D."""
    if parameter != "weight" or len(owner._modules) > 0:
        return False
    kind = type(owner)
    return kind is nn.Linear or _is_conv1d(kind)


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def install(
    model: nn.Module,
    names: Sequence[str],
    spec: TTSpec,
    cores: Sequence[nn.Parameter],
    nonlinearity: str | None = None,
) -> None:
    """Replace one dense parameter, under all of its names, by its cores.

    Args:
        model: the model to change in place.
        names: every qualified name of the parameter (several where it is tied).
        spec, cores: the factorization; the cores in the shapes of ``spec.core_shapes``.
        nonlinearity: the name of a function of ``torch.nn.functional`` between the two factors,
            where ``takes_nonlinearity`` says that there can be one.
    """
    owners = [owner_of(model, name) for name in names]
    holder: Cores | None = None
    tied = len(owners) > 1
    seen: set[tuple[int, str]] = set()
    for owner, parameter in owners:
        if (id(owner), parameter) in seen:
            continue  # one module under several names
        seen.add((id(owner), parameter))
        # The module that the caller holds keeps its class.
        plain = owner is not model and _is_plain_linear(owner, parameter) and not spec.batch
        if plain and spec.format == LOW_RANK and not (tied and _is_conv1d(type(owner))):
            _become_low_rank_linear(owner, cores)
            owner.__dict__["nonlinearity"] = nonlinearity
            continue
        shape = tuple(owner._parameters[parameter].shape)  # type: ignore[union-attr]
        frame = Frame() if shape == spec.shape else Frame(shape=shape)
        holder = holder or Cores(spec, cores, frame)
        alone = plain and type(owner) is nn.Linear
        _become_factored(owner, parameter, holder, FactoredLinear if alone else None)
    ties.follow(model, names_now)


def takes_nonlinearity(model: nn.Module, names: Sequence[str], spec: TTSpec) -> bool:
    """Whether the parameter is one plain linear's, in low rank: then two layers replace it."""
    owner, leaf = owner_of(model, names[0])
    plain = owner is not model and _is_plain_linear(owner, leaf)
    return len(names) == 1 and plain and spec.format == LOW_RANK and not spec.batch


def resize(model: nn.Module, name: str, spec: TTSpec, cores: Sequence[nn.Parameter]) -> None:
    """Give a factorized weight other ranks, wherever it is used; kernels for the old ones go.

    Args:
        name: the qualified name that its dense parameter had, any of those of a tied one.
        spec: the weight's own, with other ranks.
        cores: the new parameters, in the shapes of ``spec.core_shapes``.
    """

    def held(module: LowRankLinear | Cores) -> list[int]:
        weight = module.weight if isinstance(module, LowRankLinear) else module.forward()
        return [id(core) for core in weight.cores]

    owner, leaf = owner_of(model, name)
    holder = owner if isinstance(owner, LowRankLinear) else owner._modules[_cores_name(leaf)]
    assert isinstance(holder, LowRankLinear | Cores)
    before = held(holder)
    holders = [m for m in model.modules() if isinstance(m, LowRankLinear | Cores)]
    for module in [m for m in holders if held(m) == before]:
        module.__dict__.pop("kernels", None)
        module.resize(spec, cores)


def first_factor(model: nn.Module, name: str) -> nn.Parameter:
    """The core of a factorized linear that meets the input."""
    owner, leaf = owner_of(model, name)
    weight = owner.weight if isinstance(owner, LowRankLinear) else _weight_of(owner, leaf)
    core: Any = weight.cores[1]
    return core


def _become_low_rank_linear(owner: nn.Module, cores: Sequence[nn.Parameter]) -> None:
    left, right = cores
    transposed = _is_conv1d(type(owner))
    if transposed:  # W is (in, out): the layer's own matrix is Wᵀ = Vᵀ Uᵀ
        left, right = (
            nn.Parameter(core.detach().t().contiguous(), requires_grad=core.requires_grad)
            for core in (right, left)
        )
    first, second = _linear(right), _linear(left)
    second.bias = owner._parameters.pop("bias", None)
    del owner._parameters["weight"]
    first.training = second.training = owner.training
    owner._modules["first"], owner._modules["second"] = first, second
    sizes = second.out_features, first.in_features, first.out_features
    owner.__dict__["spec"] = TTSpec.low_rank(*sizes)
    owner.__dict__["stored_transposed"] = transposed
    owner.__dict__["_dense_class"] = type(owner)
    if transposed:  # it did not call them so
        owner.__dict__["in_features"] = first.in_features
        owner.__dict__["out_features"] = second.out_features
    owner.__class__ = LowRankLinear


def _linear(weight: nn.Parameter) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    return linear


def _become_factored(
    owner: nn.Module, parameter: str, holder: Cores, kind: type[nn.Module] | None
) -> None:
    del owner._parameters[parameter]
    holder.training = owner.training
    owner._modules[_cores_name(parameter)] = holder
    dense = getattr(owner, "_dense_class", type(owner))
    parameters = (*_lazy_parameters(owner), parameter)
    owner.__dict__.pop("_flat_weights", None)  # of a recurrent layer: it holds the dense ones
    owner.__class__ = factored_class(dense, parameters, kind or dense)


def factored(model: nn.Module) -> Iterator[tuple[str, FactoredWeight]]:
    """Every factorized weight of a model, by the qualified name its dense parameter had."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, LowRankLinear):
            yield f"{prefix}weight", module.weight
        for parameter in _lazy_parameters(module):
            yield f"{prefix}{parameter}", _weight_of(module, parameter)


def core_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """The qualified names of the parameters that stand for the dense parameter ``name``."""
    owner, leaf = owner_of(model, name)
    prefix = name.removesuffix(leaf)
    if isinstance(owner, LowRankLinear):
        return f"{prefix}first.weight", f"{prefix}second.weight"
    holder = owner.get_submodule(_cores_name(leaf))
    path = f"{prefix}{_cores_name(leaf)}"
    return tuple(f"{path}.{core}" for core, _ in holder.named_parameters())


def names_now(model: nn.Module, name: str) -> tuple[str, ...]:
    """The names of what stands for any parameter of the dense model: its own where it was left."""
    try:
        owner, leaf = owner_of(model, name)
    except AttributeError:  # a pattern, or a module that is not there
        return (name,)
    if isinstance(owner, LowRankLinear) and leaf == "bias":
        return (f"{name.removesuffix(leaf)}second.bias",)
    lazy = ("weight",) if isinstance(owner, LowRankLinear) else _lazy_parameters(owner)
    return core_names(model, name) if leaf in lazy else (name,)


def _lazy_parameters(owner: nn.Module) -> tuple[str, ...]:
    return getattr(type(owner), "_factored_parameters", ())


def restore(model: nn.Module, build: Callable[[FactoredWeight], nn.Parameter]) -> None:
    """Put a dense parameter back wherever there are cores; tied weights stay tied."""
    made: dict[tuple[int, ...], nn.Parameter] = {}

    def dense(weight: FactoredWeight) -> nn.Parameter:
        key = tuple(id(core) for core in weight.cores)
        if key not in made:
            made[key] = build(weight)
        return made[key]

    for module in list(model.modules()):
        if isinstance(module, LowRankLinear):
            weight, bias = dense(module.weight), module.bias
            del module._modules["first"], module._modules["second"]
            base = module.__dict__.pop("_dense_class")
            del module.__dict__["spec"]
            module.__dict__.pop("input_product", None)
            for extra in ("contractions", "memory_limit", "kernels", "nonlinearity"):
                module.__dict__.pop(extra, None)
            if module.__dict__.pop("stored_transposed"):
                del module.__dict__["in_features"], module.__dict__["out_features"]
            module.__class__ = base
            module._parameters["weight"] = weight
            module._parameters["bias"] = bias
            continue
        for parameter in _lazy_parameters(module):
            module._parameters[parameter] = dense(_weight_of(module, parameter))
            del module._modules[_cores_name(parameter)]
        if hasattr(module, "_factored_parameters"):
            module.__class__ = module._dense_class  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    ties.undo(model)
