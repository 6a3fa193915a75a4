"""Analyses kept on disk as safetensors and JSON, found by the content of what they depend on.

An analysis is ``analysis-<key>.json`` beside a folder ``analysis-<key>``, which holds a file for
every curve and for every group of weights that may share a first factor. Each is there as soon as
it is known, so that a run that was killed goes on after the last one. Its name tells what it is of
and, by the sha256, what it holds: damage is seen before it is used, and runs that work on the same
analysis at the same time put the same files in place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import torch

from tensorize.base.errors import CheckpointError
from tensorize.base.files import draft_of, write_at_once
from tensorize.cache.curve_files import (
    DAMAGE,
    FORMAT,
    SHARED_CURVES,
    Curves,
    Held,
)
from tensorize.ir.sites import Site, Use
from tensorize.passes.curves.curve import SharedFactor, Spectrum
from tensorize.passes.curves.formats import FormatsOption
from tensorize.passes.predict.predictor import Predictor, Trial
from tensorize.passes.stages import Analysed, Found
from tensorize.store.fingerprint import hash_batch, hash_model

log = logging.getLogger("tensorize")


def key(
    found: Found,
    fingerprint: str,
    formats: FormatsOption,
    loss_fn: Any,
    refine: str | None,
    version: str,
) -> str | None:
    """A hash of all that an analysis depends on; None where that cannot be told (a loss_fn).

    That is weights, data, options and versions; where data count, also the buffers and what the
    model computes, as far as the classes of its modules and its configuration tell.
    """
    if loss_fn is not None:
        log.info("not cached: what a loss_fn computes cannot be told from its name")
        return None
    digest = hashlib.sha256()
    plain: Any = dict(formats) if isinstance(formats, Mapping) else formats
    sites = [astuple(site) for site in found.sites]
    text = (FORMAT, fingerprint, found.metric, found.seed, plain, sites, refine, version)
    digest.update(repr((*text, torch.__version__)).encode())
    if found.calibration:
        hash_model(digest, found.model)
    for batch in found.calibration:
        hash_batch(digest, batch)
    return digest.hexdigest()[:32]


def prepare(cache_dir: str | os.PathLike[str]) -> None:
    """Make the directory that keeps analyses, before the long work.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        folder = Path(cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with draft_of(folder / "probe"):
            pass
    except OSError as error:
        raise CheckpointError(
            f"the cache directory {cache_dir} cannot be written: {type(error).__name__}: {error}",
            way_out="choose a directory that you may write to, or none",
        ) from error


def location(cache_dir: str | os.PathLike[str], key: str) -> str:
    """Where the analysis with this key is kept (a folder, and with .json what completes it)."""
    return str(Path(cache_dir).absolute() / f"analysis-{key}")


def write(base: str, curves: Curves, analysed: Analysed) -> None:
    """Complete an analysis whose curves were kept: the JSON makes it valid."""
    for curve in analysed.spectra.values():
        if curve.site.name not in curves.files:
            curves.keep(replace(curve, shared=None))
    for group, members in _shared_groups(analysed).items():
        if SHARED_CURVES + group not in curves.files:
            curves.keep_shared(group, members)
    predictor, shared = analysed.predictor, _shared_groups(analysed)
    data = {
        "metric": analysed.metric,
        "seed": analysed.seed,
        "sites": [_site_to_dict(site) for site in analysed.sites],
        "sizes": analysed.sizes,
        "files": {name: curves.files[name] for name in analysed.spectra},
        "shared": {g: curves.files[SHARED_CURVES + g] for g in shared},
        "notes": analysed.notes,
        "measured": {n: curve.measured for n, curve in analysed.spectra.items() if curve.measured},
        "predictor": None
        if predictor is None
        else {
            "unit": predictor.unit,
            "held_out": predictor.held_out,
            "refinements": predictor.refinements,
            "trials": [[getattr(t, f.name) for f in fields(Trial)] for t in predictor.trials],
        },
    }
    target = Path(base + ".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data)
    whole = {"sha256": _text_digest(text), "analysis": json.loads(text)}
    write_at_once(target, json.dumps(whole))


def _shared_groups(analysed: Analysed) -> dict[str, dict[str, SharedFactor]]:
    groups: dict[str, dict[str, SharedFactor]] = {}
    for name, curve in analysed.spectra.items():
        group = curve.site.input_group
        if curve.shared is not None and group is not None:
            groups.setdefault(group, {})[name] = curve.shared
    return groups


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read(base: str, held: Held = Held.memory) -> Analysed | None:
    """The analysis kept at ``base``, or None; a damaged one is reported."""
    try:
        text = Path(base + ".json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        return _damaged(base, error)
    curves = Curves(Path(base), held)
    try:
        whole = json.loads(text)
        data = whole["analysis"]
        if _text_digest(json.dumps(data)) != whole["sha256"]:
            raise ValueError("its content is not what it was")
        sites = tuple(_site_from_dict(site) for site in data["sites"])
        by_name = {site.name: site for site in sites}
        shared: dict[str, SharedFactor] = {}
        for group, file in data["shared"].items():
            curves.named(SHARED_CURVES + group, file)
            shared |= curves.find_shared(group) or {}
        spectra: dict[str, Spectrum] = {}
        for name, file in data["files"].items():
            curves.named(name, file)
            curve = curves.find(by_name[name])
            if curve is None:
                raise ValueError(f"the curve of {name} cannot be read")
            measured = tuple((lost, rise) for lost, rise in data["measured"].get(name, ()))
            spectra[name] = replace(curve, shared=shared.get(name), measured=measured)
        predictor = None
        if data["predictor"] is not None:
            kept = data["predictor"]
            predictor = Predictor(
                tuple(Trial(*values) for values in kept["trials"]),
                kept["unit"],
                kept["held_out"],
                tuple(kept["refinements"]),
            )
    except DAMAGE as error:
        return _damaged(base, error)
    return Analysed(
        metric=data["metric"],
        seed=data["seed"],
        sites=sites,
        sizes={name: (size[0], size[1]) for name, size in data["sizes"].items()},
        spectra=spectra,
        predictor=predictor,
        notes=tuple(data["notes"]),
        summary="read from the cache",
    )


def _damaged(base: str, error: Exception) -> None:
    log.warning("the cached analysis %s is damaged and is made again: %s", base, error)


def _site_to_dict(site: Site) -> dict[str, Any]:
    data = {f.name: getattr(site, f.name) for f in fields(Site)}
    data["uses"] = [astuple(use) for use in site.uses]
    return data


def _site_from_dict(data: Mapping[str, Any]) -> Site:
    uses = tuple(Use(*use) for use in data["uses"])
    shape, aliases = tuple(data["shape"]), tuple(data["aliases"])
    return Site(**{**data, "uses": uses, "shape": shape, "aliases": aliases})
