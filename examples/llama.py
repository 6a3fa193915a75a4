"""A small Llama of transformers, with trained weights in the repository.

The second trained decoder of the tests and benchmarks: rotary positions, grouped queries, gated
layers, RMS norms, and a head of its own, where the GPT of `examples/gpt.py` has learned positions,
a packed projection and a tied head. `examples/train_stdlib.py --model llama` trained it on the same
text, with the GPT's tokenizer.

    python -m examples.llama --out my-llama

writes it as a folder of transformers, with its tokenizer, which every command of tensorize reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from examples.gpt import DATA, load_tokenizer

WEIGHTS_FILE = "llama_stdlib.safetensors"
RECORD_FILE = "llama_stdlib.json"

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def build() -> Any:
    """A `LlamaForCausalLM` with new weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def load_pretrained(directory: Path = DATA) -> Any:
    """The trained model in evaluation mode, in float32 (the file stores float16)."""
    model = build()
    weights = load_file(directory / WEIGHTS_FILE)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval()


def main() -> None:
    """Write the trained model and its tokenizer as a folder of transformers."""
    from transformers import PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    out = parser.parse_args().out
    model, end = load_pretrained(), "<|endoftext|>"
    model.save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(), eos_token=end, pad_token=end
    )
    tokenizer.save_pretrained(out)
    print(f"{out}: a Llama of {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
