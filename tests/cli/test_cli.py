"""The command line: what it prints where, its exit codes, and what it leaves in the directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import tensorize
from tensorize.base.errors import BudgetError
from tensorize.cli import app, sources
from tensorize.cli.parse import parse_budget, parse_formats
from tensorize.cli.telling import (
    BUDGET,
    CAPTURE,
    CHECKPOINT,
    DEFECT,
    INTERRUPTED,
    USAGE,
)
from tensorize.ir.budget import Budget
from tensorize.store.manifest import read_report
from tests.models import CASES
from tests.paths import ROOT

NET = """
    import torch
    from torch import nn

    print("a module that talks")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(32, 48)
            self.down = nn.Linear(48, 12)

        def forward(self, x, shift=None):
            y = self.down(torch.relu(self.up(x)))
            return y if shift is None else y + shift

    def make():
        torch.manual_seed(0)
        return Net()

    def with_inputs():
        return make(), (torch.zeros(3, 32),)

    def attribute():
        return make()

    attribute.example_inputs = lambda: {"x": torch.zeros(3, 32)}

    def nothing():
        return 3

    def broken():
        raise RuntimeError("no such weights")

    def interrupted():
        import os, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell says so
        os.kill(os.getpid(), signal.SIGINT)
        return make()

    instance = make()
"""
TEXT = "\n\n".join(
    f"the cat number {n} sat on the mat and\nlooked at dog {n + 1}" for n in range(12)
)


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory to work in, with a module of models; nothing is left behind in Python."""
    (tmp_path / "clinet.py").write_text(textwrap.dedent(NET))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TENSORIZE_DEBUG", raising=False)
    monkeypatch.delitem(sys.modules, "clinet", raising=False)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def execute(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tensorize.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


# ------------------------------------------------------------------------------------ arguments


def test_budget_texts() -> None:
    assert parse_budget("0.3") == Budget(params=0.3)
    assert parse_budget("1") == Budget(params=1.0)
    assert parse_budget("params=0.3, error=0.05,bytes=2e6") == Budget(
        params=0.3, error=0.05, bytes=2_000_000
    )
    assert parse_budget("flops=1,loss=2") == Budget(flops=1.0, loss=2.0)
    for text in ("much", "params=", "size=3", "params=0.1,params=0.2", "params=0.1;error=2", "="):
        with pytest.raises(typer.BadParameter):
            parse_budget(text)
    for text in ("0", "7", "nan", "params=-1", "params=1.5"):
        with pytest.raises(BudgetError):
            parse_budget(text)


def test_format_texts() -> None:
    assert parse_formats(None) is None
    assert parse_formats(["tt"]) == ["tt"]
    assert parse_formats(["tt,dense", "low_rank"]) == ["tt", "dense", "low_rank"]
    assert parse_formats(["*.up=tt, dense"]) == {"*.up": ["tt", "dense"]}
    with pytest.raises(typer.BadParameter):
        parse_formats(["*.up=tt", "dense"])


def test_documents_are_paragraphs_or_lines() -> None:
    assert sources.documents("a\nb\n \nc\n\n\n\nd\n") == ["a\nb", "c", "d"]
    assert sources.documents("a\n b\nc") == ["a", "b", "c"]
    assert sources.documents(" \n\n") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "clinet:make"],
        ["compile", "clinet:make", "--out", "o", "--budget", "much"],
        ["compile", "clinet:make", "--out", "o", "--metric", "taste"],
        ["compile", "clinet:make", "--out", "o", "--batch-size", "0"],
        ["compile", "clinet:make", "--out", "o", "--html", "nowhere/page.html"],
        ["compile", "--out", "o"],
        ["analyze", "clinet:make", "--budgets", "0.1,some"],
        ["report"],
        ["polish"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == USAGE, result.output
    assert "Traceback" not in result.output
    assert not Path("o").exists()


# -------------------------------------------------------------------------------------- compile


def test_kernels_are_written_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ("compile", "clinet:make", "--budget", "0.5", "--out", "small", "--json")
    result = invoke(
        *arguments, "--backend", "triton", "--emit", "kernels", "--target", "hip:gfx90a"
    )
    assert result.exit_code == 0, result.output
    assert read_report("small").backend == "triton"
    told = json.loads(result.stdout)["kernels"]
    assert json.loads(Path("kernels/kernels.json").read_text()) == told
    assert told["up.weight.forward"]["hip:gfx90a"]["spills"] == 0
    assert "@triton.jit" in Path("kernels/up.weight.forward.py").read_text()
    assert Path("kernels/up.weight.forward.hip_gfx90a.hsaco").read_bytes()[:4] == b"\x7fELF"
    assert "amdgcn" in Path("kernels/up.weight.forward.hip_gfx90a.s").read_text()
    for wrong in (("--target", "cuda:90"), ("--emit", "kernels", "--target", "tpu:1")):
        assert invoke(*arguments, *wrong).exit_code == USAGE
    assert invoke(*arguments, "--emit", "kernels/kernels.json").exit_code == USAGE


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
        "narrow.safetensors": "the first calibration batch",
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


def test_kernels_that_cannot_be_compiled_are_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = invoke(
        "compile", "clinet:make", "--out", "small", "--emit", "kernels", "--target", "cuda:90"
    )
    assert result.exit_code == CAPTURE
    assert "unset TRITON_INTERPRET" in result.stderr
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

    monkeypatch.setattr("tensorize.cli.compile.compiled", defect)
    result = invoke("compile", "clinet:make", "--out", "small")
    assert result.exit_code == DEFECT
    assert "ZeroDivisionError: by zero" in result.stderr
    assert "TENSORIZE_DEBUG=1" in result.stderr


# ------------------------------------------------------------------------------ analyze, report


def test_analyze_prints_and_draws_the_curve() -> None:
    result = invoke("analyze", "clinet:make", "--budgets", "0.3,0.6", "--plot", "curve.svg")
    assert result.exit_code == 0, result.output
    assert "30.0 %" in result.stdout
    assert "60.0 %" in result.stdout
    assert "<svg" in Path("curve.svg").read_text()
    result = invoke("analyze", "clinet:make", "--json")
    data = json.loads(result.stdout)
    assert len(data["curve"]["points"]) > 3
    assert invoke("analyze", "clinet:make", "--budgets", "0.0001").exit_code == BUDGET
    assert invoke("analyze", "clinet:make", "--budgets", "2").exit_code == BUDGET


def test_report_reads_the_manifest_only() -> None:
    assert invoke("compile", "clinet:make", "--budget", "0.5", "--out", "small").exit_code == 0
    (weights,) = Path("small").glob("*.safetensors")
    weights.unlink()
    result = invoke("report", "small", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "up.weight" in result.stdout
    assert Path("page.html").is_file()
    result = invoke("report", "small", "--json")
    assert tensorize.Report.from_dict(json.loads(result.stdout)) == read_report("small")
    Path("small/tensorize.json").write_text("{")
    result = invoke("report", "small")
    assert result.exit_code == CHECKPOINT
    assert "not valid JSON" in result.stderr
    assert invoke("report", "nowhere").exit_code == CHECKPOINT


# --------------------------------------------------------------------------------- Hugging Face


def tiny_llama(directory: Path, *, tokenizer: bool = True, eos: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = sorted({"<unk>", "<s>", *TEXT.split()})
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=len(words), max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    if tokenizer:
        raw = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="<unk>", eos_token=eos, model_max_length=32
        ).save_pretrained(directory)
    return model


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
    result = invoke("eval", "small", *common, "--json")
    assert json.loads(result.stdout)["models"][0]["name"] == "small"
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
    assert [line[-1] for line in lines if line[0] == "dense"] == ["1.00", "1.00"]
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


@pytest.mark.parametrize("refine", ["none", "polish"])
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


# ------------------------------------------------------------------------------ real processes


def test_help_in_a_process() -> None:
    for command in ((), ("compile",), ("analyze",), ("report",)):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert not command or f"Example: tensorize {command[0]}" in result.stdout
    done = execute("--version")
    assert (done.returncode, done.stdout.strip()) == (0, tensorize.__version__)


def test_only_json_on_standard_output() -> None:
    done = execute("compile", "clinet:make", "--budget", "0.5", "--out", "small", "--json")
    assert done.returncode == 0, done.stderr
    report = tensorize.Report.from_dict(json.loads(done.stdout)["report"])
    assert report == read_report("small")
    assert "a module that talks" in done.stderr
    assert "\r" not in done.stderr  # no bar where there is no terminal


def test_interrupt_and_errors_in_a_process() -> None:
    done = execute("compile", "clinet:interrupted", "--out", "small")
    assert done.returncode == INTERRUPTED, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    done = execute("compile", "clinet:make", "--budget", "0.001", "--out", "small")
    assert done.returncode == BUDGET
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not Path("small").exists()


def test_a_language_model_in_a_process(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "llama", eos="<s>")
    Path("text.txt").write_text(TEXT)
    done = execute(
        "compile", "llama", "--budget", "0.6", "--out", "small", "--calibration", "text.txt"
    )
    assert done.returncode == 0, done.stderr
    assert "mlp.down_proj" in done.stdout
    assert sorted(p.suffix for p in Path("small").iterdir()).count(".safetensors") == 1
    assert Path("small/tokenizer.json").is_file()


def test_kernels_of_a_saved_model_are_timed_on_a_gpu_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("calibrate", "--model", tmp_path)
    assert result.exit_code not in (0, DEFECT)
    assert "kernels are timed on a GPU, and this machine has none" in result.output
    assert "way out" in result.output
    result = invoke("calibrate", "--model", tmp_path, "--rows", "1,many")
    assert result.exit_code == USAGE


def test_calibrate_times_the_kernels_of_a_saved_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[object, list[int]]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small = tensorize.compile(
        torch.nn.Sequential(torch.nn.Linear(24, 24)), 0.5, example_inputs=(torch.randn(2, 24),)
    )
    monkeypatch.setattr(tensorize, "load", lambda directory, device: small)
    monkeypatch.setattr(
        tensorize, "tune_kernels", lambda model, rows: timed.append((model, rows)) or 3
    )
    result = invoke("calibrate", "--model", tmp_path, "--rows", "1,64")
    assert result.exit_code == 0, result.output
    assert timed == [(small, [1, 64])]
    assert "3 kernels won" in result.output
