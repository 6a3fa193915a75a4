"""Multiple choice: which of several answers a decoder holds likeliest after a question.

Scored as lm-eval (Gao et al. 2021) does: every answer by the log-likelihood of its tokens after the
question, once as it is, and once over the length of its text, which favours no short answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import CaptureError
from tensorize.evaluation.quality import ChoiceFigures, ClassFigures, class_figures, macro

_KEYS = ("question", "choices", "answer")
_FORM = '{"question": text, "choices": [text, text], "answer": number from 0}'


@dataclass(frozen=True)
class Question:
    """A question, its answers as they follow on it, and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


def questions_of(given: Sequence[Mapping[str, Any]]) -> tuple[Question, ...]:
    """Questions in the form of MMLU's files: ``question``, ``choices`` and ``answer``.

    Raises:
        CaptureError: one of them has another form, or an answer that it does not have.
    """
    found = []
    for k, each in enumerate(given):
        if not isinstance(each, Mapping) or not all(key in each for key in _KEYS):
            raise CaptureError(f"questions[{k}] has another form", way_out=f"give {_FORM}")
        choices, answer = tuple(each["choices"]), each["answer"]
        if len(choices) < 2 or isinstance(answer, bool) or answer not in range(len(choices)):
            raise CaptureError(
                f"questions[{k}] has {len(choices)} choices, and the answer {answer!r}",
                way_out=f"give two choices or more, and the right one's number from 0: {_FORM}",
            )
        found.append(Question(str(each["question"]), tuple(map(str, choices)), int(answer)))
    return tuple(found)


def encoded(questions: Sequence[Question], tokenizer: Any, longest: int) -> list[list[Answer]]:
    """The answers of every question as tokens, of which the last are the answer's.

    What is longer than ``longest`` loses its beginning, as in lm-eval.

    Raises:
        CaptureError: an answer has no token of its own.
    """
    rows = []
    for k, question in enumerate(questions):
        known = _ids(tokenizer, question.text)
        answers = []
        for choice in question.choices:
            space = "" if question.text[-1:].isspace() or not question.text else " "
            whole = _ids(tokenizer, question.text + space + choice)
            own = len(whole) - len(known)
            if own < 1 or own >= len(whole):
                raise CaptureError(
                    f"questions[{k}]: {choice!r} adds no token to the question, or there is none",
                    way_out="give a question and answers that the tokenizer can tell apart",
                )
            kept = whole[-max(longest, own + 1) :]
            answers.append(Answer(torch.tensor([kept]), own, len(choice.encode())))
        rows.append(answers)
    return rows


@dataclass(frozen=True)
class Answer:
    """Tokens (1, T), of which the last ``own`` are the answer's, and the answer's length."""

    ids: Tensor
    own: int
    length: int


def _ids(tokenizer: Any, text: str) -> list[int]:
    found = tokenizer.encode(text)
    return list(getattr(found, "ids", found))


Logits = Callable[[Tensor], Tensor]
"""The logits (1, T, V) of ids (1, T)."""


def chosen(logits: Logits, answers: Sequence[Sequence[Answer]]) -> tuple[list[int], list[int]]:
    """The likeliest answer to every question, and the likeliest over its length."""
    plain, normalised = [], []
    for row in answers:
        scores = torch.tensor([likelihood(logits, answer) for answer in row])
        plain.append(int(scores.argmax()))
        lengths = torch.tensor([max(answer.length, 1) for answer in row])
        normalised.append(int((scores / lengths).argmax()))
    return plain, normalised


def likelihood(logits: Logits, answer: Answer) -> float:
    """The log-likelihood of an answer's tokens, in nats."""
    rows = logits(answer.ids)[0, -answer.own - 1 : -1].double().log_softmax(-1)
    return float(rows.gather(1, answer.ids[0, -answer.own :, None].to(rows.device)).sum())


def choice_figures(
    questions: Sequence[Question],
    found: tuple[Sequence[int], Sequence[int]],
    dense: Sequence[int],
) -> ChoiceFigures:
    """What a model's choices are worth, beside the dense model's.

    Precision and recall are those of the answers where all questions have the same (yes and no),
    else of their places: a model that always takes the first has a recall of 1 there, and finds
    nothing elsewhere.
    """
    plain, normalised = found
    wanted, count = [q.answer for q in questions], len(questions)
    same = {q.choices for q in questions}
    names = same.pop() if len(same) == 1 else ()
    most = max(len(q.choices) for q in questions)
    pairs = torch.zeros(most, most, dtype=torch.int64)
    for truth, given in zip(wanted, plain, strict=True):
        pairs[truth, given] += 1
    classes: tuple[ClassFigures, ...] = class_figures(
        pairs, {k: names[k] if names else chr(ord("A") + k) for k in range(most)}
    )
    precision, recall = macro(classes)
    return ChoiceFigures(
        questions=count,
        right=_share(plain, wanted),
        right_by_length=_share(normalised, wanted),
        same=_share(plain, dense),
        precision=precision,
        recall=recall,
        classes=classes,
    )


def _share(one: Sequence[int], other: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(other)


def logits_of(model: nn.Module, device: torch.device | None) -> Logits:
    """Of a decoder: what it gives for ids."""

    def logits(ids: Tensor) -> Tensor:
        found = model(ids.to(device))
        return found["logits"] if isinstance(found, Mapping) else found.logits

    return logits
