"""A module as the planner sees it: groups of one input, ranks, shared factors, identities."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tensorize
from examples.gpt import GPT, GPTConfig
from tensorize.base.errors import CaptureError
from tensorize.distributed.strategy.memory import saved_elements
from tensorize.distributed.strategy.over_layers import OverLayers
from tensorize.distributed.strategy.reading import workload_of
from tensorize.distributed.strategy.workload import Workload
from tensorize.training import activations
from tests.models import plain_llama


def llama() -> hf.LlamaForCausalLM:
    return plain_llama(128, 352, 256)


def test_a_llama_is_the_decoder_of_its_sizes() -> None:
    assert workload_of(llama()) == Workload.decoder(128, 352, 2, 4, 256)


def test_a_packed_projection_is_one_weight() -> None:
    model = GPT(GPTConfig(layers=2, width=64, heads=4, vocabulary=128))
    found = workload_of(model, (torch.zeros(1, 8, dtype=torch.long),))
    sizes = [[(lin.inputs, lin.outputs) for lin in g.linears] for g in found.layers[0].groups]
    assert sizes == [[(64, 192)], [(64, 64)], [(64, 256)], [(256, 64)]]
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pivoted", [False, True])
def test_factors_are_read_with_their_ranks(pivoted: bool) -> None:
    small = tensorize.initialize(llama(), None, ranks={"*layers*": 24}, pivoted=pivoted)
    found = workload_of(small)
    low = [lin for g in found.layers[0].groups for lin in g.low_rank]
    assert [lin.rank for lin in low] == [24] * 7
    assert all(lin.pivoted == pivoted for lin in low)
    assert found.parameters == sum(p.numel() for p in small.parameters())


def test_a_first_factor_in_common_counts_once() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.q(x) * self.k(x))

    torch.manual_seed(0)
    dense = nn.Sequential(Block(), Block())
    for block in dense:  # q and k read the same few directions
        few = torch.randn(16, 64)
        for linear in (block.q, block.k):
            linear.weight.data = torch.randn(64, 16) @ few / 32
    batches = [(torch.randn(32, 64),) for _ in range(2)]
    small = tensorize.compile(dense, 0.5, calibration=batches, progress=False)
    found, product = workload_of(small, batches[0]), small[0].q.input_product
    assert product is not None
    assert product is small[0].k.input_product
    assert product._end in small[0]._forward_hooks.values()  # it is as it was
    (q, k), (out,) = (group.linears for group in found.layers[0].groups)
    assert q.rank == k.rank == found.layers[0].groups[0].ranks
    assert found.parameters == sum(p.numel() for p in small.parameters())
    assert out.inputs == 64


def test_a_weight_in_another_format_is_refused_by_name() -> None:
    trains = tensorize.initialize(llama(), 0.3, formats="tt", progress=False)
    with pytest.raises(CaptureError, match=r"layers\.0.*weight"):
        workload_of(trains)


@pytest.mark.parametrize("rank", [None, 32])
def test_saved_activations_are_those_of_a_traced_pass(rank: int | None) -> None:
    """By what a second layer adds, in float32: beside the planner's, there is what eager keeps."""

    def model(layers: int) -> hf.LlamaForCausalLM:
        config = llama().config
        config.num_hidden_layers = layers
        dense = hf.LlamaForCausalLM(config)
        if rank is None:
            return dense
        return tensorize.initialize(dense, None, ranks={"*layers*": rank}, progress=False)

    batch = {"input_ids": torch.zeros(2, 64, dtype=torch.long)}
    one, two = (activations(model(n), batch) for n in (1, 2))
    over = OverLayers(Workload.decoder(128, 352, 1, 4, 256, rank=rank))
    planned = 4 * 2 * 64 * over.largest("saved", lambda layer: saved_elements(layer, "plain", 1))
    assert planned <= two - one < 1.8 * planned
