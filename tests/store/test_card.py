"""A saved folder says how it is loaded and served, and what it costs."""

from __future__ import annotations

from pathlib import Path

from tensorize.base import printer
from tensorize.reports.attach import report
from tensorize.store.card import CARD
from tensorize.store.load import load
from tensorize.store.save import save
from tests.store.saved_models import compressed_gpt2


def test_the_card_says_how_to_load_to_serve_and_what_it_costs(tmp_path: Path) -> None:
    small = compressed_gpt2()
    save(small, tmp_path / "small")
    text = (tmp_path / "small" / CARD).read_text()
    assert 'GPT2LMHeadModel.from_pretrained("small")' in text
    assert "vllm serve small" in text
    assert printer.count(report(small).totals.after.parameters) in text
    assert text.startswith("---\nlibrary_name: tensorize\n")


def test_the_card_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("# mine")
    save(compressed_gpt2(), tmp_path)
    assert (tmp_path / CARD).read_text() == "# mine"
    load(tmp_path)


def test_a_new_save_writes_a_new_card(tmp_path: Path) -> None:
    save(compressed_gpt2(), tmp_path)
    before = (tmp_path / CARD).read_text()
    save(compressed_gpt2(seed=1), tmp_path)
    assert (tmp_path / CARD).read_text().split("## What")[0] == before.split("## What")[0]
