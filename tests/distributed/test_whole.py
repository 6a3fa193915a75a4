"""What is one model on all machines is the same as on one: its values, its files, its rates."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import tensorize
from tensorize import AnalysisError, CaptureError, CheckpointError, TensorizeError
from tensorize.distributed import parallelize
from tensorize.distributed.matrices import local
from tensorize.passes.curves import spectra
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.rewrite import factorize
from tests.distributed import models, processes
from tests.distributed.models import CASES, whole, words


def over(**sizes: int) -> Any:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def half(model: nn.Module, **options: Any) -> nn.Module:
    return tensorize.initialize(model, 0.5, seed=5, **options)


def on_meta(build: Any = models.llama_of) -> nn.Module:
    with torch.device("meta"):
        return build()


def meta_is_filled_by_parts(folder: Path) -> None:
    for build in (models.llama_of, models.gpt2_of, partial(models.llama_of, "Mixtral")):
        for sizes in ({"tp": 2}, {"dp": 2}):
            want = half(on_meta(build)).state_dict()
            model = parallelize(half(on_meta(build), device="meta"), over(**sizes))
            assert tensorize.training.fill(model) is model
            got = model.state_dict()
            assert got.keys() == want.keys()
            assert all(torch.equal(whole(got[name]), want[name]) for name in want), sizes
            assert models.loss_of(model, words(2)).isfinite()


def ties_stay_when_meta_is_filled(folder: Path) -> None:
    model: Any = half(
        on_meta(lambda: models.llama_of(tie_word_embeddings=True)), device="meta", exclude="*embed*"
    )
    parallelize(model, over(dp=2))
    tensorize.training.fill(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert models.loss_of(model, words(2)).isfinite()


class Peak(TorchDispatchMode):
    """The most bytes of memory that tensors held at once, of those made in here."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: Any = WeakIdKeyDictionary()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(result):
            if isinstance(made, Tensor) and not made.is_meta:
                storage = local(made).untyped_storage()
                self._alive[storage] = storage.nbytes()
        self.most = max(self.most, sum(self._alive.values()))
        return result


def a_host_holds_its_part_and_one_module(folder: Path) -> None:
    weight = 4 * 256 * 256
    for layers, dimension in itertools.product((2, 6), ("tp", "dp", "pp")):
        shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": layers}
        model = half(on_meta(lambda shape=shape: models.llama_of(**shape)), device="meta")
        model = parallelize(model, over(**{dimension: 2}))
        with Peak() as peak:
            tensorize.training.fill(model)
        own = sum(local(p).nbytes for p in model.parameters())
        # An attention has four weights, which are dense until it is made; and one's factors.
        assert own < peak.most < own + 5 * weight, (dimension, layers)


Meshes = tuple[dict[str, int], ...]
EACH: Meshes = ({"tp": 2}, {"dp": 2})
BOTH: Meshes = ({"dp": 2, "tp": 2},)


def rates_are_those_of_one_machine(folder: Path, meshes: Meshes = EACH) -> None:
    def rates(model: nn.Module) -> list[Any]:
        groups = tensorize.training.parameter_groups(model, 1e-3, 0.1)
        return [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups]

    want = rates(CASES["plain"]())
    for sizes in meshes:
        assert rates(parallelize(CASES["plain"](), over(**sizes))) == want


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def the_folder_of_one_machine_is_written(folder: Path, meshes: Meshes = EACH) -> None:
    others = "no identity", "integers of 8 bits", "GPT-2, integers of 3 bits", "Mixtral"
    others += ("Mixtral, integers of 4 bits",)
    for case in ("plain", "compressed tied ends", "shared first factors, compiled", *others):
        for sizes in meshes:
            model = CASES[case]()
            alone = folder / "alone" / "model"
            if dist.get_rank() == 0:  # it says how long making it took
                tensorize.save(model, alone)
            together = folder / "together" / "model"  # a card says its folder's name
            with models.identities_cost():
                tensorize.save(parallelize(copy.deepcopy(model), over(**sizes)), together)
            assert files(together) == files(alone), (case, sizes)
            dist.barrier()


def compression_is_shared_out(folder: Path) -> None:
    """Of an FSDP2 model: the plan and the factors of one machine, each rank making half of them."""
    options: dict[str, Any] = {"calibration": [words(4, seed) for seed in range(5)]}
    alone, sharded = models.llama(), parallelize(models.llama(), over(dp=2))
    want = tensorize.analyze(alone, **options)
    run: Any = {"autospec": True, "side_effect": CollectStatistics.run}
    with (
        mock.patch.object(spectra, "spectrum", wraps=spectra.spectrum) as made,
        mock.patch.object(CollectStatistics, "run", **run) as collected,
    ):
        got = tensorize.analyze(sharded, **options)
    assert made.call_count in (7, 8)  # of 16 weights, without those of trial plans
    (call,) = collected.call_args_list
    assert len(call.args[0].only) == made.call_count
    for refine in ("refit", None):
        plans = [each.plan(0.5, refine=refine) for each in (got, want)]
        assert plans[0] == plans[1]
        with mock.patch.object(factorize, "_cores", wraps=factorize._cores) as made:
            small = tensorize.apply(sharded, plans[0])
        count = sum(site.spec is not None for site in plans[0].sites)
        assert refine is not None or made.call_count in (count // 2, count - count // 2)
        expected = tensorize.apply(alone, plans[1]).state_dict()
        found = small.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert isinstance(next(sharded.parameters()), DTensor)  # the caller's is as it was
    assert not any(isinstance(module, FSDPModule) for module in small.modules())
    compiled = tensorize.compile(sharded, 0.5, **options).state_dict()
    once = tensorize.compile(alone, 0.5, **options).state_dict()
    assert all(torch.equal(compiled[name], once[name]) for name in once)
    spread = parallelize(small, over(tp=2))
    assert models.loss_of(spread, words(2)).isfinite()


def what_is_learned_is_the_same_on_all(folder: Path) -> None:
    sharded = parallelize(models.llama(), over(dp=2))
    with pytest.raises(AnalysisError, match=r"learned different things.*\n.*same calibration"):
        tensorize.analyze(sharded, calibration=[words(4, seed=dist.get_rank())], refine=None)
    with pytest.raises(AnalysisError, match="cache_dir= and max_memory= are of one process"):
        tensorize.analyze(sharded, cache_dir=folder)
    split = parallelize(models.llama(), over(tp=2))
    with pytest.raises(CaptureError, match=r"not sharded by FSDP2 alone(.|\n)*compress the model"):
        tensorize.analyze(split)


def all_processes_hear_of_a_failure(folder: Path) -> None:
    (folder / "a file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        tensorize.save(parallelize(CASES["plain"](), over(dp=2)), folder / "a file")


def memory_is_of_one_rank(folder: Path) -> None:
    alone = CASES["plain"]()
    ids = {"input_ids": words(2), "use_cache": False}
    want = tensorize.training.memory(alone, batch=ids)
    split = parallelize(CASES["plain"](), over(tp=2))
    got = tensorize.training.memory(split, batch=ids)
    assert got.parameters == want.parameters / 2
    assert want.activations / 2 < got.activations < want.activations


def memory_is_shared_by_dp(folder: Path, meshes: Meshes = EACH[1:]) -> None:
    want = tensorize.training.memory(CASES["plain"]())
    for sizes in meshes:
        sharded = parallelize(CASES["plain"](), over(**sizes))
        got = tensorize.training.memory(sharded)
        assert got.optimizer == want.optimizer / math.prod(sizes.values())
        with pytest.raises(TensorizeError, match="before fully_shard"):
            tensorize.training.memory(sharded, batch={"input_ids": words(2)})


def narrow_parameters_are_rounded_stochastically(folder: Path, meshes: Meshes = EACH) -> None:
    """Steps far below half a spacing: without it none would be taken."""
    for sizes in meshes:
        model = parallelize(CASES["plain"]().bfloat16(), over(**sizes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        tensorize.training.round_stochastically(optimizer)
        before = {name: whole(p.detach()).float() for name, p in model.named_parameters()}
        for seed in range(4):
            models.loss_of(model, words(4, seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = {name: whole(p.detach()).float() for name, p in model.named_parameters()}
        large = [name for name in before if before[name].dim() == 2]
        assert not any(torch.equal(after[name], before[name]) for name in large)
        assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())


def the_report_is_that_of_one_machine(folder: Path, meshes: Meshes = EACH) -> None:
    for case in ("plain", "integers of 4 bits"):
        alone = CASES[case]()
        want = tensorize.report(alone)
        for sizes in meshes:
            got = tensorize.report(parallelize(copy.deepcopy(alone), over(**sizes)))
            assert (got.sites, got.totals, got.notes) == (want.sites, want.totals, want.notes)


IN_TWO: list[processes.Check] = [
    meta_is_filled_by_parts,
    ties_stay_when_meta_is_filled,
    a_host_holds_its_part_and_one_module,
    rates_are_those_of_one_machine,
    the_folder_of_one_machine_is_written,
    compression_is_shared_out,
    what_is_learned_is_the_same_on_all,
    all_processes_hear_of_a_failure,
    memory_is_of_one_rank,
    memory_is_shared_by_dp,
    narrow_parameters_are_rounded_stochastically,
    the_report_is_that_of_one_machine,
]


IN_FOUR: list[processes.Check] = [
    partial(check, meshes=BOTH)
    for check in (
        rates_are_those_of_one_machine,
        the_folder_of_one_machine_is_written,
        memory_is_shared_by_dp,
        narrow_parameters_are_rounded_stochastically,
        the_report_is_that_of_one_machine,
    )
]


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    processes.run(IN_FOUR, 4, tmp_path)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    processes.run(IN_TWO, 2, tmp_path)
