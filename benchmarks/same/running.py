"""What compressed models do: they train, and run by backends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import tensorize
from tensorize import training

from .models import EVERY, fading, small_batches, small_gpt, small_llama
from .put import as_text, put, put_model, put_outputs, put_report, run, values


def trains() -> None:
    """Training: fresh models, learning rates, ranks that move, memory, healing."""
    model, batches = small_llama(), small_batches()
    inputs = batches[0]
    for name, options in {
        "scaled": {},
        "spectral": {"method": "spectral"},
        "nonlinear": {"nonlinearity": "silu"},
        "block": {"formats": "block"},
        "trains": {"formats": "tt", "rank_multiple": 1},
    }.items():
        fresh = training.initialize(model, 0.5, example_inputs=inputs, progress=False, **options)
        put_model(f"initialize/{name}", fresh, inputs)
    with torch.device("meta"):
        empty = type(model)(model.config)
    torch.manual_seed(0)
    fresh = tensorize.initialize(empty, 0.5, example_inputs=inputs, progress=False)
    put_model("initialize/meta", fresh, inputs)
    for rule in ("adam", "sgd"):
        groups = training.parameter_groups(fresh, lr=1e-3, weight_decay=0.1, rule=rule)
        shown = [{**group, "params": [tuple(p.shape) for p in group["params"]]} for group in groups]
        put(f"groups/{rule}", values(shown))
    for precision in ("mixed", "float32", "bfloat16", "stochastic"):
        put(f"memory/{precision}", str(training.memory(fresh, precision=precision, batch=inputs)))
    put("memory/activations", str(training.activations(fresh, inputs)))
    put("memory/blocks", str(training.checkpoint_low_rank(fresh)))
    put("memory/fewer", str(training.activations(fresh, inputs)))
    optimizer = torch.optim.AdamW(training.parameter_groups(fresh, lr=1e-3, weight_decay=0.1))
    ranks = training.RankSchedule(fresh, optimizer, budget=0.4, start=1, end=5, every=2)
    losses, moved = [], []
    for batch in batches:
        losses.append(step(fresh.train(), optimizer, batch))
        moved.append(str(ranks.step()))
    put("schedule/losses", values(losses))
    put("schedule/moved", "\n".join(moved))
    put("schedule/ranks", values(ranks.state_dict()))
    put_model("schedule", fresh.eval(), inputs)
    narrow = tensorize.initialize(model, 0.5, example_inputs=inputs, progress=False).bfloat16()
    optimizer = torch.optim.AdamW(narrow.parameters(), lr=1e-2)
    rounded = training.round_stochastically(optimizer, seed=3)
    losses = [step(narrow.train(), optimizer, batch) for batch in batches]
    put("rounded/losses", values(losses))
    put("rounded/state", values([rounded.state_dict(), *narrow.state_dict().items()]))
    dense = small_gpt()
    texts = [(batch["input_ids"],) for batch in small_batches(8)]
    healed = tensorize.compile(
        dense, 0.5, metric="frobenius", example_inputs=texts[0], progress=False
    )
    for options in ({}, {"train": "all", "layers": True}):
        done = tensorize.heal(healed, dense, texts, steps=8, progress=False, **options)
        put(f"heal/{options}", f"{done}\n{as_text(done.to_dict())}")
        put_model(f"heal/{options}", healed, texts[0])
    distance = tensorize.distillation_loss(dense, texts)
    put("distillation", values(distance(healed, texts[1])))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> Tensor:
    """One step of training, and its loss."""
    optimizer.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def compiled() -> None:
    """``torch.compile(backend="tensorize")``, without a compiler, and previews of dense models."""
    model, (inputs, *_) = small_llama(layers=1), small_batches(1)
    compress = {"example_inputs": inputs, "metric": "frobenius", "progress": False}
    for name, formats in {"low rank": None, "every": EVERY}.items():
        found = tensorize.compile(model, 0.6, formats=formats, **compress)
        eager = torch.compile(found, backend="tensorize", options={"inner": "eager"})
        put_outputs(f"{name}/many rows", eager, inputs)
        one = {"input_ids": inputs["input_ids"][:1, :1]}
        with torch.no_grad():
            put(f"{name}/one row", values(run(eager, one)))
        put_report(name, tensorize.report(found))
        torch._dynamo.reset()
    for options in ({"budget": 0.5}, {"ranks": {"*mlp*": 8}}):
        preview = torch.compile(model, backend="tensorize", options={**options, "inner": "eager"})
        put_outputs(f"preview/{options}", preview, inputs)
        torch._dynamo.reset()


def inductor() -> None:
    """The same with inductor, kernels in triton's interpreter, and kernels compiled for a GPU."""
    model, (inputs, *_) = small_llama(layers=1), small_batches(1)
    compress = {"example_inputs": inputs, "metric": "frobenius", "progress": False}
    found = tensorize.compile(model, 0.6, **compress)
    put_outputs("inductor", torch.compile(found, backend="tensorize"), inputs)
    torch._dynamo.reset()
    by_itself = tensorize.compile(model, 0.6, backend="inductor", **compress)
    put_outputs("by itself", by_itself, inputs, gradients=False)
    torch._dynamo.reset()
    name, kernel = next(iter(sorted(tensorize.kernels(found).items())))
    made = kernel.compile("cuda:90")
    put(f"cuda:90 {name}", f"{made.registers} {made.spills} {made.shared_bytes}\n{made.asm}")


def interpreted() -> None:
    """Weights that run by Triton kernels, in triton's interpreter."""
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    fading(model)
    inputs = (torch.randn(4, 48, generator=torch.Generator().manual_seed(0)),)
    for formats in ("low_rank", "tt", "block"):
        found = tensorize.compile(
            model, 0.7, example_inputs=inputs, metric="frobenius", formats=formats,
            backend="triton", progress=False,
        )  # fmt: skip
        put_model(formats, found, inputs)
