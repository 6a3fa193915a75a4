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
    spec: Spec,
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
        if plain and format_of(spec).pair and not (tied and _is_conv1d(type(owner))):
            _become_low_rank_linear(owner, cores, nonlinearity)
            continue
        shape = tuple(owner._parameters[parameter].shape)  # type: ignore[union-attr]
        frame = Frame() if shape == spec.shape else Frame(shape=shape)
        holder = holder or Cores(spec, cores, frame)
        alone = plain and type(owner) is nn.Linear
        _become_factored(owner, parameter, holder, FactoredLinear if alone else None)
    ties.follow(model, names_now)


def takes_nonlinearity(model: nn.Module, names: Sequence[str], spec: Spec) -> bool:
    """Whether the parameter is one plain linear's, in low rank: then two layers replace it."""
    owner, leaf = owner_of(model, names[0])
    plain = owner is not model and _is_plain_linear(owner, leaf)
    return len(names) == 1 and plain and format_of(spec).pair and not spec.batch


def resize(model: nn.Module, name: str, spec: Spec, cores: Sequence[nn.Parameter]) -> None:
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
    holder = owner if isinstance(owner, LowRankLinear) else owner._modules[cores_name(leaf)]
    assert isinstance(holder, LowRankLinear | Cores)
    before = held(holder)
    holders = [m for m in model.modules() if isinstance(m, LowRankLinear | Cores)]
    for module in [m for m in holders if held(m) == before]:
        module.kernels = None
        module.resize(spec, cores)


def first_factor(model: nn.Module, name: str) -> nn.Parameter:
    """The core of a factorized linear that meets the input."""
    owner, leaf = owner_of(model, name)
    weight = owner.weight if isinstance(owner, LowRankLinear) else weight_of(owner, leaf)
    core: Any = weight.cores[1]
    return core


def _become_low_rank_linear(
    owner: nn.Module, cores: Sequence[nn.Parameter], nonlinearity: str | None
) -> None:
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
    become(
        owner,
        LowRankLinear,
        first=first,
        second=second,
        in_features=first.in_features,
        out_features=second.out_features,
        spec=TTSpec.low_rank(second.out_features, first.in_features, first.out_features),
        stored_transposed=transposed,
        nonlinearity=nonlinearity,
    )


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


def names_now(model: nn.Module, name: str) -> tuple[str, ...]:
    """The names of what stands for any parameter of the dense model: its own where it was left."""
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
