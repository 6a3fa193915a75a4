"""Neural operators and weather models of other people's packages: which compile at a quarter?

    pip install --no-deps neuraloperator torch-harmonics e3nn opt_einsum_fx nvidia-physicsnemo …
    python -m benchmarks.operators             # or the names of some

Small models with random weights, each compiled to a half and a quarter of its parameters (a complex
one counts as two) with eight samples or so: what is kept, or the reason that it is not. What is not
installed is said to be missing. The loss is of no interest: nothing was trained.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import keep
from tensorize.base.errors import TensorizeError
from tensorize.base.printer import percent, table
from tensorize.base.tensors import reals

BUDGETS = (0.5, 0.25)
Made = tuple[nn.Module, Callable[[], Any]]
"""A model, and what draws a batch."""


def _of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _operator(kind: str, side: tuple[int, int] = (16, 16), **options: Any) -> Made:
    sizes = {"in_channels": 1, "out_channels": 1, "hidden_channels": 24, "n_layers": 2}
    model = _of("neuralop.models", kind)(**{"n_modes": (8, 8), **sizes, **options})
    return model, lambda: torch.randn(4, 1, *side)


def uno() -> Made:
    model = _of("neuralop.models", "UNO")(
        in_channels=1, out_channels=1, hidden_channels=16, lifting_channels=16, n_layers=4,
        projection_channels=16, uno_out_channels=[16, 24, 24, 16],
        uno_n_modes=[[8, 8], [6, 6], [6, 6], [8, 8]], channel_mlp_skip="linear",
        uno_scalings=[[1, 1], [0.5, 0.5], [1, 1], [2, 2]],
    )  # fmt: skip
    return model, lambda: torch.randn(4, 1, 16, 16)


def gino() -> Made:
    model = _of("neuralop.models", "GINO")(
        in_channels=3, out_channels=1, gno_coord_dim=3, in_gno_radius=0.5, out_gno_radius=0.5,
        fno_n_modes=(4, 4, 4), fno_hidden_channels=16, fno_lifting_channel_ratio=2, fno_n_layers=2,
        gno_use_open3d=False, gno_use_torch_scatter=False,
    )  # fmt: skip
    side = torch.linspace(0, 1, 5)
    grid = torch.stack(torch.meshgrid(side, side, side, indexing="ij"), -1)[None]
    places = torch.rand(1, 20, 3)

    def draw() -> dict[str, Tensor]:
        x = torch.randn(1, 20, 3)
        return {"input_geom": places, "latent_queries": grid, "output_queries": places, "x": x}

    return model, draw


def _on_a_sphere(module: str, kind: str) -> Made:
    model = _of(f"torch_harmonics.examples.models.{module}", kind)(
        img_size=(16, 32), in_chans=2, out_chans=2, embed_dim=24, num_layers=2, scale_factor=2
    )
    return model, lambda: torch.randn(4, 2, 16, 32)


def e3nn_gates() -> Made:
    model = _of("e3nn.nn.models.gate_points_2101", "Network")(
        irreps_in="4x0e", irreps_hidden="16x0e+8x1o", irreps_out="1x0e", irreps_node_attr="0e",
        irreps_edge_attr="1x0e+1x1o", layers=2, max_radius=1.5, number_of_basis=8, radial_layers=1,
        radial_neurons=32, num_neighbors=4.0, num_nodes=6.0, reduce_output=True,
    )  # fmt: skip

    def draw() -> tuple[dict[str, Tensor]]:
        molecule = torch.arange(2).repeat_interleave(6)
        return ({"pos": torch.randn(12, 3), "x": torch.randn(12, 4), "batch": molecule},)

    return model, draw


def afno() -> Made:
    model = _of("physicsnemo.models.afno", "AFNO")(
        inp_shape=[16, 32], in_channels=2, out_channels=2, patch_size=[4, 4], embed_dim=48,
        depth=2, num_blocks=4,
    )  # fmt: skip
    return model, lambda: torch.randn(4, 2, 16, 32)


def transolver() -> Made:
    model = _of("physicsnemo.models.transolver", "Transolver")(
        functional_dim=2, out_dim=1, embedding_dim=2, n_layers=2, n_hidden=32, n_head=4,
        slice_num=8, use_te=False,
    )  # fmt: skip
    return model, lambda: (torch.randn(2, 40, 2), torch.randn(2, 40, 2))


def pangu() -> Made:
    model = _of("physicsnemo.models.pangu", "Pangu")(
        img_size=(32, 64), embed_dim=24, num_heads=(2, 4, 4, 2), window_size=(2, 4, 4)
    )
    return model, lambda: torch.randn(1, 4 + 3 + 5 * 13, 32, 64)


MODELS: dict[str, Callable[[], Made]] = {
    "FNO": lambda: _operator("FNO"),
    "TFNO, dense": lambda: _operator("TFNO", factorization="dense"),
    "TFNO, Tucker": lambda: _operator("TFNO", factorization="tucker", rank=0.5),
    "SFNO": lambda: _operator("SFNO", (32, 64), n_modes=(16, 16)),
    "UNO": uno,
    "GINO": gino,
    "SFNO of torch-harmonics": lambda: _on_a_sphere("sfno", "SphericalFourierNeuralOperator"),
    "local SFNO of torch-harmonics": lambda: _on_a_sphere("lsno", "LocalSphericalNeuralOperator"),
    "e3nn gates": e3nn_gates,
    "AFNO (FourCastNet)": afno,
    "Transolver": transolver,
    "Pangu": pangu,
}


def compiled(name: str) -> dict[str, Any]:
    """What became of one model: shares by budget, or why there are none."""
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some print as they are built
            model, draw = MODELS[name]()
            data = [draw() for _ in range(4)]
            model.eval()
    except ImportError as error:
        return {"missing": str(error)}
    whole = sum(map(reals, model.parameters()))
    found: dict[str, Any] = {"parameters": whole, "kept": {}, "why": {}}
    try:
        analysis = tensorize.analyze(model, calibration=data, refine=None)
    except TensorizeError as error:
        return found | {"why": {"analysis": error.cause}}
    for budget in BUDGETS:
        try:
            small = tensorize.apply(model, analysis.plan(budget, refine=None))
        except TensorizeError as error:
            found["why"][str(budget)] = error.cause
            continue
        found["kept"][str(budget)] = sum(map(reals, small.parameters())) / whole
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}")
    wanted = parser.parse_args().names or list(MODELS)
    warnings.simplefilter("ignore")  # of other people's models
    found = {name: compiled(name) for name in wanted}
    if set(wanted) == set(MODELS):
        keep("operators", found)

    def cell(result: dict[str, Any], budget: float) -> str:
        share = result.get("kept", {}).get(str(budget))
        return "–" if share is None else percent(share)

    rows = [(name, *(cell(found[name], budget) for budget in BUDGETS)) for name in wanted]
    print(table(("model", *map(percent, BUDGETS)), rows))
    for name in wanted:
        for which, why in (found[name].get("why") or {}).items():
            print(f"\n{name} at {which}: {why}")
        if missing := found[name].get("missing"):
            print(f"\n{name}: {missing}")


if __name__ == "__main__":
    main()
