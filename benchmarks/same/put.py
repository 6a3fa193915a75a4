"""What came out of a run, put down by name: texts as they are, values as hashes, no times."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tensorize

FOUND: dict[str, str] = {}
"""What came out, by name."""

TOLD: dict[str, str] = {}
"""What is worth seeing side by side, and may differ."""

NUMBER = r"[\d.]+(?:e[+-]?\d+)?"
TIMES = (
    (rf"{NUMBER} µs a parameter", "… µs a parameter"),
    (rf"; {NUMBER} measured, {NUMBER} dense", "; … measured, … dense"),
    (r"; \d+ were kept by an earlier run", ""),
)
SAID_TIMES = (rf"{NUMBER} ?(?:ns|µs|ms|s|min)\b", rf"{NUMBER} [KMG]B")


def put(name: str, value: str) -> None:
    """Put a text down, without the names of the folders that it was made in."""
    if name in FOUND:
        raise ValueError(f"{name} is put down twice")
    scratch = re.escape(str(Path.cwd().parent))
    # The key of an analysis in a cache may change: it is then made again, to the same bits.
    value = re.sub(r"analysis-[0-9a-f]{32}", "analysis-KEY", value)
    value = re.sub(rf"{scratch}/[^/\s\"']+", "SCRATCH", value)
    FOUND[name] = value.replace(str(tree()), "TREE")


def tree() -> Path:
    """The tree whose tensorize this process runs."""
    return Path(tensorize.__file__).parent.parent


def bits(tensor: Tensor) -> str:
    """What a tensor is: dtype, shape, order in memory, and a hash of its bytes."""
    tensor = tensor.detach()
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    order = tensor.stride() if tensor.numel() else ()
    kind = f"{tensor.dtype} {tuple(tensor.shape)} {order}"
    return f"{kind} {hashlib.sha256(data).hexdigest()[:16]}"


def values(value: Any) -> str:
    """All that is in a state dict, an output or any other nesting, a line each."""
    lines = []
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        said = bits(leaf) if isinstance(leaf, Tensor) else repr(leaf)
        lines.append(f"{pytree.keystr(path)} {said}")
    return "\n".join(lines)


def without_times(value: Any) -> Any:
    """JSON data with what was measured on a clock blanked."""
    if isinstance(value, Mapping):
        blank = {"seconds": 0.0} if set(value) == {"name", "seconds", "summary"} else {}
        return {key: without_times(item) for key, item in value.items()} | blank
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    if isinstance(value, str):
        for pattern, blank in TIMES:
            value = re.sub(pattern, blank, value)
    return value


def said(text: str) -> str:
    """What was said on the way, in one line, without times and sizes of memory."""
    text = in_one_line(text)
    for pattern in SAID_TIMES:
        text = re.sub(pattern, "…", text)
    return text


def in_one_line(text: str) -> str:
    """A text however its lines are broken, without times."""
    return without_times(re.sub(r"\s+", " ", text))


def as_text(data: Any) -> str:
    return json.dumps(data, indent=1, sort_keys=False, ensure_ascii=False)


def put_report(name: str, report: tensorize.Report) -> None:
    """A report as data, as text and as a page."""
    data = without_times(report.to_dict())
    report = tensorize.Report.from_dict(data)
    put(f"{name}/report.json", as_text(data))
    put(f"{name}/report.txt", str(report))
    report.to_html("page.html")
    put(f"{name}/report.html", Path("page.html").read_text())


def put_files(name: str, directory: str | Path) -> None:
    """Every file of a folder."""
    for path in sorted(Path(directory).rglob("*")):
        if path.is_dir():
            continue
        put(f"{name}/{path.relative_to(directory)}", file_text(path))


def file_text(path: Path) -> str:
    if path.suffix == ".json":
        return as_text(without_times(json.loads(path.read_text())))
    content = path.read_bytes()
    return f"{len(content)} bytes {hashlib.sha256(content).hexdigest()}"


def put_outputs(name: str, model: nn.Module, inputs: Any, *, gradients: bool = True) -> None:
    """What a model gives, and the gradients of every parameter."""
    with torch.no_grad():
        put(f"{name}/outputs", values(run(model, inputs)))
    if not gradients:
        return
    model.zero_grad()
    outputs = [t for t in pytree.tree_leaves(run(model, inputs)) if is_float(t)]
    sum(t.float().square().sum() for t in outputs).backward()  # type: ignore[union-attr]
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    put(f"{name}/gradients", values([*grads.items()]))
    model.zero_grad()


def run(model: nn.Module, inputs: Any) -> Any:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return dict(output) if isinstance(output, Mapping) else getattr(output, "logits", output)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


def put_bits(name: str, model: nn.Module, inputs: Any, *, gradients: bool = True) -> None:
    """What a model holds and computes."""
    put(f"{name}/state", values([*model.state_dict().items()]))
    put_outputs(name, model, inputs, gradients=gradients)


def put_model(name: str, model: nn.Module, inputs: Any, *, gradients: bool = True) -> None:
    """All that can be had of a compressed model, but what takes long."""
    put(f"{name}/modules", str(model))
    put_bits(name, model, inputs, gradients=gradients)
    put_report(name, tensorize.report(model))
    put(f"{name}/plan.json", tensorize.report(model).plan.to_json())


def put_rest(name: str, model: nn.Module, inputs: Any, into: nn.Module | None = None) -> None:
    """Kernels, graphs, files and dense weights of a compressed model.

    ``into``: what its artefact is loaded into, where it is no model of transformers.
    """
    for kernel, source in tensorize.kernels(model, inputs).items():
        put(f"{name}/kernels/{kernel}", str(source))
    graphs = tensorize.graphs(model, inputs)
    put(f"{name}/graphs", graphs.print_readable())
    put(f"{name}/graphs.diff", graphs.diff())
    graphs.to_svg("graphs.svg")
    put(f"{name}/graphs.svg", Path("graphs.svg").read_text())
    place = Path("saved") / name
    tensorize.save(model, place)
    put_files(f"{name}/saved", place)
    put_outputs(f"{name}/loaded", tensorize.load(place, into), inputs)
    dense = tensorize.densify(model)
    put(f"{name}/densified", values([*dense.state_dict().items()]))
    put_outputs(f"{name}/densified", dense, inputs, gradients=False)
    again = pickle.loads(pickle.dumps(model))
    put_outputs(f"{name}/pickled", again, inputs, gradients=False)
