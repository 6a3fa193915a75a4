"""``tensorize.weight.pivoted`` and ``plain``: change how factors are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tensorize.api.outcome import totals_of
from tensorize.base.sharded import of_first_rank
from tensorize.base.tensors import unwrapped
from tensorize.capture.elementwise import makers
from tensorize.capture.forward import in_usual_modes
from tensorize.capture.inputs import check_model, needed
from tensorize.codegen.machine import rates
from tensorize.ir.spec import Spec
from tensorize.reports.attach import attach, known_report, samples_of
from tensorize.running.in_use import use_kernels
from tensorize.store import transformers_config
from tensorize.weight.forms import to_parts, to_pivoted, to_plain
from tensorize.weight.hidden_units import align, linears, may_reorder, readers


def pivoted(model: nn.Module) -> nn.Module:
    """Store no number of factors that a change of basis can remove.

    W = U V of (m, n) and rank r is r (m + n) numbers, of which r² say nothing of W: U V =
    (U B) (B⁻¹ V) for every B. With r columns of V as B, V is the identity in these columns, and
    r (m + n - r) numbers are left, for the same W to rounding, and as many fewer FLOPs
    (``algebra.pivot``). Plans choose this form where it pays; an older model gets smaller by it.
    Weights with a first factor in common keep one, without the identity, and each expert of a stack
    has columns of its own. A convolution stores fewer numbers, and makes its second factor whole at
    every call. What has a function between its factors stays as it is. In half precision columns
    are chosen in groups of neighbours, where reading them one by one would count on this machine.
    Trains and blocks store r² numbers less at every bond, of blocks at that of each, where that is
    more than the integers that say which: their FLOPs are the same, and cores are made whole at
    every call (``algebra.identities``).

        model = tensorize.load("old", model)
        tensorize.weight.pivoted(model)
        tensorize.save(model, "new")

    Args:
        model: compressed; changed in place, its cores are new parameters.

    Returns:
        The same model.

    Raises:
        CaptureError: it is no module.
    """
    check_model(model)
    _note(unwrapped(model), to_pivoted(unwrapped(model), rates.current()))
    return model


def plain(model: nn.Module) -> nn.Module:
    """Store all factors whole again: what ``pivoted`` undoes.

    Args:
        model: compressed; changed in place, its cores are new parameters.

    Returns:
        The same model.

    Raises:
        CaptureError: it is no module.
    """
    check_model(model, on_meta=True)
    _note(unwrapped(model), to_plain(unwrapped(model)))
    return model


def in_parts(model: nn.Module, parts: int) -> None:
    """Let a model's weights without an identity be ones that so many ranks can split: each has as
    many kept columns in every part of the input, or, where that is slower, becomes plain."""
    device = next(model.parameters()).device.type
    machine = of_first_rank(rates.current(device if device == "cuda" else "cpu"))
    _note(model, to_parts(model, parts, machine))


@in_usual_modes("weight.aligned")
def aligned(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Compute hidden units in the order in which the next weight reads them.

    A weight that stores no identity (``pivoted``) puts its input in an order, by a pass over it.
    Where linears alone make that input, through functions of single entries, and nothing else reads
    it, as the hidden units of an MLP, the rows of those linears are put in that order instead, and
    the pass is gone: the same function, exactly. What the linears give is then in another order:
    adapters and states of optimizers that were made before do not fit. One pass through the model
    is watched; where a linear's output is also read in other ways, it stays as it is.

        tensorize.weight.aligned(small, inputs)

    Args:
        model: compressed; changed in place, the parameters of such linears are new ones.
        example_inputs: what forward takes; by default inputs are guessed.

    Returns:
        The same model.

    Raises:
        CaptureError: it is no module, or no inputs are known.
    """
    check_model(model)
    inner = unwrapped(model)
    asked, every = readers(inner), linears(inner)
    if not asked:
        return model
    batch = needed(inner, example_inputs, "hidden units need inputs to watch the model with")
    found, may = makers(inner, batch, every, asked), may_reorder(inner)
    specs = {}
    for name, made in found.items():
        if may.keys() >= made:
            specs[f"{name}.weight"] = align(asked[name], [may[each] for each in sorted(made)])
    _note(inner, specs, tuple(f"{name}: {_ALIGNED}" for name in specs))
    return model


_ALIGNED = "its input is computed in the order in which it is read"


def _note(model: nn.Module, specs: Mapping[str, Spec], notes: tuple[str, ...] = ()) -> None:
    """Let the report and the configuration say how weights are stored now."""
    transformers_config.note_factors(model)
    found = known_report(model)
    if found is None:
        return
    choices, sites = [], []
    for choice, site in zip(found.plan.sites, found.sites, strict=True):
        names = (site.name, *site.aliases)
        spec = next((specs[name] for name in names if name in specs), None)
        if spec is not None:
            choice = replace(choice, spec=spec)
            site = replace(site, parameters_after=choice.parameters_after)
        choices.append(choice)
        sites.append(site)
    after = totals_of(model, found.plan.predicted)
    predicted = replace(found.plan.predicted, parameters=after.parameters, bytes=after.bytes)
    attach(
        model,
        replace(
            found,
            plan=replace(found.plan, sites=tuple(choices), predicted=predicted),
            sites=tuple(sites),
            weights=samples_of(model),
            totals=replace(found.totals, after=after),
            notes=(*found.notes, *notes),
        ),
    )
    use_kernels(model, found.backend)  # those of the factors before are gone
