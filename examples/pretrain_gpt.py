"""Pre-trains a GPT on the sources of the standard library, dense and compressed, side by side.

    python -m examples.pretrain_gpt --out runs --steps 600 --seeds 0 1 2

Three runs for every seed, of one architecture and one learning rate: dense; compressed for the
same tokens, at a share of the FLOPs; compressed for the same FLOPs, on more tokens. It prints a
table and draws loss against steps, FLOPs, seconds and (where the machine tells) joules. Checkpoints
are written while it trains; killed at any moment and started again, it goes on to the same losses.
``--through trainer`` trains by Hugging Face's ``Trainer`` instead of the loop below.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tensorize
from examples import stdlib_text
from examples.gpt import GPT, GPTConfig, encode, evaluate, next_token_loss
from examples.train_stdlib import batches, schedule, train_tokenizer
from tensorize.base import printer
from tensorize.evaluation.energy import meter
from tensorize.training.adapt import RankSchedule
from tensorize.training.groups import parameter_groups
from tensorize.training.rounding import round_stochastically

WARMUP, DECAY = 50, 0.1
PRECISIONS = ("float32", "mixed", "stochastic")


@dataclass(frozen=True)
class Run:
    """One training run: what is trained, and for how long."""

    name: str
    config: GPTConfig
    flops: float | None
    nonlinearity: str | None
    formats: str
    shrink_from: float | None
    precision: str
    learning_rate: float
    batch: int
    steps: int
    seed: int

    def model(self) -> nn.Module:
        """Freshly initialised, dense or with ``flops`` of the dense FLOPs a token."""
        torch.manual_seed(self.seed)
        model: nn.Module = GPT(self.config)
        if self.flops is not None:
            budget = tensorize.Budget(flops=self.shrink_from or self.flops)
            model = tensorize.initialize(
                model,
                budget,
                formats=self.formats,
                nonlinearity=self.nonlinearity,
                exclude=("embedding", "positions"),
                seed=self.seed,
            )
        return model.to(torch.bfloat16) if self.precision == "stochastic" else model

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW with a learning rate for every kind of parameter."""
        groups = parameter_groups(model, self.learning_rate, DECAY)
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def ranks(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RankSchedule | None:
        """Ranks that fall to the budget in the first half of the run, where they start above it."""
        if self.flops is None or self.shrink_from is None:
            return None
        smaller = tensorize.report(replace(self, shrink_from=None).model())
        budget = tensorize.Budget(params=smaller.totals.after.parameters)
        start, end = self.steps // 10, self.steps // 2
        every = max(1, self.steps // 40)
        return RankSchedule(model, optimizer, budget, start=start, end=end, every=every)


@dataclass(frozen=True)
class Text:
    """Token ids of the three splits, and how many words the tokenizer knows."""

    train: Tensor
    validation: Tensor
    words: int


def read_text(words: int, characters: int | None) -> Text:
    """The standard library's sources, by a tokenizer that is trained on them."""
    texts = {split: [d.text for d in stdlib_text.documents(split)] for split in stdlib_text.SPLITS}
    if characters is not None:
        texts = {split: ["\n".join(parts)[:characters]] for split, parts in texts.items()}
    tokenizer = train_tokenizer(texts["train"], words)
    ids = {split: encode(tokenizer, texts[split]) for split in ("train", "validation")}
    return Text(ids["train"], ids["validation"], words)


# ------------------------------------------------------------------------------ the plain loop


def step_flops(model: nn.Module, ids: Tensor) -> int:
    """FLOPs of one forward and backward pass, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model, ids).backward()
    model.zero_grad()
    return counter.get_total_flops()


def train(run: Run, text: Text, folder: Path, every: int) -> list[dict[str, Any]]:
    """Train in plain PyTorch; goes on from the last checkpoint in ``folder``. Returns the log."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
    folder.mkdir(parents=True, exist_ok=True)
    model = run.model()
    optimizer = run.optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    ranks = run.ranks(model, optimizer)
    rounding = round_stochastically(optimizer) if run.precision == "stochastic" else None
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=run.precision == "mixed")
    began, log = resume(folder, model, optimizer, ranks, rounding)
    generator = torch.Generator().manual_seed(run.seed)
    data = islice(batches(text.train, run.batch, run.config.context, generator), began, run.steps)
    energy, pending, flops = meter("cpu"), None, 0
    last = log[-1] if log else {"seconds": 0.0, "flops": 0, "joules": None}
    clock, changed = time.monotonic(), True
    for step, ids in enumerate(data, began):
        if changed:
            flops = step_flops(model, ids)
        share = schedule(step, step / run.steps, WARMUP)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        with autocast():
            loss = next_token_loss(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        changed = ranks is not None and ranks.step() is not None
        total = (log[-1]["flops"] if log else 0) + flops
        seconds = last["seconds"] + time.monotonic() - clock
        log.append({"step": step + 1, "loss": loss.item(), "flops": total, "seconds": seconds})
        if (step + 1) % every == 0 or step + 1 == run.steps:
            log[-1]["joules"] = energy and energy.read() + (last["joules"] or 0.0)
            log[-1]["validation"] = evaluate(model, text.validation, context=run.config.context)
            if pending is not None:
                pending.result()
            pending = save(folder, step + 1, model, optimizer, ranks, rounding, log)
    if pending is not None:
        pending.result()
    return log


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: RankSchedule | None,
    rounding: Any,
    log: list[dict[str, Any]],
) -> Future[Any]:
    """Begin to write a checkpoint; it is complete when its ``.metadata`` is there."""
    place = folder / f"step-{step:06d}"
    place.mkdir(exist_ok=True)
    beside = {"log": log, "ranks": None if ranks is None else ranks.state_dict()}
    (place / "run.json").write_text(json.dumps(beside))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    if rounding is not None:
        state["rounding"] = rounding.state_dict()
    return dcp.async_save(state, checkpoint_id=place, no_dist=True)  # type: ignore[return-value]


def resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: RankSchedule | None,
    rounding: Any,
) -> tuple[int, list[dict[str, Any]]]:
    """The step to go on from, and the log up to it, from the last complete checkpoint."""
    complete = sorted(place.parent for place in folder.glob("step-*/.metadata"))
    if not complete:
        return 0, []
    place = complete[-1]
    beside = json.loads((place / "run.json").read_text())
    if ranks is not None:
        ranks.load_state_dict(beside["ranks"])
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    blank = {
        k: {
            "step": torch.zeros(()),
            "exp_avg": _wide(p, rounding is not None),
            "exp_avg_sq": _wide(p, rounding is not None),
        }
        for k, p in enumerate(parameters)
    }
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": blank}
    if rounding is not None:
        state["rounding"] = rounding.state_dict()
    dcp.load(state, checkpoint_id=place, no_dist=True)  # type: ignore[reportPrivateImportUsage]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    if rounding is not None:
        rounding.load_state_dict(state["rounding"])
    return beside["log"][-1]["step"], beside["log"]


def _wide(parameter: Tensor, wide: bool) -> Tensor:
    dtype = torch.float32 if wide else parameter.dtype
    return torch.zeros_like(parameter, dtype=dtype)


# ------------------------------------------------------------------------ Hugging Face's Trainer


class WithLoss(nn.Module):
    """A model as the Trainer wants it: texts in, the loss in what comes out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": next_token_loss(self.model, ids)}


def train_by_trainer(run: Run, text: Text, folder: Path, every: int) -> list[dict[str, Any]]:
    """Train by transformers' Trainer, with its own checkpoints. Returns the log."""
    import transformers

    model = run.model()
    optimizer = run.optimizer(model)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, step / run.steps, WARMUP)
    )
    generator = torch.Generator().manual_seed(run.seed)

    class Windows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for ids in batches(text.train, run.batch, run.config.context, generator):
                yield from ({"ids": row} for row in ids)

    ids = next(batches(text.train, run.batch, run.config.context, torch.Generator()))
    flops = step_flops(model, ids)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=every,
        bf16=run.precision == "mixed",
        use_cpu=not torch.cuda.is_available(),
        seed=run.seed,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        WithLoss(model), arguments, train_dataset=Windows(), optimizers=(optimizer, rates)
    )
    began = time.monotonic()
    there = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=there)
    seconds = (time.monotonic() - began) / run.steps
    log = [
        {"step": e["step"], "loss": e["loss"], "flops": e["step"] * flops, "joules": None,
         "seconds": e["step"] * seconds}
        for e in trainer.state.log_history
        if "loss" in e
    ]  # fmt: skip
    log[-1]["validation"] = evaluate(model, text.validation, context=run.config.context)
    return log


# -------------------------------------------------------------------------------- side by side


def runs_of(options: argparse.Namespace, seed: int) -> list[Run]:
    """Dense, compressed for the same tokens, and compressed for the same FLOPs."""
    config = GPTConfig(options.words, options.context, options.width, options.layers, options.heads)
    dense = Run(
        name="dense",
        config=config,
        flops=None,
        nonlinearity=options.nonlinearity,
        formats=options.formats,
        shrink_from=options.shrink_from,
        precision=options.precision,
        learning_rate=options.learning_rate,
        batch=options.batch,
        steps=options.steps,
        seed=seed,
    )
    small = replace(dense, name="compressed, same tokens", flops=options.flops)
    ids = torch.zeros(options.batch, options.context + 1, dtype=torch.long)
    whole, less = (step_flops(run.model().float(), ids) for run in (dense, small))
    longer = round(options.steps * whole / less)
    return [dense, small, replace(small, name="compressed, same FLOPs", steps=longer)]


def table(results: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Validation losses over the seeds, beside what they took."""
    rows = []
    dense = statistics.median(log[-1]["validation"] for log in results["dense"])
    for name, logs in results.items():
        losses = [log[-1]["validation"] for log in logs]
        last = logs[0][-1]
        rows.append(
            (
                name,
                str(last["step"]),
                f"{last['flops'] / 1e12:.3g}",
                f"{statistics.mean(log[-1]['seconds'] for log in logs):.0f}",
                f"{statistics.median(losses):.4f}",
                f"{min(losses):.4f} to {max(losses):.4f}",
                f"{100 * (statistics.median(losses) / dense - 1):+.2f} %",
            )
        )
    headers = ("run", "steps", "TFLOP", "seconds", "validation", "seeds", "over dense")
    align: list[printer.Align] = ["left", *["right"] * 6]  # type: ignore[list-item]
    return printer.table(headers, rows, width=100, align=align)


def draw(results: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Validation loss against steps, FLOPs, seconds, and joules where they were measured."""
    from matplotlib.figure import Figure

    marked = [e for logs in results.values() for log in logs for e in log if "validation" in e]
    axes = ["step", "flops", "seconds"]
    if marked and all(e.get("joules") is not None for e in marked):
        axes.append("joules")
    figure = Figure(figsize=(4.0 * len(axes), 3.6), layout="constrained")
    for place, key in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        for color, (name, logs) in enumerate(results.items()):
            for k, log in enumerate(logs):
                points = [(e[key], e["validation"]) for e in log if "validation" in e]
                label = name if k == 0 else None
                place.plot(*zip(*points, strict=True), color=f"C{color}", alpha=0.8, label=label)
        place.set_xlabel({"flops": "FLOPs", "step": "steps"}.get(key, key))
        place.grid(alpha=0.25)
    figure.axes[0].set_ylabel("validation loss (nats a token)")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs"), help="logs, checkpoints, plot")
    parser.add_argument("--steps", type=int, default=600, help="steps of the dense run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--flops", type=float, default=0.4, help="share of the dense FLOPs")
    parser.add_argument("--nonlinearity", choices=("silu", "gelu", "relu", "tanh"))
    parser.add_argument("--formats", default="block", help="low_rank, block or tt")
    parser.add_argument("--shrink-from", type=float, help="begin at this share of the FLOPs")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--through", choices=("plain", "trainer"), default="plain")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--words", type=int, default=1024, help="words of the tokenizer")
    parser.add_argument("--characters", type=int, help="use only this much text of each split")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[dict[str, Any]]]]:
    """Trains all runs, prints and draws; returns the logs by run, one a seed."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    text = read_text(options.words, options.characters)
    how = train if options.through == "plain" else train_by_trainer
    results: dict[str, list[list[dict[str, Any]]]] = {}
    for seed in options.seeds:
        for run in runs_of(options, seed):
            folder = options.out / f"{run.name.replace(', ', '-').replace(' ', '-')}-{seed}"
            log = how(run, text, folder, options.every)
            (folder / "log.json").write_text(json.dumps({"run": asdict(run), "log": log}))
            results.setdefault(run.name, []).append(log)
            print(f"seed {seed}, {run.name}: {log[-1]['validation']:.4f}", flush=True)
    print(table(results))
    draw(results, options.out / "losses.svg")
    print(f"logs, checkpoints and losses.svg are in {options.out}")
    return results


if __name__ == "__main__":
    main()
