"""Tied weights are tied under their new names, and tables are resized where they can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tensorize
from tests.hub.compressed_models import IDS, MODELS, compress, forms
from tests.marks import slow
from tests.models import CASES

TIED = forms([n for n in MODELS if n in ("gpt2", "t5") or n.endswith("head") or "tied" in n])


# ------------------------------------------------------------------------------------- tied weights


@TIED
def test_weights_are_tied_under_their_new_names(name: str, form: str) -> None:
    case, result = MODELS[name], compress(name, form)
    before, count = case.output(result), sum(p.numel() for p in result.parameters())
    ties = result.all_tied_weights_keys
    assert ties
    assert all(result.get_parameter(a) is result.get_parameter(b) for a, b in ties.items())
    result.tie_weights()
    result.tie_weights(recompute_mapping=False)
    assert case.output(result).equal(before)
    assert sum(p.numel() for p in result.parameters()) == count


@TIED
def test_densify_gives_the_tables_of_ties_back(name: str, form: str) -> None:
    model, plain = MODELS[name].model(), tensorize.densify(compress(name, form))
    for before, after in zip(model.modules(), plain.modules(), strict=True):
        for table in ("_tied_weights_keys", "all_tied_weights_keys"):
            assert getattr(after, table, None) == getattr(before, table, None)
        assert after.__dict__.keys() == before.__dict__.keys()
    plain.tie_weights()
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_weights_that_only_the_table_ties_stay_apart() -> None:
    """A head that was untied by hand: transformers would tie it again, over its own values."""
    model = MODELS["tied llama"].model()
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    result: Any = tensorize.compile(model, None, ranks={"*": 4})
    before = MODELS["tied llama"].output(result)
    result.tie_weights()
    assert MODELS["tied llama"].output(result).equal(before)


@pytest.mark.parametrize(
    ("entry", "now"),
    [
        ({"head": "table.weight"}, "cores"),  # a module, as in Qwen3-Omni
        ({r"^head\.weight$": r"^table\.weight$"}, "cores"),
        ({r"h\w+\.weight": "table.weight"}, "cores"),
        ({r"parts.(?![0])\d+": "parts.0"}, "as it was"),  # as in D-FINE
    ],
    ids=["module", "marked name", "pattern", "patterns of both"],
)
def test_ties_by_patterns(entry: dict[str, str], now: str) -> None:
    class Tied(hf.PreTrainedModel):
        config_class = hf.BertConfig
        _tied_weights_keys = entry

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
            self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            for part in self.parts:
                x = part(x)
            return self.head(x)

    model = Tied(hf.BertConfig(tie_word_embeddings=True))
    ids = torch.randint(0, 64, (2, 5))
    result: Any = tensorize.compile(model, None, example_inputs=(ids,), ranks={"*": 4})
    assert {site.format for site in tensorize.report(result).sites} == {"low_rank"}
    first, second = (f"table.weight_cores.core_{k}" for k in (0, 1))
    renamed = {"head.second.weight": first, "head.first.weight": second}
    assert result._tied_weights_keys == (renamed if now == "cores" else entry)
    before, count = result(ids), sum(p.numel() for p in result.parameters())
    assert all(
        result.get_parameter(a) is result.get_parameter(b)
        for a, b in result.all_tied_weights_keys.items()
    )
    result.tie_weights()
    assert result(ids).equal(before)
    assert sum(p.numel() for p in result.parameters()) == count
    assert tensorize.densify(result)._tied_weights_keys == entry


# ----------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("form", ["low_rank", slow("tt")])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_resize_token_embeddings_says_why_not(name: str, form: str) -> None:
    case, result = MODELS[name], compress(name, form)
    before = case.output(result)
    result.resize_token_embeddings(128)  # as large as it is
    with pytest.raises(TypeError, match=r"factorized and cannot be assigned.*tensorize\.densify"):
        result.resize_token_embeddings(140)
    assert case.output(result).equal(before)
    larger: Any = tensorize.densify(result)
    larger.resize_token_embeddings(140)
    assert larger.get_input_embeddings().weight.shape == (140, 32)


def test_transformers_refuses_to_resize_an_untied_head_in_factors() -> None:
    result: Any = tensorize.compile(CASES["llama"].model(), None, ranks={"lm_head.*": 4})
    before = result(IDS).logits
    with pytest.raises(TypeError, match="LowRankLinear"):
        result.resize_token_embeddings(140)
    assert result(IDS).logits.equal(before)


def test_a_dense_table_is_resized() -> None:
    result: Any = tensorize.compile(CASES["gpt2"].model(), 0.7, exclude="transformer.wte")
    result.resize_token_embeddings(140)
    assert result(IDS).logits.shape[-1] == 140
