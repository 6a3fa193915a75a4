"""Which formats each weight may take, from what the caller asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorize.base.errors import AnalysisError
from tensorize.ir.sites import Site
from tensorize.ir.spec import (
    DENSE,
    FORMATS,
    LOW_RANK,
    SHARED,
)
from tensorize.passes.observe.select import matches, require_match

FormatsOption = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None

UNASKED = DENSE, LOW_RANK, SHARED
"""What a weight may become where nobody chose; a probe may add trains."""


def check_formats(option: FormatsOption) -> FormatsOption:
    """What ``formats=`` is; raises AnalysisError for a format that is none, whatever the model."""
    for names in option.values() if isinstance(option, Mapping) else (option,):
        _checked(names)
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
    chosen = {pattern: _checked(formats) for pattern, formats in option.items()}
    return {
        site.name: next((f for pattern, f in chosen.items() if matches(site, pattern)), None)
        for site in sites
    }


def _checked(names: Any) -> tuple[str, ...]:
    names = (names,) if not isinstance(names, tuple | list | set | frozenset) else tuple(names)
    for name in names:
        if name not in FORMATS:
            raise AnalysisError(
                f"formats={name!r} is no format", way_out=f"one of {', '.join(FORMATS)}"
            )
    # A first factor in common is one more point of low rank.
    return (*names, LOW_RANK) if SHARED in names and LOW_RANK not in names else names
