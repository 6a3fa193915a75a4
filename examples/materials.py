"""A trained interatomic potential, compressed: what becomes of energies, forces and a relaxation?

    make materials

CHGNet (Deng et al., Nature Machine Intelligence 2023; 412 k parameters, trained on 1.5 million
configurations of the Materials Project) gives the energy of a crystal; forces and stress are its
derivatives, taken inside of its forward. The crystals are real ones: the prototypes of AFLOW
(Mehl et al. 2017) that pymatgen brings, each atom displaced at random; those that the potential
itself finds absurd are left out. Most of them calibrate, the others, of structures and often of
elements that were never seen, are what is measured on: in meV an atom, meV/Å and GPa, against the
dense model, whose own errors against quantum mechanics are about 30, 77 and 0.33. Every budget, a
share of the bytes, is met twice: by ranks alone, and by bits and ranks together, which lose less.

Shapes: B crystals, N atoms in all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from tensorize.base.printer import bytes_, interval, number, percent, table

PACKAGES = ("chgnet", "pymatgen", "ase")
INSTALL = "make materials, or pip install -c constraints.txt chgnet pymatgen ase"
DISPLACEMENT = 0.06  # Å, of every coordinate
ENERGY, FORCES, STRESS = "energy, meV/atom", "forces, meV/Å", "stress, GPa"
ABSURD = 5.0  # eV/Å, the largest component of a force
UNUSED = "network.angle_layers.2.*"  # 8 % of CHGNet: what its last angle layer makes is not read
HEALED = 0.6  # budgets below this are healed, on energies and forces, where ranks alone meet them
_BATCH, _HEALED_BATCH = 8, 4


def missing() -> str | None:
    """Why the model cannot be had here, with the way out; None where it can."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: {INSTALL}" if absent else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what these packages print and warn of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------- the crystals


def crystals(number: int, most_atoms: int, seed: int) -> list[Any]:
    """So many of AFLOW's prototypes of up to so many atoms, in an order that the seed gives."""
    with quiet():
        library = importlib.import_module("pymatgen.analysis.prototypes").AFLOW_PROTOTYPE_LIBRARY
        every = [entry["snl"].structure for entry in library]
    fit = [s for s in every if s.is_ordered and 1 < len(s) <= most_atoms and _is_known(s)]
    random.Random(seed).shuffle(fit)
    return fit[:number]


def _is_known(structure: Any) -> bool:
    """Whether CHGNet knows the elements."""
    return max(structure.atomic_numbers) <= 94


def displaced(structure: Any, seed: int) -> Any:
    """The crystal with every atom moved at random."""
    generator = torch.Generator().manual_seed(seed)
    moved = structure.copy()
    shifts = DISPLACEMENT * torch.randn(len(structure), 3, generator=generator)
    for k, shift in enumerate(shifts.tolist()):
        moved.translate_sites([k], shift, frac_coords=False)
    return moved


# ------------------------------------------------------------------------------------ the potential


class Potential(nn.Module):
    """CHGNet from graphs of crystals to what its network makes: energies (B, 1), forces (N, 3).

    The energy is that without the sum over elements, which no factor has a part in.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, graphs: list[Any]) -> dict[str, Tensor]:
        found = self.network(graphs, task="ef")
        with torch.no_grad():
            elements = self.network.composition_model(graphs)
        return {"energy": (found["e"] - elements)[:, None], "forces": torch.cat(found["f"])}


def load_pretrained() -> Potential:
    """The trained potential, version 0.3.0, in evaluation mode.

    Raises:
        SystemExit: a package is missing.
    """
    if reason := missing():
        raise SystemExit(reason)
    with quiet():
        network = importlib.import_module("chgnet.model").CHGNet
        return Potential(network.load(use_device="cpu", verbose=False)).eval()


def graphs_of(potential: Potential, structures: Sequence[Any]) -> list[Any]:
    """What the network reads: atoms, bonds and angles of every crystal."""
    with quiet():
        return [potential.network.graph_converter(structure) for structure in structures]


def is_sane(potential: Potential, graph: Any) -> bool:
    """Whether no force on an atom of a crystal is absurd."""
    return float(potential([graph])["forces"].detach().abs().max()) < ABSURD


def energy_error(found: dict, graphs: Any, dense: dict) -> Tensor:
    """The mean absolute error of energies, meV an atom."""
    return 1000 * (found["energy"] - dense["energy"]).detach().abs().mean()


def force_error(found: dict, graphs: Any, dense: dict) -> Tensor:
    """The mean absolute error of a component of a force, meV/Å."""
    return 1000 * (found["forces"] - dense["forces"]).detach().abs().mean()


METRICS = {ENERGY: energy_error, FORCES: force_error}
OWN_ERRORS = {ENERGY: 30.0, FORCES: 77.0}
RATE = 0.0002  # of healing: the largest step, relative to a parameter's size
HELD_OUT = 3  # batches to judge by while healing


def answers(potential: Any, graphs: list[Any]) -> dict[str, Tensor]:
    """Energies, forces and stresses (B, 3, 3) of crystals, of one run."""
    network = potential.network
    found = network(graphs, task="efs")
    energies = found["e"] - network.composition_model(graphs)
    made = {"energy": energies[:, None], "forces": torch.cat(found["f"])}
    return {name: v.detach() for name, v in {**made, "stress": torch.stack(found["s"])}.items()}


def stress_error(found: dict, graphs: Any, dense: dict) -> Tensor:
    """The mean absolute error of a component of the stress, GPa."""
    return (found["stress"] - dense["stress"]).abs().mean()


# ---------------------------------------------------------------------------------------- the run


def heal(small: nn.Module, dense: Potential, graphs: Sequence[Any], steps: int) -> None:
    """Train all of a compressed model on the dense one's energies and forces, by absolute errors.

    Each counts in units of the dense model's own error, as potentials are trained.
    """
    data = []
    for k in range(0, len(graphs), _HEALED_BATCH):
        batch = list(graphs[k : k + _HEALED_BATCH])
        wanted = {name: value.detach() for name, value in dense(batch).items()}
        data.append({"graphs": batch, **wanted})

    def distance(found: dict, batch: dict) -> Tensor:
        energies = (found["energy"] - batch["energy"]).abs().mean() / OWN_ERRORS[ENERGY]
        forces = (found["forces"] - batch["forces"]).abs().mean() / OWN_ERRORS[FORCES]
        return 1000 * (energies + forces)

    unseen, learnt = data[:HELD_OUT], data[HELD_OUT:]
    how = {"loss_fn": distance, "to_inputs": _graphs_alone, "train": "all"}
    print(tensorize.heal(small, dense, learnt, held_out=unseen, steps=steps, rate=RATE, **how))


def _graphs_alone(batch: dict) -> dict:
    return {"graphs": batch["graphs"]}


@dataclass(frozen=True)
class Row:
    """A model and how it is measured on crystals never seen: its bytes, errors, and intervals."""

    name: str
    bytes: int
    errors: dict[str, float]
    predicted: dict[str, tuple[float, float]]

    @property
    def inside(self) -> bool:
        """Whether every error that was predicted is within its interval."""
        return all(low <= self.errors[n] <= high for n, (low, high) in self.predicted.items())


def measured(
    name: str, small: Any, plan: Any, unseen: list[Any], wanted: list[dict[str, Tensor]]
) -> Row:
    """The errors on batches never seen of a model made by a plan, and what that predicted.

    ``wanted``: the dense model's answers to them.
    """
    sums = dict.fromkeys((*METRICS, STRESS), 0.0)
    for graphs, dense in zip(unseen, wanted, strict=True):
        found = answers(small, graphs)
        for metric, function in {**METRICS, STRESS: stress_error}.items():
            sums[metric] += float(function(found, graphs, dense)) / len(unseen)
    intervals = {m.name: m.interval for m in plan.predicted.metrics}
    return Row(name, plan.predicted.bytes, sums, intervals)


def relaxed(potential: Any, structure: Any, steps: int) -> tuple[float, float]:
    """A crystal relaxed, cell and atoms: its energy in eV an atom, and its volume in Å³ an atom."""
    with quiet():
        optimizer = importlib.import_module("chgnet.model").StructOptimizer(
            model=potential.network, use_device="cpu"
        )
        done = optimizer.relax(structure, steps=steps, fmax=0.05, verbose=False)
    final = done["final_structure"]
    return done["trajectory"].energies[-1] / len(final), final.volume / len(final)


def shown(rows: Sequence[Row]) -> str:
    """The rows as a table, each error with what was predicted of it."""
    names = [*METRICS, STRESS]

    def cell(row: Row, name: str) -> str:
        span = f" ({interval(row.predicted[name])})" if name in row.predicted else ""
        return f"{number(row.errors[name])}{span}"

    body = [(row.name, bytes_(row.bytes), *(cell(row, name) for name in names)) for row in rows]
    return table(("model", "bytes", *names), body)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Compress, measure on crystals never seen, heal, relax; the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--crystals", type=int, default=180)
    parser.add_argument("--unseen", type=int, default=32, help="of them, to measure on")
    parser.add_argument("--most-atoms", type=int, default=12)
    parser.add_argument("--heal", type=int, default=120, help="steps, of budgets below 80 %%")
    parser.add_argument("--relax", type=int, default=30, help="steps, of one crystal never seen")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    potential, seed = load_pretrained(), options.seed
    every = crystals(options.crystals, options.most_atoms, seed)
    structures = [displaced(structure, seed + k) for k, structure in enumerate(every)]
    pairs = zip(structures, graphs_of(potential, structures), strict=True)
    structures, graphs = zip(*(pair for pair in pairs if is_sane(potential, pair[1])), strict=True)
    known = graphs[options.unseen :]
    batches = [list(known[k : k + _BATCH]) for k in range(0, len(known), _BATCH)]
    unseen = [list(graphs[k : k + _BATCH]) for k in range(0, options.unseen, _BATCH)]
    wanted = [answers(potential, graphs) for graphs in unseen]
    data = [{"graphs": batch} for batch in batches]
    begun = time.perf_counter()
    analysis = tensorize.analyze(
        potential, calibration=data, metrics=METRICS, refine=None, precision="auto", seed=seed
    )
    print(f"analysed in {time.perf_counter() - begun:.0f} s, on {len(known)} crystals")
    rows: list[Row] = []
    models: dict[str, Any] = {"dense": potential}
    for budget in sorted(options.budgets, reverse=True):
        kept = percent(budget)
        both = analysis.plan(budget, refine=None)
        ranks = analysis.plan(budget, refine=None, precision=None, ranks={UNUSED: 1})
        for how, plan in (("bits and ranks", both), ("ranks alone", ranks)):
            small = models[how] = tensorize.apply(potential, plan)
            rows.append(measured(f"{kept}, {how}", small, plan, unseen, wanted))
        if options.heal and budget < HEALED:
            heal(small, potential, known, options.heal)
            healed = measured(f"{kept}, healed", small, ranks, unseen, wanted)
            rows.append(replace(healed, predicted={}))
    print(f"\nerrors on {options.unseen} crystals never seen (what was predicted of them, 90 %)")
    print(shown(rows))
    if options.relax:
        crystal = structures[0]
        for name, model in models.items():
            energy, volume = relaxed(model, crystal, options.relax)
            formula = crystal.composition.reduced_formula
            print(f"{formula} relaxed, {name}: {energy:.3f} eV, {volume:.2f} Å³ an atom")
    return rows


if __name__ == "__main__":
    main()
