"""Which formats each weight may take, from what the caller asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorize.base.errors import AnalysisError
from tensorize.formats.registry import formats, named, names
from tensorize.ir.sites import Site
from tensorize.passes.observe.select import matches, require_match

FormatsOption = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None

UNASKED = tuple(form.name for form in formats() if form.unasked)
"""What a weight may become where nobody chose; a probe may add trains."""


def check_formats(option: FormatsOption) -> FormatsOption:
    """What ``formats=`` is; raises AnalysisError for a format that is none, whatever the model."""
    for asked in option.values() if isinstance(option, Mapping) else (option,):
        _checked(asked)
    return option


def formats_by_site(sites: Sequence[Site], option: FormatsOption) -> dict[str, tuple[str, ...]]:
    """The formats that each site may take: dense and low rank where nothing else is asked for."""
    return {name: asked or UNASKED for name, asked in asked_formats(sites, option).items()}


def asked_formats(
    sites: Sequence[Site], option: FormatsOption
) -> dict[str, tuple[str, ...] | None]:
    """The formats that a caller chose for each site; None where that is left open.

    Raises:
        AnalysisError: a format is none, or a pattern matches no site.
    """
    if option is None:
        return dict.fromkeys(site.name for site in sites)
    if not isinstance(option, Mapping):
        return dict.fromkeys((site.name for site in sites), _checked(option))
    require_match(sites, list(option), "formats")
    chosen = {pattern: _checked(asked) for pattern, asked in option.items()}
    return {
        site.name: next((f for pattern, f in chosen.items() if matches(site, pattern)), None)
        for site in sites
    }


def _checked(asked: Any) -> tuple[str, ...]:
    asked = (asked,) if not isinstance(asked, tuple | list | set | frozenset) else tuple(asked)
    for name in asked:
        if name not in names():
            raise AnalysisError(
                f"formats={name!r} is no format", way_out=f"one of {', '.join(names())}"
            )
    brought = dict.fromkeys(other for name in asked for other in named(name).brings)
    return (*asked, *(other for other in brought if other not in asked))


def joins(names: Sequence[str]) -> bool:
    """Whether one of these formats is a choice for several weights of one input."""
    return any(named(name).joins for name in names)
