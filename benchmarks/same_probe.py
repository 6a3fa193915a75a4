"""What `benchmarks/same.py` runs in each of two trees: one part, with all that users see of it.

    python same_probe.py PART OUT.json OLD

It knows the public interface only, so that it runs in a tree of any inner order. OUT.json gets what
came out, by name: texts as they are, values as hashes of their bytes; what is a time is blanked.
OLD is the folder in which the older tree ran the part `write`; the part `read` starts from there.
The working directory is scratch space, and its siblings belong to other runs of the comparison.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import inspect
import io
import json
import logging
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tensorize
from tensorize import training

FOUND: dict[str, str] = {}
"""What came out, by name."""

TOLD: dict[str, str] = {}
"""What is worth seeing side by side, and may differ."""

EVERY = ("dense", "low_rank", "shared", "tt", "block")
TEXT = inspect.getsource(argparse) + inspect.getsource(ast)

# ------------------------------------------------------------------------------ what is put down

NUMBER = r"[\d.]+(?:e[+-]?\d+)?"
TIMES = (
    (rf"{NUMBER} µs a parameter", "… µs a parameter"),
    (rf"; {NUMBER} measured, {NUMBER} dense", "; … measured, … dense"),
)
SAID_TIMES = (rf"{NUMBER} ?(?:ns|µs|ms|s|min)\b", rf"{NUMBER} [KMG]B")


def put(name: str, value: str) -> None:
    """Put a text down, without the names of the folders that it was made in."""
    if name in FOUND:
        raise ValueError(f"{name} is put down twice")
    scratch = re.escape(str(Path.cwd().parent))
    value = re.sub(rf"{scratch}/[^/\s\"']+", "SCRATCH", value)
    FOUND[name] = value.replace(str(tree()), "TREE")


def tree() -> Path:
    """The tree whose tensorize this process runs."""
    return Path(tensorize.__file__).parent.parent


def bits(tensor: Tensor) -> str:
    """What a tensor is: dtype, shape, order in memory, and a hash of its bytes."""
    tensor = tensor.detach()
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    order = tensor.stride() if tensor.numel() else ()
    kind = f"{tensor.dtype} {tuple(tensor.shape)} {order}"
    return f"{kind} {hashlib.sha256(data).hexdigest()[:16]}"


def values(value: Any) -> str:
    """All that is in a state dict, an output or any other nesting, a line each."""
    lines = []
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        said = bits(leaf) if isinstance(leaf, Tensor) else repr(leaf)
        lines.append(f"{pytree.keystr(path)} {said}")
    return "\n".join(lines)


def without_times(value: Any) -> Any:
    """JSON data with what was measured on a clock blanked."""
    if isinstance(value, Mapping):
        blank = {"seconds": 0.0} if set(value) == {"name", "seconds", "summary"} else {}
        return {key: without_times(item) for key, item in value.items()} | blank
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    if isinstance(value, str):
        for pattern, blank in TIMES:
            value = re.sub(pattern, blank, value)
    return value


def said(text: str) -> str:
    """What was said on the way, in one line, without times and sizes of memory."""
    text = in_one_line(text)
    for pattern in SAID_TIMES:
        text = re.sub(pattern, "…", text)
    return text


def in_one_line(text: str) -> str:
    """A text however its lines are broken, without times."""
    return without_times(re.sub(r"\s+", " ", text))


def as_text(data: Any) -> str:
    return json.dumps(data, indent=1, sort_keys=False, ensure_ascii=False)


def put_report(name: str, report: tensorize.Report) -> None:
    """A report as data, as text and as a page."""
    data = without_times(report.to_dict())
    report = tensorize.Report.from_dict(data)
    put(f"{name}/report.json", as_text(data))
    put(f"{name}/report.txt", str(report))
    report.to_html("page.html")
    put(f"{name}/report.html", Path("page.html").read_text())


def put_files(name: str, directory: str | Path) -> None:
    """Every file of a folder."""
    for path in sorted(Path(directory).rglob("*")):
        if path.is_dir():
            continue
        put(f"{name}/{path.relative_to(directory)}", file_text(path))


def file_text(path: Path) -> str:
    if path.suffix == ".json":
        return as_text(without_times(json.loads(path.read_text())))
    content = path.read_bytes()
    return f"{len(content)} bytes {hashlib.sha256(content).hexdigest()}"


def put_outputs(name: str, model: nn.Module, inputs: Any, *, gradients: bool = True) -> None:
    """What a model gives, and the gradients of every parameter."""
    with torch.no_grad():
        put(f"{name}/outputs", values(run(model, inputs)))
    if not gradients:
        return
    model.zero_grad()
    outputs = [t for t in pytree.tree_leaves(run(model, inputs)) if is_float(t)]
    sum(t.float().square().sum() for t in outputs).backward()  # type: ignore[union-attr]
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    put(f"{name}/gradients", values([*grads.items()]))
    model.zero_grad()


def run(model: nn.Module, inputs: Any) -> Any:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return dict(output) if isinstance(output, Mapping) else getattr(output, "logits", output)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


def put_model(name: str, model: nn.Module, inputs: Any, *, gradients: bool = True) -> None:
    """All that can be had of a compressed model, but what takes long."""
    put(f"{name}/modules", str(model))
    put(f"{name}/state", values([*model.state_dict().items()]))
    put_outputs(name, model, inputs, gradients=gradients)
    put_report(name, tensorize.report(model))
    put(f"{name}/plan.json", tensorize.report(model).plan.to_json())


def put_rest(name: str, model: nn.Module, inputs: Any, into: nn.Module | None = None) -> None:
    """Kernels, graphs, files and dense weights of a compressed model.

    ``into``: what its artefact is loaded into, where it is no model of transformers.
    """
    for kernel, source in tensorize.kernels(model, inputs).items():
        put(f"{name}/kernels/{kernel}", str(source))
    graphs = tensorize.graphs(model, inputs)
    put(f"{name}/graphs", graphs.print_readable())
    put(f"{name}/graphs.diff", graphs.diff())
    graphs.to_svg("graphs.svg")
    put(f"{name}/graphs.svg", Path("graphs.svg").read_text())
    place = Path("saved") / name
    tensorize.save(model, place)
    put_files(f"{name}/saved", place)
    put_outputs(f"{name}/loaded", tensorize.load(place, into), inputs)
    dense = tensorize.densify(model)
    put(f"{name}/densified", values([*dense.state_dict().items()]))
    put_outputs(f"{name}/densified", dense, inputs, gradients=False)
    again = pickle.loads(pickle.dumps(model))
    put_outputs(f"{name}/pickled", again, inputs, gradients=False)


# ---------------------------------------------------------------------------------- the models


def trained_gpt() -> nn.Module:
    from examples import gpt

    return gpt.load_pretrained()


def trained_llama() -> nn.Module:
    from examples import llama

    return llama.load_pretrained()


def tokens(batches: int, rows: int = 2, length: int = 96) -> Tensor:
    """Text as tokens of the examples' models, (batches, rows, length)."""
    from examples import gpt

    ids = gpt.encode(gpt.load_tokenizer(), [TEXT])
    return ids[: batches * rows * length].view(batches, rows, length)


def fading(model: nn.Module) -> nn.Module:
    """The model with weights whose spectra fall, as those of trained ones do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                u, s, v = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_((u * s * torch.logspace(0, -3, len(s))) @ v)
    return model.eval()


def small_gpt() -> nn.Module:
    from examples.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    return fading(GPT(GPTConfig(vocabulary=128, context=32, width=48, layers=2, heads=4)))


def small(kind: str, **sizes: Any) -> nn.Module:
    """A small model of transformers, by what its class is called."""
    import transformers as hf

    usual = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = getattr(hf, kind)
    torch.manual_seed(0)
    return fading(model(model.config_class(**{**usual, **sizes})))


def small_llama() -> nn.Module:
    return small("LlamaForCausalLM", num_key_value_heads=2, tie_word_embeddings=False)


def small_batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(3, 128, (4, 12), generator=generator)} for _ in range(count)
    ]


class Several(nn.Module):
    """Weights of other kinds: convolved, recurrent, of attention, by einsum, bare."""

    def __init__(self) -> None:
        super().__init__()
        self.convolved = nn.Conv2d(3, 24, 4, stride=4)
        self.recurrent = nn.LSTM(24, 24, batch_first=True)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.bare = nn.Parameter(torch.randn(24, 48) / 5)
        self.mixed = nn.Parameter(torch.randn(3, 48, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolved(x).flatten(2).transpose(1, 2)
        x = x + self.recurrent(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return torch.einsum("btn,end->betd", torch.relu(x @ self.bare), self.mixed)


# ----------------------------------------------------------------------------------- the parts


def interface() -> None:
    """Names, signatures, texts of errors and of the command line, what debugging says."""
    for owner in (tensorize, training):
        put(f"names/{owner.__name__}", "\n".join(sorted(owner.__all__)))
        for name in owner.__all__:
            value = getattr(owner, name)
            if callable(value):
                parameters = inspect.signature(value).parameters.values()
                given = [str(p.replace(annotation=p.empty)) for p in parameters]
                put(f"signatures/{owner.__name__}.{name}", ", ".join(given))
            if isinstance(value, type):
                public = [each for each in dir(value) if not each.startswith("_")]
                put(f"members/{owner.__name__}.{name}", "\n".join(public))
    for command in ("", "compile", "analyze", "report", "eval", "bench", "calibrate"):
        put_command(f"help/{command}", *command.split(), "--help")
    model, batches = small_llama(), small_batches(2)
    analysis = tensorize.analyze(model, calibration=batches, progress=False)
    failing: dict[str, Callable[[], Any]] = {
        "budget": lambda: tensorize.compile(model, 0.001, metric="frobenius"),
        "budget type": lambda: tensorize.compile(model, "half"),  # type: ignore[arg-type]
        "budget loss": lambda: analysis.plan(tensorize.Budget(params=0.05, loss=1e-9)),
        "metric": lambda: tensorize.compile(model, 0.5, metric="l2"),
        "format": lambda: tensorize.compile(model, 0.5, formats="svd"),
        "formats of a plan": lambda: analysis.plan(0.5, formats="block"),
        "pattern": lambda: tensorize.compile(model, 0.5, include="nothing*"),
        "ranks": lambda: tensorize.compile(model, None, ranks={"nothing*": 4}),
        "backend": lambda: tensorize.compile(model, 0.5, backend="cuda"),
        "no data": lambda: tensorize.compile(model, 0.5, metric="loss"),
        "data": lambda: tensorize.compile(model, 0.5, calibration=[{"ids": torch.ones(2)}]),
        "polish": lambda: analysis.plan(0.5, refine="polish"),
        "no model": lambda: tensorize.compile(torch.ones(3), 0.5),  # type: ignore[arg-type]
        "no report": lambda: tensorize.report(model),
        "no plan": lambda: tensorize.apply(model, "plan"),  # type: ignore[arg-type]
        "other plan": lambda: tensorize.apply(small_gpt(), analysis.plan(0.5)),
        "no artefact": lambda: tensorize.load("nowhere"),
        "no checkpoint": lambda: tensorize.compile_checkpoint("nowhere", "out"),
        "healing": lambda: tensorize.heal(model, model, batches, steps=2),
        "groups": lambda: training.parameter_groups(model, lr=-1),
        "tuning": lambda: tensorize.tune_kernels(tensorize.apply(model, analysis.plan(0.5))),
    }
    for name, call in failing.items():
        try:
            call()
        except Exception as error:
            kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
            put(f"errors/{name}", f"{kinds}\n{error}")
        else:
            put(f"errors/{name}", "none")
    os.environ["TENSORIZE_DEBUG"] = "3"
    spoken = io.StringIO()
    with contextlib.redirect_stderr(spoken):
        tensorize.graphs(tensorize.apply(model, analysis.plan(0.5)), batches[0])
    os.environ["TENSORIZE_DEBUG"] = "0"
    put("debug", said(spoken.getvalue()))


def put_command(name: str, *arguments: str) -> None:
    """A call of the command line in this process: exit status, output, and what it said."""
    from tensorize.cli import main

    kept, sys.argv = sys.argv, ["tensorize", *arguments]
    output, spoken, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(spoken):
            main()
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv = kept
    put(f"{name}/status", str(code))
    put(f"{name}/said", said(spoken.getvalue()))
    text = output.getvalue()
    shown = as_text(without_times(json.loads(text))) if text.startswith("{") else in_one_line(text)
    put(f"{name}/output", shown)


def gpt() -> None:
    """The trained GPT: of its weights alone and by data, in all formats."""
    model, ids = trained_gpt(), tokens(5)
    inputs = (ids[-1],)
    alone = tensorize.analyze(model, example_inputs=inputs, metric="frobenius", progress=False)
    put("frobenius/curve", str(alone.curve()))
    put_model("frobenius", tensorize.apply(model, alone.plan(0.5)), inputs)
    compress = {"example_inputs": inputs, "metric": "frobenius", "progress": False}
    for name, formats in {
        "tt": ("dense", "tt"),
        "block": "block",
        "mixed": {"blocks.0.*": "tt", "blocks.1.*": "block", "*": ("dense", "low_rank")},
    }.items():
        found = tensorize.compile(model, 0.6, formats=formats, **compress)
        put_model(name, found, inputs)
        if name == "mixed":
            put_rest(name, found, inputs, trained_gpt())
    ranks = {"blocks.[0-2].*": "full", "blocks.3.*": 24}
    put_model("ranks", tensorize.compile(model, None, ranks=ranks, **compress), inputs)
    batches = [(each,) for each in ids[:4]]
    learned = tensorize.analyze(model, calibration=batches, progress=False)
    put("loss/analysis", str(learned))
    put("loss/notes", "\n".join(learned.notes))
    put_model("one-shot", tensorize.apply(model, learned.plan(0.4, refine=None)), inputs)
    refit = tensorize.apply(model, learned.plan(0.4, refine="refit"))
    put_model("refit", refit, inputs)
    put_rest("refit", refit, inputs, trained_gpt())


def llama() -> None:
    """The trained Llama of transformers: its own data, polished, shared, evaluated."""
    model, ids = trained_llama(), tokens(6)
    batches = [{"input_ids": each} for each in ids[:4]]
    inputs = {"input_ids": ids[-1]}
    put_model("default", tensorize.compile(model, 0.4, progress=False), inputs)
    shared = tensorize.compile(
        model, 0.5, formats=("dense", "shared"), metric="frobenius", progress=False
    )
    put_model("shared", shared, inputs)
    put_rest("shared", shared, inputs)
    learned = tensorize.analyze(model, calibration=batches, refine="polish", progress=False)
    put("loss/analysis", str(learned))
    for limits in (0.5, tensorize.Budget(params=0.9, flops=0.6), tensorize.Budget(loss=0.1)):
        put(f"plans/{limits}", learned.plan(limits).to_json())
    polished = tensorize.apply(model, learned.plan(0.4, refine="polish"))
    put_model("polish", polished, inputs)
    measured = tensorize.evaluate(
        {"polished": polished}, model, batches[:2], time=False, progress=False
    )
    put("evaluation", str(measured))
    put("evaluation.json", as_text(measured.to_dict()))
    measured.to_html("evaluation.html")
    put("evaluation.html", Path("evaluation.html").read_text())


def minilm() -> None:
    """The sentence encoder of the demo, by its weights alone and by a few sentences."""
    from examples import demo_minilm

    model = demo_minilm.trained()
    tokenizer = demo_minilm.load_tokenizer(demo_minilm.weights_folder())
    sentences = [line.strip() for line in TEXT.splitlines() if len(line.strip()) > 60][:24]
    batches = demo_minilm.batches_of(tokenizer, sentences, 8)
    *known, inputs = ({**batch} if isinstance(batch, Mapping) else batch for batch in batches)
    alone = tensorize.compile(model, 0.6, example_inputs=inputs, metric="frobenius", progress=False)
    put_model("frobenius", alone, inputs)
    by_inputs = tensorize.compile(
        model, 0.9, calibration=known, metric="input", include="*.layer.[01].*", progress=False
    )
    put_model("input", by_inputs, inputs, gradients=False)
    learned = tensorize.analyze(model, calibration=known, progress=False)
    put("loss/analysis", str(learned))
    put_model("refit", tensorize.apply(model, learned.plan(0.5)), inputs)


def kinds() -> None:
    """Small models with weights of many kinds, in every format."""
    ids = small_batches(1)[0]["input_ids"]
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    put_compiled("gpt", small_gpt(), (ids,), EVERY)
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_hidden_layers": 1}
    put_compiled("mixtral", small("MixtralForCausalLM", **experts), {"input_ids": ids}, EVERY)
    put_compiled("several", Several().eval(), (pixels,), EVERY)


def others() -> None:
    """Small models of transformers, in the formats that are used unasked."""
    ids = small_batches(1)[0]["input_ids"]
    masked = {"input_ids": ids, "attention_mask": (torch.arange(12) < 9).long().expand(4, 12)}
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labelled = {"input_ids": ids, "labels": ids[:, :7].contiguous()}
    gpt2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
    t5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    put_compiled("gpt2", small("GPT2LMHeadModel", **gpt2), {"input_ids": ids})
    put_compiled("bert", small("BertModel", max_position_embeddings=64), masked)
    image = {"image_size": 32, "patch_size": 8}
    put_compiled("vit", small("ViTForImageClassification", **image), {"pixel_values": pixels})
    put_compiled(
        "t5", small("T5ForConditionalGeneration", decoder_start_token_id=0, **t5), labelled
    )


def put_compiled(name: str, model: nn.Module, inputs: Any, formats: Any = None) -> None:
    """A model compiled of its weights alone and by data, in ``formats``."""
    put(f"{name}/dense", values([*model.state_dict().items()]))
    plain = tensorize.compile(model, 0.7, example_inputs=inputs, metric="frobenius", progress=False)
    put_model(f"{name}/frobenius", plain, inputs)
    learned = tensorize.compile(
        model, 0.7, calibration=[inputs] * 4, formats=formats, progress=False
    )
    put_model(f"{name}/loss", learned, inputs)
    put_rest(f"{name}/loss", learned, inputs, model)


def trains() -> None:
    """Training: fresh models, learning rates, ranks that move, memory, healing."""
    model, batches = small_llama(), small_batches()
    inputs = batches[0]
    for name, options in {
        "scaled": {},
        "spectral": {"method": "spectral"},
        "nonlinear": {"nonlinearity": "silu"},
        "block": {"formats": "block"},
        "trains": {"formats": "tt", "rank_multiple": 1},
    }.items():
        fresh = training.initialize(model, 0.5, example_inputs=inputs, progress=False, **options)
        put_model(f"initialize/{name}", fresh, inputs)
    with torch.device("meta"):
        empty = type(model)(model.config)
    torch.manual_seed(0)
    fresh = tensorize.initialize(empty, 0.5, example_inputs=inputs, progress=False)
    put_model("initialize/meta", fresh, inputs)
    for rule in ("adam", "sgd"):
        groups = training.parameter_groups(fresh, lr=1e-3, weight_decay=0.1, rule=rule)
        shown = [{**group, "params": [tuple(p.shape) for p in group["params"]]} for group in groups]
        put(f"groups/{rule}", values(shown))
    for precision in ("mixed", "float32", "bfloat16", "stochastic"):
        put(f"memory/{precision}", str(training.memory(fresh, precision=precision, batch=inputs)))
    put("memory/activations", str(training.activations(fresh, inputs)))
    put("memory/blocks", str(training.checkpoint_low_rank(fresh)))
    put("memory/fewer", str(training.activations(fresh, inputs)))
    optimizer = torch.optim.AdamW(training.parameter_groups(fresh, lr=1e-3, weight_decay=0.1))
    ranks = training.RankSchedule(fresh, optimizer, budget=0.4, start=1, end=5, every=2)
    losses, moved = [], []
    for batch in batches:
        losses.append(step(fresh.train(), optimizer, batch))
        moved.append(str(ranks.step()))
    put("schedule/losses", values(losses))
    put("schedule/moved", "\n".join(moved))
    put("schedule/ranks", values(ranks.state_dict()))
    put_model("schedule", fresh.eval(), inputs)
    narrow = tensorize.initialize(model, 0.5, example_inputs=inputs, progress=False).bfloat16()
    optimizer = torch.optim.AdamW(narrow.parameters(), lr=1e-2)
    rounded = training.round_stochastically(optimizer, seed=3)
    losses = [step(narrow.train(), optimizer, batch) for batch in batches]
    put("rounded/losses", values(losses))
    put("rounded/state", values([rounded.state_dict(), *narrow.state_dict().items()]))
    dense = small_gpt()
    texts = [(batch["input_ids"],) for batch in small_batches(8)]
    healed = tensorize.compile(
        dense, 0.5, metric="frobenius", example_inputs=texts[0], progress=False
    )
    for options in ({}, {"train": "all", "layers": True}):
        done = tensorize.heal(healed, dense, texts, steps=8, progress=False, **options)
        put(f"heal/{options}", f"{done}\n{as_text(done.to_dict())}")
        put_model(f"heal/{options}", healed, texts[0])
    distance = tensorize.distillation_loss(dense, texts)
    put("distillation", values(distance(healed, texts[1])))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> Tensor:
    """One step of training, and its loss."""
    optimizer.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def compiled() -> None:
    """``torch.compile(backend="tensorize")``, without a compiler, and previews of dense models."""
    model, (inputs, *_) = small_llama(), small_batches(1)
    compress = {"example_inputs": inputs, "metric": "frobenius", "progress": False}
    for name, formats in {"low rank": None, "every": EVERY}.items():
        found = tensorize.compile(model, 0.6, formats=formats, **compress)
        eager = torch.compile(found, backend="tensorize", options={"inner": "eager"})
        put_outputs(f"{name}/many rows", eager, inputs)
        one = {"input_ids": inputs["input_ids"][:1, :1]}
        with torch.no_grad():
            put(f"{name}/one row", values(run(eager, one)))
        put_report(name, tensorize.report(found))
        torch._dynamo.reset()
    for options in ({"budget": 0.5}, {"ranks": {"*mlp*": 8}}):
        preview = torch.compile(model, backend="tensorize", options={**options, "inner": "eager"})
        put_outputs(f"preview/{options}", preview, inputs)
        torch._dynamo.reset()


def inductor() -> None:
    """The same with inductor, kernels in triton's interpreter, and kernels compiled for a GPU."""
    model, (inputs, *_) = small_llama(), small_batches(1)
    compress = {"example_inputs": inputs, "metric": "frobenius", "progress": False}
    found = tensorize.compile(model, 0.6, **compress)
    put_outputs("inductor", torch.compile(found, backend="tensorize"), inputs)
    torch._dynamo.reset()
    by_itself = tensorize.compile(model, 0.6, backend="inductor", **compress)
    put_outputs("by itself", by_itself, inputs, gradients=False)
    torch._dynamo.reset()
    name, kernel = next(iter(sorted(tensorize.kernels(found).items())))
    made = kernel.compile("cuda:90")
    put(f"cuda:90 {name}", f"{made.registers} {made.spills} {made.shared_bytes}\n{made.asm}")


def interpreted() -> None:
    """Weights that run by Triton kernels, in triton's interpreter."""
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    fading(model)
    inputs = (torch.randn(4, 48, generator=torch.Generator().manual_seed(0)),)
    for formats in ("low_rank", "tt", "block"):
        found = tensorize.compile(
            model, 0.7, example_inputs=inputs, metric="frobenius", formats=formats,
            backend="triton", progress=False,
        )  # fmt: skip
        put_model(formats, found, inputs)


def command() -> None:
    """The command line on a checkpoint, streamed and not, and what transformers reads of it."""
    import transformers

    small_llama().save_pretrained("dense")
    stack = torch.cat([batch["input_ids"] for batch in small_batches()])
    from safetensors.torch import save_file

    save_file({"input_ids": stack}, "data.safetensors")
    data = ("--calibration", "data.safetensors")
    put_command("compile", "compile", "dense", "--budget", "0.6", "--out", "out", *data,
                "--html", "out.html", "--emit", "kernels", "--json")  # fmt: skip
    put_files("compile/files", "out")
    put_files("compile/kernels", "kernels")
    put_command("plain", "compile", "dense", "--budget", "params=0.7,flops=0.8", "--out", "plain",
                "--metric", "frobenius", "--formats", "*mlp*=tt,dense")  # fmt: skip
    put_files("plain/files", "plain")
    put_command("stream", "compile", "dense", "--budget", "0.6", "--out", "streamed", "--stream")
    put_files("stream/files", "streamed")
    put_command("analyze", "analyze", "dense", "--budgets", "0.5,0.75", *data)
    put_command("report", "report", "out")
    put_command("report json", "report", "out", "--json")
    put_command(
        "eval", "eval", "out", "--dense", "dense", "--data", "data.safetensors", "--no-time"
    )
    put_command("infeasible", "compile", "dense", "--budget", "0.0001", "--out", "none")
    put_command("missing", "report", "nowhere")
    read = transformers.AutoModelForCausalLM.from_pretrained("out")
    put_model("from_pretrained", read, small_batches(1)[0])
    report = tensorize.compile_checkpoint("dense", "checkpoint", 0.6, formats="block")
    put_report("checkpoint", report)
    put_files("checkpoint/files", "checkpoint")
    inputs = small_batches(1)[0]
    put_outputs("checkpoint", tensorize.load("checkpoint"), inputs)
    narrow = tensorize.load("out", dtype=torch.bfloat16)
    put("narrow", values([*narrow.state_dict().items()]))


# ------------------------------------------------------------------ what an older tree has written


class Stopped(Exception):
    """A run that ends in the middle: what it leaves is what a killed one leaves."""


def stops(stage: str | None, count: int) -> Callable[[str, int, int], None]:
    """Progress that ends the run where ``count`` of a stage (None: of any) are done."""

    def watch(now: str, done: int, total: int) -> None:
        if done == count and stage in (None, now):
            raise Stopped

    return watch


def healing(directory: str | Path, progress: Any) -> tuple[Any, nn.Module]:
    dense, batches = small_llama(), small_batches(10)
    found = tensorize.compile(
        dense, 0.5, example_inputs=batches[0], metric="frobenius", progress=False
    )
    options = {"steps": 24, "checkpoint_dir": directory, "progress": progress}
    return tensorize.heal(found, dense, batches, **options), found


def cached(directory: str | Path) -> tensorize.Analysis:
    return tensorize.analyze(
        small_llama(), calibration=small_batches(), cache_dir=directory, progress=False
    )


def written() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Any]]:
    """Compressed models, what each is loaded into, and inputs, by name."""
    batches = small_batches()
    inputs = batches[0]
    texts = [(batch["input_ids"],) for batch in batches]

    def compressed(model: nn.Module, data: Any, **options: Any) -> Callable[[], nn.Module]:
        return lambda: tensorize.compile(model, 0.6, calibration=data, progress=False, **options)

    def trained(**options: Any) -> nn.Module:
        model = training.initialize(
            small_llama(), 0.5, example_inputs=inputs, progress=False, **options
        )
        training.checkpoint_low_rank(model)
        return model

    alone = {"metric": "frobenius", "example_inputs": (inputs["input_ids"],), "progress": False}
    return {
        "gpt": (compressed(small_gpt(), texts, formats=EVERY), small_gpt, texts[0]),
        "llama": (compressed(small_llama(), batches, formats=EVERY), small_llama, inputs),
        "nonlinear": (lambda: trained(nonlinearity="gelu"), small_llama, inputs),
        "trained gpt": (
            lambda: tensorize.compile(
                trained_gpt(), None, ranks={"blocks.[0-2].*": "full", "blocks.4.*": 16}, **alone
            ),
            trained_gpt,
            texts[0],
        ),
    }


def write() -> None:
    """What a version leaves behind: artefacts, pickles, caches and runs that were stopped."""
    for name, (make, _, inputs) in written().items():
        model = make()
        put_outputs(f"models/{name}", model, inputs)
        tensorize.save(model, f"saved/{name}")
        torch.save(model, f"{name}.pt")
        torch.save(model.state_dict(), f"{name}.state.pt")
        Path(f"{name}.pickle").write_bytes(pickle.dumps(model))
    analysis = cached("cache")
    plan = analysis.plan(0.6)
    Path("plan.json").write_text(plan.to_json())
    report = tensorize.report(tensorize.apply(small_llama(), plan))
    spec = tensorize.TTSpec((8, 6), (12, 4), (5,))
    things = {
        "plan": plan,
        "plan alone": tensorize.Plan.from_json(plan.to_json()),
        "analysis": analysis,
        "report": report,
        "curve": analysis.curve(),
        "prediction": plan.predicted,
        "budget": tensorize.Budget(params=0.5, loss=0.1),
        "spec": spec,
        "block": tensorize.TTSpec.block((8, 6), (12, 4), 3, experts=2),
        "contraction": tensorize.plan_contraction(spec),
        "memory": training.memory(7e9),
        "kernels": tensorize.kernels(tensorize.apply(small_llama(), plan)),
        "error": tensorize.BudgetError("it is too small", way_out="a larger one"),
    }
    things["healing"], healed = healing("healed", False)
    put("healing", values([*healed.state_dict().items()]))
    for name, thing in things.items():
        Path(f"{name}.pickle").write_bytes(pickle.dumps(thing))
        torch.save(thing, f"{name}.pt")
    with contextlib.suppress(Stopped):
        healing("stopped", stops(None, 10))
    small_llama().save_pretrained("dense")
    for stage, count in (("spectra", 5), ("factorize", 6)):
        with contextlib.suppress(Stopped):
            tensorize.compile_checkpoint("dense", "halfway", 0.5, progress=stops(stage, count))
    put("left", "\n".join(sorted(str(path) for path in Path().rglob("*"))))


def read(old: Path) -> None:
    """All of that, read again."""
    shutil.copytree(old, "old")
    old = Path("old")
    for name, (_, build, inputs) in written().items():
        hugging = not name.endswith("gpt")
        loaded = tensorize.load(old / "saved" / name, None if hugging else build())
        put_model(f"{name}/loaded", loaded, inputs)
        put_outputs(
            f"{name}/torch.load", torch.load(old / f"{name}.pt", weights_only=False), inputs
        )
        unpickled = pickle.loads((old / f"{name}.pickle").read_bytes())
        put_model(f"{name}/pickle", unpickled, inputs)
        put_outputs(f"{name}/trained", unpickled.train(), inputs)
        state = torch.load(old / f"{name}.state.pt", weights_only=True)
        put(f"{name}/state dict", str(loaded.load_state_dict(state)))
        put_outputs(f"{name}/state dict", loaded.eval(), inputs)
    names = [path.stem for path in old.glob("*.pickle") if path.stem not in written()]
    for name in sorted(names):
        for thing, how in (
            (pickle.loads((old / f"{name}.pickle").read_bytes()), "pickle"),
            (torch.load(old / f"{name}.pt", weights_only=False), "torch.load"),
        ):
            put_thing(f"{name}/{how}", thing)
    put_model("plan.json", from_json(old), small_batches(1)[0])
    before = sorted(old.rglob("cache/*"))
    analysis = cached(old / "cache")
    hit = sorted(old.rglob("cache/*")) == before
    TOLD["the analysis of the older tree"] = "read" if hit else "made again"
    put("cache/analysis", str(analysis))
    put_model("cache", tensorize.apply(small_llama(), analysis.plan(0.6)), small_batches(1)[0])
    for name in ("healed", "stopped"):
        done, model = healing(old / name, False)
        put(f"{name}/healing", as_text(done.to_dict()))
        put(f"{name}/state", values([*model.state_dict().items()]))
    report = tensorize.compile_checkpoint(old / "dense", old / "halfway", 0.5)
    TOLD["the checkpoint of the older tree"] = next(
        stage.summary for stage in report.history if stage.name == "spectra"
    )
    put_files("halfway", old / "halfway")


def from_json(old: Path) -> nn.Module:
    """A plan as text, carried out from the cache that it names."""
    text = (old / "plan.json").read_text()
    plan = tensorize.Plan.from_json(text)
    put("plan.json/text", plan.to_json())
    return tensorize.apply(small_llama(), plan, calibration=small_batches())


def put_thing(name: str, thing: Any) -> None:
    """An object that was pickled."""
    if isinstance(thing, tensorize.Report):
        put_report(name, thing)
    elif isinstance(thing, tensorize.Plan):
        put(name, thing.to_json())
        if thing.analysis is not None:
            small = tensorize.apply(small_llama(), thing)
            put(f"{name}/state", values([*small.state_dict().items()]))
    elif isinstance(thing, tensorize.Analysis):
        put(name, f"{thing}\n{thing.plan(0.6).to_json()}")
    elif isinstance(thing, dict):
        for key, value in thing.items():
            put(f"{name}/{key}", f"{value!r}\n{value}")
    elif isinstance(thing, Exception):
        put(name, f"{type(thing).__name__} {thing}")
    else:
        put(name, repr(thing))


PARTS: dict[str, Callable[[], None]] = {
    "interface": interface,
    "gpt": gpt,
    "llama": llama,
    "minilm": minilm,
    "kinds": kinds,
    "others": others,
    "trains": trains,
    "compiled": compiled,
    "inductor": inductor,
    "interpreted": interpreted,
    "command": command,
    "write": write,
}


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Put down what was logged and warned of on the way."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(said(f"{record.levelname} {record.getMessage()}"))

    logger = logging.getLogger("tensorize")
    logger.addHandler(Listener())
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    put("logged", "\n".join(lines))
    put("warned", "\n".join(unique(f"{w.category.__name__}: {w.message}" for w in caught)))


def unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def main() -> None:
    part, out, old = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    expected = Path(os.environ["PYTHONPATH"])
    if tree() != expected:
        raise SystemExit(f"tensorize comes from {tree()}, not from {expected}")
    torch.manual_seed(0)
    with heard():
        if part == "read":
            read(old)
        else:
            PARTS[part]()
    out.write_text(json.dumps({"same": FOUND, "told": TOLD}))


if __name__ == "__main__":
    main()
