"""Weather on a plane, learnt by a transformer of several scales and compressed: do forecasts hold?

    python -m examples.weather --budgets 0.75 0.5 0.35 --within 1.1 --html weather.html

The weather is made here: the shallow-water equations on a rotating, periodic plane of 4,000 km,
∂u/∂t = (ζ + f) k × u - ∇(g h + |u|²/2), ∂h/∂t = -∇·((H + h) u), in Fourier space with Runge-Kutta
steps. Eddies of all sizes stir each other, and send out waves. A small transformer learns the
change over 90 minutes: windows of fine patches, shifted from block to block, around attention over
all of the coarse ones (the shape of Swin, Liu et al. 2021, and Pangu-Weather, Bi et al. 2023). A
forecast is a roll-out, the model applied to its own result for half a day.

A mean error alone praises fields that are smeared out. So a compressed model is right only if the
winds' error is within the stated multiple of the dense model's over the whole forecast, and the
energy of every band of wave lengths at its end is the dense model's within a stated share.

Shapes: B states, C fields (winds u and v, height h), S points a side, T times, K wave numbers,
P patches, D width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from examples.fitting import fit
from tensorize.base.printer import count, interval, number, percent, table

LENGTH = 4e6  # m, of a side
ROTATION = 1e-4  # 1/s, the Coriolis parameter f
GRAVITY, DEPTH = 9.81, 100.0  # m/s², m: waves run at 31 m/s, the radius of deformation is 310 km
WIND = 8.0  # m/s, the root of the mean square of the first winds
LARGEST = 3.0  # the wave number above which the first eddies become weaker
DAMPING = 1e-5  # 1/s, of the smallest waves; it goes with the fourth power of the wave number
INTERVAL, STEPS = 1.5 * 3600.0, 6  # s between two states, and steps of the solver in it
SPIN_UP = 8  # intervals before the first state, in which eddies and waves develop
BANDS = {"above 1,100 km": (1, 3), "500 to 1,100 km": (4, 7), "below 500 km": (8, 10)}
"""Bands of wave lengths by their first and last wave numbers."""
WIND_ERROR = "wind, m/s"


# ------------------------------------------------------------------------------------- the solver


class Solver:
    """Shallow water on a rotating, periodic plane: pseudo-spectral, dealiased (2/3)."""

    def __init__(self, side: int) -> None:
        self.side = side
        numbers = torch.fft.fftfreq(side, 1 / side)
        rows, columns = numbers[:, None], numbers[None, : side // 2 + 1].abs()
        self.wave_number = (rows.square() + columns.square()).sqrt()
        self._ky, self._kx = (2j * math.pi / LENGTH * k for k in (rows, columns))
        kept = side // 3
        self._kept = ((rows.abs() <= kept) & (columns <= kept)).float()
        self._damping = DAMPING * (self.wave_number / kept) ** 4

    @property
    def bands(self) -> dict[str, tuple[int, int]]:
        """The bands of which there are waves."""
        return {band: ends for band, ends in BANDS.items() if ends[0] <= self.side // 3}

    def balanced(self, number: int, generator: torch.Generator) -> Tensor:
        """Random states (B, C, S, S) in which the slope of the height holds the winds' rotation."""
        white = torch.fft.rfft2(torch.randn(number, self.side, self.side, generator=generator))
        envelope = (1 + (self.wave_number / LARGEST) ** 2) ** -1.5 * self._kept
        stream = white * envelope * (self.wave_number > 0)
        spectra = [-self._ky * stream, self._kx * stream, ROTATION / GRAVITY * stream]
        state = torch.fft.irfft2(torch.stack(spectra, 1), s=(self.side, self.side))
        speed = state[:, :2].square().sum(1).mean((1, 2)).sqrt()
        return state * (WIND / speed)[:, None, None, None]

    def advance(self, state: Tensor) -> Tensor:
        """The states (B, C, S, S) one interval later: fourth-order Runge-Kutta."""
        spectra, step = torch.fft.rfft2(state), INTERVAL / STEPS
        for _ in range(STEPS):
            first = self._change(spectra)
            second = self._change(spectra + 0.5 * step * first)
            third = self._change(spectra + 0.5 * step * second)
            fourth = self._change(spectra + step * third)
            spectra = spectra + step / 6 * (first + 2 * second + 2 * third + fourth)
        return self._fields(spectra)

    def _change(self, spectra: Tensor) -> Tensor:
        vorticity = self._kx * spectra[:, 1] - self._ky * spectra[:, 0]
        fields = self._fields(torch.cat([spectra, vorticity[:, None]], 1))
        u, v, h, turning = fields.unbind(1)
        turning = turning + ROTATION
        products = [turning * v, -turning * u, (u.square() + v.square()) / 2]
        products += [(DEPTH + h) * u, (DEPTH + h) * v]
        of_u, of_v, energy, flux_x, flux_y = (
            torch.fft.rfft2(torch.stack(products, 1)) * self._kept
        ).unbind(1)
        head = GRAVITY * spectra[:, 2] + energy
        inflow = -(self._kx * flux_x + self._ky * flux_y)
        change = torch.stack([of_u - self._kx * head, of_v - self._ky * head, inflow], 1)
        return change - self._damping * spectra

    def _fields(self, spectra: Tensor) -> Tensor:
        return torch.fft.irfft2(spectra, s=(self.side, self.side))

    def trajectories(self, number: int, times: int, generator: torch.Generator) -> Tensor:
        """States (T + 1, B, C, S, S), an interval apart, after the spin-up."""
        states = [self.balanced(number, generator)]
        for _ in range(SPIN_UP + times):
            states.append(self.advance(states[-1]))
        return torch.stack(states[SPIN_UP:])

    def energy(self, state: Tensor) -> Tensor:
        """Kinetic energy (K,) by wave number 0 to S / 2 of states (B, C, S, S), in m²/s²; a mean
        over the states. The sum over all wave numbers is half the mean square of the winds."""
        spectra = torch.fft.rfft2(state[:, :2].double(), norm="forward")
        twice = torch.full(spectra.shape[-1:], 2.0, dtype=torch.float64)
        twice[0] = 1.0  # of the others the half with negative wave numbers is not stored
        if self.side % 2 == 0:
            twice[-1] = 1.0
        density = 0.5 * (spectra.abs().square() * twice).sum(1).mean(0)
        band = self.wave_number.round().long().clamp_max(self.side // 2).flatten()
        found = torch.zeros(self.side // 2 + 1, dtype=torch.float64)
        return found.index_add_(0, band, density.flatten())


# -------------------------------------------------------------------------------------- the model


class Block(nn.Module):
    """Attention within windows of ``window`` patches a side, shifted by ``shift``, and a two-layer
    network, each behind a norm: patches (B, rows, columns, D) to the same. The plane is periodic:
    what is shifted out on one side comes in on the other, and no mask is needed."""

    def __init__(self, width: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.windows, self.shift, self.heads = (
            window,
            side // window,
            shift,
            width // 16,
        )
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.place = nn.Parameter(torch.zeros(self.heads, window**2, window**2))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attended(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))

    def _attended(self, x: Tensor) -> Tensor:
        n, w = self.windows, self.window
        x = x.roll((-self.shift, -self.shift), (1, 2)).unflatten(2, (n, w)).unflatten(1, (n, w))
        x = x.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # windows, their patches, width
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.place)
        x = self.out(x.transpose(1, 2).flatten(2)).unflatten(0, (-1, n, n)).unflatten(3, (w, w))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((self.shift, self.shift), (1, 2))


class Forecaster(nn.Module):
    """From a state (B, C, S, S) to its change over one interval, in the units of ``Scales``.

    Fine patches of two points meet within windows, coarse ones of four all of each other; what the
    fine ones knew is added when the coarse ones are split again.
    """

    def __init__(self, side: int, width: int, coarse_layers: int, window: int = 4) -> None:
        super().__init__()
        fine, coarse = side // 2, side // 4
        self.read, self.write = nn.Linear(12, width), nn.Linear(width, 12)
        shifts = (0, window // 2)
        self.down = nn.ModuleList(Block(width, fine, window, shift) for shift in shifts)
        self.up = nn.ModuleList(Block(width, fine, window, shift) for shift in shifts)
        self.merge, self.split = nn.Linear(4 * width, 2 * width), nn.Linear(2 * width, 4 * width)
        self.middle = nn.ModuleList(
            Block(2 * width, coarse, coarse, 0) for _ in range(coarse_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, state: Tensor) -> Tensor:
        x = self.read(_merged(state.movedim(1, -1)))
        for block in self.down:
            x = block(x)
        y = self.merge(_merged(x))
        for block in self.middle:
            y = block(y)
        x = x + _split(self.split(y))
        for block in self.up:
            x = block(x)
        return _split(self.write(self.norm(x))).movedim(-1, 1)


def _merged(x: Tensor) -> Tensor:
    """(B, 2 rows, 2 columns, D) as (B, rows, columns, 4 D)."""
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return x.transpose(2, 3).flatten(3)


def _split(x: Tensor) -> Tensor:
    """(B, rows, columns, 4 D) as (B, 2 rows, 2 columns, D): the inverse of ``_merged``."""
    x = x.unflatten(3, (2, 2, -1)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


@dataclass(frozen=True)
class Scales:
    """Units of the model: the spread of every field (C, 1, 1), and of its change."""

    state: Tensor
    change: Tensor

    @classmethod
    def of(cls, states: Tensor) -> Scales:
        """Those of states (T + 1, B, C, S, S)."""
        every = (0, 1, 3, 4)
        found = (x.square().mean(every).sqrt()[:, None, None] for x in (states, states.diff(dim=0)))
        return cls(*found)


def train(
    model: Forecaster,
    scales: Scales,
    states: Tensor,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> float:
    """Learn the change from each state (T + 1, B, C, S, S) to the next; the last relative error."""
    now = (states[:-1] / scales.state).flatten(0, 1)
    change = (states.diff(dim=0) / scales.change).flatten(0, 1)

    def loss() -> Tensor:
        rows = torch.randint(len(now), (batch,), generator=generator)
        return (model(now[rows]) - change[rows]).square().mean()

    return math.sqrt(fit(model, loss, steps, rate=3e-3))


@torch.no_grad()
def forecast(model: nn.Module, scales: Scales, state: Tensor, times: int) -> Tensor:
    """States (T + 1, B, C, S, S): the first (B, C, S, S), and so many intervals of a roll-out."""
    states = [state]
    for _ in range(times):
        state = state + scales.change * model(state / scales.state)
        states.append(state)
    return torch.stack(states)


def wind_error(one: Tensor, other: Tensor) -> Tensor:
    """The root of the mean square of the difference of winds (..., C, S, S), m/s."""
    return (one - other)[..., :2, :, :].square().sum(-3).mean((-1, -2)).mean(-1).sqrt()


# ---------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Row:
    """A model at one budget (None: dense), measured by its forecasts of half a day.

    ``errors``: of the winds at every time, m/s. ``bands``: kinetic energy at the end, relative to
    the true one, by band. ``step``: how far the winds are from the dense model's after one interval
    in m/s, and where it was predicted to be.
    """

    budget: float | None
    parameters: int
    errors: tuple[float, ...]
    bands: dict[str, float]
    step: float = 0.0
    predicted: tuple[float, float] = (0.0, 0.0)

    @property
    def mean(self) -> float:
        return sum(self.errors) / len(self.errors)

    def holds(self, dense: Row, within: float, energy: float) -> bool:
        """Whether errors and every band's energy are as near the dense model's as was stated."""
        near = (abs(self.bands[b] / dense.bands[b] - 1) <= energy for b in dense.bands)
        return self.mean <= within * dense.mean and all(near)


def measured(
    name: float | None, model: nn.Module, scales: Scales, solver: Solver, tests: Tensor
) -> Row:
    """The forecasts of a model from the first of the true states (T + 1, B, C, S, S)."""
    found = forecast(model, scales, tests[0], len(tests) - 1)
    errors = tuple(wind_error(found, tests).tolist()[1:])
    energies = [solver.energy(states[-1]) for states in (found, tests)]
    bands = {
        band: float(energies[0][low : high + 1].sum() / energies[1][low : high + 1].sum())
        for band, (low, high) in solver.bands.items()
    }
    return Row(name, sum(p.numel() for p in model.parameters()), errors, bands)


def report(
    dense: Forecaster,
    small: Mapping[str, nn.Module],
    scales: Scales,
    solver: Solver,
    tests: Tensor,
) -> tensorize.Evaluation:
    """All of it in one: outputs of a step, size, speed, and the forecasts as tasks."""
    hours = f"{INTERVAL / 3600 * (len(tests) - 1):g} h"

    def wind(model: nn.Module) -> float:
        return measured(None, model, scales, solver, tests).errors[-1]

    def left(band: str) -> Callable[[nn.Module], float]:
        return lambda model: measured(None, model, scales, solver, tests).bands[band]

    tasks = {f"wind off at {hours}, m/s": wind}
    tasks |= {f"energy {band}, of true": left(band) for band in solver.bands}
    unseen = list((tests[:-1] / scales.state).flatten(0, 1).split(16))
    return tensorize.evaluate(small, dense, unseen, tasks=tasks)


def compare(
    model: Forecaster,
    budgets: Sequence[float],
    scales: Scales,
    solver: Solver,
    states: Tensor,
    tests: Tensor,
) -> tuple[list[Row], dict[str, nn.Module]]:
    """The dense model and one for every budget, calibrated on ``states``; the latter by name."""

    def step_error(found: Tensor, batch: Tensor, dense: Tensor) -> Tensor:
        return wind_error(scales.change * found, scales.change * dense)

    calibration = list((states[:-1] / scales.state).flatten(0, 1)[::2][:128].split(16))
    analysis = tensorize.analyze(
        model, calibration=calibration, metrics={WIND_ERROR: step_error}, refine=None
    )
    rows = [measured(None, model, scales, solver, tests)]
    unseen, models = tests[0] / scales.state, dict[str, nn.Module]()
    for budget in sorted(budgets, reverse=True):
        plan = analysis.plan(budget, refine=None)
        small = models[f"{percent(budget)} kept"] = tensorize.apply(model, plan)
        row = measured(budget, small, scales, solver, tests)
        with torch.no_grad():
            step = float(step_error(small(unseen), unseen, model(unseen)))
        span = plan.predicted.metric(WIND_ERROR).interval
        rows.append(Row(budget, row.parameters, row.errors, row.bands, step, span))
    return rows, models


def chosen(rows: Sequence[Row], within: float, energy: float) -> Row:
    """The smallest model whose forecasts hold; the dense one's do."""
    dense = rows[0]
    fit = (row for row in rows if row.holds(dense, within, energy))
    return min(fit, key=lambda row: row.parameters)


def shown(rows: Sequence[Row], persistence: Sequence[float], within: float, energy: float) -> str:
    """Two tables: the winds' errors at some times, and the energy by band at the end."""
    last = len(persistence) - 1
    times = sorted({0, last // 2, last})
    hours = [f"{INTERVAL / 3600 * (t + 1):g} h" for t in times]
    winds, bands = [], []
    for row in rows:
        name = "dense" if row.budget is None else percent(row.budget)
        step = "–"
        if row.budget is not None:
            step = f"{number(row.step)} ({interval(row.predicted)})"
        winds.append((name, count(row.parameters), *(number(row.errors[t]) for t in times), step))
        holds = "yes" if row.holds(rows[0], within, energy) else "no"
        bands.append((name, *map(percent, row.bands.values()), holds))
    winds.append(("no change", "–", *(number(persistence[t]) for t in times), "–"))
    headers = ("wind, m/s off", "parameters", *hours, "off dense in a step (predicted)")
    return f"{table(headers, winds)}\n\n{table(('energy left', *rows[0].bands, 'holds'), bands)}"


def main(arguments: Sequence[str] | None = None) -> tuple[list[Row], list[float]]:
    """Solve, learn, compress, forecast; the rows, and the winds' errors of no change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.75, 0.5, 0.35])
    parser.add_argument("--within", type=float, default=1.1, help="of the dense model's error")
    parser.add_argument("--energy", type=float, default=0.1, help="of each band, off the dense's")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--layers", type=int, default=4, help="blocks of coarse patches")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--trajectories", type=int, default=96, help="to learn from")
    parser.add_argument("--times", type=int, default=8, help="intervals of a forecast")
    parser.add_argument("--html", metavar="PAGE", help="write all of it, with speed, as a page")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    solver = Solver(options.side)
    states = solver.trajectories(options.trajectories, options.times, generator)
    tests = solver.trajectories(16, options.times, generator)
    scales = Scales.of(states)
    model = Forecaster(options.side, options.width, options.layers)
    error = train(model, scales, states, options.steps, options.batch, generator)
    print(f"trained {options.steps} steps: the change of one interval is off by {percent(error)}")
    rows, small = compare(model, options.budgets, scales, solver, states, tests)
    persistence = wind_error(tests[:1], tests[1:]).tolist()
    print(shown(rows, persistence, options.within, options.energy))
    best = chosen(rows, options.within, options.energy)
    kept = percent(best.parameters / rows[0].parameters)
    print(
        f"winds within {options.within:g} times the dense model's error over the forecast, energy "
        f"within {percent(options.energy)} of its in every band: {count(best.parameters)} "
        f"parameters, {kept} of them"
    )
    if options.html:
        report(model, small, scales, solver, tests).to_html(options.html)
    return rows, persistence


if __name__ == "__main__":
    main()
