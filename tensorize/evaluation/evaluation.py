"""What an evaluation found, of several models beside the dense one, as a table."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tensorize.base import files, html, printer
from tensorize.base.records import by_field, encode, plain
from tensorize.evaluation.quality import NEIGHBOURS
from tensorize.evaluation.results import Figures, Spectrum


@dataclass(frozen=True)
class Evaluation:
    """Models beside the dense one that they were made from.

    ``kind`` is "text" (a vocabulary at every position), "classes" or "outputs"; ``unit`` that of
    ``Quality.distance``; ``rows`` are those that counted, and ``row`` what each
    is: "token", "image", "sample" or "row".

    Examples:
        >>> found = tensorize.evaluate(small, dense, batches, time=False)
        >>> found.kind, found.unit
        ('outputs', 'relative squared error')
    """

    kind: str
    unit: str
    rows: int
    dense: Figures
    models: tuple[Figures, ...]
    prompts: tuple[str, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    row: str = "row"

    def share(self, figures: Figures) -> float:
        """Parameters that are left, as a share of the dense model's."""
        return figures.parameters / max(self.dense.parameters, 1)

    def __getitem__(self, name: str) -> Figures:
        found = next((f for f in (self.dense, *self.models) if f.name == name), None)
        if found is None:
            names = ", ".join(repr(f.name) for f in (self.dense, *self.models))
            raise KeyError(f"{name!r} is none of {names}")
        return found

    def __str__(self) -> str:
        columns = [column for column in _COLUMNS if any(column.has(f) for f in self._all)]
        rows = [(f.name, *(column.text(f, self) for column in columns)) for f in self._all]
        align = _numbers(len(columns))
        titles = ("model", *(column.title.format(row=self.row) for column in columns))
        blocks = [
            "\n".join(textwrap.wrap(self._head(), printer.prose_width())),
            printer.table(titles, rows, align=align),
        ]
        if any(f.quality.worst.text for f in self.models):
            worst = [(f.name, _one_line(f.quality.worst.text)) for f in self.models]
            head = ("model", "up to the token that is furthest off")
            blocks.append(printer.table(head, worst, align=["left", "end"]))
        if any(f.quality.classes for f in self._all):
            blocks.append(self._class_table())
        if self.dense.choices is not None:
            blocks.append(self._choice_table())
        if self.dense.tasks:
            blocks.append(self._task_table())
        blocks += list(self._texts())
        return printer.plain("\n\n".join(blocks))

    @property
    def _all(self) -> tuple[Figures, ...]:
        return (self.dense, *self.models)

    def _head(self) -> str:
        distance = "KL to the dense model" if self.unit == "nats" else f"distance: {self.unit}"
        return (
            f"{len(self.models)} model{'s' * (len(self.models) != 1)} beside the dense one, over "
            f"{self.rows:,} {self.row}s. {distance[0].upper()}{distance[1:]}; "
            f"worst: of one {self.row}."
        )

    def _class_table(self) -> str:
        names = [c.name for c in self.dense.quality.classes]
        rows = []
        for k, name in enumerate(names):
            cells = [
                f"{printer.percent(f.quality.classes[k].precision)} / "
                f"{printer.percent(f.quality.classes[k].recall)}"
                for f in self._all
            ]
            rows.append((name, self.dense.quality.classes[k].rows, *cells))
        head = ("precision / recall", f"{self.row}s", *(f.name for f in self._all))
        align = _numbers(len(head) - 1)
        return printer.table(head, rows, align=align)

    def _choice_table(self) -> str:
        rows = []
        for figures in self._all:
            found = figures.choices
            assert found is not None
            shares = (
                found.right, found.right_by_length, found.same, found.precision, found.recall,
            )  # fmt: skip
            rows.append((figures.name, *map(printer.percent, shares)))
        assert self.dense.choices is not None
        asked = self.dense.choices.questions
        head = (
            printer.plural(asked, "question"),
            "right", "by length", "as dense", "precision", "recall",
        )  # fmt: skip
        return printer.table(head, rows, align=_numbers(len(head) - 1))

    def _task_table(self) -> str:
        rows = [
            (task.name, *(printer.number(f.tasks[k].value) for f in self._all))
            for k, task in enumerate(self.dense.tasks)
        ]
        head = ("task", *(f.name for f in self._all))
        return printer.table(head, rows, align=_numbers(len(head) - 1))

    def _texts(self) -> Iterable[str]:
        for k, prompt in enumerate(self.prompts):
            rows = [(f.name, _one_line(f.written[k])) for f in self._all]
            title = f"after: {printer.shorten_end(_one_line(prompt), printer.prose_width() - 30)}"
            yield printer.table(("model", title), rows, align=["left", "wrap"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe data: plain dicts, lists, strings and finite numbers."""
        data = plain(by_field(self))
        for own, figures in zip([data["dense"], *data["models"]], self._all, strict=True):
            own["share"] = self.share(figures)
            own["quality"]["perplexity"] = figures.quality.perplexity
        return encode(data)

    def to_html(
        self,
        path: str | os.PathLike[str],
        peers: Mapping[str, Mapping[float, float]] | None = None,
    ) -> None:
        """Writes the evaluation as one page that needs no network and no other file.

        Args:
            peers: other methods' curves to draw beside: name → share of the parameters → distance.

        Raises:
            TensorizeError: the directory of ``path`` does not exist or cannot be written.
        """
        from tensorize.evaluation import page as evaluation_page  # which draws what is defined here

        files.write_text(path, evaluation_page.render(self, peers or {}))

    def _repr_html_(self) -> str:
        from tensorize.evaluation import page as evaluation_page

        return html.framed(evaluation_page.render(self, {}))


# ---------------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class _Column:
    """One figure of every model: its title, and how it is read off."""

    title: str
    read: Callable[[Figures], float | None]
    show: Callable[[float], str]

    def has(self, figures: Figures) -> bool:
        return self.read(figures) is not None

    def text(self, figures: Figures, of: Evaluation) -> str:
        value = self.read(figures)
        if self.title == "kept":
            return printer.percent(of.share(figures))
        return "–" if value is None else self.show(value)


class _Timed(_Column):
    """A column with a dash where a machine does not tell it, beside times."""

    def has(self, figures: Figures) -> bool:
        return figures.latency is not None


_COLUMNS = (
    _Column("kept", lambda f: f.parameters, printer.count),
    _Column("bytes", lambda f: f.bytes, printer.bytes_),
    _Column(
        "perplexity", lambda f: None if f.quality.classes else f.quality.perplexity, printer.number
    ),
    _Column("accuracy", lambda f: f.quality.accuracy, printer.percent),
    _Column("precision", lambda f: f.quality.precision, printer.percent),
    _Column("recall", lambda f: f.quality.recall, printer.percent),
    _Column("distance", lambda f: f.quality.distance, printer.number),
    _Column("worst", lambda f: f.quality.worst.value, printer.number),
    _Column("top-1", lambda f: f.quality.top1, printer.percent),
    _Column("top-5", lambda f: f.quality.top5, printer.percent),
    _Column("cosine", lambda f: f.quality.cosine, lambda x: f"{x:.4f}"),
    _Column(f"{NEIGHBOURS} nearest", lambda f: f.quality.neighbours, printer.percent),
    _Column("latency", lambda f: f.latency, printer.seconds),
    _Column("{row}s/s", lambda f: f.throughput, printer.count),
    _Timed("J/{row}", lambda f: f.joules, printer.number),
)


def _numbers(columns: int) -> list[printer.Align]:
    """A name, and so many columns of numbers."""
    left: printer.Align = "left"
    right: printer.Align = "right"
    return [left, *(right for _ in range(columns))]


def _one_line(text: str) -> str:
    return " ".join(text.split())
