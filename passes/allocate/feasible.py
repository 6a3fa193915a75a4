"""Why a budget cannot be met, and the nearest one that can: it is tried before it is named."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tensorize.passes.allocate.candidates import COSTS, Points
from tensorize.passes.allocate.demand import Demand, rounded_errors

_UNITS = {"params": "", "bytes": " bytes", "flops": " FLOPs a row", "latency": " µs"}
_UNITS |= {"communication": " bytes a row", "file": " bytes in a file"}
# A parameter that is no weight is told of from this share of the model on.
_LARGE = 0.05


def refusal(demand: Demand, budget: Budget) -> BudgetError:
    """What is raised for a budget that no choice meets.

    Errors, costs and the loss are looked at in this order, each within what is named for those
    before it, so that what is named can be met as a whole.
    """
    met, errors = budget, list[BudgetError]()
    for look in (_error, _costs, _loss):
        found = look(demand, met)
        if found is not None:
            met, error = found
            errors.append(error)
    assert demand.choose(met) is not None, f"{met} is named, and cannot be met"
    if len(errors) == 1:
        return errors[0]
    first = errors[0]
    return BudgetError(first.cause, site=first.site, way_out=f"budget={_written(met)}")


def _written(budget: Budget) -> str:
    given = ((name, value) for name, value in vars(budget).items() if value is not None)
    return f"tensorize.Budget({', '.join(f'{name}={value!r}' for name, value in given)})"


def _up(value: float) -> float:
    """A little more, in four digits: what is printed is what is meant."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(1.001 * value / unit) * unit:.4g}")


def _error(demand: Demand, budget: Budget) -> tuple[Budget, BudgetError] | None:
    if budget.error is None or demand.tiers_within(budget.error):
        return None

    def smallest(points: Points) -> float:
        return float(rounded_errors(points).min())

    worst = min((max(tier, key=smallest) for tier in demand.tiers), key=smallest)
    named = _up(smallest(worst))
    return replace(budget, error=named), BudgetError(
        f"no allowed point has an error within {budget.error:g}: the smallest is {named:g}",
        site=worst.site.name,
        way_out=f"error={named:g}, or allow 'dense' in formats=",
    )


def _costs(demand: Demand, budget: Budget) -> tuple[Budget, BudgetError] | None:
    limited = [name for name in (*COSTS, "latency") if getattr(budget, name) is not None]
    if not limited:
        return None
    sizes = replace(budget, loss=None)
    if demand.choose(sizes) is not None:
        return None
    raised = [(name, demand.least(sizes, {name})) for name in limited]
    enough = [(name, found) for name, found in raised if found is not None]
    if enough:
        name, found = min(enough, key=lambda pair: _excess(demand, sizes, pair[1], pair[0]))
    else:
        found = demand.least(sizes, limited)
        assert found is not None
        changed = [each for each in limited if getattr(found, each) != getattr(sizes, each)]
        name = max(changed, key=lambda each: _excess(demand, sizes, found, each))
    met = replace(found, loss=budget.loss)
    by_itself = Budget(**{name: getattr(budget, name), "error": budget.error})
    if demand.choose(by_itself) is None:
        return met, _too_small(demand, budget, met, by_itself, name)
    value = getattr(met, name)
    out = f"{name}={value}" if enough else f"budget={_written(met)}"
    return met, BudgetError(
        f"the limits of {budget} cannot be met together: within the others, the smallest {name} "
        f"found is {_told(name, value)}",
        way_out=f"{out}, or a larger limit on what it is traded for",
    )


def _told(name: str, value: float) -> str:
    """A limit with its unit."""
    return f"{value:,}{_UNITS[name]}" if isinstance(value, int) else f"{value} of the dense model"


def _excess(demand: Demand, budget: Budget, met: Budget, name: str) -> float:
    """By what factor a cost exceeds its limit."""
    had, has = demand.limits(budget), demand.limits(met)
    pairs = [(has[k], had[k]) for k in had if k.partition("[")[0] == name]
    return max(new / max(old, 1e-300) for new, old in pairs)


def _largest(demand: Demand) -> str:
    """The largest of the parameters that are no weights, where it is no small one.

    Some models hold matrices in vectors, which they cut up as they run.
    """
    listed = {site.name for site in demand.analysed.sites}
    rest = {name: n for name, (n, _) in demand.analysed.sizes.items() if name not in listed}
    name = max(rest, key=rest.__getitem__, default="")
    if not name or rest[name] < _LARGE * sum(n for n, _ in demand.analysed.sizes.values()):
        return ""
    return (
        f"; the largest is {name}, a vector of {rest[name]:,} numbers: if it "
        "is cut into matrices, tensorize.separate(model, inputs) makes them weights"
    )


def _too_small(
    demand: Demand, budget: Budget, met: Budget, by_itself: Budget, name: str
) -> BudgetError:
    """Of a limit that no choice meets, whatever the others are."""
    least = demand.least(by_itself, {name})
    assert least is not None
    need = getattr(least, name)
    columns = [j for j, each in enumerate(demand.names) if each.partition("[")[0] == name]
    dense = demand.dense.costs
    j = min(columns, key=lambda j: dense[j]) if name == "latency" else columns[0]
    tier = min(demand.tiers, key=lambda tier: sum(p.costs[:, j].min() for p in tier))
    fixed = sorted(
        ((float(p.costs[:, j].min()), p) for p in tier if p.fixed), key=lambda pair: -pair[0]
    )
    blocking = [f"{p.site.name} ({int(v):,}: {p.fixed})" for v, p in fixed[:3] if v > 0]
    if demand.overhead[j]:
        small = int(demand.overhead[j])
        blocking.append(f"biases, norms and other small parameters ({small:,}{_largest(demand)})")
    share = np.ceil(need / dense[j] * 1e4) / 1e4 if dense[j] else np.inf  # still enough
    short = name == "params" and share <= 1 and vars(met) == vars(Budget(params=met.params))
    of_dense = (
        f" ({need / dense[j]:.4f} of the dense model)" if dense[j] else " (dense it costs none)"
    )
    of_dense = of_dense if isinstance(need, int) else ""
    limit = min(v for k, v in demand.limits(budget).items() if k.partition("[")[0] == name)
    return BudgetError(
        f"{name} cannot be within {limit:,.0f}{_UNITS[name]}: the smallest feasible value is "
        f"{_told(name, need)}{of_dense}; in the way: "
        f"{'; '.join(blocking) or 'every weight is at its smallest rank already'}",
        site=fixed[0][1].site.name if fixed else None,
        way_out=f"budget={f'{share:.4f}' if short else _written(met)}, "
        "or allow more weights to be factorized (include=, exclude=, formats=)",
    )


def _loss(demand: Demand, budget: Budget) -> tuple[Budget, BudgetError] | None:
    if budget.loss is None or demand.choose(budget) is not None:
        return None
    tiers = demand.choices(budget)
    best = tiers.least_lost(demand.caps(budget))
    assert best is not None
    named = _up(1.01 * demand.predicted(best.lost))
    largest = max(
        zip(best.points, best.choice, strict=True), key=lambda pair: pair[0].distortion[pair[1]]
    )
    return replace(budget, loss=named), BudgetError(
        f"no choice within {budget} keeps the predicted rise of the loss: the smallest reached is "
        f"{named:.4g}",
        site=largest[0].site.name,
        way_out=f"allow loss={named:.4g}, a larger size, or more formats=",
    )
