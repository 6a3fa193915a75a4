"""What an engine will do is known from the manifest: in lines, or as a refusal that names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import tensorize
from tensorize.base.errors import CheckpointError
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.spec import Spec, TTSpec
from tensorize.serve.service import check, services, services_of, told
from tensorize.store.contents import SiteRecord
from tests.paths import ROOT

LOW = TTSpec.low_rank(64, 32, 8)
PIVOTED = TTSpec.low_rank(64, 32, 8, pivoted=True)


def site(name: str, spec: Spec, nonlinearity: str | None = None) -> SiteRecord:
    return SiteRecord((name,), spec.shape, spec, nonlinearity)


def test_every_way_of_serving_is_a_line() -> None:
    sites = [
        site("a.weight", LOW), site("b.weight", LOW), site("c.weight", PIVOTED),
        site("d.weight", TTSpec((8, 8), (8, 4), (5,))),
        site("e.weight", QuantizedSpec(DenseSpec((64, 32)), "int8")),
        site("mlp.experts.down_proj", TTSpec.low_rank(64, 32, 8, experts=4)),
    ]  # fmt: skip
    assert told(services(sites)) == [
        "2 x low rank: two products (1.54 K numbers)",
        "1 x low rank without an identity: two products, with the identity (704 numbers, 768 in "
        "the engine)",
        "1 x tensor train: made whole when loaded (480 numbers, 2.05 K in the engine)",
        "1 x dense in int8: made whole when loaded (2.05 K numbers)",
        "1 x low rank: products of each expert (3.07 K numbers)",
    ]
    check(services(sites))


def test_experts_are_refused_where_an_engine_runs_none_in_factors() -> None:
    sites = [site("mlp.experts.down_proj", TTSpec.low_rank(64, 32, 8, experts=4))]
    check(services(sites, "vllm"))
    with pytest.raises(CheckpointError, match="SGLang runs no experts") as error:
        check(services(sites, "sglang"))
    assert "exclude=['mlp.experts.down_proj']" in str(error.value)


def test_a_model_without_factors_is_any_other() -> None:
    assert told([]) == ["no weight is factorized: the model is served as any other"]


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (site("heads.up", TTSpec.low_rank(64, 32, 8, experts=4)), "no experts of the engine"),
        (site("mlp.up.weight", LOW, "silu"), "silu between its factors"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_way_out(refused: SiteRecord, why: str) -> None:
    found = services([site("a.weight", LOW), refused])
    assert why in told(found)[-1]
    with pytest.raises(CheckpointError, match=why) as error:
        check(found)
    assert error.value.site == refused.names[0]
    assert f"exclude=['{refused.names[0]}']" in str(error.value)


def test_engines_serve_models_of_transformers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(32, 32))
    tensorize.save(tensorize.compile(net, 0.5, metric="frobenius"), tmp_path)
    with pytest.raises(CheckpointError, match="engines serve models of transformers"):
        services_of(tmp_path)


def test_serving_needs_neither_analysis_nor_planner() -> None:
    files = ("layout", "matrices", "service", "waiting")
    rooms = ("api", "passes.observe", "passes.curves", "passes.allocate", "codegen.device", "cache")
    code = (
        f"import sys\nimport {', '.join(f'tensorize.serve.{name}' for name in files)}\n"
        f"print([n for n in {rooms!r} if f'tensorize.{{n}}' in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
