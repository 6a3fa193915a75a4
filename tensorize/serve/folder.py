"""A folder of ours as an engine sees it: which of its weights an engine's layers run, and how.

``config.json`` says which weights are factors. An engine builds its layers first, and each claims
what is its own; then the tensors of the checkpoint come, of which the engine's loaders see what is
dense. What no layer claimed is made whole for them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensorize.base.errors import CheckpointError
from tensorize.formats.registry import format_of
from tensorize.serve.experts import STACKS, UP
from tensorize.serve.layout import Part
from tensorize.serve.service import Engine, check, services, told
from tensorize.serve.waiting import Named, Waiting, bias_names, keys_of, sorted_out
from tensorize.store.coded import decoded
from tensorize.store.contents import SiteRecord
from tensorize.store.manifest import FORMAT_VERSION, MANIFEST, SAVE_AGAIN, read_manifest
from tensorize.store.transformers_config import METHOD, factors_from_dict
from tensorize.weight.install import turned_spec

_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc")}
"""Models of transformers that have layers which keep their weights as (in, out), and these."""

_HEADS = ("lm_head", "embed_out", "output")
"""What heads are called."""


@dataclass(frozen=True)
class Table:
    """What an engine says of a table of words: its name, which may be empty, and its shape."""

    name: str
    shape: tuple[int, int]


def hook(loader: Any, method: str, weights: Callable[..., Iterator[Named]]) -> None:
    """Let an engine's loader read a checkpoint of ours by ``weights``, which is given its own
    method first; others as ever."""
    given = getattr(loader, method)
    if getattr(given, "_by_tensorize", False):  # a process may call this several times
        return

    @functools.wraps(given)
    def read(self: Any, model_config: Any, model: nn.Module) -> Iterator[Named]:
        if model_config.quantization != METHOD:
            return given(self, model_config, model)
        return weights(given, self, model_config, model)

    read._by_tensorize = True  # type: ignore[attr-defined]
    setattr(loader, method, read)


class Folder:
    """What stands under ``quantization_config`` in the ``config.json`` of a compressed model.

    ``weights`` is the file that holds them, where ``tensorize.save`` wrote it. ``claimed`` are the
    sites that a layer of this process runs, once for each layer. ``moved`` is a part of names in
    transformers that has another name in the engine, and that.
    """

    def __init__(
        self, config: Mapping[str, Any], engine: Engine, say: Callable[[str], None]
    ) -> None:
        version = config.get("format_version")
        if type(version) is not int or version > FORMAT_VERSION:
            raise CheckpointError(
                f"config.json has format version {version} of tensorize, and this one reads up to "
                f"{FORMAT_VERSION}",
                way_out="upgrade tensorize",
            )
        aliases = config.get("aliases") or {}
        sites, named = factors_from_dict(config["sites"], aliases, config.get("sha256"))
        found = services(sites, engine)
        check(found)
        for line in told(found):
            say(line)
        self.sites, self.aliases = tuple(sites), dict(named)
        self.weights: str | None = config.get("weights")
        self.turned: tuple[str, ...] = ()
        self.moved: tuple[str, str] = ("", "")
        self.claimed: list[SiteRecord] = []
        self._waiting: Waiting | None = None
        self._say = say
        self._at = {name: site for site in sites for name in site.names}

    def of_model(self, kind: str, moved: tuple[str, str] = ("", "")) -> None:
        """``kind`` is the ``model_type`` of the configuration."""
        self.turned, self.moved = _CONV1D.get(kind, ()), moved
        self.rename(self.name_of)

    def rename(self, name_of: Callable[[str], str | None]) -> None:
        """What the engine calls the weights."""
        self._at = {name_of(name) or name: site for name, site in self._at.items()}

    def name_of(self, key: str) -> str:
        """What the engine calls what has a name in transformers."""
        own, theirs = self.moved
        return key.replace(own, theirs) if own else key

    def _key_of(self, key: str) -> str:
        """What transformers calls what has a name in a checkpoint, which may be an older one."""
        own, theirs = self.moved
        return key.replace(theirs, own) if own else key

    # ---------------------------------------------------------------------- the engine's layers

    def has_factors(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> bool:
        """Whether any weight of one of the engine's linear layers is factors; ``packed``: the
        layers of the checkpoint that are one of the engine's, by what that is called."""
        return any(name in self._at for name in _names(prefix, packed))

    def parts(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> list[Part]:
        """The weights of the checkpoint that are such a layer, which claims them."""
        found = [(name, self._at.get(name)) for name in _names(prefix, packed)]
        return [Part(name, site and self.claim(self._as_held(site))) for name, site in found]

    def experts(self, prefix: str) -> dict[str, SiteRecord | None]:
        """The stacks of a layer of experts that are factors; nothing where none is."""
        found = {stack: self._at.get(f"{prefix}.{stack}") for stack in STACKS}
        if not any(found.values()):
            return {}
        return {stack: site and self.claim(site) for stack, site in found.items()}

    def table(self, table: Table) -> SiteRecord | None:
        """The factors of a table of words.

        Raises:
            CheckpointError: it has no name, and several weights are of its shape.
        """
        if table.name:
            return self._at.get(f"{table.name}.weight")
        # Llama's and others' embeddings are not told their names.
        found = {
            site.names: site
            for name, site in self._at.items()
            if site.shape == table.shape and _layer(name) not in _HEADS
        }
        if len(found) > 1:
            raise CheckpointError(
                f"{len(found)} weights have the shape {table.shape}, and the engine does not say "
                "which of them is the embedding",
                site=min(found)[0],
                way_out="compress the model again with exclude= of all but one",
            )
        return next(iter(found.values()), None)

    def claim(self, site: SiteRecord) -> SiteRecord:
        self.claimed.append(site)
        return site

    def _as_held(self, site: SiteRecord) -> SiteRecord:
        """The site whose spec is that of the tensors."""
        return replace(site, spec=turned_spec(site.spec)) if self._holds_turned(site) else site

    def _holds_turned(self, site: SiteRecord) -> bool:
        """Whether a layer that kept its weight as (in, out) holds the factors of the transpose."""
        return self.is_turned(site) and format_of(site.spec).pair

    def is_turned(self, site: SiteRecord) -> bool:
        """Whether a layer's weight is stored as (in, out)."""
        return _layer(site.names[0]) in self.turned

    # -------------------------------------------------------------------------- its checkpoint

    def let_it_read_our_file(self, model: Any) -> None:
        """A killed save may have left another one."""
        if self.weights is not None:
            model.allow_patterns_overrides = [self.weights]

    def seen(
        self,
        tensors: Iterable[Named],
        model: nn.Module,
        directory: Path,
        away: Collection[str] = (),
    ) -> Iterator[Named]:
        """The tensors of a checkpoint that the engine's own loaders are to see.

        ``away``: layers that another process has.

        Raises:
            CheckpointError: the model has no place for a weight, or the checkpoint lacks a tensor.
        """
        left = self._left_over()
        elsewhere = [site for name, site in left if name.startswith(tuple(f"{n}." for n in away))]
        whole = [(name, site) for name, site in left if site not in elsewhere]
        for name, site in whole:
            _check_place(model, name, site.names[0])
        ours = [*self.claimed, *(site for _, site in whole)]
        self._waiting = Waiting(ours, self.aliases)
        dropped = {k for site in elsewhere for keys in keys_of(site, self.aliases) for k in keys}
        known = ((self._key_of(key), tensor) for key, tensor in _decoded(tensors))
        expected = {*map(self._key_of, _expected(directory))}
        biases = bias_names(self.sites)
        for key, tensor in sorted_out(known, self._waiting, biases, dropped, expected):
            yield from self._given(key, tensor)
        for name, site in whole:
            self._say(f"{name} is made whole: the engine's layer for it takes no factors")
            yield from self._given(site.names[0], self._whole(site))

    def take(self, site: SiteRecord) -> tuple[list[Tensor], str]:
        """What came of a weight (``Waiting.take``)."""
        assert self._waiting is not None
        return self._waiting.take(site)

    def _left_over(self) -> list[tuple[str, SiteRecord]]:
        """The sites that no layer of this process runs, by their names in the engine."""
        taken = {site.names for site in self.claimed}
        names = {site.names: name for name, site in reversed(self._at.items())}
        left = [(name, self._at[name]) for key, name in names.items() if key not in taken]
        return [(name, self._as_held(site)) for name, site in left]

    def _whole(self, site: SiteRecord) -> Tensor:
        """A weight that was left over, in the form that the dense model has."""
        held, _ = self.take(site)
        own = format_of(site.spec)
        matrix = own.reconstruct(site.spec, held)
        return (matrix.t() if self._holds_turned(site) else matrix).reshape(site.shape)

    def _given(self, key: str, tensor: Tensor) -> Iterator[Named]:
        """A tensor by the engine's name; of a stack of experts, one after another where they are
        kept so."""
        name = self.name_of(key)
        path, _, leaf = name.rpartition(".")
        if not self.moved[0] or not path.endswith(".experts") or leaf not in STACKS:
            yield name, tensor
            return
        parts = ("w1", "w3") if leaf == UP else ("w2",)
        for expert, weight in enumerate(tensor):
            for part, own in zip(parts, weight.chunk(len(parts)), strict=True):
                yield f"{path}.{expert}.{part}.weight", own


def _names(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    above, _, leaf = prefix.rpartition(".")
    return [f"{above}.{own}.weight".lstrip(".") for own in packed.get(leaf, [leaf])]


def _layer(name: str) -> str:
    """What the layer of a weight is called."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _decoded(tensors: Iterable[Named]) -> Iterator[Named]:
    """What a coded file stands for; any other as it is read."""
    try:
        yield from decoded(iter(tensors))
    except ValueError as error:
        raise CheckpointError(f"its weights cannot be read: {error}", way_out=SAVE_AGAIN) from error


def _check_place(model: nn.Module, name: str, site: str) -> None:
    """Raises CheckpointError where a model has no parameter for a weight."""
    try:
        model.get_parameter(name)
    except AttributeError:
        raise CheckpointError(
            f"the engine's {type(model).__name__} has no weight {name}",
            site=site,
            way_out=f"compress the model again with exclude=[{site!r}]",
        ) from None


def _expected(directory: Path) -> set[str]:
    """The keys that the files of a checkpoint hold, where something beside them says so."""
    if (directory / MANIFEST).exists():
        contents = read_manifest(directory).contents
        return {*contents.entries} - {*contents.aliases} - {*contents.same_memory}
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return set()
