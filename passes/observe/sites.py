"""Find every parameter that is used by a matmul-like op, and why the others cannot be factorized.

With inputs, the model is run once under an observer (``tensorize/capture/observer.py``). A
parameter that the run does not use, and every parameter where there are no inputs, is read by the
type of its module.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tensorize.base.printer import percent
from tensorize.base.tensors import adapted_layers, is_index, is_plain, reals
from tensorize.capture.fit import fitting
from tensorize.capture.forward import once, untouched
from tensorize.capture.inner_gradients import note_that_it_differentiates
from tensorize.capture.kept import Kept
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import CUSTOM, TRANSFORMED, Observer
from tensorize.ir.sites import Batch, Site, Use
from tensorize.passes.observe.select import Select, names_of, selected
from tensorize.passes.stages import Found, Given

_UNKNOWN = "no use of it was seen: pass example_inputs that reach it"


@dataclass(frozen=True)
class FindSites:
    """Finds one site a parameter of at least two dimensions, blocked ones included."""

    include: Select = None
    exclude: Select = None
    name: str = "sites"

    def run(self, given: Given) -> Found:
        model = given.model
        names = names_of(model)
        seen, other, beside, written = _observe(model, given.inputs)
        sites: list[Site] = []
        adapted = tuple(f"{path}." for path in adapted_layers(model))
        for parameter, aliases in names.values():
            if not parameter.numel() or (parameter.dim() < 2 and not seen.get(aliases[0])):
                continue  # nothing at all; a bias or a scale
            uses, function = tuple(seen.get(aliases[0], ())), other.get(aliases[0])
            if not uses and function is None:
                uses, function = _uses_by_type(model, aliases)
            last_resort = None
            if function is not None and parameter.dim() >= 2 and _can_be_rebuilt(function):
                last_resort = f"it is used by {function}, which is no matmul against it"
                uses, function = (Use(function, "whole", split=_squarest(parameter.shape)),), None
            site = Site(
                name=aliases[0],
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                uses=uses,
                aliases=tuple(aliases[1:]),
                last_resort=last_resort,
            )
            blocked = written.get(aliases[0]) or _blocked(site, parameter, function)
            if any(_is_of_factors(model, name) for name in aliases):
                blocked = "it is a factor already, of a weight that the model keeps in factors"
            if any(_is_shown_as_complex(model, name, parameter) for name in aliases):
                blocked = (
                    "its module holds pairs of reals, and shows complex numbers in their place: "
                    "only complex parameters are factorized"
                )
            if any(name.startswith(adapted) for name in aliases):
                blocked = "it is part of a layer with an adapter: merge that first"
            sites.append(replace(site, blocked=blocked))
        # Weights that have a factor in common are trained together, or not, and lie in one place.
        alike = {n[0]: (p.requires_grad, p.dtype, p.device) for p, n in names.values()}
        sites = _with_input_groups(selected(sites, self.include, self.exclude), beside, alike)
        free = sum(site.blocked is None and site.last_resort is None for site in sites)
        summary = f"{free} of {len(sites)} weights can be factorized"
        sizes = {n[0]: (reals(p), p.numel() * p.element_size()) for p, n in names.values()}
        found = given.to(Found, sites=tuple(sites), sizes=sizes, summary=summary)
        cut = sum(p.numel() for p, n in names.values() if p.dim() == 1 and _is_cut(other.get(n[0])))
        share = cut / max(sum(p.numel() for p, _ in names.values()), 1)
        if share < _MUCH:
            return found
        return found.noted(
            f"{percent(share)} of the parameters are vectors that are cut up, no weights: where "
            "the pieces are matrices, tensorize.separate(model, inputs) makes them weights"
        )


_MUCH = 0.05
"""A share of the parameters that is worth a note."""

_CUTS = ("reshape", "view", "narrow", "__getitem__", "split", "chunk", "slice", "unflatten")


def _is_cut(function: str | None) -> bool:
    """Whether a function takes a piece of a vector; TorchScript's have their kind behind a dot."""
    return function is not None and function.partition(".")[0] in _CUTS


_OF_ITSELF = (
    *("embedding", "embedding_bag"),  # a table for a few rows
    *("grad", "backward"),  # the model differentiates with respect to it
)


def _can_be_rebuilt(function: str) -> bool:
    """Whether a function may be given a weight that is rebuilt for that call."""
    writes = function.endswith("_") and not function.endswith("__")
    if function.startswith(CUSTOM) or function == TRANSFORMED:
        return False  # they take tensors, and nothing that stands for one
    return not writes and function not in _OF_ITSELF


def _is_of_factors(model: nn.Module, name: str) -> bool:
    """Whether a parameter is part of a weight that is a module of factors: of tensorly-torch's.

    Those of class ``DenseTensor`` have the weight itself.
    """
    parts = name.split(".")[:-1]
    owners = (model.get_submodule(".".join(parts[: k + 1])) for k in range(len(parts)))
    kinds = ({kind.__name__ for kind in type(owner).__mro__} for owner in owners)
    return any("FactorizedTensor" in names and "DenseTensor" not in names for names in kinds)


def _is_shown_as_complex(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a module gives complex numbers for a real parameter: tensorly-torch's of factors."""
    path, _, leaf = name.rpartition(".")
    if parameter.is_complex() or parameter.shape[-1:] != (2,):
        return False
    shown = getattr(model.get_submodule(path), leaf, None)
    return isinstance(shown, Tensor) and shown.is_complex()


def _squarest(shape: Sequence[int]) -> int:
    """How many leading axes make up the rows of the matrix that takes the most ranks."""
    sides = [math.prod(shape[:k]) + math.prod(shape[k:]) for k in range(1, len(shape))]
    return 1 + sides.index(min(sides))


def _observe(
    model: nn.Module, batch: Batch | None
) -> tuple[dict[str, list[Use]], dict[str, str], list[list[str]], dict[str, str]]:
    """Matmul uses, and one other use, of every parameter in a run of the model.

    Also the names of linears that one after the other read the very same tensor, and of what the
    model itself writes to it is said when.
    """
    seen: dict[str, dict[Use, int]] = defaultdict(lambda: defaultdict(int))
    other: dict[str, str] = {}
    beside: list[list[str]] = []
    last: Tensor | None = None
    then: Tensor | None = None

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        call = matmul.convolution
        use = Use(
            matmul.kind,
            matmul.contract,
            split=matmul.split,
            groups=1 if call is None else call.groups,
            partial=frame.rows is not None,
            modes=matmul.modes,
            apart=matmul.stacked and (matmul.modes > 0 or matmul.x.is_complex()),
        )
        nonlocal last, then
        if not (matmul.x is last and _unwritten(matmul.x, then)):
            beside.append([])
            last, then = matmul.x, None if matmul.x.is_meta else matmul.x.clone()
        beside[-1].append(name)
        lookup = matmul.contract == "lookup"
        seen[name][use] += matmul.x.numel() if lookup else _row_count(matmul.to_rows(output))
        return output

    def on_other(name: str, function: str) -> None:
        other.setdefault(name, function)

    observer = Observer(model.named_parameters(), on_matmul, on_other)
    with untouched(model) as kept:
        merged = _written(model, kept, "the model's own train() and eval() write to it")
        if batch is not None:
            with fitting(model, batch), observer:
                once(model, batch)
        written = _written(model, kept, "the model writes to it when it runs") | merged
    if observer.differentiates:
        note_that_it_differentiates(model)
    uses = {
        name: [replace(use, rows=count) for use, count in table.items()]
        for name, table in seen.items()
    }
    return uses, other, beside, written


def _written(model: nn.Module, kept: Kept, why: str) -> dict[str, str]:
    """Parameters that something wrote to, by name: why none of them can have factors."""
    return {name: why for name, p in model.named_parameters() if kept.written(p)}


def _unwritten(x: Tensor, then: Tensor | None) -> bool:
    """Whether a tensor has the values that it had, whatever may have written to it."""
    return then is None or torch.equal(x, then)


def _with_input_groups(
    sites: Sequence[Site], beside: Sequence[Sequence[str]], alike: Mapping[str, Hashable]
) -> list[Site]:
    """Plain linears that always read their input together know the first of their group.

    ``alike``: only those of the same value are of one group.
    """
    plain = {
        site.name
        for site in sites
        if site.blocked is None
        and len(site.names) == len(site.uses) == 1
        and (site.uses[0].kind, site.uses[0].partial, len(site.shape)) == ("linear", False, 2)
    }
    groups: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for names in beside:
        for name in names:
            groups[name].add(tuple(sorted(set(names))))
    first: dict[Hashable, str] = {}
    result = []
    for site in sites:
        if len(groups[site.name]) == 1 and site.name in plain:
            (names,) = groups[site.name]
            own = alike[site.name]
            if sum(name in plain and alike[name] == own for name in names) > 1:
                site = replace(site, input_group=first.setdefault((names, own), site.name))
        result.append(site)
    return result


def _row_count(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _uses_by_type(model: nn.Module, names: Sequence[str]) -> tuple[tuple[Use, ...], str | None]:
    """What the types of the modules that own a parameter say of its uses: matmuls, and another."""
    uses: list[Use] = []
    other: str | None = None
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        if isinstance(owner, ParametrizationList):
            other = "a parametrization"
        elif isinstance(owner, nn.RNNBase) and leaf in owner._flat_weights_names:
            other = owner.mode.lower()
        elif leaf != "weight":
            continue
        if type(owner).forward is nn.Linear.forward:
            uses.append(Use("linear", "columns"))
        elif type(owner).forward is nn.Embedding.forward and owner.max_norm is None:
            uses.append(Use("embedding", "lookup"))
        elif type(owner).__name__ == "Conv1D" and hasattr(owner, "nf"):
            uses.append(Use("addmm", "rows"))
        elif type(owner) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and owner.groups == 1:
            uses.append(Use(f"conv{owner.weight.ndim - 2}d", "columns", split=1))
    return tuple(dict.fromkeys(uses)), other


def _blocked(site: Site, parameter: nn.Parameter, other: str | None) -> str | None:
    """Why a parameter cannot be factorized; None where it can."""
    if not is_plain(parameter):
        return f"it is a {type(parameter.data).__name__}, already in another form"
    if is_index(parameter):
        return f"its dtype is {site.dtype}: only floating-point weights are factorized"
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "a gradient hook sits on it, and factors have no gradient of the whole weight"
    if other is not None and other.startswith(CUSTOM):
        return f"it is given to the {other}, which wants the dense weight"
    if other is not None:
        return f"it is used by {other}, which is no matmul against it"
    if not site.uses:
        return _UNKNOWN
    if len({(use.split, use.groups, use.modes) for use in site.uses}) > 1:
        return "its uses read it as different matrices"
    if len(site.shape) > 3 and not site.split and not site.modes:
        return f"a weight of {len(site.shape)} dimensions used as a stack is not factorized"
    if site.experts and any(use.contract == "lookup" for use in site.uses):
        return "a lookup in a stack of tables is not factorized"
    if site.groups > 1 and min(site.matrix) == 1:
        return "a depthwise convolution: each of its matrices is a single row"
    return None
