"""Compiled Hugging Face models in transformers: generate, save, load, train, pipelines, devices."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import tensorize
from tensorize.base.errors import CaptureError, CheckpointError
from tensorize.weight.install import factored
from tests.models import CASES, Case, relative

IDS = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(1))


def _bert_with_head() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


def _distilbert_with_head() -> nn.Module:
    return hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(vocab_size=128, dim=32, hidden_dim=64, n_layers=1, n_heads=4)
    )


def _ibert_with_head() -> nn.Module:  # its table of ties holds a pattern
    return hf.IBertForMaskedLM(
        hf.IBertConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=32,
        )
    )


def _tied_llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )


def _text() -> dict[str, Tensor]:
    return {"input_ids": IDS}


MODELS: dict[str, Case] = {
    **{name: CASES[name] for name in ("llama", "gpt2", "bert", "vit", "t5", "mixtral")},
    "bert with head": Case(_bert_with_head, _text, lambda y: y.logits),
    "distilbert with head": Case(_distilbert_with_head, _text, lambda y: y.logits),
    "ibert with head": Case(_ibert_with_head, _text, lambda y: y.logits),
    "tied llama": Case(_tied_llama, _text, lambda y: y.logits),
}
AUTO = {
    "llama": hf.AutoModelForCausalLM,
    "gpt2": hf.AutoModelForCausalLM,
    "bert": hf.AutoModel,
    "vit": hf.AutoModelForImageClassification,
    "t5": hf.AutoModelForSeq2SeqLM,
    "mixtral": hf.AutoModelForCausalLM,
    "bert with head": hf.AutoModelForMaskedLM,
    "distilbert with head": hf.AutoModelForMaskedLM,
    "ibert with head": hf.AutoModelForMaskedLM,
    "tied llama": hf.AutoModelForCausalLM,
}
FORMS = [(name, form) for name in MODELS for form in ("low_rank", "tt")]
FORMS.remove(("mixtral", "tt"))  # stacks of experts are low rank
FORMS += [("gpt2", "block"), ("tied llama", "block")]
ALL = pytest.mark.parametrize(("name", "form"), FORMS, ids=[" in ".join(f) for f in FORMS])
TIED = [(n, f) for n, f in FORMS if n in ("gpt2", "t5") or n.endswith("head") or "tied" in n]


def compress(name: str, form: str = "low_rank") -> Any:
    case = MODELS[name]
    # Every weight that can be: tied ones, experts and heads among them.
    return tensorize.compile(
        case.model(), None, example_inputs=case.batch(), ranks={"*": 4}, formats=form
    )


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """No progress bars, and transformers tells of nothing but errors."""
    before = hf.utils.logging.get_verbosity()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    yield
    hf.utils.logging.set_verbosity(before)


def same_state(loaded: nn.Module, saved: nn.Module) -> None:
    mine, theirs = loaded.state_dict(), saved.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[key].equal(theirs[key]) for key in theirs)


# ------------------------------------------------------------------------------------- generate

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


GENERATE = [(n, f) for n, f in FORMS if n in ("llama", "gpt2", "t5", "mixtral")]


@pytest.mark.parametrize(("name", "form"), GENERATE, ids=[" in ".join(f) for f in GENERATE])
def test_generate_token_for_token(name: str, form: str) -> None:
    result = compress(name, form)
    plain = tensorize.densify(result)
    mask = torch.ones_like(IDS)
    for way, options in WAYS.items():
        if name == "t5" and way == "static cache":
            continue  # transformers refuses it for encoder-decoders
        got = result.generate(IDS, attention_mask=mask, **GREEDY, **options)
        want = plain.generate(IDS, attention_mask=mask, **GREEDY, **options)
        assert got.equal(want), way
        assert got.shape[1] > 1


COMPILED = [(n, f) for n, f in FORMS if n in CASES and (f == "low_rank" or n == "gpt2")]


@pytest.mark.parametrize(("name", "form"), COMPILED, ids=[" in ".join(f) for f in COMPILED])
def test_torch_compile_makes_one_graph_for_all_shapes(name: str, form: str) -> None:
    case, result = MODELS[name], compress(name, form)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: Any = torch.compile(result, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((2, 9), (3, 11), (4, 7)):
        ids = torch.randint(3, 128, (batch, length))
        given = {"t5": {"input_ids": ids, "labels": ids[:, 1:].contiguous()}}.get(
            name, {"input_ids": ids}
        )
        if name == "vit":
            given = {"pixel_values": torch.randn(batch, 3, 32, 32)}
        assert relative(case.output(compiled, given), case.output(result, given)) < 1e-5
    # Trains change their order at two batches at most, the same ones in all weights.
    assert counter.frame_count <= (1 if form == "low_rank" else 3)


# ---------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize(("name", "form"), TIED, ids=[" in ".join(f) for f in TIED])
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


@pytest.mark.parametrize(("name", "form"), TIED, ids=[" in ".join(f) for f in TIED])
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


# ---------------------------------------------------------------------------------- save and load


@ALL
@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_from_pretrained_reads_what_was_saved(
    name: str, form: str, way: str, tmp_path: Path
) -> None:
    case, saved = MODELS[name], compress(name, form)
    if way == "save":
        tensorize.save(saved, tmp_path)
    else:
        saved.save_pretrained(tmp_path)
    loaded, info = AUTO[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())  # nothing is missing, and nothing too much
    assert type(loaded) is type(saved)
    same_state(loaded, saved)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in saved.modules()]
    assert relative(case.output(loaded), case.output(saved)) < 1e-5
    assert loaded.all_tied_weights_keys == saved.all_tied_weights_keys
    assert not loaded.training
    assert not loaded.is_quantized  # so that transformers lets it train and be cast
    if way == "save":
        assert tensorize.report(loaded) == tensorize.report(saved)
    loaded.save_pretrained(tmp_path / "again")
    same_state(AUTO[name].from_pretrained(tmp_path / "again"), saved)


@ALL
def test_load_builds_the_model_by_itself(name: str, form: str, tmp_path: Path) -> None:
    case, saved = MODELS[name], compress(name, form)
    tensorize.save(saved, tmp_path)
    loaded = tensorize.load(tmp_path)
    assert case.output(loaded).equal(case.output(saved))
    half: Any = tensorize.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.dtype == torch.bfloat16

    def tables(model: Any) -> dict[str, torch.dtype]:  # those of rotary embeddings
        state = model.state_dict()
        return {n: b.dtype for n, b in model.named_buffers() if n not in state}

    assert tables(half) == tables(saved)
    if name not in ("vit", "ibert with head"):  # which take no bfloat16 as it is
        assert relative(case.output(half).float(), case.output(saved)) < 0.1
    loaded.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    same_state(AUTO[name].from_pretrained(tmp_path / "again"), saved)


@pytest.mark.parametrize("name", ["llama", "bert with head", "mixtral"])
def test_from_pretrained_in_another_dtype_and_without_the_head(name: str, tmp_path: Path) -> None:
    saved = compress(name)
    tensorize.save(saved, tmp_path)
    half = AUTO[name].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    base = hf.AutoModel.from_pretrained(tmp_path)
    own = getattr(saved, saved.base_model_prefix).state_dict()
    assert all(own[key].equal(value) for key, value in base.state_dict().items() if key in own)
    assert list(factored(base))


def test_load_moves_and_casts_into_a_model(tmp_path: Path) -> None:
    saved = compress("gpt2")
    tensorize.save(saved, tmp_path)
    with torch.device("meta"):
        blank = CASES["gpt2"].model()
    loaded: Any = tensorize.load(tmp_path, blank, device="cpu", dtype=torch.float64)
    assert loaded is blank
    assert {(p.dtype, p.device.type) for p in loaded.parameters()} == {(torch.float64, "cpu")}
    assert loaded.lm_head.second.weight is loaded.transformer.wte.weight_cores.core_0
    with pytest.raises(CheckpointError, match=r"torch\.int8 is no floating-point dtype"):
        tensorize.load(tmp_path, dtype=torch.int8)


def python(code: str, *arguments: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()), len(tensorize.report(model).sites))
"""


@pytest.mark.parametrize(
    "first", ["tensorize", pytest.param("transformers", marks=pytest.mark.slow)]
)
def test_importing_both_is_enough_in_any_order(first: str, tmp_path: Path) -> None:
    saved = compress("gpt2")
    tensorize.save(saved, tmp_path)
    code = (
        "import importlib.util, sys, tensorize\n"
        "assert not {'transformers', 'peft'} & set(sys.modules)\n"
        "assert importlib.util.find_spec('transformers.quantizers.auto')\n"  # asked, not imported
    )
    if first == "transformers":
        code = "import sys\nfrom transformers import AutoModel\nimport tensorize\n"
    output = python(f"{code}from transformers import AutoModelForCausalLM\n{LOAD}", tmp_path)
    count = sum(p.numel() for p in saved.parameters())
    assert output.split()[-2:] == [str(count), str(len(tensorize.report(saved).sites))]


def test_transformers_alone_refuses_to_make_up_weights(tmp_path: Path) -> None:
    tensorize.save(compress("gpt2"), tmp_path)
    code = """
import logging, sys
from transformers import AutoModelForCausalLM
logging.disable()
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as error:
    print(error)
"""
    assert "no file named model.safetensors" in python(code, tmp_path)


def test_configurations_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    saved = compress("gpt2")

    def change(**values: Any) -> None:
        tensorize.save(saved, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"].update(values)
        (tmp_path / "config.json").write_text(json.dumps(config))

    change(format_version=99)
    with pytest.raises(CheckpointError, match=r"format version 99(.|\n)*upgrade tensorize"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    sites = json.loads((tmp_path / "tensorize.json").read_text())["sites"]
    sites[0]["shape"][0] += 1
    change(sites=sites)
    with pytest.raises(CheckpointError, match=r"wte\.weight: .*shape \(128, 32\), and \(129, 32\)"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_note_in_a_configuration_goes_with_the_factors(tmp_path: Path) -> None:
    model = CASES["gpt2"].model()
    result = tensorize.compile(model, 0.5)
    assert not hasattr(model.config, "quantization_config")
    assert result.config.quantization_config["quant_method"] == "tensorize"
    plain = tensorize.densify(result)
    assert not hasattr(plain.config, "quantization_config")
    plain.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(factored(loaded)) == []
    same_state(loaded, plain)


def test_from_pretrained_after_a_crash_reads_one_save_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = compress("gpt2"), tensorize.compile(CASES["gpt2"].model(), 0.5)
    tensorize.save(old, tmp_path)
    replace, calls = os.replace, []
    names = ["tensorize-", "config.json", "generation_config.json", "tensorize.json"]

    def failing(source: Any, target: Any) -> None:
        if Path(target).name.startswith(names[len(calls)]):
            calls.append(target)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    while len(calls) < len(names):  # a crash before each file comes into its place
        crashed = len(calls)
        with pytest.raises(KeyboardInterrupt):
            tensorize.save(new, tmp_path)
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
        same_state(loaded, old if crashed < 2 else new)
        same_state(tensorize.load(tmp_path), old)


# --------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("form", ["low_rank", "tt"])
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


# ------------------------------------------------------------------------ training and pipelines


@pytest.mark.parametrize("name", ["gpt2", "bert with head", "mixtral"])
def test_trainer(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    result = compress(name)
    before = {key: value.clone() for key, value in result.state_dict().items()}
    data = [{"input_ids": IDS[k % 2], "labels": IDS[k % 2]} for k in range(8)]

    if name == "gpt2":
        result.activation_checkpointing_enable()

    def train(steps: int, **options: Any) -> hf.Trainer:
        arguments = hf.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=3, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = hf.Trainer(result, arguments, train_dataset=data)
        trainer.train(**options)
        return trainer

    train(3)
    after = result.state_dict()
    assert not any(after[k].equal(before[k]) for k in after if "core" in k or "first" in k)
    checkpoint = tmp_path / "checkpoint-3"
    same_state(AUTO[name].from_pretrained(checkpoint), result)
    assert train(4, resume_from_checkpoint=str(checkpoint)).state.global_step == 4


@functools.cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<mask>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, 128)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", mask_token="<mask>", pad_token="<pad>"
    )


@pytest.mark.parametrize(
    ("task", "name", "text", "options"),
    [
        ("text-generation", "gpt2", "w3 w4 w5", {"max_new_tokens": 5, "do_sample": False}),
        ("fill-mask", "bert with head", "w3 <mask> w5", {"top_k": 3}),
        ("feature-extraction", "bert", "w3 w4", {}),
    ],
)
def test_pipeline(task: Any, name: str, text: str, options: dict[str, Any]) -> None:
    result = compress(name)

    def run(model: Any) -> Any:
        return hf.pipeline(task, model=model, tokenizer=tokenizer())(text, **options)

    got, want = run(result), run(tensorize.densify(result))
    if task == "feature-extraction":
        assert relative(torch.tensor(got), torch.tensor(want)) < 1e-5
    elif task == "fill-mask":
        assert [guess["token"] for guess in got] == [guess["token"] for guess in want]
    else:
        assert got == want


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks
def test_peft_by_the_default_names(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for name in ("llama", "bert"):
        case, result = MODELS[name], compress(name)
        tuned = peft.get_peft_model(result, peft.LoraConfig(r=2, init_lora_weights=False))
        assert any("lora_A" in key for key, p in tuned.named_parameters() if p.requires_grad)
        tuned.save_pretrained(tmp_path / name)
        again = peft.PeftModel.from_pretrained(compress(name), tmp_path / name)
        assert case.output(again).equal(case.output(tuned))


# -------------------------------------------------------------------------- precision and devices


@pytest.mark.parametrize("form", ["low_rank", "tt"])
def test_layers_kept_in_float32(form: str) -> None:
    """T5 in half precision casts what goes into the layers that stay in float32."""
    case = MODELS["t5"]
    model = case.model().half()
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    result = tensorize.compile(
        model, None, example_inputs=case.batch(), ranks={"*": 4}, formats=form
    )
    got, want = case.output(result), case.output(tensorize.densify(result))
    assert got.dtype == want.dtype
    assert relative(got.float(), want.float()) < 0.02


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_models_on_a_device_map(device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    CASES["gpt2"].model().save_pretrained(tmp_path / "dense")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map=device_map)
    result = tensorize.compile(model, 0.5)
    plain = tensorize.densify(result)
    assert relative(result(IDS).logits.detach(), plain(IDS).logits.detach()) < 1e-5
    tensorize.save(result, tmp_path / "small")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map=device_map)
    same_state(loaded, result)


def test_hooks_of_accelerate_stay() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = CASES["llama"].model()
    accelerate.hooks.attach_align_device_hook(model, execution_device="cpu")

    def hooked(module: nn.Module) -> set[str]:
        return {name for name, part in module.named_modules() if hasattr(part, "_hf_hook")}

    result: Any = tensorize.compile(model, 0.5)
    assert hooked(model) <= hooked(result)
    want = tensorize.compile(CASES["llama"].model(), 0.5)
    assert result(IDS).logits.equal(want(IDS).logits)
    plain = tensorize.densify(result)
    assert relative(plain(IDS).logits.detach(), want(IDS).logits.detach()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*meta device.*offloaded")
def test_offloaded_models_are_refused_and_results_can_be_offloaded(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(CASES["llama"].model(), execution_device="cpu")
    with pytest.raises(CaptureError, match=r"meta device(.|\n)*compiled before it is offloaded"):
        tensorize.compile(model, 0.5)
    for name in ("gpt2", "mixtral"):  # tables and experts have lazy weights
        result = compress(name)
        want = result(IDS).logits.detach()
        accelerate.cpu_offload(result, execution_device="cpu")
        assert all(p.is_meta for p in result.parameters())
        assert result(IDS).logits.equal(want)


def test_from_pretrained_offloads_to_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    saved = compress("gpt2")
    tensorize.save(saved, tmp_path / "small")
    parts = ("wte", "wpe", "h.0", "h.1", "ln_f")
    places = {f"transformer.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    places["transformer.h.1"] = "disk"
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(p.is_meta for p in loaded.parameters())
    assert relative(loaded(IDS).logits.detach(), saved(IDS).logits.detach()) < 1e-5
