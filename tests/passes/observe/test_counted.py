"""Which rows count: by one backward pass, and by changing every row in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorize.capture.forward import untouched
from tensorize.capture.inputs import batch_of
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch, Site
from tensorize.passes.observe.counted import CountRows, counted_rows
from tensorize.passes.observe.outputs import call, outputs_of
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.stages import Found, Given
from tests.passes.observe import routed
from tests.passes.observe.routed import Routed, build, data


def found_in(model: nn.Module, given: list[Any], metric: str = "loss") -> Found:
    batches = tuple(map(batch_of, given))
    return FindSites().run(
        Given(model=model, inputs=batches[0], calibration=batches, metric=metric)
    )


def by_hand(model: nn.Module, batch: Batch, sites: dict[str, Site]) -> dict[str, dict[int, Tensor]]:
    """Every row of every product changed in turn: whether a counted output changes with it."""
    wanted = [(name, p) for name, p in model.named_parameters() if name in sites]
    runs: list[tuple[str, int, int]] = []

    def outputs(name: str = "", number: int = 0, row: int = -1) -> list[Tensor]:
        calls: Counter[str] = Counter()

        def on_matmul(own: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
            rows = matmul.to_rows(output)
            flat = rows.reshape(-1, rows.shape[-1]).clone()
            if row < 0:
                runs.append((own, calls[own], len(flat)))
            if (own, calls[own]) == (name, number):
                draw = torch.Generator().manual_seed(row)
                flat[row] += 3 * torch.randn(flat.shape[1:], generator=draw, dtype=flat.dtype)
                output = matmul.from_rows(flat.reshape(rows.shape))
            calls[own] += 1
            return output

        with untouched(model), Observer(wanted, on_matmul):
            return [output.rows for output in outputs_of(call(model, batch), batch, model)]

    before = outputs()
    found: dict[str, dict[int, Tensor]] = {}
    for name, number, count in list(runs):
        mask = torch.zeros(count, dtype=torch.bool)
        for row in range(count):
            after = outputs(name, number, row)
            # In float64, so that what rounding does is far below.
            mask[row] = any(
                float((a - b).abs().max()) > 1e-9 for a, b in zip(before, after, strict=True)
            )
        found.setdefault(name, {})[number] = mask
    return found


@pytest.mark.parametrize("kind", routed.EVERY)
def test_those_rows_count_that_a_counted_output_changes_with(kind: Callable[[], Routed]) -> None:
    model = build(kind).double()
    with torch.no_grad():
        model.table.weight[routed.PADDING] /= 50
    found = found_in(model, data(model, routed.PADDING, batches=1))
    sites = {site.name: site for site in found.free if not site.last_resort}
    (batch,) = found.calibration
    want, got = by_hand(model, batch, sites), counted_rows(model, batch, sites)
    assert set(want) == set(got)
    assert any(not bool(mask.all()) for calls in want.values() for mask in calls.values())
    for name, calls in want.items():
        for number, mask in calls.items():
            assert torch.equal(got[name][number], mask), (name, number)


@pytest.mark.parametrize("kind", routed.EVERY)
def test_what_stands_in_padding_changes_no_row_that_counts(kind: Callable[[], Routed]) -> None:
    model = build(kind)
    masks = []
    for padding in (0, routed.PADDING):
        found = found_in(model, data(model, padding))
        counted = CountRows(found.calibration).run(found).counted
        assert counted is not None
        masks.append([counted[batch] for batch in found.calibration])
    for one, two in zip(*masks, strict=True):
        for name, calls in one.items():  # an expert's rows may be more, by some that do not count
            assert all(int(m.sum()) == int(two[name][k].sum()) for k, m in calls.items()), name


class Dead(Routed):
    """Units that are all off for some rows, and far beyond where tanh still moves for others."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.relu(self.first(x)))))


def test_a_row_whose_units_are_all_off_or_saturated_counts() -> None:
    torch.manual_seed(0)
    model = Dead()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(routed.D))
        model.first.bias.zero_()
        model.second.weight.copy_(torch.eye(routed.D))
        model.second.bias.zero_()
    x, mask = torch.ones(2, 3, routed.D), torch.ones(2, 3)
    x[0, 0], x[0, 1], mask[1, 2] = -1.0, 1e4, 0
    found = found_in(model, [{"x": x, "attention_mask": mask}])
    counted = CountRows(found.calibration).run(found).counted
    assert counted is not None
    for name in ("first.weight", "second.weight", "head.weight"):
        assert torch.equal(counted[found.calibration[0]][name][0], mask.reshape(-1) != 0)


def test_nothing_fades_away_over_many_steps() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 8)
            for t in range(x.shape[1]):
                h = self.inner(h + x[:, t])
            return self.head(h)

    torch.manual_seed(0)
    model = Steps()
    with torch.no_grad():
        model.inner.weight.mul_(1e-2 / model.inner.weight.norm())
    x = torch.randn(2, 60, 8)  # (1e-2)⁶⁰ is none of float32's numbers
    found = found_in(model, [x])
    sites = {site.name: site for site in found.free}
    calls = counted_rows(model, found.calibration[0], sites)["inner.weight"]
    assert len(calls) == 60
    assert all(bool(mask.all()) for mask in calls.values())


def test_no_backward_pass_is_run_where_all_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(routed.Unpadded)
    given = data(model, 0)
    for batch in given:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    found = found_in(model, given)

    def fails(*_: Any) -> None:
        raise AssertionError("a pass was run")

    monkeypatch.setattr("tensorize.passes.observe.counted.counted_rows", fails)
    assert CountRows(found.calibration).run(found).counted == {}


def test_without_gradients_all_rows_count_and_a_note_says_so() -> None:
    class Fixed(Routed):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            with torch.no_grad():
                return self.head(self.rows(self.table(ids)))

    model = build(Fixed)
    found = found_in(model, data(model, 0), metric="input")
    after = CountRows(found.calibration).run(found)
    assert after.counted == {}
    assert any("all rows of the data count" in note for note in after.notes)


def test_a_loss_of_the_caller_says_which_rows_count() -> None:
    model = build(routed.Dropped)
    given = [{**b, "attention_mask": torch.ones(4, routed.T)} for b in data(model, 0, batches=1)]
    found = found_in(model, given)
    loss_fn = lambda outputs, batch: outputs[:, 3].square().mean()  # noqa: E731
    counted = CountRows(found.calibration, loss_fn).run(found).counted
    assert counted is not None
    (mask,) = counted[found.calibration[0]]["first.weight"].values()
    want = torch.zeros(4, routed.T + 2, dtype=torch.bool)
    want[:, 5] = True
    assert torch.equal(mask, want.reshape(-1))
