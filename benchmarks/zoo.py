"""Every architecture in transformers, small: compiled, and compared with its dense form.

    python -m benchmarks.zoo [NAMES…]
"""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import tensorize
from benchmarks import zoo_inputs
from benchmarks.zoo_configs import small_config

BUDGET, TOLERANCE = 0.5, 2e-3
LARGEST = 20_000_000

_HEADS = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CTC",
    "MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION",
)


class NotBuildable(Exception):
    """The model cannot be built small, or does not run dense."""


def classes(kind: str, config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """Model classes of a type, heads first, the base class last."""
    names: list[str] = []
    mappings = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS] + ["MODEL_MAPPING_NAMES"]
    mappings += [n for n in dir(modeling_auto) if n.endswith("_MAPPING_NAMES") and n not in mappings]
    for mapping in mappings:
        value = getattr(modeling_auto, mapping, {}).get(kind, ())
        names += [value] if isinstance(value, str) else list(value)
    seen: list[type] = []
    for name in names:
        try:
            found = getattr(transformers, name)
            if isinstance(found, type) and issubclass(found, PreTrainedModel):
                seen.append(found)
        except (AttributeError, ImportError):
            pass
    module = type(config).__module__.replace("configuration_", "modeling_")
    try:
        members = vars(importlib.import_module(module))
    except ImportError:
        members = {}
    for value in reversed(list(members.values())):
        own = isinstance(value, type) and issubclass(value, PreTrainedModel)
        if own and value.config_class is type(config) and not inspect.isabstract(value):
            seen.append(value)
    yield from dict.fromkeys(c for c in seen if not c.__name__.endswith("PreTrainedModel"))


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors of an output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return []


def run(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    torch.manual_seed(7)
    with torch.no_grad():
        return tensors(model(**batch))


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """‖got − want‖ / ‖want‖ over all tensors; infinities must be at the same places."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    error = size = 0.0
    for a, b in zip(got, want, strict=True):
        finite = torch.isfinite(b)
        if not torch.equal(a[~finite], b[~finite]):
            return float("inf")
        error += float((a[finite].double() - b[finite].double()).square().sum())
        size += float(b[finite].double().square().sum())
    return (error / size) ** 0.5 if size else (0.0 if error == 0 else float("inf"))


@dataclass(frozen=True)
class Small:
    """A small model that runs, and inputs for it."""

    kind: str
    model: PreTrainedModel
    batch: dict[str, Any]


def build(kind: str, debug: bool = False) -> Small:
    """The small model of a type.

    Raises:
        NotBuildable: it says why.
    """
    failures: list[str] = []
    for keep_lists in (False, True):
        try:
            config = small_config(kind, keep_lists)
        except Exception as error:
            if debug:
                traceback.print_exc()
            failures.append(f"no small configuration: {_short(error)}")
            continue
        for cls in classes(kind, config):
            try:
                model = _construct(cls, config)
            except Exception as error:
                if debug:
                    traceback.print_exc()
                failures.append(f"{cls.__name__} cannot be built: {_short(error)}")
                continue
            try:
                batches = list(zoo_inputs.inputs(kind, model))
            except Exception as error:
                failures.append(f"inputs of {cls.__name__}: {_short(error)}")
                continue
            if not batches:
                failures.append(f"{cls.__name__} takes {_taken(model)}")
            for batch in batches:
                found = _that_runs(model, batch, failures, debug)
                if found is not None:
                    return Small(kind, model, found)
    raise NotBuildable("; ".join(dict.fromkeys(failures)) or "no model class has this configuration")


def _taken(model: nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return ", ".join(names) or "nothing known here"


def _that_runs(
    model: PreTrainedModel, batch: dict[str, Any], failures: list[str], debug: bool
) -> dict[str, Any] | None:
    """The batch, mended if need be, where the model runs on it."""
    for _ in range(4):
        try:
            output = run(model, batch)
        except Exception as error:
            if debug:
                traceback.print_exc()
            failures.append(f"{type(model).__name__}({', '.join(batch)}) {_short(error)}")
            again = zoo_inputs.repaired(batch, error, model.config)
            if again is None:
                return None
            batch = again
            continue
        if output and not any(torch.isnan(t).any() for t in output):
            return batch
        failures.append(f"{type(model).__name__}: no finite floating-point output")
        return None
    return None


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def _construct(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
    except Exception:
        size = 0
    if size > LARGEST:
        raise NotBuildable(f"{size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32).eval()
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise NotBuildable(f"{size / 1e6:.0f} M parameters")
    _liven(model)
    return model


def _liven(model: nn.Module) -> None:
    """Raise what starts as zero or nearly so, such as gates: every weight then shows in the output."""
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        values = parameter.data
        broken = not torch.isfinite(values).all() or values.abs().max() > 1e4
        constant = values.numel() > 1 and bool((values == values.reshape(-1)[0]).all())
        if parameter.dim() < 2:
            if broken or (values.abs().max() < 0.01 and (constant or values.numel() == 1)):
                values.uniform_(-0.5, 0.5)
            continue
        wanted = (values.shape[0] / values.numel()) ** 0.5
        spread = 0.0 if broken or constant else float(values.std())
        if spread < 1e-12:
            values.normal_(0.0, wanted)
        elif spread < wanted:
            values.mul_(wanted / spread)


@dataclass
class Outcome:
    """What came of one architecture."""

    kind: str
    status: str = "ok"
    reason: str = ""
    cls: str = ""
    inputs: str = ""
    parameters: int = 0
    kept: float = 0.0
    difference: float = 0.0
    factorized: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    without_inputs: str = ""
    every: str = ""
    every_dense: dict[str, int] = field(default_factory=dict)


def examine(kind: str, debug: bool = False, without: bool = True) -> Outcome:
    result = Outcome(kind)
    start = time.perf_counter()
    try:
        small = build(kind, debug)
    except NotBuildable as error:
        result.status, result.reason = "not buildable", str(error)
        return result
    model, batch = small.model, small.batch
    result.cls, result.inputs = type(model).__name__, ", ".join(batch)
    result.parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    try:
        _compare(model, batch, {"example_inputs": batch}, result)
    except Exception as error:
        if debug:
            traceback.print_exc()
        result.status, result.reason = "failed", _where(error)
    result.seconds = time.perf_counter() - start
    if True:
        other = Outcome(kind)
        try:
            _compare(model, batch, {"example_inputs": batch, "ranks": {"*": 4}}, other, None)
        except Exception as error:
            if debug:
                traceback.print_exc()
            other.status, other.reason = "failed", _where(error)
        result.every = other.status if other.status == "ok" else other.reason
        result.every_dense = other.dense
    if without:
        other = Outcome(kind)
        try:
            _compare(model, batch, {}, other)
        except Exception as error:
            other.status, other.reason = "failed", _where(error)
        result.without_inputs = other.status if other.status == "ok" else other.reason
    return result


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} [{os.path.basename(frame.filename)}:{frame.lineno}]"


def _compare(model: nn.Module, batch: dict, given: dict, result: Outcome, budget=BUDGET) -> None:
    compiled = tensorize.compile(model, budget=budget, progress=False, **given)
    report = tensorize.report(compiled)
    total = sum(p.numel() for p in compiled.parameters())
    result.kept = total / max(sum(p.numel() for p in model.parameters()), 1)
    for site in report.sites:
        if site.format == "dense":
            reason = site.reason or "NO REASON"
            result.dense[reason] = result.dense.get(reason, 0) + 1
        else:
            result.factorized += 1
    got = run(compiled, batch)
    want = run(tensorize.densify(compiled), batch)
    result.difference = difference(got, want)
    if budget is not None and result.kept > BUDGET:
        result.status, result.reason = "failed", f"keeps {result.kept:.3f}"
    elif not result.difference <= TOLERANCE:
        result.status, result.reason = "failed", f"differs by {result.difference:.1e}"


if __name__ == "__main__":
    import sys, json, resource

    resource.setrlimit(resource.RLIMIT_AS, (14 << 30, 14 << 30))
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    debug = "-d" in sys.argv
    names = [a for a in sys.argv[1:] if a != "-d"] or list(CONFIG_MAPPING_NAMES)
    for kind in names:
        t = time.perf_counter()
        r = examine(kind, debug, without=False)
        t = time.perf_counter() - t
        print(json.dumps({**asdict(r), "wall": round(t, 2)}), flush=True)
        gc.collect()
