"""Train a small vision transformer on shapes, compress it, and see what it still recognises.

    python -m examples.compress_vit --budgets 0.5 0.25

The task is made here: one of eight figures, bright and of any colour, of many sizes, places and
turns, on a dark background under noise. A model that has learned it has learned something of
images, in a minute on one core. The images that are counted are others than those trained and
calibrated on.

Shapes: B images, S pixels a side.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tensorize
from examples.fitting import fit
from tensorize.base.printer import count, percent, table

FIGURES = ("disc", "square", "triangle", "ring", "cross", "bar", "half disc", "frame")
SIDE = 32
NOISE, TURN = 0.3, 0.3  # of a pixel; radians


# ------------------------------------------------------------------------------------- the task


def images(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S), and of each the number of its figure (B,)."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    labels = torch.randint(len(FIGURES), (number,), generator=generator)
    at = torch.linspace(-1, 1, SIDE)
    size, turn = draw(0.5, 0.8, number, 1, 1), draw(-TURN, TURN, number, 1, 1)
    across = at[None, None, :] - draw(-0.2, 0.2, number, 1, 1)
    down = at[None, :, None] - draw(-0.2, 0.2, number, 1, 1)
    x = (across * turn.cos() + down * turn.sin()) / size
    y = (down * turn.cos() - across * turn.sin()) / size
    figures = torch.stack([inside(name, x, y) for name in FIGURES])
    mask = figures[labels, torch.arange(number)].unsqueeze(1).float()
    ink, paper = draw(0.3, 1, number, 3, 1, 1), draw(-1, 0, number, 3, 1, 1)
    noise = torch.randn(number, 3, SIDE, SIDE, generator=generator)
    return mask * ink + (1 - mask) * paper + NOISE * noise, labels


def inside(figure: str, x: Tensor, y: Tensor) -> Tensor:
    """Where a figure of unit size is: booleans of the shape of the coordinates."""
    radius, box = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
    if figure == "disc":
        return radius < 1
    if figure == "square":
        return box < 0.9
    if figure == "triangle":
        return (y > -0.6) & (y < 1.1 - 1.9 * x.abs())
    if figure == "ring":
        return (radius < 1) & (radius > 0.55)
    if figure == "cross":
        return (box < 1) & (torch.minimum(x.abs(), y.abs()) < 0.3)
    if figure == "bar":
        return (x.abs() < 1.1) & (y.abs() < 0.3)
    if figure == "half disc":
        return (radius < 1.1) & (y > 0)
    return (box < 0.95) & (box > 0.55)


# ------------------------------------------------------------------------------------ the model


def build(width: int, layers: int, patch: int) -> Any:
    """A ``ViTForImageClassification`` with new weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config: Any = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 24, 1),
        intermediate_size=4 * width,
        image_size=SIDE,
        patch_size=patch,
    )
    config.num_labels = len(FIGURES)
    return ViTForImageClassification(config)


def train(model: Any, steps: int, batch: int, generator: torch.Generator) -> float:
    """Train on images that are drawn as they are needed; the mean loss of the last steps."""

    def loss() -> Tensor:
        pixels, labels = images(batch, generator)
        return F.cross_entropy(model(pixel_values=pixels).logits, labels)

    return fit(model, loss, steps, rate=1e-3, decay=0.05)


@torch.no_grad()
def answers(model: Any, pixels: Tensor) -> Tensor:
    """Log probabilities (B, figures)."""
    parts: Iterator[Tensor] = (model(pixel_values=part).logits for part in pixels.split(128))
    return torch.cat(list(parts)).log_softmax(-1)


# --------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Row:
    """What is left of a model at one budget; the dense model's own at None."""

    budget: float | None
    parameters: int
    right: float
    agreement: float
    divergence: float
    predicted: float


def compare(model: Any, budgets: Sequence[float], generator: torch.Generator) -> list[Row]:
    """One analysis, a compressed model for every budget, and what each says of new images."""
    calibration = [{"pixel_values": images(32, generator)[0]} for _ in range(8)]
    pixels, labels = images(1024, generator)
    dense = answers(model, pixels)
    analysis = tensorize.analyze(model, calibration=calibration)
    plans = [analysis.plan(budget) for budget in budgets]
    models = [(None, model, 0.0)] + [
        (budget, tensorize.apply(model, plan), plan.predicted.loss or 0.0)
        for budget, plan in zip(budgets, plans, strict=True)
    ]
    rows = []
    for budget, small, predicted in models:
        said = answers(small, pixels)
        best = said.argmax(-1)
        rows.append(
            Row(
                budget,
                sum(p.numel() for p in small.parameters()),
                float((best == labels).float().mean()),
                float((best == dense.argmax(-1)).float().mean()),
                float((dense.exp() * (dense - said)).sum(-1).mean()),
                predicted,
            )
        )
    return rows


def shown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    headers = ("budget", "parameters", "right", "as the dense one", "KL (nats)", "predicted")
    return table(
        headers,
        [
            (
                "dense" if row.budget is None else percent(row.budget),
                count(row.parameters),
                percent(row.right),
                percent(row.agreement),
                f"{row.divergence:.3g}",
                f"{row.predicted:.3g}",
            )
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Train, compress, print a table; the rows of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = build(options.width, options.layers, options.patch)
    loss = train(model, options.steps, options.batch, generator)
    print(f"trained {options.steps} steps, to a loss of {loss:.3f}")
    rows = compare(model, options.budgets, generator)
    print(shown(rows))
    return rows


if __name__ == "__main__":
    main()
