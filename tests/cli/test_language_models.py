"""The command line with language models of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tensorize
from tensorize.cli.telling import CAPTURE, CHECKPOINT, USAGE
from tensorize.store.manifest import read_report
from tests.cli.commands import TEXT, invoke, tiny_llama
from tests.marks import slow


@pytest.mark.parametrize("eos", ["<s>", None], ids=["padded by its end token", "one by one"])
def test_compile_a_language_model(eos: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_llama(tmp_path / "llama", eos=eos)
    Path("text.txt").write_text(TEXT)
    result = invoke(
        "compile", "llama", "--budget", "0.6", "--out", "small", "--calibration", "text.txt",
        "--batch-size", "5", "--max-length", "8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert ("3 batches" if eos else "12 batches") in result.stderr
    assert 'load it with tensorize.load("small")' in result.stdout
    report = read_report("small")
    assert report.plan.metric == "loss"
    assert report.totals.share.parameters <= 0.6
    model: Any = tensorize.load("small")
    tokens = AutoTokenizer.from_pretrained("small")("the cat sat", return_tensors="pt")
    logits = model(input_ids=tokens["input_ids"]).logits
    assert logits.shape[:2] == (1, 3)
    assert AutoTokenizer.from_pretrained("small").pad_token is None


def test_evaluate_saved_models_and_budgets(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "llama", eos="<s>")
    Path("text.txt").write_text(TEXT)
    common = ("--dense", "llama", "--data", "text.txt", "--no-time", "--max-length", "16")
    done = invoke("compile", "llama", "--budget", "0.6", "--out", "small")
    assert done.exit_code == 0, done.output
    result = invoke("eval", "small", *common, "--budgets", "0.9", "--html", "page.html")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.startswith("small ") for line in lines)
    assert any(line.startswith("90.0 % kept ") for line in lines)
    assert "perplexity" in result.stdout
    assert "after: " in result.stdout  # its tokenizer lets it write
    assert "What do I lose" in Path("page.html").read_text(encoding="utf-8")
    asked = {"question": "the cat", "choices": ["sat", "on"], "answer": 0}
    Path("asked.jsonl").write_text(json.dumps(asked) + "\n\n")
    result = invoke("eval", "small", *common, "--json", "--questions", "asked.jsonl")
    (figures,) = json.loads(result.stdout)["models"]
    assert (figures["name"], figures["choices"]["questions"]) == ("small", 1)
    for wrong in ("none.jsonl", "text.txt"):
        assert invoke("eval", "small", *common, "--questions", wrong).exit_code == CAPTURE
    assert invoke("eval", *common).exit_code == USAGE
    assert invoke("eval", "nowhere", *common).exit_code == CHECKPOINT
    assert invoke("eval", "small", *common[:2], "--data", "no.txt").exit_code == CAPTURE


def test_bench_times_saved_models_beside_the_dense_one(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "llama")
    done = invoke("compile", "llama", "--budget", "0.6", "--out", "small")
    assert done.exit_code == 0, done.output
    result = invoke("bench", "small", "--dense", "llama", "--samples", "1,3", "--length", "8")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        [name, count] for count in "13" for name in ("dense", "small")
    ]
    assert [line[-2] for line in lines if line[0] == "dense"] == ["1.00", "1.00"]
    result = invoke("bench", "small", "--dense", "llama", "--samples", "2", "--compiled", "--json")
    timed = json.loads(result.stdout)["timed"]
    names = ["dense", "small", "dense, compiled", "small, compiled"]
    assert [each["model"] for each in timed] == names
    assert all(each["seconds"] > 0 for each in timed)
    common = ("small", "--dense", "llama")
    assert invoke("bench", *common, "--samples", "x").exit_code == USAGE
    assert invoke("bench", "nowhere", "--dense", "llama").exit_code == CHECKPOINT


def test_evaluate_a_model_of_ones_own() -> None:
    save_file({"x": torch.randn(16, 32)}, "data.safetensors")
    assert invoke("compile", "clinet:make", "--budget", "0.6", "--out", "small").exit_code == 0
    result = invoke("eval", "small", "--dense", "clinet:make", "--data", "data.safetensors")
    assert result.exit_code == 0, result.output
    assert "latency" in result.stdout
    assert "cosine" in result.stdout


@pytest.mark.parametrize("refine", ["none", slow("polish")])
def test_a_language_model_calibrates_itself(refine: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "llama", tokenizer=False)
    result = invoke(
        "compile", "llama", "--budget", "0.6", "--out", "small", "--calibration", "self",
        "--refine", refine,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = read_report("small")
    assert report.plan.refine == (None if refine == "none" else "polish")
    assert any("the model wrote itself" in note for note in report.notes)


def test_hugging_face_errors(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "llama", tokenizer=False)
    Path("text.txt").write_text(TEXT)
    cases = [
        (["llama", "--calibration", "text.txt", "--out", "small"], CAPTURE, "no tokenizer"),
        (["llama", "--out", "llama"], USAGE, "choose another"),
        (["not-a-model", "--out", "small"], CAPTURE, "transformers cannot load not-a-model"),
        (["llama", "--budget", "0.9", "--out", "small"], 0, ""),
        (["small", "--out", "smaller"], CAPTURE, "compressed already"),
    ]
    for arguments, code, message in cases:
        result = invoke("compile", *arguments)
        assert result.exit_code == code, result.output
        assert message in result.output.replace("\n", " ")
