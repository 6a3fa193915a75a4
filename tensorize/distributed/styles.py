"""The ways in which ``tp`` splits a model, by their names."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensorize.api.forms import in_parts, plain
from tensorize.base.errors import AnalysisError, check_one_of
from tensorize.distributed.bottlenecks import BottleneckSplit
from tensorize.distributed.same import check_same
from tensorize.distributed.shapes import Shape, Sizes
from tensorize.distributed.split import Split
from tensorize.distributed.whole_stream import MegatronSplit, NaiveSplit
from tensorize.formats.dense import is_dense
from tensorize.formats.registry import named
from tensorize.weight.install import factored

STYLES: dict[str, type[Split]] = {
    "btp": BottleneckSplit,
    "naive": NaiveSplit,
    "megatron": MegatronSplit,
}


def split_over(model: nn.Module, shape: Shape, mesh: DeviceMesh, style: str) -> None:
    """Split a model over the ranks of a mesh of one dimension, in place.

    Raises:
        CaptureError: the ranks do not divide a size of it, or no rule is known for a parameter.
        AnalysisError: a weight is factorized in a way that the style does not split.
    """
    check_one_of("style", style, STYLES)
    sizes = Sizes.of(model, shape)
    sizes.refuse(mesh.size())
    _refuse_other_formats(model)
    kind = STYLES[style]
    kind.refuse(model, mesh.size())
    if kind.by_inputs:
        in_parts(model, mesh.size())
        check_same(model)  # of what was chosen for itself on every rank
    else:
        plain(model)
    kind(model, shape, sizes, mesh).whole_model()


def _refuse_other_formats(model: nn.Module) -> None:
    for name, weight in factored(model):
        inside = weight.spec.format  # of integers, that of what they stand for
        if not (is_dense(inside) or named(inside).pair):
            raise AnalysisError(
                f"it is {weight.format.title}, and only dense and low-rank weights are split over "
                "tp",
                site=name,
                way_out='formats="low_rank", or a mesh with dp alone',
            )
