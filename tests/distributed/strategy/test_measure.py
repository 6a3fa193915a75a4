"""Figures of a group of processes: fitted to what was measured, kept, and planned with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tensorize
from tensorize import TensorizeError
from tensorize.cli import app
from tensorize.distributed import Workload
from tensorize.distributed.strategy import probe
from tensorize.distributed.strategy.cluster import CLUSTERS, Cluster, cluster_of, keep
from tensorize.distributed.strategy.measure import alpha_beta, measure, saturation
from tensorize.distributed.strategy.seconds import AROUND, other_seconds, starts
from tests.distributed import processes

MADE = Cluster("made up", 2e10, 8e9, 5e9, 2, 1e9, 5e8, 2e9, 1e8, links=1.0, itemsize=4)


@pytest.mark.parametrize("members", [2, 4, 8])
def test_latency_and_bandwidth_are_those_that_the_planner_reckons_with(members: int) -> None:
    sizes = [2.0**k for k in range(12, 25, 2)]
    flat = Cluster("flat", 1e10, 1e9, 1e9, members, 3e8, 3e8, 1e9, 1e8, links=1.0, latency=2e-4)
    seconds = [flat.all_reduce_seconds(size, members) for size in sizes]
    latency, rate = alpha_beta(sizes, seconds, members)
    assert latency == pytest.approx(flat.latency, rel=1e-6)
    assert rate == pytest.approx(flat.link, rel=1e-6)


def test_no_latency_is_below_zero() -> None:
    sizes = [2.0**k for k in range(12, 25, 2)]
    latency, rate = alpha_beta(sizes, [size**1.2 / 1e9 for size in sizes], 2)
    assert latency == 0
    assert rate > 0


def test_peak_and_thin_side_are_those_of_the_rates() -> None:
    of = CLUSTERS["a100-40"]
    widths = (16, 64, 256, 1024)
    peak, thin = saturation(widths, [of.peak * of.share(width) for width in widths])
    assert thin == pytest.approx(of.thin, rel=0.05)
    assert peak == pytest.approx(of.peak * of.best, rel=0.05)


SLOW = replace(MADE, attention=0.4, eager=3.5, start=2e-4)


def test_what_holds_a_processor_back_is_found_again(tmp_path: Path) -> None:
    """Of blocks that take what the planner says of them."""
    shapes = iter((probe._NOTHING, None, probe._USUAL))

    def told(call: Callable[[], object]) -> float:
        call()
        shape = next(shapes)
        if shape is None:
            flops = 3 * 2 * 2 * 768 * 384 * 256
            return flops / (SLOW.peak * SLOW.share(128) * SLOW.attention)
        layer = Workload.decoder(shape.width, shape.inner, 1, shape.heads, 1).layers[0]
        begun = 2.5 * SLOW.start * (starts(layer, "plain", 1) - AROUND)
        if shape is probe._NOTHING:  # it is taken for nothing but starts
            return probe._BLOCKS * begun
        beside = other_seconds(SLOW, layer, "plain", 1, shape.rows, shape.tokens)
        return probe._BLOCKS * (begun + 3 * beside)

    meet = f"file://{tmp_path}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        found = probe.eager_figures(MADE, told)
    finally:
        torch.distributed.destroy_process_group()
    for name in ("attention", "eager", "start"):
        assert getattr(found, name) == pytest.approx(getattr(SLOW, name), rel=1e-6)


def test_what_holds_a_processor_back_has_its_seconds() -> None:
    workload = Workload.decoder(256, 704, 4, 8, 512, rank=64)
    options = {"devices": 2, "batch": 4, "sequence": 128}
    how = tensorize.distributed.Strategy(tp=2, style="btp", rows=4, micro=1)

    def seconds(**change: float) -> dict[str, float]:
        machine = replace(MADE, **change)
        return tensorize.distributed.plan(workload, machine=machine, **options).explain(how).seconds

    usual = seconds()
    # Four layers of 4 + 4 + 14 factors and 4 sums, which start as much as three products each.
    begun = seconds(start=1e-3)["compute"] - usual["compute"]
    assert begun == pytest.approx(1e-3 * (1 + 1.5) * (4 * (4 + 4 + 14 + 3 * 4) + 10))
    for change in ({"eager": 2.0}, {"attention": 0.5}):
        assert seconds(**change)["compute"] > usual["compute"]
    rate = workload.parameters / 2 / seconds(updated=2e6)["update"]
    assert rate == pytest.approx(2e6)


def test_processors_have_no_host_beside_them() -> None:
    workload = Workload.decoder(256, 704, 4, 8, 512, rank=64)
    for updated in (0.0, 1e8):
        machine = replace(MADE, updated=updated)
        found = tensorize.distributed.plan(
            workload, devices=2, machine=machine, batch=4, sequence=128
        )
        every = {each.strategy.offload for each in (found.best, *found.others)}
        assert every == ({False} if updated else {False, True})


def test_what_was_measured_is_kept_and_planned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    workload = Workload.decoder(256, 704, 4, 8, 512, rank=64)
    options = {"devices": 2, "batch": 8, "sequence": 128}
    with pytest.raises(TensorizeError, match=r"no group of processes was measured.*\n.*torchrun"):
        tensorize.distributed.plan(workload, machine="measured", **options)
    keep(MADE)
    assert cluster_of("measured") == MADE
    plan = tensorize.distributed.plan(workload, machine="measured", **options)
    assert plan.cluster == MADE
    (tmp_path / next(tmp_path.iterdir()).name).write_text("{}")
    with pytest.raises(TensorizeError, match="no group of processes was measured"):
        cluster_of("measured")


def test_what_is_sent_counts_by_the_size_of_its_numbers() -> None:
    workload = Workload.decoder(256, 704, 4, 8, 512, rank=64)
    how = tensorize.distributed.Strategy(tp=2, style="btp", rows=4, micro=1)
    options = {"devices": 2, "batch": 4, "sequence": 128}
    sent = [
        tensorize.distributed.plan(workload, machine=machine, **options).explain(how).sent
        for machine in (MADE, Cluster(**{**vars(MADE), "itemsize": 2}))
    ]
    assert sent[0]["tensor parallel"] == 2 * sent[1]["tensor parallel"]


def test_one_process_has_nothing_to_measure() -> None:
    with pytest.raises(TensorizeError, match=r"no group of several runs\n.*torchrun"):
        measure()


def test_the_command_says_what_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    done = CliRunner().invoke(app, ["calibrate", "--distributed"])
    assert done.exit_code != 0
    assert "torchrun --nproc-per-node 2 -m tensorize.cli calibrate --distributed" in done.output


def figures_make_sense(folder: Path) -> None:
    found = measure()
    assert found.node == 2
    assert found.itemsize == 4
    positive = "peak", "memory", "bandwidth", "link", "network", "host", "updates", "thin"
    assert all(0 < getattr(found, name) < float("inf") for name in positive)
    assert found.latency >= 0
    assert 0 < found.attention < float("inf")
    assert 0 <= found.eager < 100
    assert 0 < found.start < 1
    assert found.updated == found.updates


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    processes.run([figures_make_sense], 2, tmp_path)
