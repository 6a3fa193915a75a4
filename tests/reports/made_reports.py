"""Reports made by hand."""

from __future__ import annotations

import math

from tensorize.ir.plan import Plan, Prediction, RankPlan, Totals
from tensorize.ir.spec import TTSpec
from tensorize.reports.curve import Curve
from tensorize.reports.data import CurvePoint, ReportTotals, SiteReport, Stage
from tensorize.reports.report import Report

DEVIL = "x.<script>alert('&amp;\"')</script>.weight"
GAIN = "least predicted loss for its parameters (λ = 3.1e-08 a parameter)"
SMALL = "too small: low rank saves nothing below rank 2, and position rows are not redundant"


def rank_plan(name: str, kind: str, m: int, n: int, rank: int | None, error: float) -> RankPlan:
    spec = None if rank is None else TTSpec.low_rank(m, n, rank)
    reason = SMALL if rank is None else GAIN
    return RankPlan(name, kind, (m, n), spec, error, error**2 / 40, reason)


def bert_plans(layers: int = 6) -> list[RankPlan]:
    top = "bert.embeddings."
    word = TTSpec((16, 36, 53), (8, 8, 12), (64, 96))
    plans = [
        RankPlan(
            top + "word_embeddings.weight",
            "embedding+linear",
            (30528, 768),
            word,
            0.2114,
            0.0061,
            "a probe found structure: three cores beat low rank at equal parameters",
        ),
        rank_plan(top + "position_embeddings.weight", "embedding", 512, 768, None, 0.0),
    ]
    for k in range(layers):
        layer = f"bert.encoder.layer.{k}."
        for j, part in enumerate(("query", "key", "value")):
            name = f"{layer}attention.self.{part}.weight"
            plans.append(
                rank_plan(name, "linear", 768, 768, 32 + 16 * (k % 3) + 8 * j, 0.08 + 0.011 * j)
            )
        name = f"{layer}attention.output.dense.weight"
        plans.append(rank_plan(name, "linear", 768, 768, 64, 0.12))
        name = f"{layer}intermediate.dense.weight"
        plans.append(rank_plan(name, "linear", 3072, 768, 96 + 8 * k, 0.1 + 0.01 * k))
        name = f"{layer}output.dense.weight"
        plans.append(rank_plan(name, "linear", 768, 3072, 104, 0.131))
    plans.append(rank_plan("bert.pooler.dense.weight", "linear", 768, 768, None, 0.0))
    return plans


def make_report(plans: list[RankPlan], *, loss: bool = True, curve: bool = True) -> Report:
    sites = tuple(
        SiteReport(
            name=plan.name,
            aliases=("cls.predictions.decoder.weight",) if "word" in plan.name else (),
            kind=plan.kind,
            shape=plan.shape,
            format=plan.format,
            ranks=plan.ranks,
            parameters_before=plan.parameters_before,
            parameters_after=plan.parameters_after,
            predicted_error=plan.predicted_error,
            actual_error=plan.predicted_error * 0.97,
            predicted_loss=plan.predicted_loss,
            reason=plan.reason,
        )
        for plan in plans
    )
    before = sum(site.parameters_before for site in sites) + 210_034
    after = sum(site.parameters_after for site in sites) + 210_034
    flops = 2 * sum(site.parameters_before for site in sites if site.kind == "linear")
    left = 2 * sum(site.parameters_after for site in sites if site.kind == "linear")
    totals = ReportTotals(
        Totals(before, 4 * before, flops),
        Totals(after, 4 * after, left),
    )
    predicted = Prediction(
        after, 4 * after, left, 0.1731, 0.0312 if loss else None, (0.0212, 0.0453) if loss else None
    )
    plan = Plan(
        sites=tuple(plans),
        budget="params ≤ 20 %",
        metric="loss" if loss else "frobenius",
        predicted=predicted,
        dense=Totals(before, 4 * before, flops),
        batch_sizes=(1, 16, 256),
        seed=0,
        fingerprint="9f6c2e",
        notes=("kept exact: 12 sites",),
    )
    points = tuple(
        CurvePoint(
            budget=b,
            parameters=round(b * before),
            bytes=round(4 * b * before),
            flops=round(b * flops),
            output_error=0.9 * math.exp(-5 * b) if b < 1 else 0.0,
            loss=None if not loss else (1.1 * math.exp(-17 * b**0.9) if b < 1 else 0.0),
            loss_interval=None
            if not loss
            else (0.7 * math.exp(-18 * b**0.9), 1.6 * math.exp(-15.5 * b**0.9)),
        )
        for b in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0)
    )
    return Report(
        plan=plan,
        sites=sites,
        totals=totals,
        curve=Curve(points, plan.metric) if curve else None,
        history=(
            Stage("sites", 2.31, f"{len(sites)} sites in 74 uses; 3 parameters tied"),
            Stage("statistics", 85.2, "second moments of inputs and gradients from 4096 tokens"),
            Stage("spectra", 12.9, "37 whitened SVDs, 1 TT-SVD"),
            Stage("allocate", 0.0413, "λ = 3.1e-08, duality gap 0.4 %"),
            Stage("factorize", 3.07, f"{len(sites) - 2} sites rewritten, 52.1 M parameters gone"),
            Stage("verify", 1.12, "outputs equal to the interpreter's to 3.1e-06"),
        ),
        notes=(
            "bert.encoder.layer.3.attention.self.key.weight: no tokens reached 11 of 768 inputs, "
            "their directions were weighed by the prior",
            "LSTM layers are not looked at",
        ),
        environment=(
            ("tensorize", "0.1.0"),
            ("torch", "2.13.0+cpu"),
            ("python", "3.11.7"),
            ("machine", "AMD EPYC 7B13, 2 cores, 16 GB"),
        ),
        measured_loss=0.0334 if loss else None,
        measured_error=0.168 if loss else None,
    )
