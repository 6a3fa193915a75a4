"""Factors on their way from a checkpoint to an artefact, one weight at a time.

The model stays on the meta device: a weight is read from its shard, replaced by its cores as in any
compile, checked, written to its place in the artefact, and given up. A journal beside the file says
what is written, so that a run that was killed goes on after it.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import AnalysisError, CheckpointError
from tensorize.base.tensorfile import Layout, Writer
from tensorize.base.tensors import is_index, parameter_of
from tensorize.cache.curve_files import Curves
from tensorize.hub.shards import Checkpoint
from tensorize.ir.plan import Plan, RankPlan
from tensorize.ir.sites import Site
from tensorize.passes.rewrite.factorize import Cores, Place, factorized, put_cores, replace_weight
from tensorize.passes.rewrite.verify import check_weight
from tensorize.passes.stages import Opened
from tensorize.reports.report import Report
from tensorize.store.contents import Contents, contents_of
from tensorize.store.fingerprint import identity
from tensorize.store.save import save_written
from tensorize.weight.install import blank, factored, held_names, names_now, owner_of
from tensorize.weight.whole_model import settle


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder in ``out`` for what is finished; other than it, nothing in ``out`` is touched.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder = out / ".tensorize-stream"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {type(error).__name__}: {error}",
            way_out="choose a directory with room that you may write to: what is finished takes "
            "about twice the checkpoint, and is kept for the next run",
        ) from error


# ------------------------------------------------------------------------------------ the factors


@dataclass(frozen=True)
class Factors:
    """The factors of a checkpoint's weights in a file, laid out as ``checkpoint.save`` does it.

    ``refined`` gives those that are not the curve's.
    """

    source: Checkpoint
    curves: Curves
    folder: Path
    refined: Callable[[str], Cores | None] = lambda name: None

    @contextlib.contextmanager
    def in_file(self, opened: Opened) -> Iterator[Place]:
        """Where a plan's factors go; the model is then the compressed one, on meta."""
        planned = planned_model(opened, self.source.model)
        artefact = self.artefact(planned, opened.plan)
        scratch = copy.deepcopy(self.source.model)
        journal = artefact.open_journal()
        places = artefact.layout.places
        with Writer(artefact.draft, artefact.layout) as file:

            def put(unit: Sequence[RankPlan]) -> dict[str, float]:
                found = self._unit(opened, scratch, unit, file, places)
                file.flush()
                journal.add(found)
                return found

            yield Place(planned, self._units(opened), put, dict(journal.errors))
            self._copy_others(opened, planned, file, places)
            file.flush()

    def artefact(self, model: nn.Module, plan: Plan) -> Artefact:
        """What is written of a compressed model on meta."""
        contents, tensors = contents_of(model, on_meta=True)
        layout = Layout.usual(tensors, {"format": "pt"})
        text = replace(plan, cache=None).to_json()
        draft = self.folder / f"{identity(text, layout.header)[:16]}.tmp"
        return Artefact(draft, contents, layout)

    def _units(self, opened: Opened) -> list[list[RankPlan]]:
        """Weights with one first factor together, every other alone; in the order of the shards."""
        units: dict[str, list[RankPlan]] = {}
        for choice in factorized(opened):
            units.setdefault(choice.shared or choice.name, []).append(choice)
        return sorted(units.values(), key=lambda unit: self.source.shard(unit[0].name))

    def _unit(
        self,
        opened: Opened,
        scratch: nn.Module,
        unit: Sequence[RankPlan],
        file: Writer,
        places: Mapping[str, Any],
    ) -> dict[str, float]:
        """Write the cores of weights that have something in common; their measured errors."""
        sites = {site.name: site for site in opened.sites}
        errors: dict[str, float] = {}
        held: set[str] = set()
        for choice in unit:
            site = sites[choice.name]
            _put_dense(scratch, site, self.source.read(site.name))
            curve = self.curves.whole(site)
            cores = self.refined(site.name)
            errors[choice.name] = replace_weight(scratch, site, choice, curve, cores)
            for owner in {name.rpartition(".")[0] for name in site.names}:
                for leaf, factors in factored(scratch.get_submodule(owner)):
                    if not factors.is_meta:
                        check_weight(f"{owner}.{leaf}", factors)
            held |= {core for name in site.names for core in held_names(scratch, name)}
        for name in sorted(held):
            owner, leaf = owner_of(scratch, name)
            core = getattr(owner, leaf)
            if name in places:
                if is_index(core):
                    _check_order(name, core, places[name])
                file.put(name, core)
            setattr(owner, leaf, core.to("meta") if is_index(core) else _on_meta(core))
        return errors

    def _copy_others(
        self, opened: Opened, planned: nn.Module, file: Writer, places: Mapping[str, Any]
    ) -> None:
        """Copy what stays as it is."""
        replaced = {choice.name for choice in factorized(opened)}
        gone = {name for site in opened.sites if site.name in replaced for name in site.names}
        for name in sorted(self.source.entries.keys() - gone, key=self.source.shard):
            (now,) = names_now(planned, name)
            if now in places:
                file.put(now, self.source.read(name))


def planned_model(opened: Opened, model: nn.Module) -> nn.Module:
    """A copy of a model on meta with cores, on meta, where the plan has them."""
    planned = copy.deepcopy(model)
    sites = {site.name: site for site in opened.sites}
    for choice in factorized(opened):
        assert choice.spec is not None
        dtype = parameter_of(planned, choice.name).dtype
        cores = blank(choice.spec, torch.device("meta"), dtype)
        put_cores(planned, sites[choice.name], choice, cores)
    settle(planned)
    return planned


def _put_dense(model: nn.Module, site: Site, value: Tensor) -> None:
    """Give a weight its values, under all of its names."""
    empty = parameter_of(model, site.name)
    dense = nn.Parameter(value, requires_grad=empty.requires_grad)
    for name in site.names:
        owner, leaf = owner_of(model, name)
        owner._parameters[leaf] = dense


def _check_order(name: str, order: Tensor, place: tuple[int, int]) -> None:
    """Raises AnalysisError where an order of columns is another than the file has room for."""
    if order.nbytes != place[1] - place[0]:
        owner = name.removesuffix(".order").removesuffix(".weight_cores")
        raise AnalysisError(
            "its columns cannot be chosen in groups of neighbours, as the plan has them",
            site=f"{owner}.weight",
            way_out=f'exclude=["{owner}.weight"], or compile the model in memory',
        )


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


# ------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class Artefact:
    """The file of weights of a model on meta: where it is made, and what it will hold.

    It is named by plan and weights, so that a run goes on with its own file only.
    """

    draft: Path
    contents: Contents
    layout: Layout

    def open_journal(self) -> Journal:
        """What the draft holds; where there is no draft (it was put in its place), nothing."""
        path = self.draft.with_suffix(".jsonl")
        if not self.draft.exists() or self.draft.stat().st_size != self.layout.size:
            path.unlink(missing_ok=True)
        return Journal(path)

    def save(self, model: nn.Module, report: Report, directory: Path) -> None:
        """Complete it: configurations and manifest beside it, and the file in its place."""
        save_written(model, self.contents, report, self.draft, directory)


class Journal:
    """The weights that are written, and their measured errors, a line for each group of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.errors: dict[str, float] = {}
        for line in _lines(path):
            self.errors |= line

    def add(self, errors: Mapping[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(errors)) + "\n")


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """The whole lines of a journal: the last one may be cut off, and then counts in nothing."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for line in whole.splitlines():
        yield json.loads(line)
