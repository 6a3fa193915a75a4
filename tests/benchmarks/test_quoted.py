"""The tables of the pages say what the benchmarks have kept, figure by figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from benchmarks import bits, prune_peers, pruning, quality
from benchmarks.record import kept
from docs.tables import table
from tensorize.base import printer
from tests.paths import ROOT

KEYS = {"minilm": "error"}
NOT_SHOWN = {"ours, no shared factors"}


def rows_of(page: str, headers: Sequence[str]) -> list[list[str]]:
    """The rows of the table of a page that has these headers."""
    first, *rows = table(ROOT / page, "| " + " | ".join(headers).lstrip() + " |")
    assert first == list(headers)
    return rows


def runs_of(name: str) -> list[quality.Run]:
    return [draw["run"] for draw in kept("quality")[name]["draws"].values()]


@pytest.mark.parametrize("name", kept("quality"))
def test_tables_of_the_quality(name: str) -> None:
    runs = runs_of(name)
    budgets = [f"{100 * budget:g}% kept" for budget in quality.compared(runs)]
    rows = rows_of("docs/benchmarks.md", [name, *budgets])
    wanted = quality.summary(runs, KEYS.get(name, "kl"))
    assert rows == [row for row in wanted if row[0] not in NOT_SHOWN]


def test_the_table_of_bits() -> None:
    runs = [{m: run[m] for m in bits.METHODS if m in run} for run in kept("bits")["llama"].values()]
    budgets = [f"{100 * budget:g}%" for budget in bits.BUDGETS]
    assert rows_of("docs/benchmarks.md", ["llama", *budgets]) == list(bits.rows(runs, "kl"))


def test_the_table_of_pruning() -> None:
    found = kept("pruning")["llama"]
    pairs = "2:4, ends stay"
    assert {round(100 * found[method][pairs]["share"]) for method in found} == {63}
    rows = []
    for method in prune_peers.METHODS:
        free = {name: f for name, f in found[method].items() if not name.startswith("2:4")}
        chosen = [str(bits.best(free, budget, "kl")) for budget in pruning.OF_SMALL]
        values = [*(free[name]["kl"] for name in chosen), found[method][pairs]["kl"]]
        rows.append([method, *(f"{value:.3g}" for value in values)])
    ranks = kept("bits")["llama"]["0"]["ours, ranks alone"]
    rows.append(["ranks alone", *(f"{ranks[str(b)]['kl']:.3g}" for b in pruning.OF_SMALL), "–"])
    head = ["50 %", "25 %", "12.5 %", "2:4, at 63 %"]
    assert rows_of("docs/when-not.md", ["", *head]) == rows


def test_the_table_of_serving() -> None:
    rows = []
    for kind, found in kept("serve")["kinds"].items():
        speeds = [found[what]["times_dense"] for what in ("decoding 1", "decoding 8", "prefill")]
        waits = found["2 requests a second"]
        ends = [f"{waits[w][0]:.0f}, {waits[w][-1]:.0f} ms" for w in ("first", "between")]
        rows.append([kind, *(f"{speed:.2f}" for speed in speeds), *ends])
    head = ["decoding 1", "decoding 8", "prefill", "first token, 2/s", "between tokens, 2/s"]
    assert rows_of("docs/serving.md", ["", *head]) == rows
    assert rows_of("README.md", ["", *head[:3]]) == [row[:4] for row in rows]


def test_the_table_of_drafts() -> None:
    columns = {
        "parameters kept": ("budget", "g"),
        "KL, predicted": ("predicted_kl", ".4f"),
        "KL": ("kl", ".4f"),
        "1 - √(KL/π)": ("acceptance_of_the_kl", ".3f"),
        "greedy tokens the same": ("acceptance", ".3f"),
        "tokens a call of the dense model": ("tokens_a_dense_call", ".2f"),
        "times as fast": ("times_as_fast", ".2f"),
    }
    rows = [[format(row[key], how) for key, how in columns.values()] for row in kept("draft")]
    assert rows_of("docs/serving.md", list(columns)) == rows


def test_what_is_said_beside_distillation() -> None:
    text = " ".join((ROOT / "docs/when-not.md").read_text().split())
    found = kept("distil")["0.1"]
    healed = found["compressed and healed, 300 steps"]["kl"]
    assert f"loses {found['compressed']['kl']:.2f} nats as it comes, and {healed:.2f} after" in text
    students = [f["kl"] for name, f in found.items() if name.startswith("narrower, 300 steps")]
    assert f"random weights comes to {min(students):.2f}, more than" in text
    assert min(students) > found["compressed"]["kl"]


def of_the_readme() -> Iterator[list[str]]:
    """What the rows of the README's table are to be."""
    (run,) = runs_of("smollm2")
    for budget in ("0.9", "0.75"):
        ours, other = run["ours, refit"][budget], run["MPIFA"][budget]["kl"]
        best = min(run[m][budget]["kl"] for m in run if not m.startswith(("ours", "dense")))
        assert other == best
        predicted = f"{printer.number(ours['predicted'])} "
        predicted += f"({printer.interval((ours['low'], ours['high']))})"
        measured = (ours["alike"], ours["kl"], other)
        yield [f"{100 * float(budget):g} %", predicted, *map(printer.number, measured)]


def test_the_table_of_the_readme() -> None:
    head = ["kept", "predicted (90 %)", "other pages", "docstrings", "docstrings, MPIFA"]
    assert rows_of("README.md", head) == list(of_the_readme())
