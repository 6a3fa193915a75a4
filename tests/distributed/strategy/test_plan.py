"""The plan of a strategy: the best of all, what it says, what it refuses."""

from __future__ import annotations

import itertools
import json

import pytest
import torch.distributed
import transformers as hf
from torch import nn

import tensorize
from tensorize.base.errors import BudgetError, CaptureError, TensorizeError
from tensorize.distributed import Strategy, StrategyPlan, Workload, plan
from tensorize.distributed.strategy.strategy import CHECKPOINTS, STYLES

SMALL = Workload.decoder(1024, 2816, 6, 8, 8192, rank=256)
DENSE = Workload.decoder(1024, 2816, 6, 8, 8192)


def every_strategy(devices: int, batch: int) -> list[Strategy]:
    """All that can be written down, whether or not a model allows them."""
    found = []
    counts = range(1, max(devices, batch) + 1)
    for pp, dp, tp in itertools.product(range(1, devices + 1), repeat=3):
        if pp * dp * tp != devices:
            continue
        for rows, micro in itertools.product(counts, repeat=2):
            if dp * rows * micro != batch:
                continue
            rest = itertools.product(STYLES, CHECKPOINTS, (False, True), (False, True))
            for style, checkpoint, sharded, offload in rest:
                if (tp == 1) == (style == "plain") and (dp > 1 or not sharded):
                    given = pp, dp, tp, style, rows, micro, checkpoint, sharded, offload
                    found.append(Strategy(*given))
    return found


@pytest.mark.parametrize("workload", [SMALL, DENSE], ids=["compressed", "dense"])
@pytest.mark.parametrize(("devices", "batch"), [(8, 16), (12, 24)])
def test_the_plan_is_the_best_of_an_exhaustive_search(
    workload: Workload, devices: int, batch: int
) -> None:
    found = plan(workload, devices=devices, machine="a100-40", batch=batch, sequence=4096)
    best = min(
        (estimate.total, estimate.strategy)
        for strategy in every_strategy(devices, batch)
        if (estimate := explained(found, strategy)) is not None and estimate.fits
    )
    assert (found.best.total, found.strategy) == best


def explained(found: StrategyPlan, strategy: Strategy):
    try:
        return found.explain(strategy)
    except TensorizeError:
        return None


def test_thousands_of_devices_are_searched_whole() -> None:
    seven = Workload.decoder(4096, 11008, 32, 32, 32000, rank=1024)
    found = plan(seven, devices=4096, machine="h100", batch=4096, sequence=4096)
    assert len(found.others) > 1000


def test_it_says_why_the_others_lose_and_is_kept_as_json() -> None:
    found = plan(SMALL, devices=16, machine="a100-40", batch=32, sequence=4096)
    text = str(found)
    for word in ("best:", "a step", "memory", "activations", "bubble", "why not", "more of"):
        assert word in text, word
    data = json.loads(found.to_json())
    assert data["best"]["strategy"] == vars(found.strategy)
    assert sum(data["best"]["seconds"].values()) == pytest.approx(data["best"]["total"])
    assert len(data["others"]) == len(found.others)


def test_meshes_that_do_not_fit_are_told() -> None:
    large = Workload.decoder(8192, 28672, 40, 64, 32000)
    found = plan(large, devices=16, machine="a100-40", batch=16, sequence=16384)
    why = {name: text for name, text in found.refused.items() if name.startswith("pp")}
    assert why
    for name, text in why.items():
        assert name not in {e.strategy.mesh for e in (found.best, *found.others)}
        assert "of 36.0 GB" in text
    assert f"not {next(iter(found.refused))}" in str(found)


def test_any_strategy_is_explained_and_one_that_does_not_suit_is_refused() -> None:
    found = plan(SMALL, devices=8, machine="a100-40", batch=16, sequence=1024)
    btp = found.explain(Strategy(1, 2, 4, "btp", 8, 1))
    naive = found.explain(Strategy(1, 2, 4, "naive", 8, 1))
    assert btp.sent["tensor parallel"] < naive.sent["tensor parallel"]
    assert "tensor parallel" in str(btp)
    for wrong in (
        Strategy(1, 2, 2, "btp", 8, 1),
        Strategy(1, 2, 4, "megatron", 8, 1),
        Strategy(8, 1, 1, "plain", 16, 1),
    ):
        with pytest.raises(TensorizeError):
            found.explain(wrong)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"machine": "abacus"}, TensorizeError),
        ({"machine": 3}, TensorizeError),
        ({"devices": 0}, TensorizeError),
        ({"devices": 7}, TensorizeError),
        ({"sequence": 10**7}, BudgetError),
    ],
)
def test_bad_input_has_a_clear_error(change: dict, kind: type[Exception]) -> None:
    given = {"devices": 8, "machine": "a100-40", "batch": 16, "sequence": 1024}
    with pytest.raises(kind, match="way out"):
        plan(SMALL, **{**given, **change})


def test_what_does_not_fit_says_how_many_devices_would() -> None:
    large = Workload.decoder(8192, 28672, 80, 64, 32000)
    with pytest.raises(BudgetError, match=r"devices=(\d+) with batch=(\d+) hold it") as raised:
        plan(large, devices=2, machine="a100-40", batch=2, sequence=2048)
    words = str(raised.value).split("devices=")[1].split()
    more = int(words[0])
    assert plan(large, devices=more, machine="a100-40", batch=more, sequence=2048).best.fits


def test_a_mesh_needs_the_group_that_the_plan_is_for(tmp_path) -> None:
    found = plan(DENSE, devices=1, machine="h100", batch=4, sequence=128)
    with pytest.raises(TensorizeError, match="process group"):
        found.mesh("cpu")
    meet = f"file://{tmp_path}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        mesh = found.mesh("cpu")
        assert mesh.mesh_dim_names == ("pp", "dp", "tp")
        assert mesh.shape == (1, 1, 1)
    finally:
        torch.distributed.destroy_process_group()


def llama(**sizes: int) -> hf.LlamaForCausalLM:
    config = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **sizes}))


def test_models_are_planned_as_they_are() -> None:
    given = {"devices": 8, "machine": "h100", "batch": 16, "sequence": 128}
    dense = llama()
    small = tensorize.initialize(dense, 0.4, progress=False)
    with torch.device("meta"):
        blank = llama()
    assert plan(blank, **given).workload == plan(dense, **given).workload
    for model in (dense, small):
        found = plan(model, **given)
        assert found.workload.parameters == sum(p.numel() for p in model.parameters())
    assert plan(small, **given).workload.compressed > 0
    with pytest.raises(CaptureError, match="blocks"):
        plan(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), **given)
