"""Trains a small GPT, or a small Llama, on the sources of the Python standard library.

    python -m examples.train_stdlib --model gpt --seconds 1200 --compile

This wrote the files under `examples/data/`: the tokenizer, the weights (float16) and records of
how they came about. Everything is on the CPU; the arithmetic of the matmuls is bfloat16 where the
processor has instructions for it. Checkpoints are written while it trains.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from examples import gpt, llama, stdlib_text
from examples.gpt import DATA, GPT, TOKENIZER_FILE, GPTConfig, encode, evaluate, next_token_loss
from tensorize.base import files


@dataclass(frozen=True)
class Kind:
    """A model that can be trained: how it is built and read, its sizes, and its files."""

    build: Callable[[], nn.Module]
    load: Callable[[Path], nn.Module]
    sizes: dict[str, Any]
    weights: str
    record: str


KINDS = {
    "gpt": Kind(
        lambda: GPT(GPTConfig()),
        gpt.load_pretrained,
        GPTConfig().to_dict(),
        gpt.WEIGHTS_FILE,
        gpt.RECORD_FILE,
    ),
    "llama": Kind(
        llama.build, llama.load_pretrained, llama.SIZES, llama.WEIGHTS_FILE, llama.RECORD_FILE
    ),
}
VOCABULARY, CONTEXT = GPTConfig().vocabulary, GPTConfig().context


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer: no text is out of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(
    tokens: Tensor, batch: int, context: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches of windows (batch, context + 1), each epoch cut and ordered anew.

    Windows tile the text, so that an epoch sees every token once; a random offset moves the cuts.
    """
    while True:
        offset = int(torch.randint(context, (), generator=generator))
        starts = torch.arange(offset, len(tokens) - context, context)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for part in starts.split(batch):
            if len(part) == batch:
                yield torch.stack([tokens[start : start + context + 1] for start in part.tolist()])


def optimizer_for(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, and neither biases nor norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def schedule(step: int, progress: float, warmup: int) -> float:
    """Share of the learning rate: a linear warm-up by steps, a cosine to zero by progress."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def held_out_slice(tokenizer: Tokenizer, context: int, windows: int) -> Tensor:
    """The first windows of the held-out text, (windows · context + 1,).

    It is taken from the running Python, so it differs a little between versions of Python.
    """
    texts: list[str] = []
    for document in stdlib_text.documents("held_out"):
        texts.append(document.text)
        if sum(map(len, texts)) > 16 * windows * context:  # a token is about three characters
            break
    return encode(tokenizer, texts)[: windows * context + 1]


def digest(tokens: Tensor) -> str:
    """A hash of token ids: tells whether a recorded loss is of the same text."""
    return hashlib.sha256(json.dumps(tokens.tolist()).encode()).hexdigest()


def save(model: nn.Module, kind: Kind, directory: Path, record: dict[str, Any]) -> None:
    """Writes weights and record, each in one step, so that a reader never sees half a file."""
    weights = {name: value.detach().half() for name, value in model.state_dict().items()}
    with files.replacing(directory / kind.weights) as draft:
        save_file(weights, draft, metadata={"format": "pt"})
    files.write_at_once(directory / kind.record, json.dumps(record, indent=2) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=KINDS, default="gpt")
    parser.add_argument("--directory", type=Path, default=DATA, help="where the files go")
    parser.add_argument("--seconds", type=float, default=1200.0, help="how long to train")
    parser.add_argument("--steps", type=int, help="how many steps to train, instead of --seconds")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--characters", type=int, help="use only this much text of each split")
    # Enough held-out text for its loss to be telling, little enough for a test to repeat it.
    parser.add_argument("--slice-windows", type=int, default=64)
    parser.add_argument("--checkpoint-seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints and saves; returns the record that is written beside the weights."""
    options = parse(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    kind = KINDS[options.model]

    texts = {
        split: _limited([document.text for document in stdlib_text.documents(split)], options)
        for split in stdlib_text.SPLITS
    }
    tokenizer = train_tokenizer(texts["train"], VOCABULARY)
    tokenizer.save(str(options.directory / TOKENIZER_FILE))
    # A tokenizer of little text has fewer words than the vocabulary: the rest is never used.
    tokens = {split: encode(tokenizer, texts[split]) for split in stdlib_text.SPLITS}
    print({split: len(ids) for split, ids in tokens.items()}, "tokens", flush=True)

    torch.manual_seed(options.seed)
    model = kind.build()
    optimizer = optimizer_for(model, options.learning_rate)
    generator = torch.Generator().manual_seed(options.seed)
    loss_of = torch.compile(next_token_loss) if options.compile else next_token_loss

    began = last_checkpoint = time.monotonic()
    average = math.log(VOCABULARY)
    step, progress = 0, 0.0

    def record_now() -> dict[str, Any]:
        # Losses are of the weights as they are stored, that is rounded to float16.
        stored = kind.build().eval()
        stored.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
        slice_tokens = held_out_slice(tokenizer, CONTEXT, options.slice_windows)
        return {
            "config": kind.sizes,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": step,
            "tokens": step * options.batch * CONTEXT,
            "seconds": round(time.monotonic() - began),
            "finished": progress >= 1.0,
            "batch": options.batch,
            "learning_rate": options.learning_rate,
            "seed": options.seed,
            "training_loss": average,
            "validation_loss": evaluate(stored, tokens["validation"]),
            "held_out_loss": evaluate(stored, tokens["held_out"]),
            "held_out_slice": {
                "windows": options.slice_windows,
                "tokens": len(slice_tokens),
                "sha256": digest(slice_tokens),
                "loss": evaluate(stored, slice_tokens),
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }

    for ids in batches(tokens["train"], options.batch, CONTEXT, generator):
        if options.steps is not None:
            progress = step / options.steps
        else:
            progress = (time.monotonic() - began) / options.seconds
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(step, progress, options.warmup)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        average += (loss.item() - average) * max(0.02, 1 / step)

        now = time.monotonic()
        if step % 50 == 0:
            print(f"step {step:5d}  {now - began:5.0f} s  loss {average:.4f}", flush=True)
        if now - last_checkpoint >= options.checkpoint_seconds:
            record = record_now()
            save(model, kind, options.directory, record)
            print(f"validation {record['validation_loss']:.4f}", flush=True)
            last_checkpoint = now

    record = record_now()
    save(model, kind, options.directory, record)
    kind.load(options.directory)  # what was written can be read
    validation = record["validation_loss"]
    print(
        f"{step} steps, {record['seconds']} s: validation loss {validation:.4f} nats a token, "
        f"perplexity {math.exp(validation):.2f}"
    )
    return record


def _limited(texts: list[str], options: argparse.Namespace) -> list[str]:
    if options.characters is None:
        return texts
    return [("\n".join(texts))[: options.characters]]


if __name__ == "__main__":
    main()
