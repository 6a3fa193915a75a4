"""What a guarded model notices: flipped bits, no false alarms, and what the checks cost.

    python -m benchmarks.faults flips --model llama --flips 20000
    python -m benchmarks.faults alarms --model llama
    python -m benchmarks.faults generate
    python -m benchmarks.faults cost --threads 1
    python -m benchmarks.faults compiled --threads 1

``flips``: one bit of a weight, an input, a result or an unfinished sum flips in one product of the
compressed model, on rows of unseen text. It is harmful where an output moves by more than 1e-3 of
the outputs' root mean square, in 16 bits where a row moves by more than 16 times what rounding does
to it; so many harmful ones are tried. Of 16 bits it is also kept how many are noticed of those that
move a row by more than 4, 8, 32 and 64 roundings. ``alarms``: unseen text without any flip.
``generate``: the compressed Llama writes text while bits flip all the time. ``cost``: a layer and
the compressed Llama, guarded over not guarded; interleaved rounds, medians. ``compiled``: the same
under ``torch.compile``.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from benchmarks.record import circumstances, keep, kept
from benchmarks.subjects import BATCH, MANY_SENTENCES, MODELS, SENTENCES, outputs
from benchmarks.timing import interleaved
from examples import gpt, llama
from tensorize.checking.guarding import guard_of
from tensorize.checking.injection import PLACES
from tensorize.checking.site import ModuleSite
from tensorize.ir.spec import TTSpec
from tensorize.weight.install import install

BUDGET, ROWS, HARM = 0.5, 32, 1e-3
"""Share of the bytes that is kept; rows of one product; of the outputs' root mean square."""
ROUNDINGS = 16.0
"""Of 16 bits: so many times what rounding does to a row."""
SIZES = (4, 8, 16, 32, 64)
"""Other such numbers, to see how what is noticed hangs on it."""

SHAPES = ((768, 768, 64), (768, 768, 256), (3072, 768, 256))
PARTS = ("layers", "llama")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compressed(name: str, dtype: torch.dtype, seed: int) -> tuple[nn.Module, Any]:
    """A trained model, compressed and guarded, and its subject."""
    subject = MODELS[name](seed)
    data = list(subject.calibration.batches)
    small = tensorize.compile(subject.model, BUDGET, calibration=data, refine=None).to(dtype)
    return tensorize.guard(small, calibration=data), subject


def met(model: nn.Module, batch: Any, count: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every module that is one covered product, and so many rows that it meets, at most."""
    guard, found, hooks = guard_of(model), {}, []
    assert guard is not None
    for name, site in guard.sites.items():
        module = site.module
        if not isinstance(site, ModuleSite):
            module = model.get_submodule(name.rpartition(".")[0])

        def note(module: nn.Module, args: Any, name: str = name) -> None:
            x = args[0].detach()
            rows = x.reshape(-1) if not x.is_floating_point() else x.reshape(-1, x.shape[-1])
            found[name] = module, rows[torch.randperm(len(rows))[:count]].clone()

        hooks.append(module.register_forward_pre_hook(note))
    for _ in outputs(model, [batch]):
        pass
    for hook in hooks:
        hook.remove()
    return found


def rounding(module: nn.Module, x: Tensor) -> float:
    """What 16 bits do to a row of a product, relative to its length: the root mean square of rows.

    One rounding of y at least, which does a fifth of an eps.
    """
    y, exact = module(x), copy.deepcopy(module).double()(x.double() if x.is_floating_point() else x)
    lengths = exact.norm(dim=-1)
    off = ((y.double() - exact).norm(dim=-1) / lengths)[lengths > 0]
    return max(float(off.square().mean().sqrt()), torch.finfo(y.dtype).eps / 5)


def harm(bad: Tensor, right: Tensor, rounds: float) -> float:
    """How much a result moved, in units of what is harmful.

    In float32 the furthest output counts, against ``HARM`` of the root mean square of all. In 16
    bits all outputs of a row are off by more than that already, whatever computes them: there a row
    counts as a whole, against ``ROUNDINGS`` times what rounding does to a row of its length, or of
    the root mean square of rows if that is more.
    """
    off, right = bad.double() - right.double(), right.double()
    if bad.dtype is torch.float32:
        return float(off.abs().max() / right.square().mean().sqrt()) / HARM
    lengths = right.norm(dim=-1)
    lengths = lengths.clamp(min=float(lengths.square().mean().sqrt()))
    return float((off.norm(dim=-1) / lengths).nan_to_num(nan=math.inf).max()) / (ROUNDINGS * rounds)


@torch.no_grad()
def flips(name: str, count: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Of so many harmful flips, how many were noticed, and what came out after."""
    torch.manual_seed(seed)
    model, subject = compressed(name, dtype, seed)
    guard, draw = guard_of(model), random.Random(seed)
    assert guard is not None
    plain = copy.deepcopy(model)  # the same products without checks
    bare = guard_of(plain)
    assert bare is not None
    bare.detach()

    def plain_of(site: str) -> nn.Module:
        return plain.get_submodule(site.rpartition(".")[0])

    inputs = met(model, subject.unseen.batches[0], ROWS)
    wanted = {site: module(x) for site, (module, x) in inputs.items()}
    scales = {site: float(y.double().square().mean().sqrt()) for site, y in wanted.items()}
    # Of a whole batch: few rows are computed in another way, which may round less.
    every = met(model, subject.unseen.batches[0], 1 << 30)
    rounds = {site: rounding(plain_of(site), x) for site, (_, x) in every.items()}
    names = list(inputs)
    total, found, exact, harmless = Counter(), Counter(), 0, 0
    missed, worst, trial = [], 0.0, 0
    sizes = {size: [0, 0] for size in SIZES}
    while sum(total.values()) < count:
        trial += 1
        site, where = draw.choice(names), draw.choice(PLACES)
        module, x = inputs[site]
        how: dict[str, Any] = {"rate": 0.5, "where": where, "most": 1, "seed": trial}
        other = plain_of(site)
        with tensorize.inject(other, **how) as made:
            bad = other(x)
        if not made:
            continue
        moved = harm(bad, wanted[site], rounds[site])
        if where == "weights":
            for mine, theirs in zip(other.parameters(), module.parameters(), strict=True):
                mine.data.copy_(theirs)
        before = len(guard.log.faults)
        with tensorize.inject(module, **how):
            good = module(x)
        noticed = len(guard.log.faults) > before
        if where == "weights":
            guard.mend(guard.sites[site])
        for size in SIZES:
            if moved * ROUNDINGS > size:
                sizes[size] = [sizes[size][0] + noticed, sizes[size][1] + 1]
        if moved <= 1:
            harmless += noticed
            continue
        total[where] += 1
        found[where] += noticed
        if noticed:
            exact += torch.equal(good, wanted[site])
            off = (good.double() - wanted[site].double()).abs().max()
            worst = max(worst, float(off) / scales[site])
        else:
            missed.append({"site": site, "where": where, "bit": made[0].bit, "moved": moved})
    harmful = sum(total.values())
    return {
        "harmful": harmful,
        "found": sum(found.values()),
        "share": sum(found.values()) / harmful,
        "by_place": {place: [found[place], total[place]] for place in PLACES},
        **({} if dtype is torch.float32 else {"by_roundings": sizes}),
        "repaired_bit_for_bit": exact,
        "worst_after_repair": worst,
        "harmless_but_noticed": harmless,
        "trials": trial,
        "sites": len(names),
        "missed": sorted(missed, key=lambda one: -one["moved"])[:20],
    }


@torch.no_grad()
def alarms(name: str, count: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Faults that are told on unseen text, where there are none."""
    if name == "llama":  # of which there is more text than its subject has
        model = tensorize.guard(small_llama(seed).to(dtype), calibration=windows(seed))
        batches: Any = gpt.windows("held_out", count, 256, seed).split(8)
    else:
        model, subject = compressed(name, dtype, seed)
        batches = list(subject.unseen.batches)
        if name == "minilm":  # and sentences of other files, but for those of the calibration
            more = MODELS[f"minilm-{MANY_SENTENCES}"](seed)
            batches += [*more.calibration.batches[SENTENCES // BATCH :], *more.alike.batches]
    before = tensorize.guard_report(model).rows
    tokens = 0
    for batch in batches:
        tokens += (batch if isinstance(batch, Tensor) else batch["input_ids"]).numel()
        for _ in outputs(model, [batch]):
            pass
    report = tensorize.guard_report(model)
    return {
        "rows_of_text": tokens,
        "rows_of_products": report.rows - before,
        "false_alarms": len(report.faults),
    }


def generate(per_second: float, tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    """The same text with and without flips, and the times of both, in turn.

    Some hits flip nothing (of a table's rows no input), so that flips are fewer than asked for.

    Seconds are the processor's: on a busy machine those of the clock would be many more flips.
    """
    model = tensorize.guard(small_llama(seed), calibration=windows(seed))
    prompt = gpt.windows("held_out", 4, 64, seed)
    mask = torch.ones_like(prompt)

    def run(rate: float, number: int, **how: Any) -> tuple[Tensor, float, int]:
        began = time.process_time()
        with tensorize.inject(model, rate=rate, seed=number, **how) as made, torch.no_grad():
            text = model.generate(
                prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True
            )
        return text, time.process_time() - began, len(made)

    share = 0.05
    products = run(share, 0, where="intermediates")[2] / share
    same, ratios, many, seconds = True, [], 0, 0.0
    before = len(tensorize.guard_report(model).faults)
    for k in range(rounds):
        quiet, alone, _ = run(0.0, k)
        loud, took, count = run(per_second * alone / products, k)
        same = same and torch.equal(quiet, loud)
        ratios.append(took / alone)
        many, seconds = many + count, seconds + took
    report = tensorize.guard_report(model)
    tensorize.scrub(model)
    return {
        "flips": many,
        "flips_per_second": many / seconds,
        "faults_noticed": len(report.faults) - before,
        "tensors_mended": len(report.mends),
        "same_tokens": same,
        "times_over_guarded": statistics.median(ratios),
    }


def cost(seed: int, part: str, many: Sequence[int], *, compiled: bool) -> dict[str, Any]:
    """Times of guarded models over those of the same ones without; ``compiled``: by inductor."""
    found: dict[str, Any] = {}
    for m, n, rank in SHAPES if part == "layers" else ():
        for rows in many:
            model = nn.Sequential(nn.Linear(n, m)).requires_grad_(False).eval()
            spec = TTSpec.low_rank(m, n, rank)
            cores = [nn.Parameter(torch.randn(shape) / 10, False) for shape in spec.core_shapes]
            install(model, ["0.weight"], spec, cores)
            x = torch.randn(rows, n)
            found[f"{m}x{n} rank {rank}, {rows} rows"] = _over(
                model, x, [torch.randn(256, n)], compiled=compiled
            )
    if part == "llama":
        small = small_llama(seed)
        for rows in many:
            ids = gpt.windows("held_out", max(rows // 256, 1), min(rows, 256), seed)
            found[f"llama, {rows} rows"] = _over(small, ids, windows(seed), compiled=compiled)
    return found


def windows(seed: int) -> list[Tensor]:
    """Text to calibrate with: 4096 rows."""
    return list(gpt.windows("validation", 16, 256, seed).split(8))


def small_llama(seed: int) -> nn.Module:
    """The trained Llama, compressed."""
    model = llama.load_pretrained()
    return tensorize.compile(model, BUDGET, calibration=windows(seed), refine=None)


def _over(model: nn.Module, x: Tensor, data: list[Tensor], *, compiled: bool) -> float:
    guarded: Any = tensorize.guard(copy.deepcopy(model), calibration=data)
    if compiled:
        torch._dynamo.reset()
        model, guarded = (torch.compile(each, dynamic=False) for each in (model, guarded))  # type: ignore[assignment]
    with torch.no_grad():
        times = interleaved({"plain": partial(model, x), "guarded": partial(guarded, x)})
    return times["guarded"].over(times["plain"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("flips", "alarms", "generate", "cost", "compiled"))
    parser.add_argument("--model", default="llama", choices=sorted(MODELS))
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--flips", type=int, default=20_000)
    parser.add_argument("--windows", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="of a cost")
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 16, 256, 2048))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype, seed = DTYPES[given.dtype], given.seed
    name = f"{given.model} {given.dtype}"
    if given.what == "flips":
        found = {name: flips(given.model, given.flips, dtype, seed)}
    elif given.what == "alarms":
        found = {name: alarms(given.model, given.windows, dtype, seed)}
    elif given.what == "generate":
        found = {"llama": generate(60.0, given.tokens, given.rounds, seed)}
    else:
        compiled = given.what == "compiled"
        found = {
            f"{part}, {given.threads} threads": cost(seed, part, given.rows, compiled=compiled)
            for part in given.parts
        }
    results = kept("faults")
    for cell, made in found.items():
        results.setdefault(given.what, {})[cell] = {"made_with": circumstances(), **made}
        print(given.what, cell, {k: v for k, v in made.items() if k != "missed"})
        for one in made.get("missed", ())[:10]:
            print("  missed", one)
    keep("faults", results)


if __name__ == "__main__":
    main()
