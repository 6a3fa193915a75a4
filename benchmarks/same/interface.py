"""What is said to users: names, signatures, errors, the command line."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import tensorize
from tensorize import training

from .models import small_batches, small_gpt, small_llama
from .put import (
    as_text,
    in_one_line,
    put,
    put_files,
    put_model,
    put_outputs,
    put_report,
    said,
    values,
    without_times,
)


def names_and_errors() -> None:
    """Names, signatures, texts of errors and of the command line, what debugging says."""
    for owner in (tensorize, training):
        put(f"names/{owner.__name__}", "\n".join(sorted(owner.__all__)))
        for name in owner.__all__:
            value = getattr(owner, name)
            if callable(value):
                parameters = inspect.signature(value).parameters.values()
                given = [str(p.replace(annotation=p.empty)) for p in parameters]
                put(f"signatures/{owner.__name__}.{name}", ", ".join(given))
            if isinstance(value, type):
                public = [each for each in dir(value) if not each.startswith("_")]
                put(f"members/{owner.__name__}.{name}", "\n".join(public))
    for command in ("", "compile", "analyze", "report", "eval", "bench", "calibrate"):
        put_command(f"help/{command}", *command.split(), "--help")
    model, batches = small_llama(), small_batches(2)
    analysis = tensorize.analyze(model, calibration=batches, progress=False)
    failing: dict[str, Callable[[], Any]] = {
        "budget": lambda: tensorize.compile(model, 0.001, metric="frobenius"),
        "budget type": lambda: tensorize.compile(model, "half"),  # type: ignore[arg-type]
        "budget loss": lambda: analysis.plan(tensorize.Budget(params=0.05, loss=1e-9)),
        "metric": lambda: tensorize.compile(model, 0.5, metric="l2"),
        "format": lambda: tensorize.compile(model, 0.5, formats="svd"),
        "formats of a plan": lambda: analysis.plan(0.5, formats="block"),
        "pattern": lambda: tensorize.compile(model, 0.5, include="nothing*"),
        "ranks": lambda: tensorize.compile(model, None, ranks={"nothing*": 4}),
        "backend": lambda: tensorize.compile(model, 0.5, backend="cuda"),
        "no data": lambda: tensorize.compile(model, 0.5, metric="loss"),
        "data": lambda: tensorize.compile(model, 0.5, calibration=[{"ids": torch.ones(2)}]),
        "polish": lambda: analysis.plan(0.5, refine="polish"),
        "no model": lambda: tensorize.compile(torch.ones(3), 0.5),  # type: ignore[arg-type]
        "no report": lambda: tensorize.report(model),
        "no plan": lambda: tensorize.apply(model, "plan"),  # type: ignore[arg-type]
        "other plan": lambda: tensorize.apply(small_gpt(), analysis.plan(0.5)),
        "no artefact": lambda: tensorize.load("nowhere"),
        "no checkpoint": lambda: tensorize.compile_checkpoint("nowhere", "out"),
        "healing": lambda: tensorize.heal(model, model, batches, steps=2),
        "groups": lambda: training.parameter_groups(model, lr=-1),
        "tuning": lambda: tensorize.tune_kernels(tensorize.apply(model, analysis.plan(0.5))),
    }
    for name, call in failing.items():
        try:
            call()
        except Exception as error:
            kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
            put(f"errors/{name}", f"{kinds}\n{error}")
        else:
            put(f"errors/{name}", "none")
    os.environ["TENSORIZE_DEBUG"] = "3"
    spoken = io.StringIO()
    with contextlib.redirect_stderr(spoken):
        tensorize.graphs(tensorize.apply(model, analysis.plan(0.5)), batches[0])
    os.environ["TENSORIZE_DEBUG"] = "0"
    put("debug", said(spoken.getvalue()))


def put_command(name: str, *arguments: str) -> None:
    """A call of the command line in this process: exit status, output, and what it said."""
    from tensorize.cli import main

    kept, sys.argv = sys.argv, ["tensorize", *arguments]
    output, spoken, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(spoken):
            main()
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv = kept
    put(f"{name}/status", str(code))
    put(f"{name}/said", said(spoken.getvalue()))
    text = output.getvalue()
    shown = as_text(without_times(json.loads(text))) if text.startswith("{") else in_one_line(text)
    put(f"{name}/output", shown)


def command_line() -> None:
    """The command line on a checkpoint, streamed and not, and what transformers reads of it."""
    import transformers

    small_llama().save_pretrained("dense")
    stack = torch.cat([batch["input_ids"] for batch in small_batches()])
    from safetensors.torch import save_file

    save_file({"input_ids": stack}, "data.safetensors")
    data = ("--calibration", "data.safetensors")
    put_command("compile", "compile", "dense", "--budget", "0.6", "--out", "out", *data,
                "--html", "out.html", "--emit", "kernels", "--json")  # fmt: skip
    put_files("compile/files", "out")
    put_files("compile/kernels", "kernels")
    put_command("plain", "compile", "dense", "--budget", "params=0.7,flops=0.8", "--out", "plain",
                "--metric", "frobenius", "--formats", "*mlp*=tt,dense")  # fmt: skip
    put_files("plain/files", "plain")
    put_command("stream", "compile", "dense", "--budget", "0.6", "--out", "streamed", "--stream")
    put_files("stream/files", "streamed")
    put_command("analyze", "analyze", "dense", "--budgets", "0.5,0.75", *data)
    put_command("report", "report", "out")
    put_command("report json", "report", "out", "--json")
    put_command(
        "eval", "eval", "out", "--dense", "dense", "--data", "data.safetensors", "--no-time"
    )
    put_command("infeasible", "compile", "dense", "--budget", "0.0001", "--out", "none")
    put_command("missing", "report", "nowhere")
    read = transformers.AutoModelForCausalLM.from_pretrained("out")
    put_model("from_pretrained", read, small_batches(1)[0])
    report = tensorize.compile_checkpoint("dense", "checkpoint", 0.6, formats="block")
    put_report("checkpoint", report)
    put_files("checkpoint/files", "checkpoint")
    inputs = small_batches(1)[0]
    put_outputs("checkpoint", tensorize.load("checkpoint"), inputs)
    narrow = tensorize.load("out", dtype=torch.bfloat16)
    put("narrow", values([*narrow.state_dict().items()]))
