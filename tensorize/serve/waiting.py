"""The tensors of a checkpoint on their way to the layers of an engine.

An engine reads a checkpoint tensor by tensor and gives each to the parameter of its name. What is
dense goes that way. Factors are kept back here, by the names that they have in the checkpoint,
until the layers ask for them; so that no code of an engine's models sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from tensorize.base.errors import CheckpointError
from tensorize.formats.registry import format_of
from tensorize.store.contents import SiteRecord
from tensorize.store.manifest import SAVE_AGAIN
from tensorize.weight.cores import cores_name

Named = tuple[str, Tensor]


def keys_of(site: SiteRecord, aliases: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Under which keys a checkpoint may hold a weight: for each core, and then for each index.

    A linear layer of low rank is two layers, anything else holds cores; one core of tied weights is
    stored once, under the first of its names (``aliases``).
    """
    spec = site.spec
    two = ("second.weight", "first.weight") if format_of(spec).pair else ()
    cores = [f"core_{k}" for k in range(len(spec.core_shapes))]
    leaves = [*cores, *(index.name for index in spec.indices)]
    found = []
    for k, leaf in enumerate(leaves):
        of_layer = two[k] if k < len(two) else leaf
        keys = []
        for name in site.names:
            path, _, parameter = name.rpartition(".")
            prefix = f"{path}." if path else ""
            keys += [f"{prefix}{of_layer}", f"{prefix}{cores_name(parameter)}.{leaf}"]
        found.append(tuple(dict.fromkeys(aliases.get(key, key) for key in keys)))
    return found


class Waiting:
    """The factors that wait for their layers.

    ``of``: the sites whose factors a layer of this process asks for, each as often as one does.
    """

    def __init__(self, of: Sequence[SiteRecord], aliases: Mapping[str, str]) -> None:
        self._keys = {site.names: keys_of(site, aliases) for site in of}
        every = [key for site in of for keys in self._keys[site.names] for key in keys]
        self._uses = Counter(every)
        self._held: dict[str, Tensor] = {}

    def wants(self, key: str) -> bool:
        return key in self._uses

    def put(self, key: str, tensor: Tensor) -> None:
        self._held[key] = tensor

    def take(self, site: SiteRecord) -> tuple[list[Tensor], str]:
        """What the checkpoint holds of a weight, in the order of its spec, and the key of the core
        that meets the input.

        Raises:
            CheckpointError: something of it did not arrive, or is of another shape.
        """
        shapes = [*site.spec.core_shapes, *(index.shape for index in site.spec.indices)]
        found = []
        for keys, shape in zip(self._keys[site.names], shapes, strict=True):
            key = next((key for key in keys if key in self._held), None)
            if key is None:
                raise CheckpointError(
                    f"the checkpoint has no {' and no '.join(keys)}",
                    site=site.names[0],
                    way_out=SAVE_AGAIN,
                )
            tensor = self._held[key]
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{key} has the shape {tuple(tensor.shape)}, and its spec asks for {shape}",
                    site=site.names[0],
                    way_out=SAVE_AGAIN,
                )
            found.append((key, tensor))
        for keys in self._keys[site.names]:
            self._uses.subtract(keys)
            for key in keys:
                if self._uses[key] == 0:
                    self._held.pop(key, None)
        last = min(1, len(site.spec.core_shapes) - 1)
        return [tensor for _, tensor in found], found[last][0]


def bias_names(sites: Iterable[SiteRecord]) -> dict[str, str]:
    """Where layers of low rank keep their bias → the name that it had."""
    linears = [name.removesuffix("weight") for site in sites for name in site.names]
    return {f"{path}second.bias": f"{path}bias" for path in linears}


def sorted_out(
    tensors: Iterable[Named],
    waiting: Waiting,
    biases: Mapping[str, str],
    dropped: Collection[str],
    expected: Collection[str] = (),
) -> Iterator[Named]:
    """What of a checkpoint an engine loads itself; the rest waits.

    Args:
        biases: other names that tensors get.
        dropped: keys of layers that another process has.
        expected: keys that have to come.

    Raises:
        CheckpointError: one of them did not.
    """
    missing = set(expected)
    for key, tensor in tensors:
        missing.discard(key)
        if waiting.wants(key):
            waiting.put(key, tensor)
        elif key not in dropped:
            yield biases.get(key, key), tensor
    if missing:
        raise CheckpointError(
            f"the checkpoint does not hold it, and is to hold it ({len(missing)} such tensors)",
            site=min(missing),
            way_out=SAVE_AGAIN,
        )
