"""Evaluation: every figure against a plain computation of it, and the table, JSON and page."""

from __future__ import annotations

import html.parser
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import CaptureError, TensorizeError
from tensorize.evaluation import evaluate, meter
from tests.hub.test_huggingface import tokenizer
from tests.models import CASES, parameters
from tests.reports.test_report import CHROMIUM, browse
from tests.training.test_healing import (
    decoder,
    models,
    texts,
    values,
)

BUDGETS = (0.5, 0.7, 0.9)


def padded(count: int = 3, filler: int = 3) -> list[dict[str, Tensor]]:
    """Batches of text of which all but the first row of each is shorter."""
    batches = []
    for ids in texts(count, seed=9):
        mask = torch.ones_like(ids)
        mask[1:, 9:] = 0
        batches.append({"input_ids": ids.where(mask != 0, filler), "attention_mask": mask})
    return batches


def llama() -> tuple[nn.Module, nn.Module]:
    return models("llama")


def measured(model: Any, dense: nn.Module, batches: Any, **options: Any) -> tensorize.Evaluation:
    return tensorize.evaluate(model, dense, batches, time=False, **options)


# --------------------------------------------------------------------------------- single figures


def test_text_by_plain_sums_over_tokens() -> None:
    dense, small = llama()
    batches, kl, best, five, loss = padded(), [], [], [], {"dense": [], "small": []}
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.double().log_softmax(-1) for m in (dense, small))
            for row, mask in enumerate(batch["attention_mask"]):
                length = int(mask.sum())
                for t in range(length):
                    a, b = p[row, t], q[row, t]
                    kl.append(float((a.exp() * (a - b)).sum()))
                    best.append(float(a.argmax() == b.argmax()))
                    both = set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())
                    five.append(len(both) / 5)
                    if t + 1 < length:
                        word = int(batch["input_ids"][row, t + 1])
                        loss["dense"].append(-float(a[word]))
                        loss["small"].append(-float(b[word]))
    found = measured({"small": small}, dense, batches)
    quality = found["small"].quality
    assert (found.kind, found.unit, found.rows) == ("text", "nats", len(kl))

    def mean(xs: list[float]) -> Any:
        return pytest.approx(sum(xs) / len(xs), rel=1e-4)

    assert quality.distance == mean(kl)
    assert quality.top1 == mean(best)
    assert quality.top5 == mean(five)
    assert quality.loss == mean(loss["small"])
    assert found.dense.quality.loss == mean(loss["dense"])
    assert quality.perplexity == pytest.approx(torch.tensor(quality.loss).exp().item(), rel=1e-5)
    assert quality.worst.value == pytest.approx(max(kl), rel=1e-4)
    assert quality.tail <= quality.worst.value


def test_the_worst_token_is_where_it_is() -> None:
    dense, small = llama()
    batches = padded()
    worst = measured({"small": small}, dense, batches, tokenizer=tokenizer())["small"].quality.worst
    batch = batches[worst.batch]
    with torch.no_grad():
        p, q = (m(**batch).logits.log_softmax(-1).flatten(0, 1) for m in (dense, small))
    here = (p.exp() * (p - q)).sum(-1)[worst.row]
    assert float(here) == pytest.approx(worst.value, rel=1e-4)
    assert worst.text.split()[-1] == tokenizer().decode([batch["input_ids"].flatten()[worst.row]])


def test_padding_counts_in_nothing() -> None:
    dense, small = llama()
    figures = [measured({"small": small}, dense, padded(filler=f)) for f in (3, 90)]
    assert figures[0].rows == figures[1].rows
    for name in ("dense", "small"):
        assert figures[0][name].quality == figures[1][name].quality


def test_batches_that_are_hidden_altogether() -> None:
    dense, small = llama()
    hidden = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
              for batch in padded(1)]  # fmt: skip
    with pytest.raises(CaptureError, match="no row of the batches counts"):
        measured(small, dense, hidden)
    some = measured({"small": small}, dense, [*padded(), *hidden])
    assert some["small"].quality == measured({"small": small}, dense, padded())["small"].quality


def test_ids_given_as_the_only_argument() -> None:
    (dense, small), batches = models(), texts(2, seed=9)
    quality = measured(small, dense, batches).models[0].quality
    with torch.no_grad():
        ids = torch.cat(batches)
        logits = small(ids).logits[:, :-1].flatten(0, 1)
    want = float(F.cross_entropy(logits, ids[:, 1:].flatten()))
    assert quality.loss == pytest.approx(want, rel=1e-4)


def test_the_dense_model_equals_itself() -> None:
    dense = decoder("llama")
    found = measured({"itself": dense}, dense, padded())["itself"].quality
    assert (found.distance, found.worst.value, found.top1, found.top5) == (0, 0, 1, 1)


def test_embeddings_of_an_encoder() -> None:
    torch.manual_seed(0)
    dense = CASES["bert"].model()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(4)
    small = tensorize.compile(dense, 0.5, calibration=[CASES["bert"].batch()])
    batches = padded(4)
    means: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for batch in batches:
            for side, model in zip(means, (dense, small), strict=True):
                hidden = model(**batch).last_hidden_state
                for row, mask in zip(hidden, batch["attention_mask"], strict=True):
                    side.append(row[: int(mask.sum())].mean(0))
    before, after = (torch.stack(side) for side in means)
    cosines = F.cosine_similarity(before, after)
    near = []
    for side in (before, after):
        unit = F.normalize(side)
        order = (unit @ unit.T).argsort(descending=True)
        near.append([[k for k in row.tolist() if k != i][:10] for i, row in enumerate(order)])
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)]
    found = measured({"small": small}, dense, batches)
    quality = found["small"].quality
    assert found.kind == "outputs"
    assert quality.cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert quality.worst_cosine == pytest.approx(float(cosines.min()), abs=1e-5)
    assert quality.neighbours == pytest.approx(sum(shared) / len(shared), abs=1e-6)
    assert quality.neighbours < 1
    assert quality.top1 is None
    assert quality.perplexity is None
    assert found.dense.quality.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("given", ["in the batches", "beside them"])
def test_precision_and_recall_apart(given: str) -> None:
    dense = CASES["vit"].model()
    with torch.no_grad():
        dense.classifier.weight.mul_(40)
    small = tensorize.compile(dense, 0.7, example_inputs=CASES["vit"].batch())
    pixels = [torch.randn(16, 3, 32, 32) for _ in range(3)]
    labels = [torch.randint(0, 10, (16,)) for _ in range(3)]
    with torch.no_grad():
        predicted = torch.cat([small(pixel_values=x).logits.argmax(-1) for x in pixels])
    truth = torch.cat(labels)
    if given == "in the batches":
        batches = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
        found = measured({"small": small}, dense, batches)
    else:
        batches = [{"pixel_values": x} for x in pixels]
        found = measured({"small": small}, dense, batches, labels=labels)
    quality = found["small"].quality
    assert found.kind == "classes"
    assert quality.accuracy == pytest.approx(float((predicted == truth).double().mean()))
    assert [c.name for c in quality.classes] == [f"LABEL_{k}" for k in sorted(set(truth.tolist()))]
    for c in quality.classes:
        k = int(c.name.removeprefix("LABEL_"))
        hits = int(((predicted == k) & (truth == k)).sum())
        assert c.rows == int((truth == k).sum())
        assert c.precision == pytest.approx(hits / max(int((predicted == k).sum()), 1))
        assert c.recall == pytest.approx(hits / c.rows)
    recalls = [c.recall for c in quality.classes]
    assert quality.recall == pytest.approx(sum(recalls) / len(recalls))
    assert quality.recall != quality.precision
    assert "precision / recall" in str(found)


def test_labels_of_a_plain_module() -> None:
    dense = CASES["mlp"].model()
    small = tensorize.compile(dense, 0.6)
    x, y = torch.randn(64, 48), torch.randint(0, 32, (64,))
    found = measured(small, dense, [x], labels=[y])
    with torch.no_grad():
        want = float((small(x).argmax(-1) == y).double().mean())
    assert found.models[0].quality.accuracy == pytest.approx(want)
    assert found.unit == "relative squared error"
    again = measured(small, dense, [{"x": x, "labels": y}])
    assert again.models[0].quality == found.models[0].quality
    hidden = torch.cat([y[:40], torch.full((24,), -100)])
    some, few = measured(small, dense, [x], labels=[hidden]), measured(small, dense, [x[:40]])
    assert some.rows == few.rows == 40
    assert some.models[0].quality.worst.value <= found.models[0].quality.worst.value
    with pytest.raises(CaptureError, match="one label for each row"):
        measured(small, dense, [x], labels=[y[:5]])
    with pytest.raises(CaptureError, match="1 batches and 2 labels"):
        measured(small, dense, [x], labels=[y, y])


@pytest.mark.parametrize(("classes", "label"), [(3, 3), (3, -2), (1, 1)])
def test_labels_that_are_no_class_are_named(classes: int, label: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, classes))
    small = tensorize.compile(model, 0.6, example_inputs=(torch.randn(2, 32),))
    labels = [torch.zeros(8, dtype=torch.long), torch.full((8,), label)]
    with pytest.raises(tensorize.CaptureError, match=f"batch 1 has a label {label}"):
        tensorize.evaluate(
            small, model, [torch.randn(8, 32) for _ in labels], labels=labels, time=False
        )


def test_labels_of_a_sequence_to_sequence_model() -> None:
    case = CASES["t5"]
    dense = case.model()
    small = tensorize.compile(dense, 0.7, example_inputs=case.batch())
    batch = case.batch(3)
    found = measured({"small": small}, dense, [batch])
    with torch.no_grad():
        want = float(small(**batch).loss)
    assert found["small"].quality.loss == pytest.approx(want, rel=1e-4)


def test_sizes_and_times() -> None:
    dense, small = llama()
    found = tensorize.evaluate({"small": small}, dense, padded())
    for name, model in (("dense", dense), ("small", small)):
        assert found[name].parameters == parameters(model)
        stored = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
        assert found[name].bytes == sum(stored.values())
        assert (found[name].latency or 0) > 0
        assert (found[name].throughput or 0) > 0
    assert measured(small, dense, padded()).models[0].latency is None


def test_text_is_written_side_by_side() -> None:
    for name in ("llama", "gpt"):
        dense, small = models(name)
        words = tokenizer()
        found = measured({"small": small}, dense, texts(1), tokenizer=words, prompts=["w5 w6 w7"])
        assert found.prompts == ("w5 w6 w7",)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, small(ids).logits[:, -1:].argmax(-1)], 1)
        want = words.decode(ids[0, 3:].tolist()).split()
        assert found["small"].written[0].split()[:8] == want
        assert len(found["small"].written[0].split()) == 32
    without = measured({"small": small}, dense, texts(2), tokenizer=words)
    assert len(without.prompts) == evaluate.PROMPTS
    assert without.prompts[0] == words.decode(texts(1)[0][0].tolist())


# -------------------------------------------------------------------------------- several models


@pytest.fixture(scope="module")
def three() -> tensorize.Evaluation:
    torch.manual_seed(0)
    dense = decoder("llama")
    return tensorize.evaluate(
        list(BUDGETS), dense, padded(), calibration=texts(3, seed=5), tokenizer=tokenizer()
    )


def test_budgets_are_compressed_to(three: tensorize.Evaluation) -> None:
    assert [f.name for f in three.models] == ["50.0 % kept", "70.0 % kept", "90.0 % kept"]
    for figures, budget in zip(three.models, BUDGETS, strict=True):
        assert 0.8 * budget < three.share(figures) <= budget
    distances = [f.quality.distance for f in three.models]
    assert distances == sorted(distances, reverse=True)
    with pytest.raises(KeyError, match=r"none of 'dense', '50\.0 % kept'"):
        three["0.5"]


def test_models_and_budgets_in_one_call_and_nothing_is_changed() -> None:
    dense, small = llama()
    small.train()
    before, state = [values(m) for m in (dense, small)], torch.get_rng_state()
    several = [small, small, tensorize.Budget(params=0.8)]
    found = measured(several, dense, padded(), calibration=texts(3, seed=5))
    names = [f.name for f in found.models]
    assert names[0].endswith("kept")
    assert names[1] == f"{names[0]} again"
    assert names[2] == "params=0.8"
    assert found.models[0].quality == found.models[1].quality
    assert small.training
    assert torch.equal(torch.get_rng_state(), state)
    for model, was in zip((dense, small), before, strict=True):
        assert all(torch.equal(v, was[n]) for n, v in model.state_dict().items())
    with pytest.raises(CaptureError, match="no model to evaluate"):
        measured([], dense, padded())


def test_ranks_and_spectra_are_those_of_the_weights(three: tensorize.Evaluation) -> None:
    dense = decoder("llama")
    small = tensorize.compile(dense, BUDGETS[0], calibration=texts(3, seed=5))
    sites = tensorize.report(small).sites
    assert [(w.name, w.ranks) for w in three.models[0].weights] == [
        (s.name, s.ranks) for s in sites
    ]
    spectrum = next(s for s in three.spectra if s.name.endswith("0.mlp.up_proj.weight"))
    want = torch.linalg.svdvals(dense.get_parameter(spectrum.name).detach())
    for index, value in spectrum.values:
        assert value == pytest.approx(float(want[index - 1] / want[0]), rel=1e-3)
    assert spectrum.values[0][0] == 1
    assert spectrum.values[-1][0] == len(want)


# -------------------------------------------------------------------------------- how it is shown


def test_the_table_is_at_most_100_wide(three: tensorize.Evaluation) -> None:
    text = str(three)
    assert max(map(len, text.splitlines())) <= 100
    head = next(line for line in text.splitlines() if line.startswith("model"))
    for title in ("kept", "bytes", "perplexity", "distance", "worst", "top-1", "top-5", "latency"):
        assert title in head
    assert "accuracy" not in head
    for figures in (three.dense, *three.models):
        assert any(line.startswith(figures.name) for line in text.splitlines())
    assert "up to the token that is furthest off" in text
    assert "after: " in text


def test_json_is_strict(three: tensorize.Evaluation) -> None:
    data = json.loads(json.dumps(three.to_dict(), allow_nan=False))
    assert data["models"][1]["share"] == three.share(three.models[1])
    assert data["dense"]["quality"]["perplexity"] == three.dense.quality.perplexity
    assert data["models"][0]["quality"]["worst"]["row"] == three.models[0].quality.worst.row


class _Page(html.parser.HTMLParser):
    """The texts of a page, its elements, and everything that it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.loaded, self.open = "", [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


PEERS = {"SVD": {0.5: 3.0, 0.7: 1.5, 0.9: 0.2}, "<b>ASVD</b>": {0.5: 2.5, 0.9: 0.1}}


def test_the_page_needs_nothing_else(three: tensorize.Evaluation, tmp_path: Path) -> None:
    three.to_html(tmp_path / "page.html", peers=PEERS)
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page(source)
    assert not page.loaded
    assert "script" not in page.tags
    assert "nan" not in re.sub(r"[^0-9a-z. ]", " ", source).split()
    shown = (
        "What you gain", "What you lose", "Perplexity", "Worst token", "SVD", "<b>ASVD</b>",
        "Ranks by layer", "Spectra", "model.layers.*.mlp.up_proj",
    )  # fmt: skip
    for expected in shown:
        assert expected in page.text
    for figures in three.models:
        assert figures.name in page.text
    with pytest.raises(TensorizeError, match="does not exist"):
        three.to_html(tmp_path / "missing" / "page.html")


def test_pages_of_other_kinds(tmp_path: Path) -> None:
    dense = CASES["mlp"].model()
    x, y = torch.randn(64, 48), torch.randint(0, 32, (64,))
    found = measured([0.6, 0.9], dense, [x], labels=[y])
    found.to_html(tmp_path / "classes.html")
    text = _Page((tmp_path / "classes.html").read_text(encoding="utf-8")).text
    assert "Accuracy" in text
    assert "Classes" in text
    assert "Perplexity" not in text
    exact = measured({"itself": dense}, dense, [x])
    exact.to_html(tmp_path / "exact.html")  # nothing fits a logarithmic axis
    assert "by memory kept" not in (tmp_path / "exact.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_three_budgets_are_answered_without_scrolling(
    three: tensorize.Evaluation, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    three.to_html(page, peers=PEERS)
    measure = """<script>
    document.documentElement.dataset.bottom = Math.round(
      document.querySelector(".top").getBoundingClientRect().bottom);
    document.documentElement.dataset.wide = document.documentElement.scrollWidth;
    </script>"""
    source = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"<meta http-equiv=.Content-Security[^>]*>", "", source) + measure)
    dom = browse(tmp_path, page, "--dump-dom", "--window-size=1280,800").stdout
    found = {name: int(value) for name, value in re.findall(r'data-(bottom|wide)="(\d+)"', dom)}
    assert found["bottom"] <= 800
    assert found["wide"] <= 1280


# ------------------------------------------------------------------------- other people's tools


def test_quantizing_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = llama()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(TensorizeError, match="pip install torchao"):
        measured(small, dense, padded(), quantize="int8")
    with pytest.raises(TensorizeError, match="'int3' is not one of"):
        measured(small, dense, padded(), quantize="int3")


@pytest.mark.slow  # `make test-all` installs torchao
def test_quantized_factors_are_one_more_row() -> None:
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    dense, small = llama()
    before = values(small)
    found = measured({"small": small}, dense, padded(), quantize=("int8", "int4"))
    names = [f.name for f in found.models]
    assert names == ["small", "dense, int8", "small, int8", "dense, int4", "small, int4"]
    for way in ("int8", "int4"):
        assert found[f"small, {way}"].bytes < found["small"].bytes
        assert found[f"dense, {way}"].quality.distance > 0
    # Errors add up: each alone costs less than both together.
    both = found["small, int4"].quality.distance
    assert both > max(found["small"].quality.distance, found["dense, int4"].quality.distance)
    assert found["small, int8"].quality.distance < both
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.slow
def test_lm_eval_takes_a_compressed_model_as_it_is() -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    instance = pytest.importorskip("lm_eval.api.instance")
    _, small = llama()
    words = tokenizer()
    words.eos_token = "<pad>"
    answering = harness.HFLM(pretrained=small, tokenizer=words, device="cpu", batch_size=2)
    asked = [("w5 w6 w7", " w8 w9"), ("w10 w11", " w12")]
    requests = [
        instance.Instance("loglikelihood", {}, arguments, k) for k, arguments in enumerate(asked)
    ]
    answers = answering.loglikelihood(requests, disable_tqdm=True)
    for (context, rest), (likelihood, _) in zip(asked, answers, strict=True):
        ids = torch.tensor([words.encode(context + rest)])
        known = len(words.encode(context))
        with torch.no_grad():
            logits = small(ids).logits.log_softmax(-1)[0, known - 1 : -1]
        want = logits.gather(1, ids[0, known:, None]).sum()
        assert likelihood == pytest.approx(float(want), rel=1e-3)


def test_neighbours_of_few_samples() -> None:
    a = torch.randn(4, 8)
    assert meter.neighbour_agreement(a, a) == 1.0
    assert meter.neighbour_agreement(a, -a) == 1.0  # all three others, in any order
