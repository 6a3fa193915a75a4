"""A budget of what tensor-parallel devices send: ranks, shared factors and dense weights count."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import tensorize
from tensorize.base.errors import BudgetError
from tensorize.distributed import Strategy, plan
from tensorize.distributed.strategy.reading import workload_of
from tensorize.distributed.strategy.volumes import backward_messages, elements, forward_messages
from tests.models import plain_llama


@pytest.fixture(scope="module")
def llama() -> hf.LlamaForCausalLM:
    return plain_llama(64, 160, 96)


@pytest.fixture(scope="module")
def analysis(llama: hf.LlamaForCausalLM) -> tensorize.Analysis:
    batch = {"input_ids": torch.randint(0, 96, (8, 16), generator=torch.manual_seed(1))}
    return tensorize.analyze(llama, calibration=[batch], progress=False)


def sent(model: torch.nn.Module, style: str) -> int:
    """Bytes a row of the planner's own volumes; the statistics of norms are not the weights'."""
    layers = workload_of(model).layers
    ways = (forward_messages, backward_messages)
    total = sum(elements(way(layer, style)) for layer in layers for way in ways)
    return 2 * (total - (8 * len(layers) if style == "btp" else 0))


HEAD = 2 * 64


def test_a_dense_model_sends_what_megatron_does(
    llama: hf.LlamaForCausalLM, analysis: tensorize.Analysis
) -> None:
    dense = analysis.plan(0.5).dense
    assert dense.communication == sent(llama, "megatron") + HEAD


def test_a_plan_counts_what_its_model_sends(
    llama: hf.LlamaForCausalLM, analysis: tensorize.Analysis
) -> None:
    found = analysis.plan(tensorize.Budget(params=0.5), refine=None)
    small = tensorize.apply(llama, found, progress=False)
    head = next(site for site in found.sites if site.name == "lm_head.weight")
    of_head = HEAD if head.spec is None else 4 * sum(head.ranks)
    if all(s.spec is not None for s in found.sites if "layers" in s.name):
        assert found.predicted.communication == sent(small, "btp") + of_head
    else:
        assert found.predicted.communication >= sent(small, "btp") + of_head


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_budget_of_communication_is_met(analysis: tensorize.Analysis, share: float) -> None:
    found = analysis.plan(tensorize.Budget(communication=share))
    assert found.predicted.communication <= share * found.dense.communication
    both = analysis.plan(tensorize.Budget(communication=share, params=0.4))
    assert both.predicted.communication <= share * found.dense.communication
    assert both.predicted.parameters <= 0.4 * found.dense.parameters
    assert both.predicted.loss is not None
    assert found.predicted.loss is not None
    assert found.predicted.loss <= both.predicted.loss + 1e-9


def test_one_that_cannot_be_met_names_one_that_can(analysis: tensorize.Analysis) -> None:
    with pytest.raises(BudgetError, match="bytes a row") as raised:
        analysis.plan(tensorize.Budget(communication=1))
    least = int(str(raised.value).split("communication=")[1].split(")")[0])
    assert analysis.plan(tensorize.Budget(communication=least)).predicted.communication <= least


def test_bytes_a_step_on_a_mesh_are_such_a_budget(llama: hf.LlamaForCausalLM) -> None:
    found = plan(llama, devices=8, machine="a100-40", batch=8, sequence=128)
    with pytest.raises(tensorize.TensorizeError, match="tp"):
        found.communication_budget(1e9)
    split = found.explain(Strategy(1, 2, 4, "megatron", 4, 1))
    from dataclasses import replace

    on_mesh = replace(found, best=split)
    assert on_mesh.communication_budget(1e9).communication == int(1e9 // (4 * 128))
