"""Damaged artefacts and plans by the hundreds: the promised errors only, and nothing that differs.

Of an artefact one file is damaged at a time: bytes and bits are changed, the end is cut off, pieces
are moved, and values of the manifest are replaced, with and without its checksum made again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.store.manifest import MANIFEST, signed
from tests.store.saved_models import weights_file

ARTEFACTS, PLANS = 2000, 500
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**12, 10**18, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x",
    "q.first.weight", "float16", "\ud800", "../x", [], [0], [1, 1], [10**18], ["x"], [[]], {},
    {"x": 1}, {"float": "nan"}, {"float": "x"}, {"float": []},
]  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)
        self.n = nn.BatchNorm1d(12)
        self.twin = self.k
        self.register_buffer("table", torch.arange(6.0).reshape(2, 3).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.q(x) * self.twin(x)) + self.table.sum()


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An artefact, and what its model gives."""
    small = tensorize.compile(
        net(), None, ranks={"q.*": 3, "k.*": 2}, metric="frobenius", example_inputs=(X,)
    )
    folder = tmp_path_factory.mktemp("fuzz")
    tensorize.save(small, folder)
    return folder, small(X).detach()


# -------------------------------------------------------------------------------------- damage


def bytes_damaged(data: bytes, draw: random.Random) -> bytes:
    """Some bytes or bits are others, gone, moved, or there twice."""
    at, length = draw.randrange(len(data)), draw.choice((1, 1, 1, 4, 64))
    piece = data[at : at + length]
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + draw.randbytes(len(piece)) + data[at + length :]
    if kind == 3:
        return data[:at] + data[at + length :]
    to = draw.randrange(len(data))
    if kind == 4:
        return data[:to] + piece + data[to:]
    return data[:at] + b"0" * len(piece) + data[at + length :]


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within JSON data with each of its keys."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield data, key
        if isinstance(value, dict | list):
            yield from places(value)


def values_damaged(data: Any, draw: random.Random) -> None:
    """A value is another one, gone, or in the place of one elsewhere."""
    found = list(places(data))
    held, key = draw.choice(found)
    other, there = draw.choice(found)
    kind = draw.randrange(5)
    if kind == 0:
        del held[key]
    elif kind == 1:
        held[key] = copy.deepcopy(other[there])
    elif kind == 2 and isinstance(held, dict):
        held[f"{key}x"] = held.pop(key)
    elif kind == 3 and type(held[key]) in (int, float):
        held[key] = held[key] * 2 + draw.choice((-3, -1, 1, 7))
    else:
        held[key] = copy.deepcopy(draw.choice(ODD))


def outcome(folder: Path, model: nn.Module) -> Tensor | None:
    """What a loaded model gives; None where it was refused, and left as it was."""
    before = {key: (id(value), value.clone()) for key, value in kept(model).items()}
    try:
        loaded = tensorize.load(folder, model)
    except tensorize.CheckpointError as error:
        assert error.way_out  # noqa: PT017 -- it may also be no error
        after = kept(model)
        assert after.keys() == before.keys()
        for key, (place, value) in before.items():
            assert id(after[key]) == place
            assert after[key].equal(value)
        assert type(model.q) is nn.Linear
        return None
    return loaded(X).detach()


def kept(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)


# --------------------------------------------------------------------------------- the artefacts


def test_damaged_artefacts_are_refused_or_are_what_they_were(saved: tuple[Path, Tensor]) -> None:
    """Damage that the checksum is not made again for: what still loads is the same model."""
    folder, expected = saved
    files = [folder / MANIFEST, folder / MANIFEST, weights_file(folder)]
    draw, model, refused = random.Random(0), net(), 0
    for _ in range(ARTEFACTS // 2):
        path = draw.choice(files)
        whole = path.read_bytes()
        if path.name == MANIFEST and draw.random() < 0.5:
            data = json.loads(whole)
            for _ in range(draw.choice((1, 1, 2))):
                values_damaged(data, draw)
            damaged = json.dumps(data).encode()
        else:
            damaged = bytes_damaged(whole, draw)
        path.write_bytes(damaged)
        try:
            found = outcome(folder, model)
        finally:
            path.write_bytes(whole)
        if found is None:
            refused += 1
        else:
            assert found.equal(expected), damaged
            model = net()
    assert refused > 0.9 * ARTEFACTS // 2
    assert torch.equal(tensorize.load(folder, net())(X), expected)


def test_values_are_checked_where_the_checksum_is_made_again(saved: tuple[Path, Tensor]) -> None:
    """Somebody who writes his own checksum, or none, meets the checks of every value."""
    folder, _ = saved
    path = folder / MANIFEST
    whole = path.read_bytes()
    draw, model, refused = random.Random(1), net(), 0
    for _ in range(ARTEFACTS // 2):
        data = json.loads(whole)
        del data["sha256"]
        part = draw.choice(("sites", "tensors", "aliases", "weights", "transient", "report"))
        values_damaged(draw.choice((data, data[part] or data, data[part] or data)), draw)
        path.write_text(signed(data) if draw.random() < 0.7 else json.dumps(data))
        try:
            found = outcome(folder, model)
        finally:
            path.write_bytes(whole)
        refused += found is None
        model = model if found is None else net()
    assert refused > 0.5 * ARTEFACTS // 2


def test_weights_of_another_artefact_are_no_weights_of_this(
    saved: tuple[Path, Tensor], tmp_path: Path
) -> None:
    folder, _ = saved
    small = tensorize.compile(net(), None, ranks={"q.*": 2, "k.*": 2}, example_inputs=(X,))
    tensorize.save(small, tmp_path)
    mine, other = weights_file(folder), weights_file(tmp_path)
    other.write_bytes(mine.read_bytes())
    assert outcome(tmp_path, net()) is None
    data = json.loads((tmp_path / MANIFEST).read_text())
    del data["sha256"]
    known = hashlib.sha256(other.read_bytes()).hexdigest(), other.stat().st_size
    data["weights"].update(sha256=known[0], bytes=known[1])
    (tmp_path / MANIFEST).write_text(signed(data))
    assert outcome(tmp_path, net()) is None


# ------------------------------------------------------------------------------------- the plans


def plan_damage(text: str, draw: random.Random) -> tuple[str, bool]:
    """A damaged plan, and whether the checksum goes with it."""
    if draw.random() < 0.4:
        return bytes_damaged(text.encode(), draw).decode("utf-8", "replace"), False
    data = json.loads(text)
    again = draw.random() < 0.6
    if again:
        del data["sha256"]
    values_damaged(data, draw)
    return json.dumps(data), again


def test_damaged_plans_are_refused_or_are_what_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    analysis = tensorize.analyze(
        model, metric="frobenius", example_inputs=(X,), formats=["tt", "low_rank"]
    )
    plan = analysis.plan(0.6)
    text = plan.to_json()
    applied: Callable[..., Any] = lambda *_, **__: copy.deepcopy(analysis)  # noqa: E731
    monkeypatch.setattr("tensorize.api.apply.analyzed", applied)
    draw, refused = random.Random(2), 0
    for _ in range(PLANS):
        damaged, again = plan_damage(text, draw)
        try:
            found = tensorize.Plan.from_json(damaged)
            assert again or found == plan
            str(found), hash(found)
            tensorize.apply(model, found)
        except (tensorize.AnalysisError, tensorize.BudgetError) as error:
            assert error.way_out  # noqa: PT017 -- it may also be no error
            refused += 1
    assert refused > 0.5 * PLANS
