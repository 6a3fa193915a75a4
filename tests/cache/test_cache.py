"""Analyses on disk: found by what they depend on, whole or made again, and bounded in memory."""

from __future__ import annotations

import copy
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize import Analysis
from tensorize.base.errors import AnalysisError, BudgetError
from tensorize.ir.budget import parse_bytes
from tensorize.passes.curves import in_groups
from tensorize.passes.observe.moments import has_moments, moment_bytes
from tensorize.passes.observe.statistics import CollectStatistics
from tests.marks import slow, slow_but
from tests.paths import ROOT

IDS = [torch.arange(24).reshape(2, 12).roll(k) for k in range(6)]


class Net(nn.Module):
    """A table, parallel projections of one input, a norm with statistics, and a recurrent layer."""

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.power = power
        self.words = nn.Embedding(24, 16)
        self.gate, self.up = nn.Linear(16, 40, bias=False), nn.Linear(16, 40, bias=False)
        self.norm = nn.BatchNorm1d(40)
        self.memory = nn.GRU(40, 12, batch_first=True)
        self.head = nn.Linear(12, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = F.silu(self.gate(x)) * self.up(x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.memory(x)[0] ** self.power)


class OtherNet(Net):
    """The same weights under another name."""


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    model = kind()
    model.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


def analysed(cache: Path | None, model: nn.Module | None = None, **options: Any) -> Analysis:
    options = {"calibration": IDS, "refine": None, **options}
    return tensorize.analyze(model or net(), cache_dir=cache, **options)


def was_read(analysis: Analysis) -> bool:
    return all(stage.name != "curves" for stage in analysis.program.history)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("analysis-*.json"))


def curves(cache: Path) -> list[Path]:
    return sorted(cache.glob("analysis-*/*.safetensors"))


def assert_alike(one: Analysis, other: Analysis, budget: float = 0.5) -> None:
    """The same curves, plan and compressed weights, bit for bit."""
    assert one.program.spectra.keys() == other.program.spectra.keys()
    for name, curve in one.program.spectra.items():
        again = other.program.spectra[name]
        assert curve.formats == again.formats
        assert curve.in_nats == again.in_nats
        assert curve.measured == again.measured
        assert (curve.shared is None) == (again.shared is None)
        for first, second in zip(tensors_of(curve), tensors_of(again), strict=True):
            assert torch.equal(first, second), name
    plans = [analysis.plan(budget) for analysis in (one, other)]
    assert plans[0].sites == plans[1].sites
    assert plans[0].predicted == plans[1].predicted
    states = [tensorize.apply(net(), plan).state_dict() for plan in plans]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def tensors_of(curve: Any) -> list[Tensor]:
    found = [curve.distortion]
    found += [root for m in curve.metrics for root in (m.left, m.right) if root is not None]
    found += [core for train in curve.trains for core in train.cores]
    if curve.shared is not None:
        found += [curve.shared.factor, curve.shared.reader, curve.shared.distortion]
    return found


# ------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize("metric", ["loss", "input", "frobenius"])
def test_what_was_analysed_is_found_again(metric: str, tmp_path: Path) -> None:
    first = analysed(tmp_path, metric=metric)
    again = analysed(tmp_path, metric=metric)
    assert was_read(again)
    assert not was_read(first)
    assert_alike(first, again)
    assert_alike(analysed(None, metric=metric), again)


def changed_buffer() -> dict[str, Any]:
    model = net()
    model.norm.running_mean.add_(0.1)  # type: ignore[union-attr]
    return {"model": model}


def changed_weight() -> dict[str, Any]:
    model = net()
    with torch.no_grad():
        model.head.weight[3, 5] += 1e-6
    return {"model": model}


def with_hook() -> dict[str, Any]:
    model = net()
    model.norm.register_forward_hook(lambda module, args, out: 2 * out)
    return {"model": model}


def with_power() -> dict[str, Any]:
    model = net()
    model.power = 2
    return {"model": model}


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "an attribute": with_power,
    "a hook": with_hook,
    "weights": changed_weight,
    "buffers": changed_buffer,
    "what the model computes": lambda: {"model": net(OtherNet)},
    "data": lambda: {"calibration": [*IDS[:-1], IDS[-1].roll(1)]},
    "less data": lambda: {"calibration": IDS[:-1]},
    "the metric": lambda: {"metric": "input"},
    "formats": lambda: {"formats": ["dense", "low_rank"]},
    "the choice of weights": lambda: {"exclude": "head"},
    "refine": lambda: {"refine": "refit"},
    "the seed": lambda: {"seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_an_analysis_depends_on_is_in_its_key(change: str, tmp_path: Path) -> None:
    analysed(tmp_path)
    assert not was_read(analysed(tmp_path, **CHANGES[change]()))
    assert len(entries(tmp_path)) == 2


def test_versions_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysed(tmp_path)
    monkeypatch.setattr("tensorize.api.analyze.__version__", "0.0.0")
    assert not was_read(analysed(tmp_path))


def test_what_it_does_not_depend_on_is_not(tmp_path: Path) -> None:
    """Modes, gradients, the place of the data, and how much memory there is."""
    analysed(tmp_path)
    model = net()
    model(IDS[0]).sum().backward()
    model.train()
    assert was_read(analysed(tmp_path, model, calibration=copy.deepcopy(IDS), max_memory="1GB"))


def test_what_cannot_be_told_is_not_kept(tmp_path: Path) -> None:
    """And a note says of what; the analysis is the one that it always is."""
    model: Any = net()
    model.source = (word for word in "abc")
    found = analysed(tmp_path, model)
    assert any("not kept in cache_dir: source is a builtins.generator" in n for n in found.notes)
    assert not list(tmp_path.iterdir())
    assert found.plan(0.5).cache is None
    assert_alike(analysed(None), found)
    own = analysed(tmp_path, loss_fn=lambda outputs, batch: outputs.square().mean())
    assert any("not kept in cache_dir: it is of a loss_fn" in note for note in own.notes)


SAME = """
import sys
from pathlib import Path
from tests.cache.test_cache import analysed, was_read
print(was_read(analysed(Path(sys.argv[1]))))
"""


def test_another_process_finds_what_was_analysed(tmp_path: Path) -> None:
    def run(seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", SAME, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()  # fmt: skip

    assert [run("1"), run("2")] == ["False", "True"]


# ------------------------------------------------------------------------------ disks without room

FULL = """
import resource, sys
from pathlib import Path
from tests.cache.test_cache import analysed
options = {"max_memory": "1GB"} if sys.argv[3] == "mapped" else {}
whole = analysed(None)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
found = analysed(Path(sys.argv[1]), **options)
assert found.plan(0.5).sites == whole.plan(0.5).sites
print(found.cache, [note for note in found.notes if "cache_dir" in note])
"""


@pytest.mark.parametrize("held", [slow("memory"), "mapped"])
@pytest.mark.parametrize("room", [0, slow(3000)])
def test_a_full_disk_costs_the_cache_and_not_the_analysis(
    room: int, held: str, tmp_path: Path
) -> None:
    """There is room for nothing, or for some of the curves."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(room), held],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None ['the analysis is not kept in cache_dir: OSError")
    assert "is gone on without" in done.stderr  # one warning
    assert not entries(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not was_read(analysed(tmp_path))
    assert was_read(analysed(tmp_path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tensorize.cache.analyses.write_at_once", fail)  # the last file of all
    found = analysed(tmp_path)
    assert any(os.strerror(code) in note for note in found.notes)
    assert found.plan(0.5).cache is None
    monkeypatch.undo()
    assert was_read(analysed(tmp_path)) is False


# ------------------------------------------------------------------------------------ the damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    """One bit of a number in the middle: what is left is a valid file."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".json":
        at = data.rindex(b'"seed": 0') + len('"seed": ')
        data[at] ^= 1
    else:
        data[-100] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Analysis]:
    """A cache, and the analysis that wrote it."""
    folder = tmp_path_factory.mktemp("once")
    return folder, analysed(folder)


DAMAGE = {"cut": cut, "emptied": emptied, "flipped": flipped, "gone": Path.unlink}


@pytest.mark.parametrize("what", ["the entry", "a curve", slow("a shared factor")])
@pytest.mark.parametrize("damage", slow_but(("flipped", "gone"), DAMAGE))
def test_damage_is_found_and_made_good_with_a_warning(
    damage: str,
    what: str,
    once: tuple[Path, Analysis],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, first = once
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (entry,) = entries(tmp_path)
    names = json.loads(entry.read_text())["analysis"]
    made = entry.with_suffix("")
    path = {
        "the entry": entry,
        "a curve": made / names["files"]["head.weight"],
        "a shared factor": made / names["shared"]["gate.weight"],
    }[what]
    before = path.read_bytes()
    DAMAGE[damage](path)
    with caplog.at_level(logging.WARNING, logger="tensorize"):
        again = analysed(tmp_path)
    assert ("is damaged and is made again" in caplog.text) == (
        damage != "gone" or what != "the entry"
    )
    assert not was_read(again)
    assert path.read_bytes() == before
    assert_alike(first, again)
    caplog.clear()
    assert was_read(analysed(tmp_path))
    assert not caplog.text


def test_only_what_is_damaged_is_made_again(tmp_path: Path) -> None:
    analysed(tmp_path)
    (entry,) = entries(tmp_path)
    names = json.loads(entry.read_text())["analysis"]["files"]
    flipped(entry.with_suffix("") / names["up.weight"])
    stage = next(s for s in analysed(tmp_path).program.history if s.name == "curves")
    assert f"{len(names) - 1} kept by an earlier run" in stage.summary


def test_a_folder_that_holds_other_things_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "analysis-notes.json").write_text("mine")
    (tmp_path / "picture.png").write_bytes(b"png")
    analysed(tmp_path)
    assert (tmp_path / "analysis-notes.json").read_text() == "mine"
    assert (tmp_path / "picture.png").read_bytes() == b"png"


# ---------------------------------------------------------------------- several runs, killed runs


def worker(cache: str, start: Any, results: Any) -> None:
    torch.set_num_threads(1)
    start.wait()
    for _ in range(3):
        plan = analysed(Path(cache)).plan(0.5)
    results.put([(site.name, site.ranks, site.predicted_loss) for site in plan.sites])


@pytest.mark.slow
def test_runs_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two processes that analyse the same model at once, while another damages what they keep."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    processes = [
        context.Process(target=worker, args=(str(tmp_path), start, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert found[0] == found[1]
    alone = analysed(None).plan(0.5)
    assert found[0] == [(site.name, site.ranks, site.predicted_loss) for site in alone.sites]
    assert len(entries(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.tmp"))


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.cache.test_cache import analysed
def watch(stage, done, total):
    if (stage, done) == ("spectra", 4):
        os.kill(os.getpid(), signal.SIGKILL)
analysed(Path(sys.argv[1]), max_memory=50000, progress=watch)
"""


def test_a_killed_analysis_goes_on_after_the_last_weight(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(curves(tmp_path)) == 4
    assert not entries(tmp_path)
    again = analysed(tmp_path)
    stage = next(stage for stage in again.program.history if stage.name == "curves")
    assert "4 kept by an earlier run" in stage.summary
    assert_alike(analysed(None), again)


# ------------------------------------------------------------------------------- bounded memory


def largest(metric: str) -> int:
    sites = [s for s in analysed(None).program.sites if has_moments(s, metric)]
    return max(moment_bytes(site, metric) for site in sites)


@pytest.mark.parametrize("metric", ["loss", "input"])
def test_groups_of_weights_give_the_same_bits(metric: str) -> None:
    whole = analysed(None, metric=metric)
    bounded = analysed(None, metric=metric, max_memory=3 * largest(metric))
    stage = next(stage for stage in bounded.program.history if stage.name == "curves")
    assert int(stage.summary.partition(" ")[0]) >= 3
    assert_alike(whole, bounded)
    assert set(whole.notes) == set(bounded.notes)


def test_moments_are_never_more_than_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    most = 3 * largest("loss")
    plain = CollectStatistics.run

    def run(self: CollectStatistics, program: Any) -> Any:
        after = plain(self, program)
        terms = [term for m in after.statistics.values() for term in m.terms.values()]
        held.append(sum(side.nbytes for term in terms for side in term.held.values()))
        return after

    monkeypatch.setattr(CollectStatistics, "run", run)
    analysed(None)
    (whole,) = held
    held.clear()
    analysed(None, max_memory=most)
    assert whole > most
    assert len(held) > 1
    assert max(held) <= most
    assert sum(held) == whole


def test_what_is_learned_lies_on_disk_and_nothing_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bounded = analysed(None, max_memory="1GB")
    assert not list(tmp_path.iterdir())
    assert_alike(analysed(None), bounded)


@pytest.mark.slow
def test_the_whole_compile_is_the_same(tmp_path: Path) -> None:
    options = {"calibration": IDS, "refine": "polish"}
    whole = tensorize.compile(net(), 0.5, **options)
    bounded = tensorize.compile(net(), 0.5, **options, max_memory=3 * largest("loss"))
    states = whole.state_dict(), bounded.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_weight_that_does_not_fit_is_named() -> None:
    with pytest.raises(
        AnalysisError, match=r"second moments take .* max_memory is 1.00 kB"
    ) as told:
        analysed(None, max_memory=1000)
    needed = int(str(told.value).partition("max_memory=")[2].partition(",")[0])
    analysed(None, max_memory=max(needed, 3 * largest("loss")))


def test_groups_are_as_few_as_fit() -> None:
    sites = [site for site in analysed(None).program.sites if site.blocked is None]
    sizes = {site.name: moment_bytes(site, "loss") for site in sites}

    def held(groups: Sequence[Sequence[Any]]) -> list[int]:
        return [sum(sizes[s.name] for s in g) + 2 * max(sizes[s.name] for s in g) for g in groups]

    for most in range(3 * max(sizes.values()), 3 * sum(sizes.values()), 5000):
        groups = in_groups.groups_that_fit(sites, "loss", most)
        assert sorted(s.name for g in groups for s in g) == sorted(sizes)
        assert max(held(groups)) <= most
        for one, other in pairwise(groups):
            assert held([[*one, other[0]]])[0] > most  # one more would not have fitted
    assert len(in_groups.groups_that_fit(sites, "loss", None)) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (5, 5),
        ("4GB", 4 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5g", 1_500_000_000),
        ("100", 100),
        (" 2kB ", 2000),
    ],
)
def test_sizes(given: Any, expected: int | None) -> None:
    assert parse_bytes(given) == expected


@pytest.mark.parametrize("given", ["", "much", "4XB", "-1GB", 0, -5, True, 1.5, "0"])
def test_what_is_no_size(given: Any) -> None:
    with pytest.raises(BudgetError, match="is no size"):
        parse_bytes(given)
