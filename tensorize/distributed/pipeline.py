"""Pipeline parallelism: a rank's blocks as stages, with the embedding before the first and the
head after the last, and PyTorch's schedules that run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from tensorize.base.errors import CaptureError, TensorizeError, check_one_of
from tensorize.distributed.shapes import Shape
from tensorize.training.blueprint import pass_on_blueprint

SCHEDULES: dict[str, tuple[type[Any], bool]] = {
    "1f1b": (Schedule1F1B, False),
    "gpipe": (ScheduleGPipe, False),
    "interleaved": (ScheduleInterleaved1F1B, True),
    "zero-bubble": (ScheduleInterleavedZeroBubble, True),
}
"""By name: the schedule, and whether ranks have several stages each."""


class Part(nn.Module):
    """Successive blocks, and the model's ends where they belong; all under their names."""

    held: dict[str, nn.Module]

    def __init__(self, model: nn.Module, shape: Shape, blocks: range, count: int) -> None:
        super().__init__()
        self.shape, self.numbers = shape, blocks
        self.first, self.last = blocks.start == 0, blocks.stop == count
        names = [f"{shape.blocks}.{number}" for number in blocks]
        names += [shape.embedding, *shape.places] if self.first else []
        names += [shape.norm, shape.head] if self.last else []
        names += [shape.rotary] if shape.rotary else []
        self.__dict__["held"] = {name: model.get_submodule(name) for name in names}
        for name, module in self.held.items():
            hang(self, name, module)

    def of_blocks(self) -> list[nn.Module]:
        return [self.get_submodule(f"{self.shape.blocks}.{number}") for number in self.numbers]

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        places = torch.arange(x.shape[1], device=x.device)[None]
        if self.first:
            x = self.get_submodule(shape.embedding)(x)
            for name in shape.places:
                x = x + self.get_submodule(name)(places)
        how: dict[str, Any] = {}
        if shape.rotary:
            turns = self.get_submodule(shape.rotary)(x, places)
            how = {"position_embeddings": turns, "position_ids": places}
        for block in self.of_blocks():
            x = block(x, **how)
        if self.last:
            x = self.get_submodule(shape.head)(self.get_submodule(shape.norm)(x))
        return x


class Stage(nn.Module):
    """What a rank of ``pp`` holds of a model: its parameters, under the names of the whole model.

    ``schedule`` runs it; it computes nothing by itself.
    """

    parts: list[Part]

    def __init__(self, model: nn.Module, shape: Shape, mesh: DeviceMesh, chunks: int) -> None:
        super().__init__()
        self.mesh, self.config = mesh, model.config
        ranks, this = mesh.size(), mesh.get_local_rank()
        count, self.total = len(shape.of_blocks(model)), ranks * chunks
        each, more = divmod(count, self.total)
        ends = [k * each + min(k, more) for k in range(self.total + 1)]
        self.places = [this + k * ranks for k in range(chunks)]
        # Beside the tree, which has the names of the whole model.
        held = [Part(model, shape, range(ends[k], ends[k + 1]), count) for k in self.places]
        self.__dict__["parts"] = held
        for part in held:
            for name, module in part.held.items():
                hang(self, name, module)
        self.train(model.training)

    def train(self, mode: bool = True) -> Stage:
        for part in self.__dict__.get("parts", ()):
            part.train(mode)
        return super().train(mode)


class _Folder(nn.Module):
    """Stands where a module was that holds others."""


def hang(tree: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a tree under its name, with folders on the way."""
    *folders, leaf = name.split(".")
    for folder in folders:
        if folder not in tree._modules:
            tree.add_module(folder, _Folder())
        tree = tree.get_submodule(folder)
    tree.add_module(leaf, module)


def stage_of(model: nn.Module, shape: Shape, mesh: DeviceMesh, chunks: int) -> Stage:
    """This rank's blocks.

    Raises:
        CaptureError: there are fewer blocks than stages, or the model's blocks do not run one
            after the other by themselves.
    """
    count, stages = len(shape.of_blocks(model)), mesh.size() * chunks
    if count < stages:
        raise CaptureError(
            f"the model has {count} blocks for {stages} stages",
            way_out=f"pp={max(1, count // chunks)} with chunks={chunks}",
        )
    config: Any = model.config
    head, embedding = (model.get_submodule(name) for name in (shape.head, shape.embedding))
    if {id(p) for p in head.parameters()} & {id(p) for p in embedding.parameters()}:
        raise CaptureError(
            "the head shares its weight with the embedding, which is in another stage",
            way_out="tie_word_embeddings=False in the configuration, or a mesh without pp",
        )
    if config._attn_implementation == "eager":
        raise CaptureError(
            "without a mask, which stages are not given, its attention would look ahead",
            way_out='attn_implementation="sdpa" in the configuration',
        )
    if getattr(config, "sliding_window", None) is not None:
        raise CaptureError(
            f"its attention has a window of {config.sliding_window}, and stages are given no mask",
            way_out="sliding_window=None in the configuration, or a mesh without pp",
        )
    stage = Stage(model, shape, mesh, chunks)
    pass_on_blueprint(model, stage)
    return stage


class Schedule:
    """Runs a rank's stages over the parts of a batch: ``step(ids)``."""

    def __init__(self, stage: Stage, run: Any) -> None:
        self.stage, self._run = stage, run

    def step(self, ids: Tensor, target: Tensor | None = None) -> Tensor:
        """Forward and backward of one batch, on all ranks; gradients are left on the parameters.

        Args:
            ids: the tokens; every rank of a pipeline is given the same ones.
            target: what ``loss_fn`` is given beside the logits; None: the tokens.

        Returns:
            The mean loss, without gradients, on all ranks.
        """
        stage, target = self.stage, ids if target is None else target
        given = (ids,) if 0 in stage.places else ()
        losses: list[Tensor] = []
        if stage.total - 1 in stage.places:
            self._run.step(*given, target=target, losses=losses)
        else:
            self._run.step(*given)
        mean = torch.zeros((), device=ids.device)
        if losses:
            mean = torch.stack(losses).detach().mean().float()
        group = stage.mesh.get_group()
        dist.broadcast(mean, group_src=stage.mesh.size() - 1, group=group)
        return mean


def schedule(
    stage: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    kind: str = "1f1b",
    *,
    microbatches: int | None = None,
) -> Schedule:
    """How the stages of a pipeline run: ``schedule(stage, loss_fn).step(ids)``.

    Args:
        stage: from ``parallelize`` with a mesh that has ``pp``.
        loss_fn: of the logits and the target of a part of the batch, a mean over it.
        kind: ``"1f1b"``, ``"gpipe"``, or with several stages a rank (``chunks=``)
            ``"interleaved"`` and ``"zero-bubble"``.
        microbatches: the parts of a batch; None: two for every stage.

    Raises:
        TensorizeError: it is no stage, or the schedule is unknown or wants other stages.
    """
    if not isinstance(stage, Stage):
        raise TensorizeError(
            f"a {type(stage).__name__} is no stage of a pipeline",
            way_out='parallelize(model, mesh) with a mesh that has a dimension "pp"',
        )
    check_one_of("kind", kind, SCHEDULES)
    run, several = SCHEDULES[kind]
    if several != (len(stage.places) > 1):
        raise TensorizeError(
            f"{kind!r} runs {'several stages' if several else 'one stage'} a rank, and there "
            f"{'is one' if several else f'are {len(stage.places)}'}",
            way_out=f"parallelize(model, mesh, chunks={2 if several else 1})",
        )
    device = next(stage.parameters()).device
    group = stage.mesh.get_group()
    stages = [
        PipelineStage(part, place, stage.total, device, group=group)
        for part, place in zip(stage.parts, stage.places, strict=True)
    ]
    count = 2 * stage.total if microbatches is None else microbatches
    return Schedule(stage, run(stages if several else stages[0], count, loss_fn=loss_fn))
