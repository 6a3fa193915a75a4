"""Compress a decoder, heal it by distillation, and see what was lost and gained.

    python -m examples.compress_and_heal --budget 0.1 --steps 300 --output healed/

The decoder is the small GPT of `examples/gpt.py` with its trained weights; the text is that of the
Python standard library. Compression to a tenth costs much of what the model knows; some hundred
steps of distillation, on text without labels, give most of it back. A run that was killed goes on
where it was when it is started again. The folder then holds the model, and a page that compares the
dense, the compressed and the healed one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import tensorize
from examples.gpt import load_pretrained, load_tokenizer, windows
from examples.stdlib_text import SPLITS

BATCH = 8


def main(arguments: Sequence[str] | None = None) -> tensorize.Evaluation:
    """Compresses, heals, saves and compares; returns the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=0.1, help="share of the parameters to keep")
    parser.add_argument("--steps", type=int, default=300, help="of the healing")
    parser.add_argument("--context", type=int, default=256, help="tokens of a window of text")
    parser.add_argument("--calibration", type=int, default=64, help="windows to compress with")
    parser.add_argument("--text", choices=SPLITS, default="train", help="files to heal on")
    parser.add_argument("--unseen", type=int, default=32, help="windows to compare on")
    parser.add_argument("--output", type=Path, default=Path("healed"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    context = options.context

    dense, tokenizer = load_pretrained(), load_tokenizer()
    calibration = windows("validation", options.calibration, context).split(BATCH)
    small = tensorize.compile(dense, options.budget, calibration=calibration)
    healed = copy.deepcopy(small)
    batches = windows(options.text, (options.steps + 6) * BATCH, context).split(BATCH)
    done = tensorize.heal(
        healed, dense, batches, steps=options.steps, checkpoint_dir=options.output / "state"
    )
    print(f"healed: {done}\n")

    found = tensorize.evaluate(
        {"compressed": small, "healed": healed},
        dense,
        windows("held_out", options.unseen, context).split(BATCH),
        tokenizer=tokenizer,
        prompts=["def read_file(path):\n    ", "class Error(Exception):\n    "],
    )
    print(found)
    page, model = options.output / "evaluation.html", options.output / "model"
    found.to_html(page)
    tensorize.save(healed, model)
    print(f"\nthe page: {page.resolve()}")
    print(f'tensorize.load("{model}", GPT()) reads the model')
    return found


if __name__ == "__main__":
    main()
