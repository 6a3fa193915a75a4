"""Every architecture in transformers, small: compiled, and compared with its dense form.

    python -m benchmarks.zoo [NAMES…]

A model type is built small from its configuration (``zoo_configs``) and run on made-up inputs
(``zoo_inputs``). The compiled model has to keep at most half of the parameters and to equal
``tensorize.densify`` of itself to 2e-3. Types that cannot be built here, or do not run dense, are
listed with the reason and do not count. Every model is also compiled with all of its weights at
one low rank, which leaves no site out, and at half without any inputs given.

A worker process examines one model after the other; one that takes more than a minute, or takes
the process down, has failed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

import tensorize
from benchmarks import zoo_inputs
from benchmarks.record import keep
from benchmarks.zoo_configs import small_config
from tensorize.base.printer import table

os.environ.setdefault("HF_HUB_OFFLINE", "1")


BUDGET, TOLERANCE, RANK = 0.5, 2e-3, 4
LARGEST = 20_000_000  # parameters of what still counts as small
SECONDS = 60  # for one model
MEMORY = 14 << 30  # bytes of address space of the worker
RENEW = 100  # models until the worker is replaced, and what it kept is freed

# Which class of a type to take: those that hold most of the architecture first.
_HEADS = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
)


# Chains of exponentials, which are chaotic where weights are not small.
_DELICATE = ("vits",)


class NotBuildable(Exception):
    """The model cannot be built small here, or does not run dense; the message says why."""


@dataclass(frozen=True)
class Small:
    """A small model that runs, and inputs for it."""

    kind: str
    model: PreTrainedModel
    batch: dict[str, Any]


@dataclass
class Outcome:
    """What came of one architecture: ``status`` is ok, failed or not buildable."""

    kind: str
    status: str = "ok"
    reason: str = ""
    model: str = ""
    inputs: str = ""
    parameters: int = 0
    kept: float = 0.0
    difference: float = 0.0
    change: float = 0.0
    factorized: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    every_weight: str = ""
    without_inputs: str = ""


def types() -> list[str]:
    """The model types that transformers registers."""
    return list(CONFIG_MAPPING)


# ------------------------------------------------------------------------------ building a model


def build(kind: str) -> Small:
    """The small model of a type.

    Raises:
        NotBuildable: it says why.
    """
    failures: list[str] = []
    for keep_lists in (False, True):
        try:
            config = small_config(kind, keep_lists)
        except Exception as error:
            failures.append(f"no small configuration: {_short(error)}")
            continue
        for cls in _classes(kind, config):
            try:
                model = _construct(cls, config)
                batches = list(zoo_inputs.inputs(kind, model))
            except Exception as error:
                failures.append(f"{cls.__name__} cannot be built: {_short(error)}")
                continue
            if not batches:
                failures.append(f"{cls.__name__} takes {_taken(model)}")
            for batch in batches:
                found = _that_runs(model, batch, failures)
                if found is not None:
                    _normalize(model, found)
                    return Small(kind, model, found)
    raise NotBuildable("; ".join(dict.fromkeys(failures)) or "a part without a model of its own")


def _classes(kind: str, config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """Model classes of a type: the registered ones, then all with this configuration."""
    names: list[str] = []
    mappings = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS] + ["MODEL_MAPPING_NAMES"]
    mappings += [n for n in dir(modeling_auto) if n.endswith("_MAPPING_NAMES")]
    for mapping in dict.fromkeys(mappings):
        value = getattr(modeling_auto, mapping, {}).get(kind, ())
        names += [value] if isinstance(value, str) else list(value)
    found: list[Any] = []
    for name in names:
        try:
            found.append(getattr(transformers, name))
        except (AttributeError, ImportError):  # another library is missing
            continue
    module = type(config).__module__.replace("configuration_", "modeling_")
    try:
        members = list(vars(importlib.import_module(module)).values())
    except ImportError:
        members = []
    for value in reversed(members):
        own = isinstance(value, type) and issubclass(value, PreTrainedModel)
        if own and value.config_class is type(config) and not inspect.isabstract(value):
            found.append(value)
    for cls in dict.fromkeys(found):
        is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
        if is_model and not cls.__name__.endswith("PreTrainedModel"):
            yield cls


def _construct(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            _refuse_large(cls(config))
    except NotBuildable:
        raise
    except Exception:  # not every model can be built without values
        pass
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32).eval()
    _refuse_large(model)
    if config.model_type not in _DELICATE:
        _liven(model)
    return model


def _refuse_large(model: nn.Module) -> None:
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise NotBuildable(f"{size / 1e6:.0f} M parameters")


def _liven(model: nn.Module) -> None:
    """Raise what starts at zero or nearly so, as gates do: every weight then shows in the output.

    Weights of a fresh model are a fiftieth of what a matmul of this width would need to pass its
    input on; they are scaled up to that.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        values = parameter.data
        largest = float(values.abs().max())
        broken = not torch.isfinite(values).all() or largest > 1e4  # memory that nobody filled
        constant = bool((values == values.reshape(-1)[0]).all())
        if parameter.dim() < 2:
            if broken or (constant and largest < 0.01):
                values.uniform_(-0.5, 0.5)
            continue
        stacked = parameter.dim() == 3 and values.shape[0] <= 8  # experts
        inner = max(values.shape[1:]) if stacked else values.numel() // values.shape[0]
        wanted = inner**-0.5
        spread = 0.0 if broken or constant else float(values.std())
        if spread < 1e-12:
            values.normal_(0.0, wanted)
        elif spread < wanted:
            values.mul_(wanted / spread)


def _normalize(model: nn.Module, batch: dict[str, Any]) -> None:
    """Give batch norms the statistics of these inputs: without, a deep signal dies away."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        if norms:
            run(model, batch)
    except ValueError:  # a single value a channel has no variance
        pass
    finally:
        model.eval()


def _taken(model: nn.Module) -> str:
    if getattr(model.forward, "__name__", "") == "_forward_unimplemented":
        return "nothing: it has no forward"
    given = inspect.signature(model.forward).parameters.values()
    required = [p for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return ", ".join(p.name for p in required) or "no input that is known here"


def _that_runs(
    model: PreTrainedModel, batch: dict[str, Any], failures: list[str]
) -> dict[str, Any] | None:
    """The batch, mended if need be, where the model runs on it."""
    for _ in range(4):
        try:
            output = run(model, batch)
        except Exception as error:
            failures.append(f"{type(model).__name__}({', '.join(batch)}): {_short(error)}")
            mended = zoo_inputs.mended(batch, error, model.config)
            if mended is None:
                return None
            batch = mended
            continue
        if output and not any(torch.isnan(t).any() for t in output):
            return batch
        failures.append(f"{type(model).__name__}: no finite floating-point output")
        return None
    return None


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


# ------------------------------------------------------------------------------ looking at a model


def run(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """All floating-point tensors of the output; what is drawn at random is the same each time."""
    torch.manual_seed(7)
    with torch.no_grad():
        return list(_tensors(model(**batch)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """‖got − want‖ / ‖want‖ over all tensors; what is not finite must be so at the same places."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    error = size = 0.0
    for a, b in zip(got, want, strict=True):
        finite = torch.isfinite(b)
        if not torch.equal(a[~finite], b[~finite]):
            return float("inf")
        a, b = a[finite].double(), b[finite].double()
        error += float((a - b).square().sum())
        size += float(b.square().sum())
    return (error / size) ** 0.5 if size else (0.0 if error == 0 else float("inf"))


def examine(kind: str) -> Outcome:
    """Build the small model of a type, compile it, and compare it with its dense form."""
    result = Outcome(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            small = build(kind)
        except NotBuildable as error:
            result.status, result.reason = "not buildable", str(error)
            return result
        result.model, result.inputs = type(small.model).__name__, ", ".join(small.batch)
        result.parameters = _size(small.model)
        start = time.perf_counter()
        _compile_and_compare(small, {"example_inputs": small.batch}, result)
        result.seconds = time.perf_counter() - start
        every, alone = Outcome(kind), Outcome(kind)
        options = {"example_inputs": small.batch, "budget": None, "ranks": {"*": RANK}}
        _compile_and_compare(small, options, every)
        _compile_and_compare(small, {}, alone)
        result.every_weight = every.reason or every.status
        result.without_inputs = alone.reason or alone.status
    return result


def _compile_and_compare(small: Small, options: dict[str, Any], result: Outcome) -> None:
    """Fills in ``result``; whatever goes wrong is in it."""
    options = {"budget": BUDGET, **options}
    try:
        compiled = tensorize.compile(small.model, progress=False, **options)
        report = tensorize.report(compiled)
        got, want = (run(m, small.batch) for m in (compiled, tensorize.densify(compiled)))
        before = run(small.model, small.batch)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        text = " ".join(str(error).split())[:300]
        result.status, result.reason = "failed", f"{type(error).__name__}: {text} ({place})"
        return
    result.kept = _size(compiled) / _size(small.model)
    result.difference = difference(got, want)
    result.change = difference(got, before)
    for site in report.sites:
        if site.format == "dense":
            result.dense[site.reason] = result.dense.get(site.reason, 0) + 1
        else:
            result.factorized += 1
    if options["budget"] is not None and result.kept > options["budget"]:
        result.status, result.reason = "failed", f"keeps {result.kept:.3f} of the parameters"
    elif not result.difference <= TOLERANCE:
        result.status, result.reason = "failed", f"differs by {result.difference:.1e}"
    elif "" in result.dense:
        result.status, result.reason = "failed", "a weight stayed dense without a reason"


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------ running all of them


def _work(pipe: Connection) -> None:
    """A worker: names in, outcomes out."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    while True:
        pipe.send(examine(pipe.recv()))
        gc.collect()


class _Worker:
    """A process that examines models, and that can be given up."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.done = 0

    def examine(self, kind: str) -> Outcome:
        self.done += 1
        try:
            self._pipe.send(kind)
            if self._pipe.poll(SECONDS + 30 * (self.done == 1)):  # the first waits for imports
                return self._pipe.recv()
            reason = f"took more than {SECONDS} s"
        except (EOFError, OSError):
            reason = "the process died"
        self.done = RENEW
        return Outcome(kind, "failed", reason)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def examine_all(kinds: Sequence[str]) -> list[Outcome]:
    """Every type, with a line as each is done."""
    outcomes: list[Outcome] = []
    worker = _Worker()
    try:
        for number, kind in enumerate(kinds, 1):
            if worker.done >= RENEW:
                worker.stop()
                worker = _Worker()
            outcomes.append(outcome := worker.examine(kind))
            print(f"{number}/{len(kinds)} {kind}: {outcome.status}", flush=True)
    finally:
        worker.stop()
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures: the share, what failed and what cannot be built, and what stayed dense."""
    built = [o for o in outcomes if o.status != "not buildable"]
    good = [o for o in built if o.status == "ok"]
    dense: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for outcome in good:
        for reason, count in outcome.dense.items():
            dense[reason][0] += count
            dense[reason][1] += 1
    return {
        "registered": len(outcomes),
        "buildable": len(built),
        "compiled": len(good),
        "share": len(good) / max(len(built), 1),
        "largest_difference": max((o.difference for o in good), default=0.0),
        "unchanged": [o.kind for o in good if o.change < 1e-6],
        "seconds_a_model": sum(o.seconds for o in built) / max(len(built), 1),
        "every_weight_at_one_rank": sum(o.every_weight == "ok" for o in built),
        "without_inputs": sum(o.without_inputs == "ok" for o in built),
        "failed": {o.kind: o.reason for o in built if o.status == "failed"},
        "failed_with_every_weight": {
            o.kind: o.every_weight for o in built if o.every_weight not in ("", "ok")
        },
        "failed_without_inputs": {
            o.kind: o.without_inputs for o in built if o.without_inputs not in ("", "ok")
        },
        "kept_dense": {
            reason: f"{sites} weights of {models} models"
            for reason, (sites, models) in sorted(dense.items(), key=lambda item: -item[1][1])
        },
        "not_buildable": {o.kind: o.reason[:200] for o in outcomes if o.status == "not buildable"},
    }


_COLUMNS = (
    "type",
    "model",
    "inputs",
    "parameters",
    "kept",
    "difference",
    "factorized",
    "dense",
    "s",
)


def _row(outcome: Outcome) -> list[str]:
    return [
        outcome.kind,
        outcome.model,
        outcome.inputs,
        str(outcome.parameters),
        f"{outcome.kept:.3f}",
        f"{outcome.difference:.0e}",
        str(outcome.factorized),
        str(sum(outcome.dense.values())),
        f"{outcome.seconds:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="model types; all that are registered by default")
    names = parser.parse_args().names
    transformers.utils.logging.set_verbosity_error()
    outcomes = examine_all(names or types())
    figures = summary(outcomes)
    good = [o for o in outcomes if o.status == "ok"]
    print(table(_COLUMNS, [_row(o) for o in good]))
    for title in ("not_buildable", "kept_dense", "failed_with_every_weight", "failed"):
        if figures[title]:
            print(f"\n{title.replace('_', ' ')} ({len(figures[title])})")
            print(table(("type", "reason"), [list(item) for item in figures[title].items()]))
    print(
        f"\n{figures['compiled']} of {figures['buildable']} models that can be built: "
        f"{100 * figures['share']:.1f} % ({figures['registered']} types are registered); "
        f"{figures['seconds_a_model']:.2f} s a model; largest difference "
        f"{figures['largest_difference']:.0e}\n"
        f"with every weight at rank {RANK}: {figures['every_weight_at_one_rank']}; "
        f"without inputs: {figures['without_inputs']}"
    )
    if not names:
        models = [" | ".join(_row(o)) for o in good]
        path = keep("zoo", {**figures, "columns": " | ".join(_COLUMNS), "models": models})
        print(f"kept in {path}")


if __name__ == "__main__":
    main()
