"""The example that compresses and heals, at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest

import tensorize
from examples import compress_and_heal
from examples.gpt import GPT, GPTConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tensorize.Evaluation]:
    output = tmp_path_factory.mktemp("heal") / "healed"
    sizes = ["--steps", "12", "--context", "64", "--calibration", "8", "--unseen", "8"]
    small = [*sizes, "--text", "validation"]  # which takes less to read than all of the text
    return output, compress_and_heal.main(["--output", str(output), *small])


@pytest.mark.slow
def test_healing_gives_back_a_part_of_what_was_lost(
    run: tuple[Path, tensorize.Evaluation],
) -> None:
    _, found = run
    compressed, healed = found["compressed"], found["healed"]
    assert found.share(healed) <= 0.1
    assert healed.parameters == compressed.parameters
    assert healed.quality.distance < 0.9 * compressed.quality.distance
    assert healed.quality.perplexity is not None
    assert compressed.quality.perplexity is not None
    assert healed.quality.perplexity < compressed.quality.perplexity
    assert len(healed.written) == len(found.prompts) == 2


@pytest.mark.slow
def test_the_folder_holds_the_model_the_page_and_the_state(
    run: tuple[Path, tensorize.Evaluation],
) -> None:
    output, _ = run
    model = tensorize.load(output / "model", GPT(GPTConfig()))
    assert any("healed" in note for note in tensorize.report(model).notes)
    assert "What do I lose" in (output / "evaluation.html").read_text(encoding="utf-8")
    assert (output / "state" / "healing.pt").is_file()
