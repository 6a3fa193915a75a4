"""What an older tree has left behind, written by it and read by both."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensorize
from tensorize import training

from .models import EVERY, small_batches, small_gpt, small_llama, trained_gpt
from .put import TOLD, as_text, put, put_bits, put_files, put_model, put_outputs, put_report, values


class Stopped(Exception):
    """A run that ends in the middle: what it leaves is what a killed one leaves."""


def stops(stage: str | None, count: int) -> Callable[[str, int, int], None]:
    """Progress that ends the run where ``count`` of a stage (None: of any) are done."""

    def watch(now: str, done: int, total: int) -> None:
        if done == count and stage in (None, now):
            raise Stopped

    return watch


class Steps:
    """Progress that remembers where it began."""

    first: int | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.first = done if self.first is None else self.first


def healing(directory: str | Path, progress: Any) -> tuple[Any, nn.Module]:
    dense, batches = small_llama(), small_batches(10)
    found = tensorize.compile(
        dense, 0.5, example_inputs=batches[0], metric="frobenius", progress=False
    )
    options = {"steps": 24, "checkpoint_dir": directory, "progress": progress}
    return tensorize.heal(found, dense, batches, **options), found


def cached(directory: str | Path) -> tensorize.Analysis:
    return tensorize.analyze(
        small_llama(), calibration=small_batches(), cache_dir=directory, progress=False
    )


def written() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Any]]:
    """Compressed models, what each is loaded into, and inputs, by name."""
    batches = small_batches()
    inputs = batches[0]
    ids = inputs["input_ids"]

    def trained(**options: Any) -> nn.Module:
        model = training.initialize(
            small_llama(), 0.5, example_inputs=inputs, progress=False, **options
        )
        training.checkpoint_low_rank(model)
        return model

    alone = {"metric": "frobenius", "example_inputs": (ids,), "progress": False}
    return {
        "gpt": (
            lambda: tensorize.compile(small_gpt(), 0.6, formats=EVERY, **alone),
            small_gpt,
            (ids,),
        ),
        "llama": (
            lambda: tensorize.compile(
                small_llama(), 0.6, calibration=batches, formats="shared", progress=False
            ),
            small_llama,
            inputs,
        ),
        "nonlinear": (lambda: trained(nonlinearity="gelu"), small_llama, inputs),
        "trained gpt": (
            lambda: tensorize.compile(
                trained_gpt(), None, ranks={"blocks.[0-2].*": "full", "blocks.4.*": 16}, **alone
            ),
            trained_gpt,
            (ids,),
        ),
    }


def write() -> None:
    """What a version leaves behind: artefacts, pickles, caches and runs that were stopped."""
    for name, (make, _, inputs) in written().items():
        model = make()
        put_outputs(f"models/{name}", model, inputs)
        tensorize.save(model, f"saved/{name}")
        torch.save(model, f"{name}.pt")
        torch.save(model.state_dict(), f"{name}.state.pt")
        Path(f"{name}.pickle").write_bytes(pickle.dumps(model))
    analysis = cached("cache")
    plan = analysis.plan(0.6)
    Path("plan.json").write_text(plan.to_json())
    report = tensorize.report(tensorize.apply(small_llama(), plan))
    spec = tensorize.TTSpec((8, 6), (12, 4), (5,))
    things = {
        "plan": plan,
        "plan alone": tensorize.Plan.from_json(plan.to_json()),
        "analysis": analysis,
        "report": report,
        "curve": analysis.curve(),
        "prediction": plan.predicted,
        "budget": tensorize.Budget(params=0.5, loss=0.1),
        "spec": spec,
        "block": tensorize.TTSpec.block((8, 6), (12, 4), 3, experts=2),
        "contraction": tensorize.plan_contraction(spec),
        "memory": training.memory(7e9),
        "kernels": tensorize.kernels(tensorize.apply(small_llama(), plan)),
        "error": tensorize.BudgetError("it is too small", way_out="a larger one"),
    }
    things["healing"], healed = healing("healed", False)
    put("healing", values([*healed.state_dict().items()]))
    for name, thing in things.items():
        Path(f"{name}.pickle").write_bytes(pickle.dumps(thing))
        torch.save(thing, f"{name}.pt")
    with contextlib.suppress(Stopped):
        healing("stopped", stops(None, 10))
    small_llama().save_pretrained("dense")
    for stage, count in (("spectra", 5), ("factorize", 6)):
        with contextlib.suppress(Stopped):
            tensorize.compile_checkpoint("dense", "halfway", 0.5, progress=stops(stage, count))
    put("left", "\n".join(sorted(str(path) for path in Path().rglob("*"))))


def read(old: Path) -> None:
    """All of that, read again."""
    shutil.copytree(old, "old")
    old = Path("old")
    for name, (_, build, inputs) in written().items():
        hugging = not name.endswith("gpt")
        loaded = tensorize.load(old / "saved" / name, None if hugging else build())
        put_model(f"{name}/loaded", loaded, inputs)
        put_outputs(
            f"{name}/torch.load", torch.load(old / f"{name}.pt", weights_only=False), inputs
        )
        unpickled = pickle.loads((old / f"{name}.pickle").read_bytes())
        put_model(f"{name}/pickle", unpickled, inputs)
        put_outputs(f"{name}/trained", unpickled.train(), inputs)
        state = torch.load(old / f"{name}.state.pt", weights_only=True)
        put(f"{name}/state dict", str(loaded.load_state_dict(state)))
        put_outputs(f"{name}/state dict", loaded.eval(), inputs)
    names = [path.stem for path in old.glob("*.pickle") if path.stem not in written()]
    for name in sorted(names):
        for thing, how in (
            (pickle.loads((old / f"{name}.pickle").read_bytes()), "pickle"),
            (torch.load(old / f"{name}.pt", weights_only=False), "torch.load"),
        ):
            put_thing(f"{name}/{how}", thing)
    text = (old / "plan.json").read_text()
    plan = tensorize.Plan.from_json(text)
    put("plan.json/text", plan.to_json())
    carried_out = tensorize.apply(small_llama(), plan, calibration=small_batches())
    put_bits("plan.json", carried_out, small_batches(1)[0])
    before = sorted(old.rglob("cache/*"))
    analysis = cached(old / "cache")
    hit = sorted(old.rglob("cache/*")) == before
    TOLD["the analysis of the older tree"] = "read" if hit else "made again"
    put("cache/analysis", str(analysis))
    put_bits("cache", tensorize.apply(small_llama(), analysis.plan(0.6)), small_batches(1)[0])
    for name in ("healed", "stopped"):
        steps = Steps()
        done, model = healing(old / name, steps)
        put(f"{name}/goes on after", str(steps.first))
        put(f"{name}/healing", as_text(done.to_dict()))
        put(f"{name}/state", values([*model.state_dict().items()]))
    report = tensorize.compile_checkpoint(old / "dense", old / "halfway", 0.5)
    TOLD["the checkpoint of the older tree"] = next(
        stage.summary for stage in report.history if stage.name == "spectra"
    )
    put_files("halfway", old / "halfway")


def put_thing(name: str, thing: Any) -> None:
    """An object that was pickled."""
    if isinstance(thing, tensorize.Report):
        put_report(name, thing)
    elif isinstance(thing, tensorize.Plan):
        put(name, thing.to_json())
        if getattr(thing, "analysis", None) is not None:
            small = tensorize.apply(small_llama(), thing)
            put(f"{name}/state", values([*small.state_dict().items()]))
    elif isinstance(thing, tensorize.Analysis):
        put(name, f"{thing}\n{thing.plan(0.6).to_json()}")
    elif isinstance(thing, dict):
        for key, value in thing.items():
            put(f"{name}/{key}", f"{value!r}\n{value}")
    elif isinstance(thing, Exception):
        put(name, f"{type(thing).__name__} {thing}")
    else:
        put(name, repr(thing))
