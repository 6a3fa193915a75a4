"""Curves on disk, a weight at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensorize.algebra.metric import Metric
from tensorize.base.files import draft_of, into_place
from tensorize.base.records import plain
from tensorize.base.tensorfile import Layout, Writer, is_padding, sha256_of
from tensorize.formats.format import TensorTrain
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec
from tensorize.passes.curves.curve import SharedFactor, Spectrum
from tensorize.passes.curves.rounding import Rounding
from tensorize.store.fingerprint import identity

log = logging.getLogger("tensorize")


# Of what is kept: entries of another format have other keys.
FORMAT = 8
_ENDING = ".safetensors"
_SQUARES = ("squares of rows", "squares of columns")
# Names of groups, so that they are not those of weights.
SHARED_CURVES = "shared: "
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


class Held(Enum):
    """How a curve that is on disk is held while a run goes on."""

    memory = "in memory, as it was made"
    mapped = "mapped: the system reads what is asked for, and may drop it again"
    shapes = "all but the factors, of which the shapes are enough for a plan"


@dataclass(frozen=True)
class Curves:
    """The curves of one analysis in a folder, where each is as soon as it is known.

    ``files`` are the names of those that this run kept or found, by what they are of. ``lost`` says
    why some could not be kept, where that is no error: their curves stay in memory.
    """

    folder: Path
    held: Held = Held.memory
    files: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def find(self, site: Site) -> Spectrum | None:
        """The curve of a weight, if it was kept and is whole; without its shared factor."""
        found = self._find(site.name)
        return None if found is None else self._held(_curve_from_dict(site, *found))

    def keep(self, curve: Spectrum) -> Spectrum:
        """Put a curve in place; it comes back as it is to be held from now on."""
        tensors: dict[str, Tensor] = {}
        data = _curve_to_dict(curve, tensors)
        path = self._put(curve.site.name, tensors, data)
        if path is None or self.held is Held.memory:
            return curve
        return self._held(_curve_from_dict(curve.site, *self._open(path)))

    def _held(self, curve: Spectrum) -> Spectrum:
        """A curve that was read, as it is to be held."""
        if self.held is not Held.memory:
            return curve
        return replace(curve, metrics=tuple(metric.packed() for metric in curve.metrics))

    def complete(self, curve: Spectrum) -> Spectrum:
        """One that ``find`` or ``keep`` gave, with all of its tensors."""
        if self.held is not Held.shapes:
            return curve
        whole = self.whole(curve.site)
        shared = None if curve.shared is None else whole.shared
        return replace(whole, shared=shared, measured=curve.measured)

    def find_shared(self, group: str) -> dict[str, SharedFactor] | None:
        """The first factor of a group of weights, by the names of its members."""
        found = self._find(SHARED_CURVES + group)
        return None if found is None else _shared_from_dict(*found)

    def keep_shared(
        self, group: str, members: Mapping[str, SharedFactor]
    ) -> Mapping[str, SharedFactor]:
        """Put what the members of a group have in common in place; see ``keep``."""
        first = next(iter(members.values()))
        tensors = {"factor": first.factor, "reader": first.reader}
        tensors |= {f"{k}.distortion": m.distortion for k, m in enumerate(members.values())}
        path = self._put(SHARED_CURVES + group, tensors, {"members": list(members)})
        if path is None or self.held is Held.memory:
            return members
        return _shared_from_dict(*self._open(path))

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
        paths = (
            [self.folder / known] if known else sorted(self.folder.glob(f"{identity(name)[:16]}-*"))
        )
        for path in paths:
            try:
                if known or _is_whole(path):
                    found = self._open(path)
                    self.files[name] = path.name
                    return found
                why = "its content is not what its name says"
            except DAMAGE as error:
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

    def _put(
        self, name: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]
    ) -> Path | None:
        """Put a file in place; None where the disk does not take it, and it can stay in memory."""
        try:
            return self._written(name, tensors, data)
        except OSError as error:
            if self.held is Held.shapes:
                raise
            if not self.lost:
                log.warning("%s cannot be written, and is gone on without: %s", self.folder, error)
            self.lost.append(f"{type(error).__name__}: {error}")
            return None

    def _written(self, name: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        layout = Layout.aligned(tensors, {"data": json.dumps(data)})
        stem = identity(name)[:16]
        with draft_of(self.folder / stem) as draft:
            with Writer(draft, layout) as file:
                for key, tensor in tensors.items():
                    file.put(key, tensor)
            path = self.folder / f"{stem}-{sha256_of(draft)[:16]}{_ENDING}"
            into_place(draft, path)
        self.files[name] = path.name
        return path


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
    tensors |= {f"{each.precision}.distortion": each.low_rank for each in curve.roundings}
    tensors |= dict(zip(_SQUARES, curve.squares or (), strict=False))
    for k, train in enumerate(curve.trains):
        tensors |= {f"train{k}.{j}": core for j, core in enumerate(train.cores)}
    return {
        "formats": curve.formats,
        "metrics": metrics,
        "trains": plain([train.spec for train in curve.trains]),
        "train_points": plain(curve.train_points),
        "in_nats": curve.in_nats,
        "roundings": [[each.precision, each.dense] for each in curve.roundings],
        "few": curve.few,
        "unforeseen": curve.unforeseen,
    }


def _curve_from_dict(
    site: Site, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Spectrum:
    def tensor(name: str | None) -> Tensor | None:
        return None if name is None else tensors[name]

    specs = [Spec.from_dict(spec) for spec in data["trains"]]
    trains = [
        TensorTrain(spec, tuple(tensors[f"train{k}.{j}"] for j in range(len(spec.core_shapes))))
        for k, spec in enumerate(specs)
    ]
    return Spectrum(
        site=site,
        formats=tuple(data["formats"]),
        metrics=tuple(
            Metric(m["scale"], tensor(m["left"]), tensor(m["right"])) for m in data["metrics"]
        ),
        distortion=tensors["distortion"],
        trains=tuple(trains),
        train_points=tuple((Spec.from_dict(s), lost) for s, lost in data["train_points"]),
        in_nats=data["in_nats"],
        roundings=tuple(
            Rounding(name, dense, tensors[f"{name}.distortion"])
            for name, dense in data["roundings"]
        ),
        squares=(tensors[_SQUARES[0]], tensors[_SQUARES[1]]) if _SQUARES[0] in tensors else None,
        few=None if data["few"] is None else (data["few"][0], data["few"][1]),
        unforeseen=data["unforeseen"],
    )
