"""The planner beside what was published: BOOST's table, and Frontier's choices.

    python -m benchmarks.strategy

Three constants of the planner (the best share of the peak, how wide a product has to be for it, the
share of the links) are fitted to the three rows of the 7B model in BOOST's table, all others are
known figures. The rows of 3B and 13B are predicted. The constants stand in
``tensorize/distributed/strategy/cluster.py``. Nothing is fitted to Frontier.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.record import keep
from tensorize.distributed import CLUSTERS, Cluster, Strategy, Workload, plan
from tensorize.distributed.strategy.estimate import Estimate, Estimator
from tensorize.distributed.strategy.strategy import BTP, MEGATRON, NAIVE

PUBLISHED = Path(__file__).parent / "published"
STYLES = {"full": MEGATRON, "naive": NAIVE, "btp": BTP}
FITTED = ("best", "thin", "links")
MOST = {"best": 1.0, "thin": math.inf, "links": 1.0}
ON = "a100-40"


def published(name: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / f"{name}.json").read_text())


def boost_estimate(row: dict[str, Any], kind: str, cluster: Cluster) -> Estimate:
    """The planner's figures for one cell of BOOST's table."""
    table = published("boost")
    shape = table["shapes"][row["model"]]
    rank = None if kind == "full" else shape["width"] // 4
    how = Strategy(row["pp"], 1, row["tp"], STYLES[kind], table["batch"], 1)
    return Estimator(Workload.decoder(**shape, rank=rank), cluster, table["sequence"])(how)


def boost_errors(cluster: Cluster, models: Sequence[str]) -> dict[str, dict[str, float]]:
    """By how much predicted seconds are off, as a share, by model and kind."""
    rows = [row for row in published("boost")["rows"] if row["model"] in models]
    return {
        row["model"]: {
            kind: boost_estimate(row, kind, cluster).total / seconds - 1
            for kind, seconds in row["seconds"].items()
        }
        for row in rows
    }


def fitted(cluster: Cluster) -> Cluster:
    """The cluster with the constants that meet the rows of 7B best: least squares of logs.

    A search in ever smaller steps along each constant, within what they can be: shares up to 1.
    """

    def with_(values: dict[str, float]) -> Cluster:
        return replace(cluster, **values)

    def misses(values: dict[str, float]) -> float:
        return sum(math.log1p(e) ** 2 for e in boost_errors(with_(values), ["7B"])["7B"].values())

    values = {name: float(getattr(cluster, name)) for name in FITTED}
    least, step = misses(values), 1.3
    while step > 1.001:
        tried = [
            {**values, **dict(zip(FITTED, moved, strict=True))}
            for signs in itertools.product((-1, 0, 1), repeat=len(FITTED))
            for moved in [[values[n] * step**k for n, k in zip(FITTED, signs, strict=True)]]
            if all(value <= MOST[n] for n, value in zip(FITTED, moved, strict=True))
        ]
        found = min(tried, key=misses)
        if misses(found) < least:
            values, least = found, misses(found)
        else:
            step = math.sqrt(step)
    return with_(values)


@dataclass(frozen=True)
class Choice:
    """One of Frontier's choices beside the planner's: theirs as well as it can be, the best of what
    they chose among (no shards of parameters, nothing on the host), and the best of all."""

    theirs: Estimate
    likewise: Estimate
    best: Estimate
    used: float

    @property
    def gaps(self) -> dict[str, float]:
        """By how much theirs is predicted to be slower."""
        return {
            "of the same kind": self.theirs.total / self.likewise.total - 1,
            "of all": self.theirs.total / self.best.total - 1,
        }


def frontier_choice(row: dict[str, Any]) -> Choice:
    """What the planner makes of one of Frontier's models."""
    table = published("frontier")
    pipelines = row["devices"] // row["tp"] // row["pp"]
    found = plan(
        Workload.decoder(**table["shapes"][row["model"]], gated=False),
        devices=row["devices"],
        machine="mi250x",
        batch=pipelines * table["micro"],
        sequence=table["sequence"],
    )
    every = (found.best, *found.others)
    kind = [e for e in every if not (e.strategy.sharded or e.strategy.offload)]
    theirs = next(e for e in kind if (e.strategy.tp, e.strategy.pp) == (row["tp"], row["pp"]))
    return Choice(theirs, kind[0], found.best, found.share_of_peak(theirs))


def seconds_of_search(devices: int = 4096) -> float:
    """What the search for so many devices takes of a processor: the median of five."""
    seven = Workload.decoder(**published("boost")["shapes"]["7B"], rank=1024)
    took = []
    for _ in range(5):
        began = time.process_time()
        plan(seven, devices=devices, machine="h100", batch=devices, sequence=4096)
        took.append(time.process_time() - began)
    return statistics.median(took)


def main() -> None:
    start = replace(CLUSTERS[ON], best=0.9, thin=500.0, links=0.8)
    cluster = fitted(start)
    print({name: round(getattr(cluster, name), 4) for name in FITTED})
    errors = boost_errors(cluster, ["3B", "7B", "13B"])
    for model, each in errors.items():
        print(model, {kind: f"{100 * off:+.1f} %" for kind, off in each.items()})
    rows = []
    for row in published("frontier")["rows"]:
        choice = frontier_choice(row)
        print(
            f"{row['model']}: {choice.theirs.strategy}: predicted {100 * choice.used:.1f} % of the"
        )
        print(f"  peak, published {100 * row['used']:.1f} %")
        for which, gap in choice.gaps.items():
            best = choice.best if which == "of all" else choice.likewise
            print(f"  {100 * gap:.1f} % behind the best {which}, {best.strategy}")
        rows.append({**row, "gaps": choice.gaps, "predicted": choice.used})
    constants = {name: getattr(cluster, name) for name in FITTED}
    searched = seconds_of_search()
    print(f"a search for 4096 devices takes {searched:.2f} s of a processor")
    results = {"constants": constants, "boost": errors, "frontier": rows}
    results["seconds_of_search"] = searched
    print(f"kept in {keep('strategy', results)}")


if __name__ == "__main__":
    main()
