"""A surrogate for a solver, compressed: how far may it be cut before its forecasts suffer?

    python -m examples.science_surrogate --budgets 0.75 0.5 0.25 --within 1.25
    python -m examples.science_surrogate --operator

The solver is made here: a concentration that is carried by a steady flow of four vortices and
diffuses, ∂c/∂t + u·∇c = ν ∇²c on a periodic square (advection–diffusion), in Fourier space, with
Runge–Kutta steps. A small transformer, or a Fourier neural operator (Li et al. 2021), whose weights
are complex matrices, one for every mode, learns the change over one interval from random initial
fields. A forecast is a roll-out: the surrogate applied to its own result again and again.
The smallest model whose error, over the whole roll-out and against the solver, is within the stated
multiple of the dense surrogate's is the answer.

Shapes: B fields, S points a side, T times, P patches, D width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from examples.fitting import fit
from tensorize.base.printer import count, percent, table
from tensorize.base.tensors import reals

VISCOSITY = 1e-2
INTERVAL, STEPS = 0.25, 10  # time between two states, and steps of the solver in it
SMOOTHNESS = 3.0  # about the largest wave number of initial states


# ------------------------------------------------------------------------------------- the solver


class Solver:
    """Advection–diffusion on a periodic square of side 2π, pseudo-spectral, dealiased (2/3).

    The flow is that of the stream function sin x sin y + ½ cos x: four vortices and a shear.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        frequencies = torch.fft.fftfreq(side, 1 / side)
        self._kx, self._ky = frequencies[None, :], torch.fft.fftfreq(side, 1 / side)[:, None]
        self._square = self._kx.square() + self._ky.square()
        x, y = (2 * torch.pi / side * torch.arange(side)[place] for place in (None, (..., None)))
        self.flow = x.sin() * y.cos(), 0.5 * x.sin() - x.cos() * y.sin()
        kept = side // 3
        self._kept = ((self._kx.abs() <= kept) & (self._ky.abs() <= kept)).float()

    def initial(self, number: int, generator: torch.Generator) -> Tensor:
        """Random smooth fields (B, S, S) of unit variance."""
        white = torch.fft.fft2(torch.randn(number, self.side, self.side, generator=generator))
        envelope = torch.exp(-self._square / SMOOTHNESS**2) * (self._square > 0)
        field = torch.fft.ifft2(white * envelope).real
        return field / field.std((1, 2), keepdim=True)

    def advance(self, field: Tensor) -> Tensor:
        """The fields (B, S, S) one interval later: fourth-order Runge–Kutta."""
        spectrum, step = torch.fft.fft2(field), INTERVAL / STEPS
        for _ in range(STEPS):
            first = self._change(spectrum)
            second = self._change(spectrum + 0.5 * step * first)
            third = self._change(spectrum + 0.5 * step * second)
            fourth = self._change(spectrum + step * third)
            spectrum = spectrum + step / 6 * (first + 2 * second + 2 * third + fourth)
        return torch.fft.ifft2(spectrum).real

    def _change(self, spectrum: Tensor) -> Tensor:
        """-u·∇c + ν ∇²c in Fourier space."""
        dx, dy = self._real(1j * self._kx * spectrum), self._real(1j * self._ky * spectrum)
        carried = torch.fft.fft2(self.flow[0] * dx + self.flow[1] * dy) * self._kept
        return -carried - VISCOSITY * self._square * spectrum

    def _real(self, spectrum: Tensor) -> Tensor:
        return torch.fft.ifft2(spectrum * self._kept).real

    def trajectories(self, number: int, times: int, generator: torch.Generator) -> Tensor:
        """States (T + 1, B, S, S) at the times 0 to T."""
        states = [self.initial(number, generator)]
        for _ in range(times):
            states.append(self.advance(states[-1]))
        return torch.stack(states)


# ---------------------------------------------------------------------------------- the surrogate


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm: (B, P, D) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.query_key_value(self.first(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Surrogate(nn.Module):
    """A vision transformer from a field (B, S, S) to its change over one interval."""

    def __init__(self, side: int, width: int, layers: int, patch: int = 4) -> None:
        super().__init__()
        self.patch, places = patch, (side // patch) ** 2
        self.read = nn.Linear(patch**2, width)
        self.place = nn.Parameter(0.5 * torch.randn(places, width))
        self.blocks = nn.ModuleList(Block(width, max(width // 16, 1)) for _ in range(layers))
        self.norm, self.write = nn.LayerNorm(width), nn.Linear(width, patch**2)

    def forward(self, field: Tensor) -> Tensor:
        rows = field.shape[-1] // self.patch
        patches = field.unflatten(-1, (rows, self.patch)).unflatten(1, (rows, self.patch))
        x = self.read(patches.transpose(2, 3).flatten(3).flatten(1, 2)) + self.place
        for block in self.blocks:
            x = block(x)
        patches = self.write(self.norm(x)).unflatten(1, (rows, rows))
        patches = patches.unflatten(-1, (self.patch, self.patch)).transpose(2, 3)
        return patches.flatten(3).flatten(1, 2)


class SpectralConvolution(nn.Module):
    """A complex matrix for each of the lowest modes: fields (B, D, S, S) to the same."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        shape = width, width, modes, modes
        self.rising = nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / width)
        self.falling = nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / width)

    def forward(self, field: Tensor) -> Tensor:
        spectrum, kept = torch.fft.rfft2(field), self.modes
        result = torch.zeros_like(spectrum)
        for rows, weight in ((slice(kept), self.rising), (slice(-kept, None), self.falling)):
            low = spectrum[:, :, rows, :kept]
            result[:, :, rows, :kept] = torch.einsum("bixy,ioxy->boxy", low, weight)
        return torch.fft.irfft2(result, s=field.shape[-2:])


class Operator(nn.Module):
    """A Fourier neural operator from a field (B, S, S) to its change over one interval."""

    def __init__(self, width: int, layers: int, modes: int = 8) -> None:
        super().__init__()
        self.read, self.write = nn.Conv2d(3, width, 1), nn.Conv2d(width, 1, 1)
        self.spectral = nn.ModuleList(SpectralConvolution(width, modes) for _ in range(layers))
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))

    def forward(self, field: Tensor) -> Tensor:
        side = torch.linspace(0, 1, field.shape[-1], device=field.device)
        places = torch.stack(torch.meshgrid(side, side, indexing="ij"))
        places = places.expand(len(field), -1, -1, -1)
        x = self.read(torch.cat([field.unsqueeze(1), places], dim=1))
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = x + F.gelu(spectral(x) + local(x))
        return self.write(x).squeeze(1)


def train(
    model: nn.Module, states: Tensor, steps: int, batch: int, generator: torch.Generator
) -> float:
    """Learn the change from each state (T + 1, B, S, S) to the next; the last relative error."""
    now, change = states[:-1].flatten(0, 1), states.diff(dim=0).flatten(0, 1)

    def loss() -> Tensor:
        rows = torch.randint(len(now), (batch,), generator=generator)
        return (model(now[rows]) - change[rows]).square().mean() / change.square().mean()

    return math.sqrt(fit(model, loss, steps, rate=3e-3))


@torch.no_grad()
def roll_out(model: nn.Module, states: Tensor) -> Tensor:
    """The relative error (T,) of forecasts from the first states (T + 1, B, S, S), by time."""
    field, errors = states[0], []
    for truth in states[1:]:
        field = field + model(field)
        errors.append((field - truth).norm() / truth.norm())
    return torch.stack(errors)


# --------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Row:
    """A model at one budget (None: dense), the error of its forecasts, by time, and the verdict."""

    budget: float | None
    parameters: int
    errors: tuple[float, ...]
    within: bool

    @property
    def mean(self) -> float:
        return sum(self.errors) / len(self.errors)


def compare(
    model: nn.Module, budgets: Sequence[float], within: float, states: Tensor, tests: Tensor
) -> list[Row]:
    """The dense surrogate, and one for every budget, calibrated on ``states``."""
    calibration = list(states[:-1].flatten(0, 1)[:256].split(32))
    analysis = tensorize.analyze(model, calibration=calibration)
    models: list[tuple[float | None, nn.Module]] = [(None, model)]
    for budget in sorted(budgets, reverse=True):
        models.append((budget, tensorize.apply(model, analysis.plan(budget))))
    rows: list[Row] = []
    for budget, small in models:
        errors = tuple(roll_out(small, tests).tolist())
        size = sum(map(reals, small.parameters()))
        limit = within * rows[0].mean if rows else math.inf
        rows.append(Row(budget, size, errors, sum(errors) / len(errors) <= limit))
    return rows


def chosen(rows: Sequence[Row]) -> Row:
    """The smallest model whose forecasts are within the stated error; the dense one is."""
    return min((row for row in rows if row.within), key=lambda row: row.parameters)


def shown(rows: Sequence[Row], persistence: Tensor) -> str:
    """The rows as a table, errors at the first, the middle and the last time."""
    last = len(persistence) - 1
    times = sorted({0, last // 2, last})
    headers = ("model", "parameters", *(f"error at t={INTERVAL * (t + 1):g}" for t in times), "ok")

    def cells(errors: Sequence[float]) -> list[str]:
        return [percent(errors[t]) for t in times]

    body = [
        (
            "dense" if row.budget is None else percent(row.budget),
            count(row.parameters),
            *cells(row.errors),
            "yes" if row.within else "no",
        )
        for row in rows
    ]
    return table(headers, [*body, ("no change", "–", *cells(persistence.tolist()), "–")])


def main(arguments: Sequence[str] | None = None) -> tuple[list[Row], Tensor]:
    """Solve, learn, compress, forecast; the rows, and the error of forecasting no change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.35, 0.25])
    parser.add_argument("--within", type=float, default=1.25, help="of the dense model's error")
    parser.add_argument("--operator", action="store_true", help="a Fourier neural operator")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--width", type=int, help="96, of an operator 20")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, help="1500, of an operator 1000")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--fields", type=int, default=128, help="initial states to learn from")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    solver = Solver(options.side)
    states = solver.trajectories(options.fields, options.times, generator)
    tests = solver.trajectories(16, options.times, generator)
    model: nn.Module
    steps = options.steps or (1000 if options.operator else 1500)
    if options.operator:
        model = Operator(options.width or 20, options.layers, modes=options.side // 4)
    else:
        model = Surrogate(options.side, options.width or 96, options.layers)
    error = train(model, states, steps, options.batch, generator)
    print(f"trained {steps} steps: the change of one interval is off by {percent(error)}")
    rows = compare(model, options.budgets, options.within, states, tests)
    persistence = torch.stack([(tests[0] - truth).norm() / truth.norm() for truth in tests[1:]])
    print(shown(rows, persistence))
    best = chosen(rows)
    kept = percent(best.parameters / rows[0].parameters)
    print(
        f"within {options.within:g} times the dense model's error over {options.times} intervals: "
        f"{count(best.parameters)} parameters, {kept} of them"
    )
    return rows, persistence


if __name__ == "__main__":
    main()
