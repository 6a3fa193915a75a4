"""Dense checkpoints of every kind, compiled whole, and what it is that two results are one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import transformers as hf

import tensorize
from tensorize.store.manifest import MANIFEST
from tests.paths import ROOT


def llama(**changes: Any) -> hf.PreTrainedModel:
    config = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **changes}))


def saved(model: hf.PreTrainedModel, directory: Path, shard: str = "40kB") -> Path:
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def compiled(directory: Path, out: Path, budget: Any = 0.5, **options: Any) -> Path:
    """What is to be matched: the model loaded whole, compiled by its weights, and saved."""
    config = hf.AutoConfig.from_pretrained(directory)
    kind = getattr(hf, config.architectures[0])
    model = kind.from_pretrained(directory, dtype="auto")
    small = tensorize.compile(model, budget, metric="frobenius", **options)
    tensorize.save(small, out)
    return out


def the_manifest(directory: Path) -> dict[str, Any]:
    """The manifest but for the curve and for what is timed: passes, and slow weights."""
    data = json.loads((directory / MANIFEST).read_text())
    data["report"]["history"] = data["report"]["curve"] = None
    data["report"]["notes"] = [note.partition("; ")[0] for note in data["report"]["notes"]]
    data["report"]["plan"]["cache"] = data["sha256"] = None  # of all of that, too
    data["report"]["weights"] = None  # of a model in parts none are looked at
    data["model"].get("config", {}).pop("_name_or_path", None)
    return data


def assert_same(one: Path, other: Path) -> None:
    (first,), (second,) = one.glob("tensorize-*"), other.glob("tensorize-*")
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert the_manifest(one) == the_manifest(other)


def kill(script: str, stage: str, count: int, dense: Path, out: Path) -> None:
    """Run a script in a process of its own, which kills itself so far into a stage."""
    done = subprocess.run(
        [sys.executable, "-c", script, stage, str(count), str(dense), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
