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
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import TensorizeError
from tensorize.capture.matmul import Frame
from tensorize.formats.registry import format_of
from tensorize.ir.spec import Spec, TTSpec
from tensorize.weight import kept, ties
from tensorize.weight.become import become, become_dense, dense_class
from tensorize.weight.cores import (
    Cores,
    FactoredLinear,
    cores_name,
    factored_class,
    keep_indices,
    lazy_parameters,
    weight_of,
)
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.low_rank import LowRankLinear, drop_products


def is_lazy(owner: nn.Module, parameter: str) -> bool:
    """Whether cores stand for a module's parameter."""
    if isinstance(owner, LowRankLinear):
        return parameter == "weight"
    return parameter in lazy_parameters(owner)


def followed(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """What is installed in here is followed where modules keep the dense weight aside."""
    return kept.followed(model, is_lazy)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter ``name``, and the parameter's own name in it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def is_plain_linear(owner: nn.Module, parameter: str) -> bool:
    """Whether the owner does nothing but x Wᵀ + b, or x W + b as GPT-2's Conv1D."""
    if parameter != "weight" or len(owner._modules) > 0:
        return False
    kind = type(owner)
    return kind is nn.Linear or is_conv1d(kind)


def is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def install(
    model: nn.Module,
    names: Sequence[str],
    spec: Spec,
    cores: Sequence[Tensor],
    nonlinearity: str | None = None,
) -> None:
    """Replace one dense parameter, under all of its names, by its cores.

    Args:
        model: the model to change in place.
        names: every qualified name of the parameter (several where it is tied).
        spec, cores: the factorization; the cores in the shapes of ``spec.core_shapes``, and then
            the indices of ``spec.indices``.
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
        plain = owner is not model and is_plain_linear(owner, parameter) and not spec.batch
        if plain and format_of(spec).pair and not (tied and is_conv1d(type(owner))):
            _become_low_rank_linear(owner, spec, cores, nonlinearity)
            continue
        shape = tuple(owner._parameters[parameter].shape)  # type: ignore[union-attr]
        frame = Frame.of(shape, spec.shape)
        if holder is None or spec.indices:  # tools know no buffer of several names
            holder = Cores(spec, cores, frame)
        alone = plain and type(owner) is nn.Linear
        _become_factored(owner, parameter, holder, FactoredLinear if alone else None)
    ties.follow(model, names_now)


def takes_nonlinearity(model: nn.Module, names: Sequence[str], spec: Spec) -> bool:
    """Whether the parameter is one plain linear's, in low rank: then two layers replace it."""
    owner, leaf = owner_of(model, names[0])
    plain = owner is not model and is_plain_linear(owner, leaf)
    return len(names) == 1 and plain and format_of(spec).pair and not spec.batch


def resize(model: nn.Module, name: str, spec: Spec, cores: Sequence[Tensor]) -> None:
    """Give a factorized weight other cores, wherever it is used; kernels for the old ones go.

    Args:
        name: the qualified name that its dense parameter had, any of those of a tied one.
        spec: the weight's own, with other ranks, or in another form.
        cores: the new parameters, in the shapes of ``spec.core_shapes``, and then its indices.
    """

    def held(module: LowRankLinear | Cores) -> list[int]:
        weight = module.weight if isinstance(module, LowRankLinear) else module.forward()
        return [id(core) for core in weight.cores]

    owner, leaf = owner_of(model, name)
    holder = owner if isinstance(owner, LowRankLinear) else owner._modules[cores_name(leaf)]
    assert isinstance(holder, LowRankLinear | Cores)
    before = held(holder)
    holders = [m for m in model.modules() if isinstance(m, LowRankLinear | Cores)]
    for module in [m for m in holders if held(m) == before]:
        module.kernels = None
        module.resize(spec, cores)


def first_factor(model: nn.Module, name: str) -> tuple[Tensor, ...]:
    """The core of a factorized linear that meets the input, and the order of its columns."""
    owner, leaf = owner_of(model, name)
    weight = owner.weight if isinstance(owner, LowRankLinear) else weight_of(owner, leaf)
    return weight.cores[1], *weight.indices


def with_own_order(model: nn.Module, name: str, spec: Spec) -> Spec:
    """The spec of a weight that stores no identity, with as many neighbours as its order keeps."""
    assert isinstance(spec, TTSpec)
    owner, _ = owner_of(model, name)
    if isinstance(owner, LowRankLinear) and owner.stored_transposed:
        return spec.in_order_of(1)
    *_, order = first_factor(model, name)
    return spec.in_order_of(spec.shape[-1] // order.shape[-1])


def _become_low_rank_linear(
    owner: nn.Module, spec: Spec, cores: Sequence[Tensor], nonlinearity: str | None
) -> None:
    transposed = is_conv1d(type(owner))
    if transposed:  # W is (in, out): the layer's own matrix is Wᵀ
        spec, cores = turned(spec, cores)
    left, right, *indices = cores
    first, second = _linear(right), _linear(left)
    second.register_parameter("bias", owner._parameters.pop("bias", None))
    del owner._parameters["weight"]
    first.training = second.training = owner.training
    become(
        owner,
        LowRankLinear,
        first=first,
        second=second,
        in_features=spec.shape[1],
        out_features=second.out_features,
        spec=spec,
        stored_transposed=transposed,
        nonlinearity=nonlinearity,
    )
    keep_indices(owner, spec, indices)


def turned(spec: Spec, cores: Sequence[Tensor]) -> tuple[TTSpec, list[Tensor]]:
    """Spec and cores of Wᵀ = Vᵀ Uᵀ, for W = U V of low rank; cores that train stay parameters."""
    found = turned_spec(spec)
    first = cores[0]
    if first.is_meta or not any(first.stride()):
        return found, blank(found, first.device, first.dtype, first.requires_grad)
    left, right = (core.detach() for core in format_of(spec).computed(spec, cores))
    made = format_of(found).stored(found, (right.t(), left.t()), first.dtype)
    held = [core.contiguous() for core in made[:2]]
    return found, [*(nn.Parameter(core, first.requires_grad) for core in held), *made[2:]]


def turned_spec(spec: Spec) -> TTSpec:
    """The spec of the transpose, for one of low rank."""
    (m, n), (rank,) = spec.shape, spec.ranks
    return TTSpec.low_rank(n, m, rank, pivoted=min(spec.pivoted, 1))  # no neighbours are known


def blank(
    spec: Spec, device: torch.device, dtype: torch.dtype, requires_grad: bool = False
) -> list[Tensor]:
    """Cores and indices of a spec without values, of one number of memory each."""
    if device.type == "meta":  # no memory at all, so they may lie as others do
        made = [torch.empty(shape, dtype=dtype, device=device) for shape in spec.core_shapes]
        cores = [nn.Parameter(core, requires_grad) for core in made]
    else:
        point = torch.zeros((), dtype=dtype, device=device)
        cores = [nn.Parameter(point.expand(shape), requires_grad) for shape in spec.core_shapes]
    kinds = [torch.zeros((), dtype=getattr(torch, i.dtype), device=device) for i in spec.indices]
    return [*cores, *(k.expand(i.shape) for k, i in zip(kinds, spec.indices, strict=True))]


def _linear(weight: Any) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = weight
    return linear


def _become_factored(
    owner: nn.Module, parameter: str, holder: Cores, kind: type[nn.Module] | None
) -> None:
    del owner._parameters[parameter]
    holder.training = owner.training
    owner._modules[cores_name(parameter)] = holder
    parameters = (*lazy_parameters(owner), parameter)
    if "_flat_weights" in vars(owner):  # of a recurrent layer: it holds the dense ones
        del owner._flat_weights
    become(owner, factored_class(parameters, kind or dense_class(owner)))


def factored(model: nn.Module) -> Iterator[tuple[str, FactoredWeight]]:
    """Every factorized weight of a model, by the qualified name its dense parameter had.

    Raises:
        TensorizeError: other layers took the place of a weight's two, and hold no factors.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, LowRankLinear):
            for layer in (module.first, module.second):
                if not isinstance(layer.weight, Tensor):
                    raise TensorizeError(
                        f"one of its two layers has become a {type(layer).__name__}: there are no "
                        "factors to read",
                        site=f"{prefix}weight",
                        way_out="use the model from before, and quantize a copy of it",
                    )
            yield f"{prefix}weight", module.weight
        for parameter in lazy_parameters(module):
            yield f"{prefix}{parameter}", weight_of(module, parameter)


def core_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """The qualified names of the parameters that stand for the dense parameter ``name``."""
    owner, leaf = owner_of(model, name)
    prefix = name.removesuffix(leaf)
    if isinstance(owner, LowRankLinear):
        return f"{prefix}first.weight", f"{prefix}second.weight"
    holder = owner.get_submodule(cores_name(leaf))
    path = f"{prefix}{cores_name(leaf)}"
    return tuple(f"{path}.{core}" for core, _ in holder.named_parameters())


def held_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """``core_names``, and the name of an index that belongs to them."""
    names = core_names(model, name)
    owner, leaf = owner_of(model, name)
    low_rank = isinstance(owner, LowRankLinear)
    holder = owner if low_rank else owner.get_submodule(cores_name(leaf))
    path = name.removesuffix(leaf) + ("" if low_rank else f"{cores_name(leaf)}.")
    return (*names, *(f"{path}{index}" for index in holder._buffers))


def names_now(model: nn.Module, name: str) -> tuple[str, ...]:
    """What stands for any parameter of the dense model, by name: itself where it was left."""
    try:
        owner, leaf = owner_of(model, name)
    except AttributeError:  # a pattern, or a module that is not there
        return (name,)
    if isinstance(owner, LowRankLinear) and leaf == "bias":
        return (f"{name.removesuffix(leaf)}second.bias",)
    lazy = ("weight",) if isinstance(owner, LowRankLinear) else lazy_parameters(owner)
    return core_names(model, name) if leaf in lazy else (name,)


def restore(
    model: nn.Module,
    build: Callable[[FactoredWeight], nn.Parameter],
    names: Collection[str] | None = None,
) -> None:
    """Put a dense parameter back wherever there are cores; tied weights stay tied.

    ``names``: of which weights; None: of all.
    """
    drop_products(model)
    made: dict[tuple[int, ...], nn.Parameter] = {}

    def dense(weight: FactoredWeight) -> nn.Parameter:
        key = tuple(id(core) for core in weight.cores)
        if key not in made:
            made[key] = build(weight)
        return made[key]

    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        lazy = ("weight",) if isinstance(module, LowRankLinear) else lazy_parameters(module)
        back = [name for name in lazy if names is None or f"{prefix}{name}" in names]
        if not back:
            continue
        if isinstance(module, LowRankLinear):
            parameters = {"weight": dense(module.weight), "bias": module.bias}
        else:
            parameters = {name: dense(weight_of(module, name)) for name in back}
            for name in back:
                del module._modules[cores_name(name)]
        still = tuple(name for name in lazy if name not in back)
        become_dense(module)
        module._parameters.update(parameters)
        if still:
            become(module, factored_class(still, dense_class(module)))
        elif isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    kept.forget(model, is_lazy)
    if names is None:
        ties.undo(model)
