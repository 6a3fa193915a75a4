"""The trained GPT and the text that it was trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from examples import stdlib_text
from examples.gpt import (
    DATA,
    GPT,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    GPTConfig,
    GPTOutput,
    evaluate,
    load_pretrained,
    load_record,
    load_tokenizer,
    next_token_loss,
)
from examples.train_stdlib import digest, held_out_slice
from examples.train_stdlib import main as train


@pytest.fixture(scope="module")
def model() -> GPT:
    return load_pretrained()


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocabulary=50, context=16, width=24, layers=2, heads=3)).eval()


# The text


def test_the_splits_are_disjoint_and_cover_the_library() -> None:
    names = {
        split: {document.name for document in stdlib_text.documents(split)}
        for split in stdlib_text.SPLITS
    }
    assert all(names.values())
    assert sum(map(len, names.values())) == len(set().union(*names.values()))
    assert set().union(*names.values()) == {item.name for item in stdlib_text.documents()}
    train_size = sum(len(document.text) for document in stdlib_text.documents("train"))
    assert train_size > 0.7 * sum(len(document.text) for document in stdlib_text.documents())


def test_the_text_is_the_same_every_time() -> None:
    first = stdlib_text.documents()
    stdlib_text.documents.cache_clear()
    assert stdlib_text.documents() == first
    assert [item.name for item in first] == sorted(item.name for item in first)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("json/decoder.py", "train"),
        ("operator.py", "validation"),
        ("bisect.py", "held_out"),
        ("pydoc_data/topics.py", "train"),
    ],
)
def test_the_split_of_a_file_never_changes(name: str, split: str) -> None:
    # The recorded losses mean nothing once a file moves from one split to another.
    assert stdlib_text.split_of(name) == split


def test_no_file_of_this_machine_or_of_a_package_is_text() -> None:
    names = [document.name for document in stdlib_text.documents()]
    assert not [name for name in names if "site-packages" in name or "_sysconfigdata" in name]


def test_sentences_are_unique_prose_in_an_order_that_the_seed_decides() -> None:
    some = stdlib_text.sentences(limit=500, seed=3)
    assert len(some) == len(set(some)) == 500
    assert some[:100] == stdlib_text.sentences(limit=100, seed=3)
    assert some != stdlib_text.sentences(limit=500, seed=4)
    assert all(text[0].isupper() and text[-1] in ".!?" and len(text.split()) >= 6 for text in some)
    held_out = set(stdlib_text.sentences(split="held_out"))
    assert held_out
    assert held_out <= set(stdlib_text.sentences())


# The model


def test_each_position_sees_only_what_is_before_it() -> None:
    model, ids = tiny(), torch.arange(12)[None]
    changed = ids.clone()
    changed[0, 8:] = 49
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_the_head_is_the_embedding() -> None:
    model = tiny()
    assert "head" not in " ".join(model.state_dict())
    next_token_loss(model, torch.arange(12)[None]).backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert gradient[40].abs().sum() > 0  # never an input: this comes from the head


def test_a_text_longer_than_the_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="17 tokens do not fit a context of 16"):
        tiny()(torch.zeros(1, 17, dtype=torch.long))


def test_torch_export_keeps_the_output_class() -> None:
    model, ids = tiny(), torch.arange(12)[None]
    out = torch.export.export(model, (ids,)).module()(ids)
    assert isinstance(out, GPTOutput)
    torch.testing.assert_close(out.logits, model(ids).logits)


def test_evaluate_predicts_every_token_but_the_first_once() -> None:
    model, tokens = tiny(), torch.randint(50, (49,))
    windows = torch.stack([tokens[0:17], tokens[16:33], tokens[32:49]])
    assert evaluate(model, tokens, context=16, batch=2) == pytest.approx(
        next_token_loss(model, windows).item()
    )
    with pytest.raises(ValueError, match="do not fill one window"):
        evaluate(model, tokens[:16], context=16)


# The trained weights


def test_the_files_are_small() -> None:
    size = (DATA / WEIGHTS_FILE).stat().st_size + (DATA / TOKENIZER_FILE).stat().st_size
    assert size < 7e6


def test_the_tokenizer_loses_nothing() -> None:
    text = 'def naïve(x):\n\t"""Return “x”."""\n    return x  # ≥ 3.11 🎉\n'
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == load_record()["config"]["vocabulary"]


def test_held_out_loss_is_the_recorded_one(model: GPT) -> None:
    record = load_record()
    recorded = record["held_out_slice"]
    tokens = held_out_slice(load_tokenizer(), model.config.context, recorded["windows"])
    same_text = digest(tokens) == recorded["sha256"]
    loss = evaluate(model, tokens, context=model.config.context)
    # Float32 sums in another order move a mean over 16,000 tokens by far less than 1e-4; another
    # version of Python has other sources, and then the loss only has to be of the same kind.
    assert loss == pytest.approx(recorded["loss"], abs=1e-4 if same_text else 0.5)
    assert len(tokens) == recorded["tokens"]
    assert record["finished"]
    assert math.exp(record["validation_loss"]) < 30


def test_the_trained_model_writes_python(model: GPT) -> None:
    tokenizer = load_tokenizer()
    beginning = "class Reader:\n    def __init__(self, name):\n        self.name ="
    out = model.generate(torch.tensor([tokenizer.encode(beginning).ids]), 2)
    assert tokenizer.decode(out[0].tolist()).startswith(beginning + " name")


def test_training_writes_what_loading_reads(tmp_path: Path) -> None:
    sizes = "--steps 2 --batch 2 --warmup 1 --characters 8000 --slice-windows 4"
    record = train([*sizes.split(), "--directory", str(tmp_path)])
    assert record["steps"] == 2
    assert record["finished"]
    assert record == json.loads(json.dumps(load_record(tmp_path)))
    trained = load_pretrained(tmp_path)
    assert evaluate(trained, held_out_slice(load_tokenizer(tmp_path), 256, 4)) == pytest.approx(
        record["held_out_slice"]["loss"], abs=1e-4
    )
    # Two steps from N(0, 0.02²) already leave the uniform prediction.
    assert record["validation_loss"] < math.log(1024)
    assert not list(tmp_path.glob("*.tmp"))
