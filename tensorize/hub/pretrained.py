"""transformers' ``from_pretrained`` for models that tensorize made.

Imported when transformers' registry of quantization methods is (``hooks.py``): to transformers
a factorized model is one of a pre-quantized kind. The architecture is built on the meta device, its
weights give way to cores, and transformers fills these from the file.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensorize.base.errors import CheckpointError
from tensorize.base.tensorfile import sha256_of
from tensorize.reports.attach import attach
from tensorize.store import transformers_config
from tensorize.store.coded import is_coded, write_decoded
from tensorize.store.manifest import FORMAT_VERSION, SAVE_AGAIN, WEIGHTS_NAME, fail, read_manifest
from tensorize.store.transformers_config import METHOD, NEEDS_US, factors_from_dict
from tensorize.weight.install import blank, install
from tensorize.weight.whole_model import settle


class FactorsConfig(QuantizationConfigMixin):
    """What ``huggingface.factors_to_dict`` wrote into a configuration.

    ``weights`` names the file where ``tensorize.save`` put them; ``save_pretrained`` chooses its
    own names.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        format_version: int = FORMAT_VERSION,
        sites: Sequence[Mapping[str, Any]] = (),
        aliases: Mapping[str, str] | None = None,
        weights: str | None = None,
        sha256: str | None = None,
        **newer: Any,
    ) -> None:
        self.quant_method: Any = quant_method  # pyright: ignore[reportIncompatibleVariableOverride]
        self.format_version, self.sha256 = format_version, sha256
        self.sites, self.aliases, self.weights = sites, aliases or {}, weights


class FactorsLoader(HfQuantizer):
    """Installs cores before transformers loads the weights."""

    quantization_config: FactorsConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        version = self.quantization_config.format_version
        if not self.pre_quantized:
            raise CheckpointError(
                "from_pretrained does not factorize a dense model",
                way_out="load it without quantization_config=, then tensorize.compile(model)",
            )
        if type(version) is not int or version > FORMAT_VERSION:
            raise CheckpointError(
                f"config.json has format version {version} of tensorize, and this one reads up to "
                f"{FORMAT_VERSION}",
                way_out="upgrade tensorize",
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Say where the weights are: the one step that sees the configuration before its files.

        In config.json stands instead what makes transformers without tensorize refuse it.
        """
        transformers_config.unmark(config)
        if self.quantization_config.weights is not None:
            config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self._files = [Path(name) for name in checkpoint_files or ()]
        self._decoded: list[Callable[[], Any]] = []
        for file in self._files:
            _check_named(file)
        if checkpoint_files is not None:
            self._decode(checkpoint_files)
        noted = self.quantization_config
        sites, aliases = factors_from_dict(noted.sites, noted.aliases, noted.sha256)
        for site in sites:
            found = [_name_in(model, name) for name in site.names]
            names = [name for name in found if name is not None]
            if not names:
                continue  # of a head that this class does not have
            parameter = model.get_parameter(names[0])
            if tuple(parameter.shape) != site.shape:
                raise CheckpointError(
                    f"the configuration asks for shape {tuple(parameter.shape)}, and {site.shape} "
                    "was factorized",
                    site=names[0],
                    way_out=SAVE_AGAIN,
                )
            cores = blank(site.spec, torch.device("meta"), parameter.dtype, requires_grad=True)
            install(model, names, site.spec, cores, site.nonlinearity)
        own = dict(model.named_parameters(remove_duplicate=False))
        for alias, first in aliases.items():
            tied, to = _name_in(model, alias), _name_in(model, first)
            if tied in own and to in own:
                model.all_tied_weights_keys[tied] = to
        return model

    def _decode(self, files: list[str]) -> None:
        """Let transformers read decoded files in the place of coded ones; they go after it."""
        for k, file in enumerate(self._files):
            try:
                if not is_coded(file):
                    continue
                folder = tempfile.mkdtemp(prefix="tensorize-")
                remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self._decoded.append(remove)
                plain = Path(folder) / file.name
                with torch.device("cpu"):  # transformers builds on meta just now
                    write_decoded(file, plain)
            except (OSError, SafetensorError, ValueError) as error:
                fail(file, f"cannot be read: {type(error).__name__}: {error}", SAVE_AGAIN)
            files[k] = str(plain)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """From here on it is a plain model, that trains and is cast as any other."""
        for remove in self._decoded:
            remove()
        self.remove_quantization_config(model)
        settle(model)
        transformers_config.note_factors(model)
        for file in self._files:
            with contextlib.suppress(CheckpointError):  # there is none beside it
                manifest = read_manifest(file.parent)
                if manifest.weights.name == file.name:  # both are of one save
                    attach(model, manifest.report)
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


def _check_named(file: Path) -> None:
    """Raises CheckpointError unless a file of ``tensorize.save`` holds what its name says."""
    if WEIGHTS_NAME.fullmatch(file.name) and sha256_of(file)[:16] != file.stem[-16:]:
        fail(file, "is damaged or cut short: its sha256 is not that of its name", SAVE_AGAIN)


# With tensorize the mark of a configuration is no reason to refuse it: it is built as without.
ALL_EXPERTS_FUNCTIONS.register(NEEDS_US, ALL_EXPERTS_FUNCTIONS["batched_mm"])
# Not as decorators, which would hide the types.
register_quantization_config(METHOD)(FactorsConfig)
register_quantizer(METHOD)(FactorsLoader)


def _name_in(model: Any, name: str) -> str | None:
    """A parameter's name in this model: a head's model and its base differ by a prefix."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        path, _, leaf = candidate.rpartition(".")
        try:
            owner = model.get_submodule(path)
        except AttributeError:
            continue
        if leaf in owner._parameters:
            return candidate
    return None
