"""Choose weights by shell patterns or by a predicate."""

from __future__ import annotations

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tensorize.base.errors import AnalysisError
from tensorize.base.tensors import is_finite
from tensorize.ir.sites import Site

Select = str | Sequence[str] | Callable[[Site], bool] | None


def names_of(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[str]]]:
    """Every parameter once, with all of its names: told apart by identity, never by name."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    return names


def matches(site: Site, select: Select) -> bool:
    """Whether a site is named by shell patterns (parameter or owner), or chosen by a predicate."""
    if select is None:
        return False
    if callable(select):
        return bool(select(site))
    patterns = _patterns(select)
    candidates = [*site.names, *(name.rpartition(".")[0] for name in site.names)]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in candidates)


def check_select(select: Select) -> Select:
    """A predicate, or the shell patterns; raises AnalysisError for anything else."""
    return select if callable(select) else _patterns(select)


def _patterns(select: Any) -> list[str]:
    several = isinstance(select, Iterable) and not isinstance(select, str)
    found = list(select) if several else [select]
    if all(isinstance(each, str) for each in found):
        return found
    raise AnalysisError(
        f"weights are chosen by shell patterns or by a predicate on sites, got {select!r}",
        way_out='"blocks.*.weight", a list of such, or lambda site: site.shape[0] > 512',
    )


def named_parameters(model: nn.Module) -> list[Site]:
    """Every parameter with its names, of no known use: what patterns can be compared with early."""
    return [
        Site(aliases[0], tuple(p.shape), str(p.dtype).removeprefix("torch."), (), aliases[1:])
        for p, aliases in names_of(model).values()
    ]


def require_match(sites: Sequence[Site], patterns: Sequence[str], option: str) -> None:
    """Raises AnalysisError, with near names, for a pattern that names no site."""
    names = [name for site in sites for name in site.names]
    for pattern in patterns:
        if any(matches(site, pattern) for site in sites):
            continue
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        raise AnalysisError(
            f"{option}={pattern!r} matches no weight of the model",
            way_out=f"near names: {', '.join(near)}" if near else "the model has no weights",
        )


def _routers(sites: Sequence[Site]) -> set[str]:
    """The names of weights that choose among the experts of a stack: of a layer within the stack's
    own module, or else beside it, with as many rows as there are experts."""

    def above(name: str) -> str:
        return name.rpartition(".")[0]

    flat: dict[tuple[str, int], set[str]] = defaultdict(set)
    for site in sites:
        if len(site.shape) == 2:
            flat[above(above(site.name)), site.shape[0]].add(site.name)
    found: set[str] = set()
    for stack in (s for s in sites if s.experts and s.groups == 1 and not s.modes):
        own, count = above(stack.name), stack.experts
        found |= flat.get((own, count)) or flat.get((above(own), count), set())
    return found


def selected(sites: list[Site], include: Select, exclude: Select) -> list[Site]:
    """The sites that may be compressed, and the others with the reason.

    Routers are left alone where they are not asked for: a small error of a score changes which
    experts a row meets, and they are small themselves.
    """
    for option, select in (("include", include), ("exclude", exclude)):
        if select is not None and not callable(select):
            require_match(sites, _patterns(select), option)
    chosen: list[Site] = []
    routers = _routers(sites) if include is None else ()
    for site in sites:
        blocked = site.blocked
        if blocked is None and site.name in routers:
            blocked = "it chooses among experts: include='*' has it compressed, too"
        if blocked is None and include is not None and not matches(site, include):
            blocked = "not named by include"
        if blocked is None and matches(site, exclude):
            blocked = "excluded by the caller"
        chosen.append(replace(site, blocked=blocked))
    if include is not None and all(site.blocked for site in chosen):
        reason = next((s.blocked for s in chosen if s.blocked != "not named by include"), None)
        raise AnalysisError(
            "include leaves no weight that can be factorized" + (f": {reason}" if reason else ""),
            way_out="widen include=",
        )
    return chosen


def check_weights(model: nn.Module) -> None:
    """Raises AnalysisError for a parameter that holds NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise AnalysisError(
                "the parameter holds NaN or infinite values",
                site=name,
                way_out="repair the checkpoint: no factorization of such a weight means anything",
            )
