"""torchtitan's configs with factors in place of dense weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tensorize import AnalysisError, BudgetError, CaptureError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed"
)


def models(*converters: Any) -> Any:
    from torchtitan.models.llama3 import model_registry

    config = model_registry("debugmodel", converters=list(converters)).model
    model = config.build()
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))
    return model


def converter(**options: Any) -> Any:
    from tensorize.torchtitan import LowRankConverter

    return LowRankConverter.Config(**options)


WEIGHTS = ("attention.qkv_linear.wqkv", "attention.wo", *(f"feed_forward.w{k}" for k in (1, 2, 3)))


@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_every_weight_of_a_block_keeps_its_share_and_the_ends_are_dense(keep: float) -> None:
    dense, small = models(), models(converter(keep=keep))
    for block in range(6):
        for name in WEIGHTS:
            before = dense.get_parameter(f"layers.{block}.{name}.weight")
            after = small.get_submodule(f"layers.{block}.{name}")
            size = sum(p.numel() for p in after.parameters())
            assert 0.8 * keep < size / before.numel() <= keep
            assert after.first.out_features % 8 == 0
    for name in ("tok_embeddings.weight", "lm_head.weight", "norm.weight"):
        assert small.get_parameter(name).shape == dense.get_parameter(name).shape


def test_weights_begin_at_the_scale_of_the_dense_ones() -> None:
    dense, small = models(), models(converter())
    for name in (f"layers.{block}.{name}" for block in (0, 5) for name in WEIGHTS):
        layer = small.get_submodule(name)
        with torch.no_grad():
            ours = float((layer.second.weight @ layer.first.weight).std())
            wanted = float(dense.get_parameter(f"{name}.weight").std())
        assert ours == pytest.approx(wanted, rel=0.1)


def test_converting_leaves_the_random_state_as_it_was() -> None:
    from torchtitan.models.llama3 import model_registry

    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    model_registry("debugmodel", converters=[converter()])
    assert torch.equal(torch.rand(4), wanted)


def test_some_weights_alone() -> None:
    small = models(converter(weights=("*.w2",)))
    names = {name for name, _ in small.named_parameters() if "first" in name}
    assert names == {f"layers.{block}.feed_forward.w2.first.weight" for block in range(6)}


def test_a_bias_stays() -> None:
    from torchtitan.models.common.linear import Linear

    from tensorize.torchtitan.convert import factored

    init = {"weight": torch.nn.init.normal_, "bias": torch.nn.init.ones_}
    layer = factored(
        Linear.Config(in_features=64, out_features=32, bias=True, param_init=init)
    ).build()
    layer.init_states()
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = x @ (layer.second.weight @ layer.first.weight).T + 1
        torch.testing.assert_close(layer(x), wanted)
    assert layer.first.bias is None


def test_the_flag_makes_what_the_converter_makes() -> None:
    from tests.torchtitan.training import OURS, config_of, updated

    def shapes(config: Any) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: p.shape for name, p in updated(config).build().named_parameters()}

    dense = ("--module", "llama3", "--config", "llama3_debugmodel", "--override.imports")
    usual = shapes(config_of(*OURS))
    assert shapes(config_of(*dense, "tensorize.torchtitan.flag.low_rank")) == usual
    half = config_of(*dense, 'tensorize.torchtitan.flag.low_rank={"keep": 0.5}')
    name = "layers.0.attention.wo.first.weight"
    assert shapes(half)[name] == (64, 256) != usual[name]


def test_what_is_compressed_is_not_compressed_again() -> None:
    from tests.torchtitan.training import OURS, config_of, updated

    with pytest.raises(CaptureError, match="a Factor is no plain linear layer"):
        updated(config_of(*OURS, "--override.imports", "tensorize.torchtitan.flag.low_rank"))
    with pytest.raises(CaptureError, match=r"wqkv.first: a Factor is no plain linear layer"):
        models(converter(), converter())


def test_what_cannot_be_done_says_so() -> None:
    with pytest.raises(BudgetError, match="no share between 0 and 1"):
        models(converter(keep=1.5))
    with pytest.raises(BudgetError, match=r"layers.0.attention.wo: .* less than rank 1") as error:
        models(converter(keep=0.003, weights=("*.wo",)))
    assert error.value.way_out is not None
    keep = float(error.value.way_out.removeprefix("keep=").split()[0])
    assert models(converter(keep=keep, weights=("*.wo",))) is not None
    with pytest.raises(CaptureError, match="no linear layer of the model is called blocks"):
        models(converter(weights=("blocks.*",)))


def test_layers_of_another_class_are_refused_and_nothing_is_changed() -> None:
    from torchtitan.components.lora import LoRAConverter
    from torchtitan.models.llama3 import llama3_configs

    config = llama3_configs["debugmodel"](attn_backend="flex")
    adapted = LoRAConverter.Config(target_modules=["w2"]).build().convert(config)
    with pytest.raises(CaptureError, match=r"layers.0.attention.*: a Linear"):
        converter().build().convert(adapted)
    assert type(adapted.layers[0].feed_forward.w2).__qualname__.endswith("LoRALinear.Config")


@pytest.mark.parametrize("init", [None, torch.nn.init.zeros_, torch.nn.init.xavier_uniform_])
def test_a_scale_that_is_not_known_is_not_guessed(init: Any) -> None:
    from torchtitan.models.common.linear import Linear

    from tensorize.torchtitan.convert import factored

    given = None if init is None else {"weight": init}
    with pytest.raises(AnalysisError, match=r"^wo: .*\n  way out: param_init="):
        factored(Linear.Config(in_features=256, out_features=64, param_init=given), name="wo")
