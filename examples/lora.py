"""LoRA on a compressed model: what the cut took is partly learned back by small adapters.

    python -m examples.lora --budget 0.25 --steps 200

The repository's small Llama is compressed, and stays frozen. peft puts a low-rank adapter beside
every layer of the blocks, factorized or not, by the names that the dense layers had. They train on
the next token of real text; what is counted is the loss on text of other files. The adapter is
saved by itself, a fraction of the model, and both load again to the same bits.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensorize
from examples import gpt, llama, stdlib_text
from examples.fitting import fit
from tensorize.base.printer import bytes_, count, percent, table

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONTEXT = 256


@dataclass(frozen=True)
class Result:
    """Losses on text that nothing was fitted to, sizes, and whether what is loaded agrees."""

    dense: float
    compressed: float
    tuned: float
    kept: float
    trainable: int
    adapter_bytes: int
    loads_to_the_same_bits: bool

    @property
    def recovered(self) -> float:
        """The share of the rise of the loss that the adapters took back."""
        return (self.compressed - self.tuned) / (self.compressed - self.dense)


def text(split: stdlib_text.Split, windows: int) -> Tensor:
    """The beginning of a split of the text as tokens, enough for so many windows."""
    tokenizer = gpt.load_tokenizer()
    ids, have = [], 0
    for document in stdlib_text.documents(split):
        ids.append(gpt.encode(tokenizer, [document.text]))
        have += len(ids[-1])
        if have > windows * CONTEXT:
            break
    return torch.cat(ids)[: windows * CONTEXT + 1]


def with_adapters(model: Any, rank: int) -> Any:
    """The model in peft's hands: only the adapters train."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LAYERS))
    return peft.get_peft_model(model, config)


def train(model: Any, tokens: Tensor, steps: int, batch: int, rate: float) -> None:
    """Adam on the next token, at random places of a text."""
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        starts = torch.randint(len(tokens) - CONTEXT, (batch,), generator=generator)
        ids = torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])
        return model(input_ids=ids, labels=ids).loss

    fit(model, loss, steps, rate=rate, decay=0.0)


def loads_to_the_same_bits(tuned: Any, small: Path, adapter: Path, ids: Tensor) -> bool:
    """Save the adapter, load model and adapter from disk, and compare what they say."""
    import peft

    tuned.save_pretrained(adapter)
    again = peft.PeftModel.from_pretrained(tensorize.load(small), adapter).eval()
    with torch.no_grad():
        return torch.equal(again(input_ids=ids).logits, tuned(input_ids=ids).logits)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Compress, tune, save, load; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens, to calibrate on")
    parser.add_argument("--refine", default="auto", choices=("auto", "none", "refit", "polish"))
    parser.add_argument("--held-out", type=int, default=32, help="windows to measure on")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    dense = llama.load_pretrained()
    training, held_out = text("train", 16 * options.windows), text("held_out", options.held_out)
    windows = training.unfold(0, CONTEXT, CONTEXT)[::16][: options.windows]
    calibration = [{"input_ids": part} for part in windows.split(8)]
    refine = None if options.refine == "none" else options.refine
    small = tensorize.compile(dense, options.budget, calibration=calibration, refine=refine)
    losses = [gpt.evaluate(model, held_out) for model in (dense, small)]
    kept = tensorize.report(small).totals.share.parameters
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = Path(folder) / "model", Path(folder) / "adapter"
        tensorize.save(small, model)
        tuned = with_adapters(small, options.rank)
        train(tuned, training, options.steps, options.batch, options.rate)
        ids = held_out[:CONTEXT].unsqueeze(0)
        same = loads_to_the_same_bits(tuned, model, adapter, ids)
        size = sum(path.stat().st_size for path in adapter.glob("*.safetensors"))
    result = Result(
        dense=losses[0],
        compressed=losses[1],
        tuned=gpt.evaluate(tuned, held_out),
        kept=kept,
        trainable=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        adapter_bytes=size,
        loads_to_the_same_bits=same,
    )
    rows = [
        ("dense", f"{result.dense:.3f}", "–"),
        (f"compressed to {percent(kept)}", f"{result.compressed:.3f}", "–"),
        ("with LoRA", f"{result.tuned:.3f}", count(result.trainable)),
    ]
    print(table(("model", "loss (nats)", "trained parameters"), rows))
    print(
        f"{percent(result.recovered)} of the rise is taken back; the adapter is "
        f"{bytes_(result.adapter_bytes)}, and loads to the same bits: {same}"
    )
    return result


if __name__ == "__main__":
    main()
