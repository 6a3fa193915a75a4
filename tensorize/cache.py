"""Analyses kept on disk as safetensors and JSON, found by the content of what they depend on."""

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from tensorize.ir import Batch, Site, TTSpec, Use
from tensorize.passes.metric import Metric
from tensorize.passes.pipeline import Program
from tensorize.passes.predict import Predictor, Trial
from tensorize.passes.spectra import FormatsOption, SharedFactor, Spectrum, TensorTrain

log = logging.getLogger("tensorize")


def key(
    program: Program,
    fingerprint: str,
    formats: FormatsOption,
    loss_fn: Any,
    refine: str | None,
    version: str,
) -> str | None:
    """A hash of all that an analysis depends on; None where that cannot be told (a loss_fn)."""
    if loss_fn is not None:
        log.info("not cached: what a loss_fn computes cannot be told from its name")
        return None
    digest = hashlib.sha256()
    sites = [(site.name, site.shape, site.blocked) for site in program.sites]
    plain: Any = dict(formats) if isinstance(formats, Mapping) else formats
    text = (fingerprint, program.metric, program.seed, plain, sites, refine, version)
    digest.update(repr((*text, torch.__version__)).encode())
    for batch in program.calibration:
        hash_batch(digest, batch)
    return digest.hexdigest()[:32]


def hash_batch(digest: Any, batch: Batch) -> None:
    """Put the content of a batch into a hash."""
    leaves, structure = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    digest.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        else:
            digest.update(repr(leaf).encode())


def location(cache_dir: str | os.PathLike[str], key: str) -> str:
    """Where the analysis with this key is kept (without the endings of its two files)."""
    return str(Path(cache_dir).absolute() / f"analysis-{key}")


def write(cache_dir: str | os.PathLike[str], key: str, program: Program) -> None:
    """Keep an analysis; the JSON, written last, makes it valid."""
    base = location(cache_dir, key)
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    spectra = {}
    for k, (name, curve) in enumerate(program.spectra.items()):
        spectra[name] = _curve_to_dict(curve, f"{k}.", tensors)
    predictor = program.predictor
    data = {
        "metric": program.metric,
        "seed": program.seed,
        "sites": [_site_to_dict(site) for site in program.sites],
        "sizes": program.sizes,
        "spectra": spectra,
        "notes": program.notes,
        "predictor": None
        if predictor is None
        else {
            "unit": predictor.unit,
            "held_out": predictor.held_out,
            "trials": [[getattr(t, f.name) for f in fields(Trial)] for t in predictor.trials],
        },
    }
    own = f".{os.getpid()}.tmp"  # two runs may write the same analysis at the same time
    save_file({n: t.contiguous() for n, t in tensors.items()}, base + ".safetensors" + own)
    Path(base + ".json" + own).write_text(json.dumps(data))
    os.replace(base + ".safetensors" + own, base + ".safetensors")
    os.replace(base + ".json" + own, base + ".json")


def read(cache_dir: str | os.PathLike[str], key: str, program: Program) -> Program | None:
    """The kept analysis, or None; a damaged one is reported and made again."""
    found = read_location(location(cache_dir, key))
    return None if found is None else replace(found, history=program.history)


def read_location(base: str) -> Program | None:
    """The analysis kept at ``base``, or None where there is none that can be read."""
    if not Path(base + ".json").exists():
        return None
    try:
        data = json.loads(Path(base + ".json").read_text())
        tensors = load_file(base + ".safetensors")
        sites = tuple(_site_from_dict(site) for site in data["sites"])
        by_name = {site.name: site for site in sites}
        spectra = {
            name: _curve_from_dict(by_name[name], curve, tensors)
            for name, curve in data["spectra"].items()
        }
        predictor = None
        if data["predictor"] is not None:
            trials = tuple(Trial(*values) for values in data["predictor"]["trials"])
            predictor = Predictor(trials, data["predictor"]["unit"], data["predictor"]["held_out"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        log.warning("the cached analysis %s is damaged and is made again: %s", base, error)
        return None
    return Program(
        model=torch.nn.Module(),
        metric=data["metric"],
        seed=data["seed"],
        sites=sites,
        sizes={name: (size[0], size[1]) for name, size in data["sizes"].items()},
        spectra=spectra,
        predictor=predictor,
        notes=tuple(data["notes"]),
        summary="read from the cache",
    )


def _site_to_dict(site: Site) -> dict[str, Any]:
    data = {f.name: getattr(site, f.name) for f in fields(Site)}
    data["uses"] = [astuple(use) for use in site.uses]
    return data


def _site_from_dict(data: Mapping[str, Any]) -> Site:
    uses = tuple(Use(*use) for use in data["uses"])
    shape, aliases = tuple(data["shape"]), tuple(data["aliases"])
    return Site(**{**data, "uses": uses, "shape": shape, "aliases": aliases})


def _curve_to_dict(curve: Spectrum, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for name in ("left", "right", "distortion"):
        tensors[prefix + name] = getattr(curve, name)
    if curve.shared is not None:  # the factors are those of all members of its group
        tensors[f"{curve.site.input_group}.factor"] = curve.shared.factor
        tensors[f"{curve.site.input_group}.reader"] = curve.shared.reader
        tensors[prefix + "shared.distortion"] = curve.shared.distortion
    metrics = []
    for k, metric in enumerate(curve.metrics):
        sides = {"left": metric.left, "right": metric.right}
        for side, root in sides.items():
            if root is not None:
                tensors[f"{prefix}metric{k}.{side}"] = root
        metrics.append(
            {
                "scale": metric.scale,
                **{
                    side: None if root is None else f"{prefix}metric{k}.{side}"
                    for side, root in sides.items()
                },
            }
        )
    for k, train in enumerate(curve.trains):
        for j, core in enumerate(train.cores):
            tensors[f"{prefix}train{k}.{j}"] = core
    return {
        "prefix": prefix,
        "formats": curve.formats,
        "metrics": metrics,
        "trains": [train.spec.to_dict() for train in curve.trains],
        "train_points": [[spec.to_dict(), lost] for spec, lost in curve.train_points],
        "in_nats": curve.in_nats,
        "shared": None if curve.shared is None else curve.site.input_group,
    }


def _curve_from_dict(
    site: Site, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Spectrum:
    prefix = data["prefix"]

    def tensor(name: str | None) -> Tensor | None:
        return None if name is None else tensors[name]

    trains = []
    for k, spec in enumerate(data["trains"]):
        parsed = TTSpec.from_dict(spec)
        cores = tuple(tensors[f"{prefix}train{k}.{j}"] for j in range(len(parsed.cores)))
        trains.append(TensorTrain(parsed, cores))
    shared = None
    if data["shared"] is not None:
        own = tensors[prefix + "shared.distortion"]
        factor, reader = (tensors[f"{data['shared']}.{name}"] for name in ("factor", "reader"))
        shared = SharedFactor(factor, reader, own)
    return Spectrum(
        site=site,
        formats=tuple(data["formats"]),
        metrics=tuple(
            Metric(m["scale"], tensor(m["left"]), tensor(m["right"])) for m in data["metrics"]
        ),
        left=tensors[prefix + "left"],
        right=tensors[prefix + "right"],
        distortion=tensors[prefix + "distortion"],
        trains=tuple(trains),
        train_points=tuple((TTSpec.from_dict(s), lost) for s, lost in data["train_points"]),
        in_nats=data["in_nats"],
        shared=shared,
    )
