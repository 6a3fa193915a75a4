"""Multiple choice and tasks of the caller's, beside everything else, in one report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import CaptureError
from tensorize.evaluation import choices
from tensorize.evaluation.choices import Answer, Question
from tests.evaluation.measured_models import llama, measured, padded
from tests.hub.compressed_models import tokenizer
from tests.models import CASES
from tests.training.healed_models import texts

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"w{k} w{k + 3} w{k + 1}", "choices": ["w9 w10", f"w{k + 2}", "w40 w41 w42"],
     "answer": k % 3}
    for k in range(5, 11)
]  # fmt: skip


def by_hand(model: nn.Module, question: dict[str, Any]) -> list[float]:
    """The log-likelihood of every choice: one softmax after the other."""
    words, found = tokenizer(), []
    for choice in question["choices"]:
        ids, total = words.encode(question["question"]), 0.0
        for token in words.encode(choice):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[token])
            ids = [*ids, token]
        found.append(total)
    return found


def test_the_likeliest_answer_is_taken_as_it_is_and_over_its_length() -> None:
    dense, small = llama()
    found = measured({"small": small}, dense, padded(), tokenizer=tokenizer(), questions=QUESTIONS)
    mine: dict[str, list[int]] = {}
    for name, model in (("dense", dense), ("small", small)):
        scores = [by_hand(model, question) for question in QUESTIONS]
        lengths = [[len(c) for c in question["choices"]] for question in QUESTIONS]
        plain = mine[name] = [row.index(max(row)) for row in scores]
        over = [
            max(range(3), key=lambda k, row=row, size=size: row[k] / size[k])  # type: ignore[misc]
            for row, size in zip(scores, lengths, strict=True)
        ]
        wanted = [question["answer"] for question in QUESTIONS]
        figures = found[name].choices
        assert figures is not None
        assert figures.questions == len(QUESTIONS)
        assert figures.right == share(plain, wanted)
        assert figures.right_by_length == share(over, wanted)
        for k, place in enumerate("ABC"):
            (entry,) = [c for c in figures.classes if c.name == place]
            hits = sum(a == b == k for a, b in zip(plain, wanted, strict=True))
            assert entry.recall == pytest.approx(hits / wanted.count(k))
            assert entry.precision == pytest.approx(hits / max(plain.count(k), 1))
    small_figures = found["small"].choices
    assert small_figures is not None
    assert small_figures.same == share(mine["small"], mine["dense"])


def share(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(other)


def test_the_logits_of_one_answer_are_read_where_they_stand() -> None:
    """Answer tokens 2 and 0 after a 1, under chances that are known."""
    chances = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    answer = Answer(torch.tensor([[0, 1, 2, 0]]), own=2, length=3)
    got = choices.likelihood(lambda ids: chances.log()[None, : ids.shape[1]], answer)
    assert got == pytest.approx(math.log(0.3) + math.log(0.7), rel=1e-6)


def test_answers_that_are_the_same_everywhere_have_names() -> None:
    """Of a model that says yes to everything recall is right where it is yes, and precision is
    the share of yes."""
    asked = [Question(f"is {k} odd?", ("no", "yes"), k % 2) for k in range(5)]
    yes = [1] * 5
    figures = choices.choice_figures(asked, (yes, yes), yes)
    assert [(c.name, c.rows, c.precision, c.recall) for c in figures.classes] == [
        ("no", 3, 0.0, 0.0),
        ("yes", 2, pytest.approx(0.4), 1.0),
    ]
    assert (figures.precision, figures.recall) == (pytest.approx(0.2), 0.5)
    assert figures.right == pytest.approx(0.4)


def test_one_report_has_all_kinds_for_several_budgets(tmp_path: Path) -> None:
    """Multiple choice, text side by side, a task, and speed."""
    dense, _ = llama()

    def surprise(model: nn.Module) -> Tensor:
        """A task that needs gradients, as a relaxation does."""
        ids = texts(1)[0][:1]
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
        model(inputs_embeds=embedded).logits.square().mean().backward()
        assert not model.training
        return embedded.grad.norm()

    found = tensorize.evaluate(
        [0.5, 0.9],
        dense,
        padded(),
        calibration=texts(3, seed=5),
        tokenizer=tokenizer(),
        questions=QUESTIONS,
        tasks={"slope, 1": surprise, "always": lambda model: 3},
    )
    text = str(found)
    for words in ("6 questions", "by length", "precision", "slope, 1", "after: ", "latency"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100
    values = [figures.tasks[0].value for figures in (found.dense, *found.models)]
    assert abs(values[2] - values[0]) < abs(values[1] - values[0])
    assert [figures.tasks[1].value for figures in found.models] == [3.0, 3.0]
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["models"][0]["tasks"][0] == {"name": "slope, 1", "value": values[1]}
    assert data["dense"]["choices"]["questions"] == 6
    found.to_html(tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text()
    for words in ("Right answers", "Answers&#39; recall", "slope, 1", "What they write", "Latency"):
        assert words in page


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"question": "w5", "choices": ["w6", "w7"]}, "another form"),
        ({"question": "w5", "choices": ["w6", "w7"], "answer": 2}, "the answer 2"),
        ({"question": "w5", "choices": ["w6"], "answer": 0}, "1 choices"),
        ({"question": "w5", "choices": ["w6", ""], "answer": 0}, "adds no token"),
        ({"question": "", "choices": ["w6", "w7"], "answer": 0}, "adds no token"),
    ],
)
def test_questions_that_cannot_be_asked_are_named(question: dict, words: str) -> None:
    dense, small = llama()
    with pytest.raises(CaptureError, match=words):
        measured(small, dense, padded(1), tokenizer=tokenizer(), questions=[question])


def test_what_cannot_be_asked_or_done_is_said() -> None:
    dense = CASES["mlp"].model()
    small = tensorize.compile(dense, 0.6)
    x = torch.randn(8, 48)
    with pytest.raises(CaptureError, match="asks a decoder"):
        measured(small, dense, [x], questions=QUESTIONS)
    with pytest.raises(CaptureError, match=r"tasks\['all'\] gives no number but a tensor of shape"):
        measured(small, dense, [x], tasks={"all": lambda model: model(x)})
    with pytest.raises(CaptureError, match="gives no number but None"):
        measured(small, dense, [x], tasks={"nothing": lambda model: None})
