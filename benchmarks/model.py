"""Whole models at a quarter of the parameters of every linear: time and memory, side by side.

    python -m benchmarks.model --models llama gpt2 minilm vit --threads 1

Dense and the factors of ``tensorize.compile``, and the same factors as two ``F.linear`` written by
hand (eager, and with ``--compiled`` under ``torch.compile``, too: ours by ``backend="tensorize"``,
the others by inductor): a forward pass of 256 tokens (prefill;
8 x 64 tokens for a sentence encoder, one image for a vision model), one token at a time with a
cache (decode), and a batch of four. Interleaved rounds, medians, with one thread of the processor's
time; speedups are over eager dense. The peak of resident memory is that of a process of its own
which loads the model and runs it. Joules of a call are measured where the machine tells them; else
they are null.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import tensorize
from benchmarks.record import circumstances, keep, kept, processor
from benchmarks.timing import interleaved
from examples import demo_minilm
from tensorize.evaluation.energy import joules_of
from tensorize.weight.low_rank import LowRankLinear

os.environ.setdefault("HF_HUB_OFFLINE", "1")


KEPT = 0.25
TASKS, DECODERS = ("prefill", "batch", "decode"), ("llama", "gpt2")
TOKENS, BATCH, PROMPT, STEPS = 256, 4, 64, 8


def minilm() -> nn.Module:
    folder = demo_minilm.weights_folder()
    return transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=768, num_hidden_layers=12, intermediate_size=2048, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "minilm": minilm,
    "vit": vit,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def inputs(name: str, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return (torch.randn(batch, 3, 224, 224, generator=generator),)
    if name == "minilm":
        ids = torch.randint(1000, (8 * batch, 64), generator=generator)
        return ids, torch.ones_like(ids)
    return (torch.randint(1000, (batch, TOKENS), generator=generator),)


def ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every linear at which it keeps its share of the parameters."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            m, n = module.weight.shape
            found[f"{path}.weight"] = max(1, int(KEPT * m * n / (m + n)))
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if tied:  # the head is the table: its share is kept by no linear
        found.pop("lm_head.weight", None)
    return found


class ByHand(nn.Module):
    """Two matmuls, as one would write them."""

    def __init__(self, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first), self.second, self.bias)


def by_hand(name: str, small: nn.Module) -> nn.Module:
    """A model of the same factors, written by hand."""
    model = build(name)
    for path, layer in small.named_modules():
        if isinstance(layer, LowRankLinear):
            parent, _, leaf = path.rpartition(".")
            first, second, bias = layer.first.weight, layer.second.weight, layer.second.bias
            own = ByHand(first.detach(), second.detach(), None if bias is None else bias.detach())
            setattr(model.get_submodule(parent), leaf, own)
    return model.eval()


def decode(model: Any, cache: Any, token: Tensor) -> None:
    """Some tokens one by one, after a prompt that the cache holds."""
    for _ in range(STEPS):
        model(token, past_key_values=cache, use_cache=True)
    cache.crop(-STEPS)


@torch.no_grad()
def measure(name: str, rounds: int, tasks: Sequence[str], *, compiled: bool) -> dict[str, Any]:
    """Milliseconds of dense, speedups of the others, parameters and memory."""
    dense = build(name)
    small = tensorize.compile(
        dense, None, ranks=ranks(dense), example_inputs=inputs(name, 1), metric="frobenius",
        progress=False,
    )  # fmt: skip
    hand = by_hand(name, small)
    ours, theirs = (model(*inputs(name, 1))[0] for model in (small, hand))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    models: dict[str, Any] = {"dense": dense, "tensorize": small, "by hand": hand}
    if compiled:
        models["dense, compiled"] = torch.compile(dense)
        models["by hand, compiled"] = torch.compile(hand)
        models["tensorize, compiled"] = torch.compile(small, backend="tensorize")

    def calls_of(task: str) -> dict[str, Callable[[], object]]:
        if task != "decode":
            given = inputs(name, BATCH if task == "batch" else 1)
            return {key: partial(model, *given) for key, model in models.items()}
        found: dict[str, Callable[[], object]] = {}
        prompt = inputs(name, 1)[0][:, :PROMPT]
        for key, model in models.items():
            cache = dense(prompt, use_cache=True).past_key_values
            found[key] = partial(decode, model, cache, prompt[:, :1])
            found[key]()  # under torch.compile the first two lengths of the cache are compiled
        return found

    found: dict[str, Any] = {}
    for task in tasks:
        if task == "decode" and name not in DECODERS:
            continue
        torch._dynamo.reset()  # after eight graphs of a forward it would run others as they are
        calls = calls_of(task)
        times = interleaved(calls, rounds)
        each = STEPS if task == "decode" else 1
        found[task] = {
            "dense ms": 1e3 * times["dense"].wall / each,
            "dense ms of the processor": 1e3 * times["dense"].cpu / each,
            **{key: times["dense"].over(times[key]) for key in calls if key != "dense"},
            **{
                f"{key} over by hand": times[f"by hand{how}"].over(times[key])
                for how in ("", ", compiled")
                if (key := f"tensorize{how}") in times
            },
            **{f"joules, {key}": joules_of(each, "cpu") for key, each in calls.items()},
        }
        print(name, task, {k: v if v is None else round(v, 3) for k, v in found[task].items()})
    count = {"dense": dense, "tensorize": small}
    found["parameters"] = {k: sum(p.numel() for p in m.parameters()) for k, m in count.items()}
    found["peak MB"] = memory(name, {"dense": dense, "tensorize": small})
    print(name, found["parameters"], found["peak MB"], flush=True)
    return found


def memory(name: str, models: dict[str, Any]) -> dict[str, float]:
    """Megabytes that a process with the model takes at most, beside those of its libraries."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, model in models.items():
            place = str(Path(folder) / key)
            model.save_pretrained(place)
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.model", "--peak", name, place],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found[key] = float(done.stdout.split()[-1])
    return found


@torch.no_grad()
def peak(name: str, place: str) -> float:
    """What this process takes at most for one forward pass, over what it took without a model."""

    def resident() -> float:  # getrusage would count what the process that started this one took
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))

    before = resident()
    kind = json.loads((Path(place) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(place).eval()
    model(*inputs(name, 1))
    return resident() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--compiled", action="store_true", help="both under torch.compile, too")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    if options.peak:
        print(peak(*options.peak))
        return
    results, key = kept("model"), f"{processor()}, {options.threads} threads"
    for name in options.models:
        began = time.perf_counter()
        found = measure(name, options.rounds, options.tasks, compiled=options.compiled)
        known = results.setdefault(key, {})
        known[name] = {**known.get(name, {}), **found, "made_with": circumstances()}
        print(f"{name}: {time.perf_counter() - began:.0f} s; kept in {keep('model', results)}")


if __name__ == "__main__":
    main()
