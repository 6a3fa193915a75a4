"""What an engine does with each weight of a saved model, known before it is started."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tensorize.base.errors import CheckpointError
from tensorize.base.printer import count
from tensorize.formats.registry import format_of
from tensorize.ir.coded import QuantizedSpec
from tensorize.serve.experts import STACKS
from tensorize.serve.matrices import stays_two
from tensorize.store.contents import SiteRecord
from tensorize.store.manifest import read_manifest

Engine = Literal["vllm", "sglang"]


@dataclass(frozen=True)
class Service:
    """How one weight is served. ``refusal``: why it cannot be, where it cannot.

    ``stored`` and ``served`` are the numbers in the file and in the running engine.
    """

    name: str
    how: str
    stored: int
    served: int
    refusal: str | None = None


def services_of(directory: Path, engine: Engine = "vllm") -> list[Service]:
    """How every factorized weight of a saved model is served; reads the manifest only.

    Raises:
        CheckpointError: there is none, or it is of a model that no engine knows.
    """
    manifest = read_manifest(directory)
    if not manifest.model["huggingface"]:
        raise CheckpointError(
            f"{directory} holds a {manifest.model['class']}, and engines serve models of "
            "transformers",
            way_out="tensorize.load(directory, model) runs it in a program of your own",
        )
    return services(manifest.contents.sites, engine)


def services(sites: Iterable[SiteRecord], engine: Engine = "vllm") -> list[Service]:
    """How every factorized weight is served."""
    return [_service(site, engine) for site in sites]


def _service(site: SiteRecord, engine: Engine) -> Service:
    spec, name = site.spec, site.names[0]
    title = format_of(spec).title
    if spec.precision is not None:
        title = f"{title} in {spec.precision}"
    stored = spec.parameters
    if site.nonlinearity is not None:
        why = f"it has {site.nonlinearity} between its factors: it is no matrix"
        return Service(name, title, stored, stored, why)
    if spec.batch:
        if name.rpartition(".")[2] not in STACKS:
            why = "it is a stack of matrices that are no experts of the engine's"
            return Service(name, title, stored, stored, why)
        if engine == "sglang":
            why = "SGLang runs no experts in factors"
            return Service(name, title, stored, stored, why)
        how = f"{title}: products of each expert"
        return Service(name, how, stored, spec.plain.parameters)
    if stays_two(spec) and len(site.shape) == 2:
        how = f"{title}: two products"
        inner = spec.inner if isinstance(spec, QuantizedSpec) else spec
        if inner.pivoted:
            how = f"{title} without an identity: two products, with the identity"
        return Service(name, how, stored, spec.plain.parameters)
    whole = math.prod(site.shape)
    return Service(name, f"{title}: made whole when loaded", stored, whole)


def check(found: Sequence[Service]) -> None:
    """Raises CheckpointError for the first weight that cannot be served."""
    refused = [each for each in found if each.refusal is not None]
    if refused:
        raise refused_by_name(refused[0].refusal, [each.name for each in refused])


def refused_by_name(why: str | None, names: Sequence[str]) -> CheckpointError:
    """The error for weights that cannot be served; ``why``: what keeps the first of them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return CheckpointError(
        f"it cannot be served: {why}",
        site=names[0],
        way_out=f"compress the model again with exclude=[{', '.join(map(repr, names[:3]))}]{more}",
    )


def told(found: Sequence[Service]) -> list[str]:
    """The same for people: one line for each way in which weights are served."""
    if not found:
        return ["no weight is factorized: the model is served as any other"]
    ways = dict.fromkeys(each.how for each in found if each.refusal is None)
    lines = []
    for how in ways:
        own = [each for each in found if each.how == how and each.refusal is None]
        stored, served = (sum(getattr(e, side) for e in own) for side in ("stored", "served"))
        more = f", {count(served)} in the engine" if served != stored else ""
        lines.append(f"{len(own)} x {how} ({count(stored)} numbers{more})")
    lines += [f"refused: {e.name} ({e.how}): {e.refusal}" for e in found if e.refusal is not None]
    return lines
