"""Analyses kept on disk as safetensors and JSON, found by the content of what they depend on.

An analysis is ``analysis-<key>.json`` beside a folder ``analysis-<key>``, which holds a file for
every curve and for every group of weights that may share a first factor. Each is there as soon as
it is known, so that a run that was killed goes on after the last one. Its name tells what it is of
and, by the sha256, what it holds: damage is seen before it is used, and runs that work on the same
analysis at the same time put the same files in place.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from tensorize.base.errors import CheckpointError
from tensorize.base.files import draft_of, is_full, write_at_once
from tensorize.base.records import plain, record
from tensorize.cache.curve_files import DAMAGE, FORMAT, SHARED_CURVES, Curves, Held
from tensorize.ir.sites import Site
from tensorize.passes.curves.curve import SharedFactor, Spectrum
from tensorize.passes.curves.formats import FormatsOption
from tensorize.passes.predict.predictor import Predictor
from tensorize.passes.stages import Analysed, Found
from tensorize.store.fingerprint import identity
from tensorize.store.identity import Opaque, content

log = logging.getLogger("tensorize")


def key(
    found: Found,
    fingerprint: str,
    formats: FormatsOption,
    precisions: Sequence[str],
    loss_fn: Any,
    refine: str | None,
    version: str,
) -> str:
    """A hash of all that an analysis depends on.

    That is weights, data, options and versions; where data count, also what the model computes.

    Raises:
        Opaque: what one of them holds cannot be told.
    """
    if callable(loss_fn):
        raise Opaque("it is of a loss_fn")
    plain: Any = dict(formats) if isinstance(formats, Mapping) else formats
    sites = [astuple(site) for site in found.sites]
    text = (
        FORMAT,
        fingerprint,
        found.metric,
        found.seed,
        plain,
        precisions,
        sites,
        refine,
        loss_fn,
        version,
    )
    data = (found.model, *found.calibration) if found.calibration else ()
    defaults = torch.__version__, torch.get_default_dtype()
    return content(repr(text), *map(str, defaults), *data)[:32]


def prepare(cache_dir: str | os.PathLike[str]) -> None:
    """Make the directory that keeps analyses, before the long work.

    A disk without room is no error: it may have some by then.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        folder = Path(cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with draft_of(folder / "probe"):
            pass
    except OSError as error:
        if is_full(error):
            return
        raise CheckpointError(
            f"the cache directory {cache_dir} cannot be written: {type(error).__name__}: {error}",
            way_out="choose a directory that you may write to, or none",
        ) from error


def location(cache_dir: str | os.PathLike[str], key: str) -> str:
    """Where the analysis with this key is kept (a folder, and with .json what completes it)."""
    return str(Path(cache_dir).absolute() / f"analysis-{key}")


def write(base: str, curves: Curves, analysed: Analysed) -> str | None:
    """Complete an analysis whose curves were kept; why not, where the disk does not take it."""
    try:
        if not curves.lost:
            _complete(base, curves, analysed)
    except OSError as error:
        log.warning("%s.json cannot be written, and is gone on without: %s", base, error)
        curves.lost.append(f"{type(error).__name__}: {error}")
    return curves.lost[0] if curves.lost else None


def _complete(base: str, curves: Curves, analysed: Analysed) -> None:
    """The JSON makes it valid."""
    for curve in analysed.spectra.values():
        if curve.site.name not in curves.files:
            curves.keep(replace(curve, shared=None))
    predictor, shared = analysed.predictor, _shared_groups(analysed)
    for group, members in shared.items():
        if SHARED_CURVES + group not in curves.files:
            curves.keep_shared(group, members)
    data = {
        "metric": analysed.metric,
        "seed": analysed.seed,
        "sites": [
            {**plain(site), "uses": [astuple(use) for use in site.uses]} for site in analysed.sites
        ],
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
            "without": predictor.without,
            "worth": predictor.worth,
            "text_loss": predictor.text_loss,
            "row": predictor.row,
            "images": predictor.images,
            "metrics": predictor.metrics,
            "batches": predictor.batches,
            "sufficiency": plain(predictor.sufficiency),
            "trials": [astuple(trial) for trial in predictor.trials],
            "rounded": [astuple(trial) for trial in predictor.rounded],
        },
    }
    if curves.lost:  # of those that were kept just now
        return
    target = Path(base + ".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data)
    whole = {"sha256": identity(text), "analysis": json.loads(text)}
    write_at_once(target, json.dumps(whole))


def _shared_groups(analysed: Analysed) -> dict[str, dict[str, SharedFactor]]:
    groups: dict[str, dict[str, SharedFactor]] = {}
    for name, curve in analysed.spectra.items():
        group = curve.site.input_group
        if curve.shared is not None and group is not None:
            groups.setdefault(group, {})[name] = curve.shared
    return groups


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
        if identity(json.dumps(data)) != whole["sha256"]:
            raise ValueError("its content is not what it was")
        sites = tuple(record(Site, site) for site in data["sites"])
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
        kept = data["predictor"]
        predictor = None if kept is None else record(Predictor, kept)
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
