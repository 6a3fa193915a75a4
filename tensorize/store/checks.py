"""What a manifest may say: every value is looked at before anything is done with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensorize.ir.spec import MOST_ELEMENTS, NONLINEARITIES
from tensorize.store.contents import BUFFER, PARAMETER, Contents, Entry, SiteRecord, dtype_of

# Entries of cores in a byte of a file, at most: one bit each.
_DENSEST = 8
# Of a coded file: of what is all zero, 128 KiB of bytes of four entries are coded in four bytes.
_DENSEST_CODED = 1 << 17
_LOOSE: dict[str, Any] = {"kind": PARAMETER, "requires_grad": False}


def check_contents(contents: Contents, size: int, *, coded: bool) -> None:
    """Raises ValueError or TypeError for what no model holds.

    ``size``: bytes of the file of weights, which may be ``coded``.
    """
    densest = _DENSEST_CODED if coded else _DENSEST
    entries = contents.entries
    for key, entry in entries.items():
        _check_entry(key, entry)
    for name, dtype in _pairs(contents.transient):
        _check(dtype_of(dtype).is_floating_point, f"the buffer {name} is of {dtype}")
    aliases, same = dict(_pairs(contents.aliases)), dict(_pairs(contents.same_memory))
    for key, first in (*aliases.items(), *same.items()):
        _check(
            key in entries and first in entries,
            f"{key!r} stands for {first!r}, and one of them is not there",
        )
        # One object may be a buffer here and a parameter there, and two of one memory train apart.
        alike = replace(entries[key], **_LOOSE) == replace(entries[first], **_LOOSE)
        _check(
            first not in aliases and alike,
            f"{key} stands for {first}, which is another tensor",
        )
        _check(key in aliases or first not in same, f"{key} lies where {first} does not lie itself")
    _check(
        not aliases.keys() & same.keys(), "a tensor is another one, and in the memory of a third"
    )
    for site in contents.sites:
        _check(
            site.spec.parameters <= densest * size,
            f"{site.names[0]} has more entries than there are in the file",
        )


def check_sites(sites: Sequence[SiteRecord]) -> None:
    """Raises ValueError for records of no factorized parameters."""
    seen: set[str] = set()
    for site in sites:
        _check_shape(str(site.names), site.shape)
        _check(
            bool(site.names) and len({*site.names} - seen) == len(site.names),
            f"{site.names} are names of no parameter, or of two",
        )
        seen |= {*site.names}
        _check(
            math.prod(site.spec.shape) == math.prod(site.shape),
            f"{site.names[0]} of shape {site.shape} is to be {site.spec}",
        )
        # A name out of a file is looked up nowhere unless it is known.
        _check(
            site.nonlinearity in (None, *NONLINEARITIES),
            f"{site.nonlinearity!r} is no non-linearity between factors",
        )


def check_model(about: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError for no description of a model."""
    huggingface = about["huggingface"]
    _check(isinstance(about["class"], str) and isinstance(huggingface, bool), "model is no model")
    if huggingface:
        config, generation = about["config"], about["generation_config"]
        _check(isinstance(config, dict), "config is no configuration")
        _check(isinstance(generation, dict | None), "generation_config is no configuration")
        for name, chosen in about["implementations"].items():
            _check(isinstance(chosen, str | None), f"the implementation of {name} is {chosen!r}")


def check_keys(found: Collection[str], contents: Contents) -> None:
    """Raises ValueError unless a file holds the tensors that it is to hold, and no others."""
    stored = contents.entries.keys() - contents.aliases.keys() - contents.same_memory.keys()
    odd = stored ^ {*found}
    where = "is in it, and in" if odd & {*found} else "is not in it, and is in"
    _check(not odd, f"{min(odd, default='')} {where} the manifest{' not' * bool(odd & {*found})}")


def _check_entry(key: str, entry: Entry) -> None:
    _check(entry.kind in (PARAMETER, BUFFER), f"{key} is a {entry.kind!r}")
    dtype = dtype_of(entry.dtype)
    _check_shape(key, entry.shape)
    if entry.stride is not None:
        _check(_fills(entry.shape, entry.stride), f"{key} has the strides {entry.stride}")
    trained = entry.requires_grad and entry.kind == PARAMETER
    _check(not trained or dtype.is_floating_point or dtype.is_complex, f"{key} trains {dtype}")


def _check_shape(name: str, shape: Sequence[int]) -> None:
    sizes = [max(size, 1) for size in shape]
    fine = min(shape, default=0) >= 0 and math.prod(sizes) <= MOST_ELEMENTS
    _check(fine, f"{name} has the shape {shape}")


def _fills(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the strides are those of a permutation of a contiguous tensor."""
    if len(shape) != len(stride) or min(stride, default=0) < 0:
        return False
    step = 1
    for own, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and own != step:
            return False
        step *= size
    return True


def _pairs(names: Any) -> list[tuple[str, str]]:
    _check(isinstance(names, dict), f"{names!r} says which tensor is which")
    for key, value in names.items():
        _check(isinstance(value, str), f"{key} is {value!r}")
    return list(names.items())


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
