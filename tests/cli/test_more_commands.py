"""Commands about models that are saved already, about this machine, and how much is said."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file

import tensorize
from tensorize.base import progress
from tensorize.cli import COMMANDS
from tensorize.cli.telling import CAPTURE, CHECKPOINT, USAGE
from tests.cli.commands import TEXT, invoke, tiny_llama
from tests.paths import ROOT


@pytest.fixture
def small() -> Path:
    """A model of the caller's own code, compressed and saved."""
    done = invoke("compile", "clinet:make", "--budget", "0.5", "--out", "small")
    assert done.exit_code == 0, done.output
    return Path("small")


def own() -> torch.nn.Module:
    import clinet  # pyright: ignore[reportMissingImports] -- written for these tests

    return clinet.make()


@pytest.fixture(autouse=True)
def _loud_again() -> object:
    yield
    progress.say_much(quiet=False, verbose=False)


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_says(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert COMMANDS[name].help in said
    assert COMMANDS[name].example in said.replace("- ", "-") or COMMANDS[name].example in said


HEAVY = "torch", "transformers", "safetensors", "numpy", "sympy", "networkx"
HELP_OF_ALL = f"""
import contextlib, io, json, sys
for name in {HEAVY}:
    sys.modules[name] = None  # an import of it fails
from tensorize.cli import COMMANDS, app
said = {{}}
for words in ([], *([name] for name in COMMANDS)):
    with contextlib.redirect_stdout(io.StringIO()) as told:
        app([*words, "--help"], standalone_mode=False)
    said[" ".join(words)] = told.getvalue()
print(json.dumps(said))
"""


@pytest.mark.parametrize("width", [30, 40, 200])
def test_help_of_no_command_imports_what_models_need(width: int) -> None:
    """Counted in modules, not in seconds: without torch and its like it takes a fifth of one."""
    columns = {"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}
    env = {**os.environ, **columns, "PYTHONPATH": str(ROOT)}
    code = [sys.executable, "-c", HELP_OF_ALL]
    done = subprocess.run(code, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert all(name in said[""] for name in COMMANDS)
    for text in said.values():
        assert "Usage: " in text
        too_long = [line for line in text.splitlines() if len(line) > width]
        assert all(line.startswith("  --") and "|" in line for line in too_long), too_long
    assert "with the calibration data" in " ".join(said["compile"].split())  # no word is cut


# --------------------------------------------------------------------------------------- serve


def test_only_what_writes_text_is_served(small: Path) -> None:
    refused = invoke("serve", small)
    assert refused.exit_code == CHECKPOINT
    assert "only Hugging Face models" in refused.stderr


def test_a_taken_port_is_said_with_a_way_out() -> None:
    tiny_llama(Path("dense"))
    done = invoke("compile", "dense", "--budget", "0.9", "--metric", "frobenius", "--out", "small")
    assert done.exit_code == 0, done.output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = invoke("serve", "small", "--port", taken.getsockname()[1])
    assert refused.exit_code == CAPTURE
    assert "--port 0" in refused.stderr


# --------------------------------------------------------------------------------- saved models


def test_info_of_a_dense_model_and_of_a_saved_one(small: Path) -> None:
    dense = invoke("info", "clinet:with_inputs")
    assert dense.exit_code == 0, dense.output
    assert "2 of 2 weights can be compressed" in dense.stdout
    known = json.loads(invoke("info", "clinet:make", "--json").stdout)
    assert known["parameters"] == sum(p.numel() for p in own().parameters())
    saved = invoke("info", small)
    assert saved.stdout.startswith("kept: ")
    assert json.loads(invoke("info", small, "--json").stdout)["compressed"]
    assert invoke("info", "./nowhere").exit_code == CAPTURE


def test_healed_models_are_saved_with_what_it_gained(small: Path) -> None:
    save_file({"x": torch.randn(64, 32)}, "data.safetensors")
    common = ("--dense", "clinet:make", "--data", "data.safetensors", "--steps", "8")
    done = invoke("heal", small, *common, "--out", "healed", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["healing"]["after"] <= told["healing"]["before"]
    assert "measured" in told["verdict"][1]
    model = tensorize.load("healed", own())
    assert tensorize.report(model).measured_loss == pytest.approx(told["healing"]["after"])
    assert invoke("heal", "nowhere", *common, "--out", "o").exit_code == CHECKPOINT
    assert invoke("heal", small, "--out", "o").exit_code == USAGE


def test_densified_models_are_plain_files(small: Path) -> None:
    done = invoke("densify", small, "--dense", "clinet:make", "--out", "dense")
    assert done.exit_code == 0, done.output
    model = own()
    load_model(model, "dense/model.safetensors")
    wanted = tensorize.densify(tensorize.load(small, own()))
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert invoke("densify", small, "--out", "again").exit_code == CHECKPOINT  # whose model?


def test_a_language_model_is_densified_for_transformers(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "llama", eos="<s>")
    Path("text.txt").write_text(TEXT)
    assert invoke("compile", "llama", "--budget", "0.6", "--out", "small").exit_code == 0
    assert invoke("densify", "small", "--out", "dense").exit_code == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("dense")
    ids = AutoTokenizer.from_pretrained("dense")("the cat sat", return_tensors="pt")["input_ids"]
    wanted = tensorize.densify(tensorize.load("small"))(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, wanted)
    assert "first.weight" not in str(load_file("dense/model.safetensors").keys())
    graphs = invoke("graphs", "small", "--svg", "graph.svg")
    assert graphs.exit_code == 0, graphs.output
    assert "low rank" in graphs.stdout
    assert Path("graph.svg").read_text().startswith("<svg")


def test_kernels_of_a_saved_model_are_listed_and_written(small: Path) -> None:
    common = (small, "--dense", "clinet:make")
    listed = invoke("kernels", *common)
    assert listed.exit_code == 0, listed.output
    found = json.loads(invoke("kernels", *common, "--json").stdout)
    assert listed.stdout.splitlines()[-1] == f"{len(found['kernels'])} kernels"
    assert invoke("kernels", *common, "--out", "sources").exit_code == 0
    assert {f"{name}.py" for name in found["kernels"]} <= {
        p.name for p in Path("sources").iterdir()
    }
    assert invoke("kernels", *common, "--target", "cuda:90").exit_code == USAGE


# ------------------------------------------------------------------------------- this machine


def test_the_doctor_looks_at_all_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads(invoke("doctor", "--json").stdout)["findings"]
    names = [each["name"] for each in told]
    assert {"torch", "device", "figures", "triton", "compiler", "bfloat16", "cache"} <= set(names)
    figures = told[names.index("figures")]
    assert "tensorize calibrate" in figures["advice"]
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(Path("clinet.py").absolute() / "in a file"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    text = invoke("doctor").stdout
    assert "cannot be written" in text
    assert "TENSORIZE_CACHE_DIR" in text
    if not torch.cuda.is_available():
        assert "install g++" in text


# ------------------------------------------------------------------------------ how much is said


def test_quiet_and_verbose_stand_anywhere() -> None:
    command = ("compile", "clinet:make", "--budget", "0.5", "--out", "small")
    usual = invoke(*command)
    assert "loading" in usual.stderr
    for quiet in (("--quiet", *command), (*command, "-q")):
        result = invoke(*quiet)
        assert result.exit_code == 0, result.output
        assert "tensorize:" not in result.stderr
        assert "saved in small" in result.stdout
    for verbose in (("-v", *command), (*command, "--verbose")):
        assert "tensorize: factorize" in invoke(*verbose).stderr
    assert "factorize" not in invoke(*command).stderr
    assert invoke("-q", "-v", *command).exit_code == USAGE
    failed = invoke("-q", "info", "./nowhere")
    assert failed.stderr.startswith("error: ")
