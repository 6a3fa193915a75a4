"""A model over a mesh computes what it does on one machine, and communicates no more than said."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import tensorize
from tensorize import AnalysisError, CaptureError, TensorizeError
from tensorize.algebra.metric import Metric
from tensorize.distributed import parallelize
from tensorize.distributed.matrices import CodedMatrix, local
from tensorize.distributed.ranks import Ranks
from tensorize.distributed.strategy.reading import workload_of
from tensorize.distributed.strategy.volumes import backward_messages, forward_messages
from tensorize.formats.registry import format_of
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.weight.cores import Cores
from tensorize.weight.install import factored
from tests.distributed import guarded, models, processes
from tests.distributed.models import CASES, RANK, WIDTH, farthest, loss_of, mine, words

BATCH, TIME = 4, 16
Sizes = dict[str, int]

EXACT = {"Qwen2": 5e-6, "GPT-2, integers of 8 bits": 1e-5, "Mixtral, integers of 8 bits": 1e-5}
"""Gradients of biases of queries, and of a scale that many entries have in common, are small
differences of large numbers."""


def mesh_of(sizes: Sizes) -> Any:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


@cache
def alone(case: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of one process, and its gradients."""
    model = CASES[case]()
    loss_of(model, words(BATCH)).backward()
    return model, models.gradients(model)


def same_gradients(folder: Path, case: str, sizes: Sizes, style: str = "btp") -> None:
    model, want = alone(case)
    spread = copy.deepcopy(model)
    spread.zero_grad()
    mesh = mesh_of(sizes)
    with models.identities_cost():
        assert parallelize(spread, mesh, style=style) is spread
    assert all(isinstance(p, DTensor) for p in spread.parameters())
    loss_of(spread, mine(words(BATCH), mesh)).backward()
    assert (far := farthest(spread, want)) < EXACT.get(case, 2e-6), (case, style, far)
    assert style != "btp" or _forms(spread) == _forms(model)


def _forms(model: nn.Module) -> list[Any]:
    return [weight.spec for _, weight in factored(model)]


def a_model_on_meta_stays_there(folder: Path) -> None:
    with torch.device("meta"):
        model = models.low_rank(models.llama_of(), *models.ENDS, pivoted=True, device="meta")
    spread = parallelize(model, mesh_of({"tp": 2}))
    assert all(isinstance(p, DTensor) and p.is_meta for p in spread.parameters())


def an_identity_is_stored_where_that_is_faster(folder: Path) -> None:
    model = models.low_rank(models.llama(), *models.ENDS, pivoted=True)
    want = model(words(BATCH)).logits
    spread = parallelize(copy.deepcopy(model), mesh_of({"tp": 2}))
    assert models.relative(spread(words(BATCH)).logits.detach(), want.detach()) < 2e-6
    assert not any(weight.spec.pivoted for _, weight in factored(spread))


def codes_are_split_where_nothing_is_cut(folder: Path) -> None:
    """Each rank's part of a matrix of integers is its part of the numbers; most is not held."""
    ranks = Ranks.of(mesh_of({"tp": 2}))
    for precision, columns, side, shared in (
        *(("int8", 10, 1, 0), ("int8", 10, 0, 0)),  # columns need whole bytes and groups
        *(("int4", 256, 1, 0), ("int4", 192, 1, 1), ("int4", 100, 0, 0)),
        *(("int3", 256, 1, 1), ("int3", 100, 0, 0), ("int2", 128, 1, 0)),
    ):
        spec = QuantizedSpec(DenseSpec((6, columns)), precision)
        draw = torch.Generator().manual_seed(0)
        numbers = torch.randn(6, columns, generator=draw)
        held = format_of(spec).rounded(spec, [numbers], [Metric(1.0, None, None)], torch.float32)
        held = [nn.Parameter(held[0]), *held[1:]]
        cores = Cores(spec, held)
        matrix = CodedMatrix(cores, 0, ranks)
        bytes_before = cores.get_buffer("codes_0").nbytes
        matrix.place(putting(mesh_of({"tp": 2})), side)
        want = format_of(spec).reconstruct(spec, held)
        whole = want.detach().chunk(2, side)[dist.get_rank()]
        assert torch.equal(matrix(), whole), (precision, columns, side)
        own = local(cores.get_buffer("codes_0")).nbytes
        assert own == bytes_before // (1 if shared else 2), (precision, columns, side)
        (matrix() * whole).sum().backward()
        (want * want.detach()).sum().backward()
        got = models.whole(cores.get_parameter("core_0").grad)
        assert torch.allclose(got, held[0].grad, rtol=1e-5)


def putting(mesh: Any) -> Any:
    def put(module: nn.Module, leaf: str, placement: Any) -> None:
        held = module._parameters if leaf in module._parameters else module._buffers
        if held.get(leaf) is not None:
            split = distribute_tensor(held[leaf].data, mesh, [placement], src_data_rank=None)
            held[leaf] = nn.Parameter(split) if held is module._parameters else split

    return put


class Messages(TorchDispatchMode):
    """The elements of every reduction that a block makes, and how often products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: list[int] = []
        self.by_dtype: Counter[torch.dtype] = Counter()
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "tensorize::reduced_product":  # what it sums is what it gives
            self._add(*result)
        elif name == "_c10d_functional::all_reduce":
            self._add(args[0])
        elif name.startswith("_c10d_functional::") and "wait" not in name:
            self.others.append(name)
        return result

    def _add(self, *sent: Tensor) -> None:
        self.narrow.append(sum(tensor.numel() for tensor in sent))
        for tensor in sent:
            self.by_dtype[tensor.dtype] += tensor.numel()


def reductions_of(block: nn.Module, width: int = WIDTH // 2) -> tuple[Messages, Messages]:
    """What one block reduces, forward and backward; it sends nothing else."""
    torch.manual_seed(0)
    dtype = next(block.parameters()).dtype
    x = torch.randn(BATCH, TIME, width, dtype=dtype, requires_grad=True)
    shape = 1, TIME, WIDTH // models.HEADS
    turns = torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    with Messages() as forward:
        y = block(x, position_embeddings=turns)
    with Messages() as backward:
        y.sum().backward()
    assert not forward.others
    assert not backward.others
    return forward, backward


def messages_of(block: nn.Module, width: int = WIDTH // 2) -> tuple[list[int], list[int]]:
    forward, backward = reductions_of(block, width)
    return forward.narrow, backward.narrow


def four_messages_a_layer(folder: Path) -> None:
    spread: Any = parallelize(CASES["plain"](), mesh_of({"tp": 2}))
    forward, backward = messages_of(spread.model.layers[0])
    rows = BATCH * TIME
    assert forward == [rows * (3 * RANK + 1), rows * RANK, rows * (2 * RANK + 1), rows * RANK]
    assert sorted(backward) == sorted(rows * k * RANK for k in (1, 2, 1, 3))


def products_are_sent_in_the_compute_dtype(folder: Path) -> None:
    spread: Any = parallelize(CASES["plain"]().bfloat16(), mesh_of({"tp": 2}))
    forward, backward = reductions_of(spread.model.layers[0])
    rows = BATCH * TIME
    assert forward.by_dtype == {torch.bfloat16: 7 * RANK * rows, torch.float32: 2 * rows}
    assert backward.by_dtype == {torch.bfloat16: 7 * RANK * rows}


def shared_first_factors_send_half_of_full_rank(folder: Path) -> None:
    """At r = d/4; first factors of their own send .88 of it (BOOST). Statistics are apart."""
    assert 4 * RANK == WIDTH
    dense: Any = parallelize(CASES["dense"](), mesh_of({"tp": 2}), style="megatron")
    full, statistics = messages_of(dense.model.layers[0], WIDTH), 2 * BATCH * TIME
    for case, share in (("shared first factors", 0.5), ("plain", 0.875)):
        spread: Any = parallelize(CASES[case](), mesh_of({"tp": 2}))
        forward, backward = messages_of(spread.model.layers[0])
        assert len(forward) == len(backward) == 4
        assert sum(forward) - statistics == share * sum(full[0]), case
        assert sum(backward) == share * sum(full[1]), case


def other_styles_send_what_the_planner_counts(folder: Path) -> None:
    for case, style in (("plain", "naive"), ("dense", "naive"), ("dense", "megatron")):
        model: Any = CASES[case]()
        (layer, *_) = workload_of(model, (words(1),)).layers
        spread: Any = parallelize(model, mesh_of({"tp": 2}), style=style)
        found = messages_of(spread.model.layers[0], WIDTH)
        for got, messages in zip(found, (forward_messages, backward_messages), strict=True):
            want = [BATCH * TIME * message.elements for message in messages(layer, style)]
            assert sorted(got) == sorted(want), (case, style)


def first_factors(model: nn.Module) -> list[set[str]]:
    """The names of every first factor."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".first." in name:
            names.setdefault(id(parameter), set()).add(name)
    return sorted(names.values(), key=min)


def shared_first_factors_are_one(folder: Path) -> None:
    model = alone("shared first factors")[0]
    spread: Any = parallelize(copy.deepcopy(model), mesh_of({"tp": 2}))
    assert first_factors(spread) == first_factors(model)
    assert any(len(names) > 1 for names in first_factors(model))
    block = spread.model.layers[0]
    linears = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    distinct = {id(each.first.weight): len(each.first.weight) for each in linears}
    forward, _ = messages_of(block)
    assert forward[0] == BATCH * TIME * (sum(distinct.values()) + 1)


def checkpointing_repeats_no_product(folder: Path) -> None:
    model, want = alone("plain")
    spread = parallelize(copy.deepcopy(model), mesh_of({"tp": 2})).train()
    spread.zero_grad()
    assert tensorize.training.checkpoint_low_rank(spread) == models.LAYERS
    loss = loss_of(spread, words(BATCH))
    with Messages() as backward:
        loss.backward()
    rows = BATCH * TIME
    # What the gradients need, and the sum that the norm before the dense head needs.
    layers = [rows * k * RANK for k in (1, 2, 1, 3)] * models.LAYERS
    assert sorted(backward.narrow) == sorted([*layers, rows])
    assert farthest(spread, want) < 2e-6


def other_numbers_are_refused(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    torch.nn.init.constant_(model[0].weight, float(dist.get_rank()))
    with pytest.raises(CaptureError, match=r"0.weight: rank 1 holds other numbers"):
        parallelize(model, mesh_of({"dp": 2}))


def same_in(case: str, style: str = "btp", **sizes: int) -> processes.Check:
    return partial(same_gradients, case=case, sizes=sizes, style=style)


OFTEN = "tied", "shared first factors", "fewer key heads than ranks", "GPT-2", "no identity"

NAIVE = (
    *("plain", "tied", "silu between", "fewer key heads than ranks", "GPT-2 dense, untied"),
    *("compressed ends", "compressed tied ends", "dense", "some dense", "Qwen3", "GPT-2"),
)
MEGATRON = "dense", "GPT-2 dense, untied", "integers alone", "fewer key heads, dense"

IN_TWO: list[processes.Check] = [
    *(same_in(case, tp=2) for case in OFTEN),
    same_in("some dense", "naive", tp=2),
    same_in("dense", "megatron", tp=2),
    other_styles_send_what_the_planner_counts,
    same_in("plain", dp=2),
    codes_are_split_where_nothing_is_cut,
    an_identity_is_stored_where_that_is_faster,
    a_model_on_meta_stays_there,
    four_messages_a_layer,
    products_are_sent_in_the_compute_dtype,
    shared_first_factors_send_half_of_full_rank,
    shared_first_factors_are_one,
    checkpointing_repeats_no_product,
    other_numbers_are_refused,
    *guarded.IN_TWO,
]


@pytest.mark.slow
def test_two_processes_with_all_models(tmp_path: Path) -> None:
    seldom = [case for case in CASES if case not in OFTEN]
    split = [same_in(case, tp=2) for case in seldom]
    split += [same_in(case, "naive", tp=2) for case in NAIVE]
    split += [same_in(case, "megatron", tp=2) for case in MEGATRON]
    by_data = [same_in(case, dp=2) for case in CASES]
    processes.run([*split, *by_data, *guarded.SELDOM], 2, tmp_path)


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    split = [same_in(case, tp=4) for case in CASES]
    split += [same_in(case, "naive", dp=2, tp=2) for case in NAIVE]
    split += [same_in(case, "megatron", tp=4) for case in MEGATRON]
    processes.run([*split, *(same_in(case, dp=2, tp=2) for case in CASES)], 4, tmp_path)


# ------------------------------------------------------------------------- refused, with a way out


@pytest.fixture
def _eight_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_eight_ranks")
@pytest.mark.parametrize(
    ("change", "count", "cause"),
    [
        (
            {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6},
            8,
            "hidden size is 36, which 8 ranks",
        ),
        ({"intermediate_size": 36}, 8, "inner size of the MLP is 36"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, 8, "number of attention heads is 4"),
        ({"num_attention_heads": 24, "hidden_size": 96, "num_key_value_heads": 3}, 2, "heads is 3"),
        ({"vocab_size": 129}, 8, "129 words"),
    ],
)
def test_what_ranks_do_not_divide_is_named(change: Any, count: int, cause: str) -> None:
    with torch.device("meta"):
        model = models.llama_of(**change)
    mesh = init_device_mesh("cpu", (8 // count, count), mesh_dim_names=("dp", "tp"))
    with pytest.raises(CaptureError, match=cause):
        parallelize(model, mesh)


@pytest.mark.usefixtures("_eight_ranks")
def test_the_way_out_is_the_largest_number_of_ranks_that_divides() -> None:
    with torch.device("meta"):
        model = models.llama_of(intermediate_size=36)
    with pytest.raises(CaptureError, match="way out: tp=4"):
        parallelize(model, mesh_of({"tp": 8}))


@pytest.mark.usefixtures("_eight_ranks")
def test_models_of_other_shapes_and_other_meshes_are_refused() -> None:
    with pytest.raises(CaptureError, match="nothing of a Sequential"):
        parallelize(nn.Sequential(nn.Linear(8, 8)), mesh_of({"tp": 8}))
    with pytest.raises(CaptureError, match="dimensions rows, columns"):
        parallelize(nn.Linear(8, 8), mesh_of({"rows": 4, "columns": 2}))
    with pytest.raises(CaptureError, match="sharded already"):
        parallelize(parallelize(nn.Linear(8, 8), mesh_of({"dp": 8})), mesh_of({"dp": 8}))


@pytest.mark.usefixtures("_eight_ranks")
def test_trains_are_refused() -> None:
    chain = tensorize.initialize(models.llama(), 0.5, formats="tt", exclude=list(models.ENDS))
    with pytest.raises(AnalysisError, match=r"q_proj.weight: it is .*train.*\n.*low_rank"):
        parallelize(chain, mesh_of({"tp": 8}))


@pytest.mark.usefixtures("_eight_ranks")
def test_what_a_style_does_not_split_is_named() -> None:
    with pytest.raises(AnalysisError, match=r"weight: its rank is 12, which 8 ranks.*\n.*btp"):
        parallelize(models.low_rank(models.llama(), rank=12), mesh_of({"tp": 8}), style="naive")
    with pytest.raises(AnalysisError, match=r"weight: it is of low rank, and Megatron's.*\n.*btp"):
        parallelize(models.low_rank(models.llama()), mesh_of({"tp": 8}), style="megatron")
    with pytest.raises(CaptureError, match=r"has experts, which this style.*\n.*btp"):
        parallelize(models.llama("Mixtral"), mesh_of({"tp": 8}), style="naive")
    with pytest.raises(TensorizeError, match="style='boost' is not one of"):
        parallelize(models.llama(), mesh_of({"tp": 8}), style="boost")
