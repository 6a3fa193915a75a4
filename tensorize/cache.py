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
import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

from tensorize.errors import CheckpointError
from tensorize.files import draft_of, into_place, write_at_once
from tensorize.ir import Batch, Site, TTSpec, Use
from tensorize.passes.curves import SharedFactor, Spectrum
from tensorize.passes.metric import Metric
from tensorize.passes.pipeline import Program
from tensorize.passes.predict import Predictor, Trial
from tensorize.passes.spectra import FormatsOption
from tensorize.passes.trains import TensorTrain
from tensorize.tensorfile import Layout, Writer, is_padding, sha256_of
from tensorize.tensors import raw_bytes

log = logging.getLogger("tensorize")

# Of what is kept: entries of another format have other keys.
_FORMAT = 5
_ENDING = ".safetensors"
# Names of groups, so that they are not those of weights.
_SHARED = "shared: "
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


def key(
    program: Program,
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
    sites = [astuple(site) for site in program.sites]
    text = (_FORMAT, fingerprint, program.metric, program.seed, plain, sites, refine, version)
    digest.update(repr((*text, torch.__version__)).encode())
    if program.calibration:
        _hash_model(digest, program.model)
    for batch in program.calibration:
        hash_batch(digest, batch)
    return digest.hexdigest()[:32]


def _hash_model(digest: Any, model: torch.nn.Module) -> None:
    """What a model computes with its weights, and the version of the library that it comes from."""
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(f"{name} {kind.__module__}.{kind.__qualname__};".encode())
    for name, buffer in model.named_buffers():
        digest.update(name.encode())
        _hash_values(digest, buffer)
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(str(config.to_json_string()).encode())  # type: ignore[union-attr]
    home = sys.modules.get(type(model).__module__.partition(".")[0])
    digest.update(repr(getattr(home, "__version__", None)).encode())


def hash_batch(digest: Any, batch: Batch) -> None:
    """Put the content of a batch into a hash."""
    leaves, structure = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    digest.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            _hash_values(digest, leaf)
        else:
            digest.update(repr(leaf).encode())


def _hash_values(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor))


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


# ------------------------------------------------------------------------------------- the curves


class Held(Enum):
    """How a curve that is on disk is held while a run goes on."""

    memory = "in memory, as it was made"
    mapped = "mapped: the system reads what is asked for, and may drop it again"
    shapes = "all but the factors, of which the shapes are enough for a plan"


@dataclass(frozen=True)
class Curves:
    """The curves of one analysis in a folder, where each is as soon as it is known.

    ``files`` are the names of those that this run kept or found, by what they are of.
    """

    folder: Path
    held: Held = Held.memory
    files: dict[str, str] = field(default_factory=dict)

    def find(self, site: Site) -> Spectrum | None:
        """The curve of a weight, if it was kept and is whole; without its shared factor."""
        found = self._find(site.name)
        return None if found is None else _curve_from_dict(site, *found)

    def keep(self, curve: Spectrum) -> Spectrum:
        """Put a curve in place; it comes back as it is to be held from now on."""
        tensors: dict[str, Tensor] = {}
        data = _curve_to_dict(curve, tensors)
        path = self._put(curve.site.name, tensors, data)
        return (
            curve if self.held is Held.memory else _curve_from_dict(curve.site, *self._open(path))
        )

    def find_shared(self, group: str) -> dict[str, SharedFactor] | None:
        """The first factor of a group of weights, by the names of its members."""
        found = self._find(_SHARED + group)
        return None if found is None else _shared_from_dict(*found)

    def keep_shared(
        self, group: str, members: Mapping[str, SharedFactor]
    ) -> Mapping[str, SharedFactor]:
        """Put what the members of a group have in common in place; see ``keep``."""
        first = next(iter(members.values()))
        tensors = {"factor": first.factor, "reader": first.reader}
        tensors |= {f"{k}.distortion": m.distortion for k, m in enumerate(members.values())}
        path = self._put(_SHARED + group, tensors, {"members": list(members)})
        return members if self.held is Held.memory else _shared_from_dict(*self._open(path))

    def whole(self, site: Site) -> Spectrum:
        """A curve with its factors, those that it shares among them.

        Raises:
            KeyError: it was not kept, or is damaged.
        """
        mapped = replace(self, held=Held.mapped)
        curve = mapped.find(site)
        if curve is None:
            raise KeyError(site.name)
        shared = None if site.input_group is None else mapped.find_shared(site.input_group)
        return replace(curve, shared=(shared or {}).get(site.name))

    def named(self, name: str, file: str) -> None:
        """Take a file for what ``name`` is, as a finished analysis says.

        Raises:
            ValueError: it is missing or damaged.
        """
        path = self.folder / Path(file).name
        if not _is_whole(path):
            raise ValueError(f"{path} is missing or damaged")
        self.files[name] = path.name

    def _find(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        known = self.files.get(name)
        paths = [self.folder / known] if known else sorted(self.folder.glob(f"{_short(name)}-*"))
        for path in paths:
            try:
                if known or _is_whole(path):
                    found = self._open(path)
                    self.files[name] = path.name
                    return found
                why = "its content is not what its name says"
            except _DAMAGE as error:
                why = f"{type(error).__name__}: {error}"
            log.warning("%s of %s is damaged and is made again: %s", path, name, why)
        return None

    def _open(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        with safe_open(path, framework="pt", device="cpu") as file:
            data = json.loads(file.metadata()["data"])
            for name in file.keys():  # noqa: SIM118
                if is_padding(name):
                    continue
                tensor = file.get_tensor(name)
                if self.held is Held.shapes:
                    kept = name.endswith("distortion")
                    tensor = tensor.clone() if kept else torch.empty_like(tensor, device="meta")
                tensors[name] = tensor
        return data, tensors

    def _put(self, name: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        layout = Layout.aligned(tensors, {"data": json.dumps(data)})
        with draft_of(self.folder / _short(name)) as draft:
            with Writer(draft, layout) as file:
                for key, tensor in tensors.items():
                    file.put(key, tensor)
            path = self.folder / f"{_short(name)}-{sha256_of(draft)[:16]}{_ENDING}"
            into_place(draft, path)
        self.files[name] = path.name
        return path


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    try:
        return path.stem.rpartition("-")[2] == sha256_of(path)[:16]
    except OSError:
        return False


def _shared_from_dict(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, SharedFactor]:
    factor, reader = tensors["factor"], tensors["reader"]
    return {
        name: SharedFactor(factor, reader, tensors[f"{k}.distortion"])
        for k, name in enumerate(data["members"])
    }


def _curve_to_dict(curve: Spectrum, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors["distortion"] = curve.distortion
    metrics = []
    for k, metric in enumerate(curve.metrics):
        sides = {"left": metric.left, "right": metric.right}
        names = {s: None if root is None else f"metric{k}.{s}" for s, root in sides.items()}
        tensors |= {f"metric{k}.{s}": root for s, root in sides.items() if root is not None}
        metrics.append({"scale": metric.scale, **names})
    for k, train in enumerate(curve.trains):
        tensors |= {f"train{k}.{j}": core for j, core in enumerate(train.cores)}
    return {
        "formats": curve.formats,
        "metrics": metrics,
        "trains": [train.spec.to_dict() for train in curve.trains],
        "train_points": [[spec.to_dict(), lost] for spec, lost in curve.train_points],
        "in_nats": curve.in_nats,
    }


def _curve_from_dict(
    site: Site, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Spectrum:
    def tensor(name: str | None) -> Tensor | None:
        return None if name is None else tensors[name]

    trains = []
    for k, spec in enumerate(data["trains"]):
        parsed = TTSpec.from_dict(spec)
        cores = tuple(tensors[f"train{k}.{j}"] for j in range(len(parsed.cores)))
        trains.append(TensorTrain(parsed, cores))
    return Spectrum(
        site=site,
        formats=tuple(data["formats"]),
        metrics=tuple(
            Metric(m["scale"], tensor(m["left"]), tensor(m["right"])) for m in data["metrics"]
        ),
        distortion=tensors["distortion"],
        trains=tuple(trains),
        train_points=tuple((TTSpec.from_dict(s), lost) for s, lost in data["train_points"]),
        in_nats=data["in_nats"],
    )


# ----------------------------------------------------------------------------- the whole analysis


def write(base: str, curves: Curves, program: Program) -> None:
    """Complete an analysis whose curves were kept: the JSON makes it valid."""
    for curve in program.spectra.values():
        if curve.site.name not in curves.files:
            curves.keep(replace(curve, shared=None))
    for group, members in _shared_groups(program).items():
        if _SHARED + group not in curves.files:
            curves.keep_shared(group, members)
    predictor = program.predictor
    data = {
        "metric": program.metric,
        "seed": program.seed,
        "sites": [_site_to_dict(site) for site in program.sites],
        "sizes": program.sizes,
        "files": {name: curves.files[name] for name in program.spectra},
        "shared": {group: curves.files[_SHARED + group] for group in _shared_groups(program)},
        "notes": program.notes,
        "measured": {n: curve.measured for n, curve in program.spectra.items() if curve.measured},
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


def _shared_groups(program: Program) -> dict[str, dict[str, SharedFactor]]:
    groups: dict[str, dict[str, SharedFactor]] = {}
    for name, curve in program.spectra.items():
        group = curve.site.input_group
        if curve.shared is not None and group is not None:
            groups.setdefault(group, {})[name] = curve.shared
    return groups


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read(base: str, program: Program, held: Held = Held.memory) -> Program | None:
    """The analysis kept at ``base``, or None; a damaged one is reported and made again."""
    found = read_location(base, held)
    return None if found is None else replace(found, history=program.history)


def read_location(base: str, held: Held = Held.memory) -> Program | None:
    """The analysis kept at ``base``, or None where there is none that can be read."""
    try:
        text = Path(base + ".json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
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
            curves.named(_SHARED + group, file)
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
    except _DAMAGE as error:
        return _damaged(base, error)
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
