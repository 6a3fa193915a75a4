"""Trained models, with text to calibrate with and other text to measure on, for the benchmarks.

``smollm2`` and ``gemma3``: real language models (``examples/packaged.py``), on English prose: pages
of Python's reference manual to calibrate with, other pages of it, and docstrings, which are another
kind of document. ``gpt`` and ``llama``: two small decoders (``examples/``), on source text that
they were not trained on. ``minilm``: a sentence encoder (``examples/demo_minilm.py``), on sentences
from docstrings. Each seed draws other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers import Distance
from examples import demo_minilm, gemma3, gpt, llama, smollm2, stdlib_text
from examples.gpt import windows as text
from examples.packaged import Packaged, windows
from tensorize.capture.inputs import batch_of
from tensorize.passes.observe import loss as preserved

CONTEXT, WINDOWS, BATCH = 256, 64, 8
SENTENCES, MANY_SENTENCES, UNSEEN_SENTENCES, SENSED_SENTENCES = 64, 512, 256, 32

Figures = Callable[[Iterable[Tensor], Iterable[Tensor], Sequence[Any]], dict[str, float]]
"""What is measured: of the dense model's outputs, another model's, and the batches they are of."""


@torch.no_grad()
def outputs(
    model: nn.Module, batches: Sequence[Any], weights: Mapping[str, Tensor] | None = None
) -> Iterator[Tensor]:
    """What a model gives for each batch (logits where it has them), with some weights replaced."""
    for batch in map(batch_of, batches):
        result = functional_call(model, dict(weights or {}), batch.args, dict(batch.kwargs))
        yield getattr(result, "logits", result)


@dataclass
class Measure:
    """How far another model is from a dense one, on some batches: its figures, by name."""

    model: nn.Module
    batches: Sequence[Any]
    figures: Figures

    def __call__(self, other: nn.Module) -> dict[str, float]:
        # Of a table of many words the outputs of all batches take gigabytes: they are made again.
        return self.figures(
            outputs(self.model, self.batches), outputs(other, self.batches), self.batches
        )

    def alone(self, count: int) -> Distance:
        """The first figure on the first ``count`` batches, as a function of weights replaced."""
        batches = self.batches[:count]
        dense = list(outputs(self.model, batches))

        def distance(weights: Mapping[str, Tensor]) -> float:
            return first(self.figures(dense, outputs(self.model, batches, weights), batches))

        return distance


def first(figures: Mapping[str, float]) -> float:
    """The figure that compression is to keep small."""
    return next(iter(figures.values()))


@dataclass
class Subject:
    """A trained model, text to calibrate with, and other text to measure on.

    ``alike`` is of the same files as the calibration, ``unseen`` of other ones. So many batches as
    ``sensed`` serve where every weight is compressed alone; 0: that, and gradient steps, take too
    long. ``text``: the unseen one as windows of token ids, where models have a loss of their own.
    """

    model: nn.Module
    calibration: Measure
    alike: Measure
    unseen: Measure
    sensed: int
    text: Tensor | None

    def dense(self) -> dict[str, float]:
        """The dense model's own figures."""
        return {} if self.text is None else {"loss": loss(self.model, self.text)}


def predictions(
    dense: Iterable[Tensor], other: Iterable[Tensor], batches: Sequence[Tensor]
) -> dict[str, float]:
    """Of logits: the KL to the dense model's and the rise of the text's loss, in nats a token."""
    kl, rise, windows = 0.0, 0.0, 0
    for before, after, ids in zip(dense, other, batches, strict=True):
        p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
        lost = (p - q)[:, :-1].gather(-1, ids[:, 1:, None])
        kl += float(preserved.divergence(before, after)) / ids.shape[1]
        rise += float(lost.mean()) * len(ids)
        windows += len(ids)
    return {"kl": kl / windows, "rise": rise / windows}


def embeddings(
    dense: Iterable[Tensor], other: Iterable[Tensor], batches: Sequence[Any]
) -> dict[str, float]:
    """Of embeddings: their squared error over their variance, and the neighbours that change.

    They have unit length, so that 1 - cos is the squared error again, and says nothing more.
    """
    before, after = torch.cat(list(dense)), torch.cat(list(other))
    return {
        "error": demo_minilm.difference(before, after),
        "neighbours": 1 - demo_minilm.agreement(before, after, demo_minilm.NEIGHBOURS),
    }


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Cross-entropy of the next token, in nats, over windows (windows, context)."""
    total = 0.0
    for batch in ids.split(BATCH):
        logits = model(batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item() * len(batch)
    return total / len(ids)


def divergence(model: nn.Module, dense: nn.Module, ids: Tensor) -> float:
    """KL of a model's prediction to the dense model's, in nats a token."""
    batches = ids.split(BATCH)
    return predictions(outputs(dense, batches), outputs(model, batches), batches)["kl"]


def decoder(load: Callable[[], nn.Module], seed: int) -> Subject:
    """A decoder, and windows of source text that it was not trained on."""
    model = load()
    known = text("validation", 2 * WINDOWS, CONTEXT, seed=seed).split(WINDOWS)
    unseen = text("held_out", WINDOWS, CONTEXT, seed=seed)
    calibration, alike, other = (
        Measure(model, windows.split(BATCH), predictions) for windows in (*known, unseen)
    )
    return Subject(
        model=model,
        calibration=calibration,
        alike=alike,
        unseen=other,
        sensed=2,
        text=unseen,
    )


def encoder(seed: int, count: int = SENTENCES) -> Subject:
    """The sentence encoder, and sentences from docstrings."""
    model = demo_minilm.trained()
    tokenizer = demo_minilm.load_tokenizer(demo_minilm.weights_folder())

    def on(texts: list[str]) -> Measure:
        # In the order drawn, not sorted by length: the first few are then like all others.
        groups = [texts[k : k + BATCH] for k in range(0, len(texts), BATCH)]
        batches = [demo_minilm.batches_of(tokenizer, group, BATCH)[0] for group in groups]
        return Measure(model, batches, embeddings)

    # As many to compare predictions with as to calibrate: the mean of fewer is no better known.
    alike = max(UNSEEN_SENTENCES, count)
    known, unseen = demo_minilm.sentences(count + alike, UNSEEN_SENTENCES, seed)
    return Subject(
        model=model,
        calibration=on(known[:count]),
        alike=on(known[count:]),
        unseen=on(unseen),
        sensed=SENSED_SENTENCES // BATCH,
        text=None,
    )


def language_model(packaged: Packaged, seed: int) -> Subject:
    """A real one, and English prose: half of the manual's pages, its other half, docstrings.

    Raises:
        SystemExit: its package is missing.
    """
    model, tokenizer = packaged.load_pretrained(), packaged.load_tokenizer()
    known, alike = stdlib_text.pages(seed)[::2], stdlib_text.pages(seed)[1::2]
    other = stdlib_text.sentences(seed=seed, split="held_out")

    def on(texts: list[str], count: int) -> Measure:
        # One document after the other: batches that are held out are then of other documents. Of
        # few windows each, as logits are of many words.
        found = windows(tokenizer, texts, CONTEXT)[:count]
        return Measure(model, found.split(BATCH // 2), predictions)

    calibration, alike, unseen = on(known, WINDOWS), *(on(t, WINDOWS // 2) for t in (alike, other))
    return Subject(
        model=model,
        calibration=calibration,
        alike=alike,
        unseen=unseen,
        sensed=0,
        text=torch.cat(list(unseen.batches)),
    )


DECODERS: dict[str, Callable[[], Any]] = {
    "gpt": gpt.load_pretrained,
    "llama": llama.load_pretrained,
}
COMPARED: dict[str, Callable[[int], Subject]] = {
    "smollm2": partial(language_model, smollm2.MODEL),
    **{name: partial(decoder, load) for name, load in DECODERS.items()},
    "minilm": encoder,
}
MODELS = {
    **COMPARED,
    "gemma3": partial(language_model, gemma3.MODEL),
    f"minilm-{MANY_SENTENCES}": partial(encoder, count=MANY_SENTENCES),
}
