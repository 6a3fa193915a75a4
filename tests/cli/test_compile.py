"""``tensorize compile``: what it prints where, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tensorize
from tensorize.cli.telling import BUDGET, CAPTURE, CHECKPOINT, DEFECT
from tensorize.store.manifest import read_report
from tests.cli.commands import TEXT, invoke
from tests.models import CASES


def test_compile_a_factory() -> None:
    result = invoke(
        "compile", "clinet:make", "--budget", "0.5", "--out", "small", "--html", "page.html"
    )
    assert result.exit_code == 0, result.output
    assert "up.weight" in result.stdout
    assert "saved in small" in result.stdout
    assert 'tensorize.load("small", model=make())' in result.stdout
    assert "a module that talks" not in result.stdout
    assert Path("page.html").read_text().lstrip().lower().startswith("<!doctype html>")
    import clinet  # type: ignore[import-not-found]

    dense = clinet.make()
    count = sum(p.numel() for p in dense.parameters())
    model = tensorize.load("small", model=dense)
    assert sum(p.numel() for p in model.parameters()) <= 0.5 * count
    assert model(torch.zeros(3, 32)).shape == (3, 12)


@pytest.mark.parametrize("source", ["with_inputs", "attribute", "instance", "Net"])
def test_example_inputs_come_with_the_factory(source: str) -> None:
    result = invoke("compile", f"clinet:{source}", "--budget", "0.5", "--out", "small")
    assert result.exit_code == 0, result.output
    given = source in ("with_inputs", "attribute")
    assert ("example_inputs" in result.stdout) == given
    assert f"model={source}{'' if source == 'instance' else '()'})" in result.stdout


def test_options_reach_the_library() -> None:
    result = invoke(
        "compile", "clinet:make", "--budget", "params=0.9,bytes=7000", "--out", "small", "--json",
        "--exclude", "down*", "--formats", "up*=tt", "--seed", "3", "--dtype", "bfloat16",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["directory"] == "small"
    report = tensorize.Report.from_dict(data["report"])
    assert report == read_report("small")
    assert {site.name: site.format for site in report.sites}["up.weight"] in ("tt", "dense")
    assert report.totals.after.bytes <= 7000
    assert report.plan.seed == 3
    model = tensorize.load("small", model=_net())
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "given", [["auto"], ["int8", "--precision", "int4"], ["int8,int4"]], ids=str
)
def test_bits_reach_the_library(given: list[str]) -> None:
    result = invoke(
        *("compile", "clinet:make", "--budget", "0.3", "--out", "small", "--json"),
        *("--precision", *given),
    )
    assert result.exit_code == 0, result.output
    report = tensorize.Report.from_dict(json.loads(result.stdout)["report"])
    assert any(site.precision for site in report.sites)
    assert report.totals.share.bytes <= 0.3


def test_a_cache_is_kept() -> None:
    for _ in range(2):
        result = invoke(
            "compile", "clinet:make", "--budget", "0.5", "--out", "small", "--cache", "kept"
        )
        assert result.exit_code == 0, result.output
    assert list(Path("kept").iterdir())


def _net() -> torch.nn.Module:
    import clinet  # type: ignore[import-not-found]

    return clinet.make()


def test_calibration_from_tensors() -> None:
    samples = torch.randn(40, 32)
    save_file({"x": samples, "shift": torch.randn(40, 12)}, "both.safetensors")
    save_file({"anything": samples}, "one.safetensors")
    for file in ("both", "one"):
        result = invoke(
            "compile", "clinet:make", "--budget", "0.5", "--out", file, "--batch-size", "16",
            "--calibration", f"{file}.safetensors",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "3 batches" in result.stderr
        assert read_report(file).plan.metric == "loss"


def test_unusable_calibration() -> None:
    save_file({"x": torch.zeros(4, 32), "shift": torch.zeros(3, 12)}, "uneven.safetensors")
    save_file({"x": torch.zeros(4, 32), "y": torch.zeros(4, 1)}, "unknown.safetensors")
    save_file({"x": torch.zeros(4, 31)}, "narrow.safetensors")
    save_file({"x": torch.tensor(1.0)}, "point.safetensors")
    Path("broken.safetensors").write_text("x")
    Path("text.txt").write_text(TEXT)
    expected = {
        "uneven.safetensors": "different numbers of samples",
        "unknown.safetensors": "holds y, which the model's forward does not take",
        "narrow.safetensors": "calibration: batch 0 does not fit",
        "point.safetensors": "numbers of samples",
        "broken.safetensors": "no safetensors file",
        "text.txt": "no tokenizer",
        "missing.txt": "there is no file missing.txt",
    }
    for file, message in expected.items():
        result = invoke("compile", "clinet:make", "--out", "small", "--calibration", file)
        assert result.exit_code == CAPTURE, (file, result.output)
        assert message in result.stderr
        assert "way out" in result.stderr
    assert not Path("small").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["clinet:nothing"], CAPTURE, "gave a int, not a torch.nn.Module"),
        (["clinet:broken"], CAPTURE, "no such weights"),
        (["clinet:missing"], CAPTURE, "AttributeError"),
        (["no_such_module:make"], CAPTURE, "ModuleNotFoundError"),
        (["./no/such/dir"], CAPTURE, "there is no directory"),
        (["clinet:make", "--include", "nothing*"], CAPTURE, "nothing*"),
        (["clinet:make", "--formats", "quantized"], CAPTURE, "quantized"),
        (["clinet:make", "--metric", "loss"], CAPTURE, "needs calibration data"),
        (["clinet:make", "--budget", "0.001"], BUDGET, "smallest feasible"),
        (["clinet:make", "--budget", "12"], BUDGET, "share"),
        (["clinet:make", "--out", "clinet.py"], CHECKPOINT, "not a directory"),
        (["clinet:make", "--cache", "clinet.py"], CHECKPOINT, "cache directory clinet.py"),
    ],
)
def test_errors_are_one_message(arguments: list[str], code: int, message: str) -> None:
    out = [] if "--out" in arguments else ["--out", "small"]
    result = invoke("compile", *arguments, *out)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "error: " in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not Path("small").exists()


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["analyze", "clinet:make", "--plot", "curve.xyz"], "--plot"),
        (["analyze", "clinet:make", "--plot", "curve"], "--plot"),
        (["compile", "clinet:make", "--out", "small", "--max-memory", "much"], "--max-memory"),
        (["compile", "clinet:make", "--out", "small", "--scratch", "work"], "--scratch"),
        (["calibrate", "--rows", "banana"], "--rows"),
        (
            ["eval", "s", "--dense", "clinet:make", "--data", "x.txt", "--calibration", "y.txt"],
            "--calibration",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_work(
    arguments: list[str], option: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert option in result.stderr
    assert "loading" not in result.stderr
    assert not Path("small").exists()


def test_an_architecture_that_transformers_does_not_have(tmp_path: Path) -> None:
    """A decoder of that kind would be loaded without its head."""
    model = CASES["gpt2"].model()
    model.save_pretrained(tmp_path / "scores")
    config = json.loads((tmp_path / "scores" / "config.json").read_text())
    config["architectures"] = ["GPT2ForRewardScoring"]
    (tmp_path / "scores" / "config.json").write_text(json.dumps(config))
    for more in ([], ["--stream"]):
        result = invoke("compile", str(tmp_path / "scores"), "--out", "small", *more)
        assert result.exit_code == CAPTURE
        assert "transformers has no GPT2ForRewardScoring for this gpt2" in result.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORIZE_DEBUG", "1")
    result = invoke("compile", "clinet:broken", "--out", "small")
    assert result.exit_code == CAPTURE
    assert "Traceback" in result.stderr


def test_a_defect_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("tensorize.api.compile.compiled", defect)
    result = invoke("compile", "clinet:make", "--out", "small")
    assert result.exit_code == DEFECT
    assert "ZeroDivisionError: by zero" in result.stderr
    assert "TENSORIZE_DEBUG=1" in result.stderr
