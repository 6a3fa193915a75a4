"""The README's Python runs as it stands, one snippet after the other."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorize

pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
STEPS = 3


@pytest.mark.filterwarnings("ignore:.*`torch_dtype` is deprecated")
def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).eval()
    # A trained model's spectra fall; a quarter of a random one's loss is not to be had at a half.
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() == 2:
                u, s, v = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_((u * s * torch.logspace(0, -3, len(s))) @ v)
    batches = [{"input_ids": torch.randint(0, 96, (4, 16))} for _ in range(12)]
    names: dict[str, Any] = {
        "batches": batches,
        "batch": batches[0],
        "LlamaForCausalLM": LlamaForCausalLM,
        "config": config,
        "torch": torch,
        "tensorize": tensorize,
    }
    assert len(SNIPPETS) >= 5
    for snippet in SNIPPETS:
        names["model"] = copy.deepcopy(dense)
        # What takes hundreds of steps is done in some.
        exec(compile(snippet.replace("steps=300", f"steps={STEPS}"), "README.md", "exec"), names)
    assert type(names["small"]) is LlamaForCausalLM
    assert names["done"].steps <= STEPS
