"""Models of dense weights in four or eight bits, as other readers take them: compressed-tensors.

The layout ``pack-quantized``, which transformers (with the package compressed-tensors) and vLLM
read: of every linear ``weight_packed`` (codes from zero on, the first one lowest, in words of 32
bits), ``weight_scale``, ``weight_shape``, and for groups ``weight_zero_point``, packed by rows.
transformers 5.23 takes one number of bits for all linears; vLLM one for those that it fuses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tensorize.algebra import packing
from tensorize.base.errors import CheckpointError
from tensorize.base.files import draft_of, into_place
from tensorize.base.tensors import unwrapped
from tensorize.ir.precision import INTEGERS
from tensorize.store import transformers_config
from tensorize.weight.become import dense_class
from tensorize.weight.install import factored, held_names, owner_of
from tensorize.weight.lazy import FactoredWeight

METHOD = "compressed-tensors"
_READ = ("int4", "int8")
_WORD = 4
"""Bytes of a word."""


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a Hugging Face model of linears in four or eight bits for readers that are not ours.

    Tables, and heads that are tied to them, are written as numbers of their own dtype.

    Raises:
        CheckpointError: it is no Hugging Face model, a weight is held in another form, or the
            directory cannot be written or holds a checkpoint.
    """
    directory, model = Path(directory), unwrapped(model)
    if not transformers_config.is_huggingface(model):
        raise CheckpointError(
            f"a {type(model).__name__} has no config.json that readers of {METHOD} could go by",
            way_out="tensorize.save(model, directory), and tensorize.load reads it",
        )
    transformers_config.check_place(directory)
    tensors, found = _tensors(model)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with draft_of(directory / "model.safetensors.tmp") as draft:
            usual = draft.stat().st_mode
            save_file(tensors, draft, metadata={"format": "pt"})
            draft.chmod(usual)  # safetensors makes files that only their owner may read
            into_place(draft, directory / "model.safetensors")
        with draft_of(directory / "config.json.tmp") as draft:
            transformers_config.save_plain(model, directory, draft, _described(model, found))
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be written: {type(error).__name__}: {error}",
            way_out="choose a directory with room that you may write to",
        ) from error


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is written, each tensor once; and the precision of every linear in codes."""
    weights = dict(factored(model))
    ours = {held for name in weights for held in held_names(model, name)}
    tensors: dict[str, Tensor] = {}
    precisions: dict[str, str] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name not in ours and tensor.data_ptr() not in seen:
            tensors[name] = tensor.detach().contiguous()
            seen.add(tensor.data_ptr() if tensor.numel() else -1)
    tied = [id(weight.cores[0]) for weight in weights.values()]
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        table = isinstance(owner_of(model, name)[0], nn.Embedding)
        if table or tied.count(id(weight.cores[0])) > 1:
            if id(weight.cores[0]) not in seen:
                tensors[name] = weight.dense().detach().contiguous()
            seen.add(id(weight.cores[0]))
            continue
        _check(model, name, weight)
        precisions[path] = str(weight.spec.precision)
        tensors |= {f"{path}.{part}": tensor for part, tensor in _parts(weight)}
    return tensors, precisions


def _check(model: nn.Module, name: str, weight: FactoredWeight) -> None:
    """Raises CheckpointError for a weight that readers do not take."""
    owner, spec = owner_of(model, name)[0], weight.spec
    why = None
    if dense_class(owner) is not nn.Linear:
        why = f"is that of a {dense_class(owner).__name__}, and only linears are read"
    elif spec.ranks:
        why = f"is held as {spec.format}"
    elif spec.precision not in _READ:
        why = f"has entries of {spec.precision}"
    elif spec.kind.group is not None and spec.shape[1] % spec.kind.group:
        why = f"has rows of {spec.shape[1]} entries, no whole groups of {spec.kind.group}"
    if why is not None:
        raise CheckpointError(
            f"{METHOD} holds linears in four or eight bits, and this weight {why}",
            site=name,
            way_out='compile with formats="dense" and precision=("int4", "int8"), or '
            "tensorize.save(model, directory), and tensorize.load reads it",
        )


def _parts(weight: FactoredWeight) -> Iterator[tuple[str, Tensor]]:
    spec, (scale,), (codes, *zeros) = weight.spec, weight.cores, weight.indices
    if spec.kind.bits == 8:
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
    yield "weight_packed", _words(codes)
    yield "weight_scale", scale.detach().contiguous()
    yield "weight_shape", torch.tensor(spec.shape)
    for each in zeros:
        apart = packing.unpacked(each, spec.kind.bits, scale.shape[1])
        yield "weight_zero_point", _words(packing.packed(apart.mT, spec.kind.bits)).mT.contiguous()


def _words(held: Tensor) -> Tensor:
    return F.pad(held, (0, -held.shape[-1] % _WORD)).view(torch.int32)


def _described(model: nn.Module, precisions: dict[str, str]) -> dict[str, Any]:
    """The entry ``quantization_config`` of a configuration."""
    linears = [n for n, m in model.named_modules() if dense_class(m) is nn.Linear]
    groups = {}
    for name in dict.fromkeys(precisions.values()):
        kind = INTEGERS[name]
        groups[f"group_{len(groups)}"] = {
            "targets": [path for path, each in precisions.items() if each == name],
            "weights": {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": not kind.offset,
                "strategy": "channel" if kind.group is None else "group",
                "group_size": kind.group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # As numbers: transformers 5.23 lacks room for packed zero points in what it keeps packed.
        "dequantize": True,
        "config_groups": groups,
        "ignore": [path for path in linears if path not in precisions],
    }
