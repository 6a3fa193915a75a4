"""Models in layers, beside the same in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tensorize.base.progress import Progress, no_progress
from tensorize.capture.inputs import batch_of, without_cache
from tensorize.ir.sites import Batch
from tensorize.passes.curves.curve import Store
from tensorize.passes.curves.spectra import ComputeSpectra
from tensorize.passes.layers.chain import find_chain
from tensorize.passes.layers.count import CountInLayers
from tensorize.passes.layers.layers import Layers
from tensorize.passes.layers.learn import LearnInLayers
from tensorize.passes.layers.work import Work
from tensorize.passes.observe.counted import CountRows
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.stages import Found, Given, Learned


def llama(**changes: Any) -> hf.PreTrainedModel:
    config = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **changes})).eval()


def gpt2() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=96, n_positions=64, n_embd=48, n_layer=2, n_head=4)
    return hf.GPT2LMHeadModel(config).eval()


def tokens(count: int = 4, *, hidden: int = 0) -> list[dict[str, Tensor]]:
    """Batches of three texts; of the last one so many tokens are padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(96, (3, 20), generator=generator)
        mask = torch.ones_like(ids)
        if hidden:
            mask[-1, -hidden:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def batches_for(model: nn.Module, given: Sequence[Any]) -> tuple[Batch, ...]:
    return tuple(without_cache(model, batch_of(each)) for each in given)


def found_in(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: str = "loss",
    progress: Progress = no_progress,
) -> Found:
    given = Given(
        model=model, inputs=batches[0], calibration=tuple(batches), metric=metric, progress=progress
    )
    return FindSites().run(given)


def in_memory(
    model: nn.Module, batches: Sequence[Batch], metric: str = "loss", loss_fn: Any = None
) -> Learned:
    """What is to be matched."""
    batches = tuple(batches)
    loss = PreservedLoss.fit(model, batches, loss_fn) if metric == "loss" else None
    found = CountRows(batches, loss_fn).run(found_in(model, batches, metric))
    return ComputeSpectra().run(CollectStatistics(batches, loss).run(found))


def values_of(model: nn.Module) -> Callable[[str], Tensor]:
    """Values of parameters and buffers by name, in memory of their own."""
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return lambda name: named[name].detach().clone()


def in_layers(
    model: nn.Module,
    batches: Sequence[Batch],
    folder: Path,
    metric: str = "loss",
    *,
    store: Store | None = None,
    progress: Progress = no_progress,
    loss_fn: Any = None,
) -> Learned:
    found = found_in(model, batches, metric, progress)
    layers = layered(model, found, folder)
    spectra = ComputeSpectra(weights=values_of(model), store=store)
    found = CountInLayers(layers, loss_fn).run(found)
    return LearnInLayers(layers, tuple(range(len(batches))), spectra, loss_fn).run(found)


def layered(model: Any, found: Found, folder: Path) -> Layers:
    blank = copy.deepcopy(model).to("meta")
    blank.tie_weights()  # moving a model unties it
    names = {site.name for site in found.free}
    chain = find_chain(blank, model, found.calibration[0], names)
    return Layers(chain, values_of(model), found.calibration, Work(folder))
