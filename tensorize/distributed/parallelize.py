"""``tensorize.distributed.parallelize``: a model over the dimensions of a mesh."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tensorize.base.errors import CaptureError
from tensorize.base.sharded import is_sharded
from tensorize.base.tensors import unwrapped
from tensorize.distributed.pipeline import stage_of
from tensorize.distributed.same import check_same
from tensorize.distributed.shapes import SHAPES, shape_of
from tensorize.distributed.styles import split_over

DIMENSIONS = ("pp", "dp", "tp")


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    style: str = "btp",
    compute_dtype: torch.dtype | None = None,
    chunks: int = 1,
) -> nn.Module:
    """Let every process of a mesh hold its part of a model, and compute with the others.

    Parameters become DTensors under the names that they have. ``tp`` splits weights and the
    residual stream, so that only products of a low rank are communicated
    (``tensor_parallel``); ``dp`` shards parameters, gradients and optimizer states (FSDP2), and
    every rank of it takes other data; ``pp`` gives every rank some of the blocks, which
    ``schedule`` runs. Over ``tp``, low rank that stores no identity has it in as many columns of
    every rank's part, or is stored whole where that is predicted to be faster. The model computes
    what it does on one machine, to rounding.

        mesh = init_device_mesh("cuda", (2, 4, 2), mesh_dim_names=("pp", "dp", "tp"))
        model = tensorize.distributed.parallelize(model, mesh)

    Args:
        model: dense or compressed, with the same numbers on every process, or on meta. It is
            changed in place. Make the optimizer after this.
        mesh: of dimensions named ``pp``, ``dp`` and ``tp``, or some of them.
        style: how ``tp`` splits: ``"btp"`` as above; ``"naive"``: each pair of factors by its rank,
            with a sum of every weight's outputs; ``"megatron"``: dense weights alone, in pairs. In
            these two every rank has the whole residual stream.
        compute_dtype: what ``dp`` computes in, while parameters keep their dtype; None: theirs.
        chunks: over ``pp``, how many stages a rank has, each some blocks apart from the others.

    Returns:
        The same model; over ``pp`` a rank's ``Stage``, whose parameters have the names that they
        have in the model.

    Raises:
        CaptureError: the mesh has other dimensions, the model is sharded already, processes hold
            different numbers, a size is not divided, or (``tp`` and ``pp``) no rule is known for
            the model's class.
        AnalysisError: a weight is factorized in a way that is not split, or not in this style
            (``tp`` only).
        TensorizeError: there is no such style.
    """
    names = _named(mesh)
    inner = unwrapped(model)
    if any(is_sharded(parameter) for parameter in inner.parameters()):
        raise CaptureError(
            "the model is sharded already", way_out="one mesh with all dimensions, in one call"
        )
    check_same(inner)
    if "tp" in names:
        split_over(inner, shape_of(inner), mesh["tp"], style)
    if "pp" in names:
        stage = stage_of(inner, shape_of(inner), mesh["pp"], chunks)
        if "dp" in names:
            for part in stage.parts:
                _shard(part, part.of_blocks(), mesh["dp"], compute_dtype)
        return stage
    if "dp" in names:
        _shard(inner, _blocks(inner), mesh["dp"], compute_dtype)
    return model


def _named(mesh: DeviceMesh) -> tuple[str, ...]:
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(DIMENSIONS):
        raise CaptureError(
            f"the mesh has the dimensions {', '.join(names) or 'without names'}",
            way_out=f"init_device_mesh(device, sizes, mesh_dim_names={DIMENSIONS}), or some",
        )
    return names


def _shard(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None,
) -> None:
    """FSDP2: block by block, then what is left."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _blocks(model: nn.Module) -> list[nn.Module]:
    if type(model).__name__ in SHAPES:
        return shape_of(model).of_blocks(model)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    inside = {id(part) for outer in lists for part in outer.modules() if part is not outer}
    return [b for outer in lists if id(outer) not in inside for b in outer if any(b.parameters())]
