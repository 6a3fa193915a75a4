"""Evaluation: every figure against a plain computation of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import CaptureError
from tensorize.evaluation import evaluate
from tests.evaluation.measured_models import llama, measured, padded
from tests.hub.compressed_models import tokenizer
from tests.models import CASES, parameters
from tests.training.healed_models import decoder, models, texts


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
