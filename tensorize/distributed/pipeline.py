"""Pipeline parallelism: a rank's blocks as stages, with the embedding before the first and the
head after the last, and PyTorch's schedules that run them.

A weight that stages of several ranks hold, as a head that is tied to the embedding, stays one: its
values are the first one's before a batch, and its gradient is the sum of theirs after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
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
from tensorize.distributed.matrices import local
from tensorize.distributed.shapes import Shape
from tensorize.reports.attach import attach, known_report
from tensorize.training.blueprint import pass_on_blueprint

SCHEDULES: dict[str, tuple[type[Any], bool]] = {
    "1f1b": (Schedule1F1B, False),
    "gpipe": (ScheduleGPipe, False),
    "interleaved": (ScheduleInterleaved1F1B, True),
    "zero-bubble": (ScheduleInterleavedZeroBubble, True),
}
"""By name: the schedule, and whether ranks have several stages each."""


def _modules_of(shape: Shape, blocks: range, count: int) -> list[str]:
    """The names of what a stage of these blocks holds, of so many that there are."""
    names = [f"{shape.blocks}.{number}" for number in blocks]
    names += [shape.embedding, *shape.places] if blocks.start == 0 else []
    names += [shape.norm, shape.head] if blocks.stop == count else []
    return [*names, shape.rotary] if shape.rotary else names


class Part(nn.Module):
    """Successive blocks, and the model's ends where they belong; all under their names."""

    held: dict[str, nn.Module]

    def __init__(self, model: nn.Module, shape: Shape, blocks: range, count: int) -> None:
        super().__init__()
        self.shape, self.numbers = shape, blocks
        self.first, self.last = blocks.start == 0, blocks.stop == count
        names = _modules_of(shape, blocks, count)
        self.__dict__["held"] = {name: model.get_submodule(name) for name in names}
        for name, module in self.held.items():
            hang(self, name, module, shape)

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
    way_to_save = (
        "tensorize.distributed.save(stage, optimizer, run, step=step).wait(), and in one process "
        "tensorize.distributed.load(model, optimizer, run) and tensorize.save(model, directory)"
    )

    def __init__(self, model: nn.Module, shape: Shape, mesh: DeviceMesh, chunks: int) -> None:
        super().__init__()
        self.mesh, self.config = mesh, model.config
        ranks, this = mesh.size(), mesh.get_local_rank()
        count, self.total = len(shape.of_blocks(model)), ranks * chunks
        each, more = divmod(count, self.total)
        ends = [k * each + min(k, more) for k in range(self.total + 1)]
        blocks = [range(*pair) for pair in pairwise(ends)]
        self.ties = _ties(model, [_modules_of(shape, own, count) for own in blocks], mesh)
        self.places = [this + k * ranks for k in range(chunks)]
        # Beside the tree, which has the names of the whole model.
        held = [Part(model, shape, blocks[k], count) for k in self.places]
        self.__dict__["parts"] = held
        for part in held:
            for name, module in part.held.items():
                hang(self, name, module, shape)
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            "a stage of a pipeline computes nothing by itself",
            way_out="tensorize.distributed.schedule(stage, loss_fn).step(ids), and for what runs a "
            "model itself (heal, evaluate) a mesh without pp",
        )

    def train(self, mode: bool = True) -> Stage:
        for part in self.__dict__.get("parts", ()):
            part.train(mode)
        return super().train(mode)


@dataclass(frozen=True)
class Tie:
    """A parameter that this rank of ``pp`` and others hold: the first of its names in the model,
    the one that it has here, and all of these ranks, that of the first stage first."""

    first: str
    here: str
    ranks: tuple[int, ...]


def _ties(model: nn.Module, stages: Sequence[Sequence[str]], mesh: DeviceMesh) -> list[Tie]:
    """What this rank has in common with others, of stages that hold modules of these names.

    Raises:
        CaptureError: two stages of one rank have a parameter in common.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    found, this = [], mesh.get_local_rank()
    for own in (each for each in names.values() if len(each) > 1):
        held = {
            stage: next(name for name in own if _is_in(name, modules))
            for stage, modules in enumerate(stages)
            if any(_is_in(name, modules) for name in own)
        }
        ranks = [stage % mesh.size() for stage in held]
        if len(set(ranks)) < len(ranks):
            raise CaptureError(
                "two stages of one rank would share this weight",
                site=own[0],
                way_out="chunks=1, or a mesh without pp",
            )
        if len(ranks) > 1 and this in ranks:
            here = list(held.values())[ranks.index(this)]
            found.append(Tie(own[0], here, tuple(ranks)))
    return found


def _is_in(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def names_in_the_model(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter that a stage has under another one."""
    ties = model.ties if isinstance(model, Stage) else []
    return {tie.here: tie.first for tie in ties}


class _Folder(nn.Module):
    """Stands where a module was that holds others."""


def hang(tree: nn.Module, name: str, module: nn.Module, shape: Shape) -> None:
    """Put a module into a tree under its name, with folders on the way; blocks are in a list."""
    *folders, leaf = name.split(".")
    for place, folder in enumerate(folders, 1):
        if folder not in tree._modules:
            blocks = ".".join(folders[:place]) == shape.blocks
            tree.add_module(folder, nn.ModuleList() if blocks else _Folder())
        tree = tree.get_submodule(folder)
    tree.add_module(leaf, module)


def stage_of(model: nn.Module, shape: Shape, mesh: DeviceMesh, chunks: int) -> Stage:
    """This rank's blocks.

    Raises:
        CaptureError: there are fewer blocks than stages, two stages of one rank have a weight in
            common, or the model's blocks do not run one after the other by themselves.
    """
    count, stages = len(shape.of_blocks(model)), mesh.size() * chunks
    if count < stages:
        raise CaptureError(
            f"the model has {count} blocks for {stages} stages",
            way_out=f"pp={max(1, count // chunks)} with chunks={chunks}",
        )
    config: Any = model.config
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
    if (found := known_report(model)) is not None:
        attach(stage, replace(found, weights=()))  # of the model, whose weights are not all here
    return stage


class Schedule:
    """Runs a rank's stages over the parts of a batch: ``step(ids)``."""

    def __init__(self, stage: Stage, run: Any) -> None:
        self.stage, self._run = stage, run

    def step(self, ids: Tensor, target: Tensor | None = None) -> Tensor:
        """Forward and backward of one batch, on all ranks; gradients are added to those that
        parameters have.

        Args:
            ids: the tokens; every rank of a pipeline is given the same ones.
            target: what ``loss_fn`` is given beside the logits; None: the tokens.

        Returns:
            The mean loss, without gradients, on all ranks.
        """
        stage, target = self.stage, ids if target is None else target
        given = (ids,) if 0 in stage.places else ()
        losses: list[Tensor] = []
        self._level()
        before = self._taken()
        if stage.total - 1 in stage.places:
            self._run.step(*given, target=target, losses=losses)
        else:
            self._run.step(*given)
        self._add_over_stages()
        self._put_back(before)
        mean = torch.zeros((), device=ids.device)
        if losses:
            mean = torch.stack(losses).detach().mean().float()
        group = stage.mesh.get_group()
        dist.broadcast(mean, group_src=stage.mesh.size() - 1, group=group)
        return mean

    def _taken(self) -> dict[str, Tensor]:
        """The gradients that there are, taken away: torch's schedules scale what they find."""
        found = {}
        for name, parameter in self.stage.named_parameters():
            if parameter.grad is not None:
                found[name], parameter.grad = parameter.grad, None
        return found

    @torch.no_grad()
    def _put_back(self, gradients: dict[str, Tensor]) -> None:
        for name, before in gradients.items():
            parameter = self.stage.get_parameter(name)
            parameter.grad = before if parameter.grad is None else before + parameter.grad

    # ------------------------------------------------- parameters that other ranks have as well

    @torch.no_grad()
    def _level(self) -> None:
        """Give ties the first stage's values: an optimizer that draws numbers parts them."""
        tied = self._tied()
        told = self._told(list(tied.values()), by_first=True)
        for parameter, (first, *_) in zip(tied.values(), told, strict=True):
            local(parameter).copy_(first)

    @torch.no_grad()
    def _add_over_stages(self) -> None:
        """Make the gradients of ties the sums of those of their stages."""
        tied = self._tied()
        for parameter in tied.values():
            if parameter.grad is None:  # its counterparts wait for it
                parameter.grad = torch.zeros_like(parameter)
        told = self._told([parameter.grad for parameter in tied.values()])
        for parameter, (first, *others) in zip(tied.values(), told, strict=True):
            local(parameter.grad).copy_(sum(others, first))  # in one order: the same bits for all

    def _tied(self) -> dict[Tie, Any]:
        """Looked up at every call, as FSDP2 puts others in their place."""
        found = {tie: self.stage.get_parameter(tie.here) for tie in self.stage.ties}
        return {tie: parameter for tie, parameter in found.items() if parameter.requires_grad}

    def _told(self, tensors: Sequence[Any], *, by_first: bool = False) -> list[list[Tensor]]:
        """For each tie what its ranks have of a tensor; ``by_first``: the first one's alone."""
        group, this = self.stage.mesh.get_group(), self.stage.mesh.get_local_rank()
        found, messages = [], []
        for tie, tensor in zip(self._tied(), tensors, strict=True):
            own = local(tensor).detach().contiguous()
            held = [own if rank == this else torch.empty_like(own) for rank in tie.ranks]
            for place, rank in enumerate(tie.ranks):
                if rank == this:
                    continue
                if not by_first or this == tie.ranks[0]:
                    messages.append(dist.P2POp(dist.isend, own, group=group, group_peer=rank))
                if not by_first or place == 0:
                    to = held[place]
                    messages.append(dist.P2POp(dist.irecv, to, group=group, group_peer=rank))
            found.append(held)
        for message in dist.batch_isend_irecv(messages) if messages else ():
            message.wait()
        return found


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
