"""The model card of a saved folder: how to load it, how to serve it, what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorize.base.files import into_place
from tensorize.base.printer import bytes_, count, number, percent
from tensorize.reports.report import Report
from tensorize.version import __version__

CARD = "README.md"
_OURS = "<!-- written by tensorize.save, which writes it again -->"


_SERVE = """## Serve it

```
tensorize report {name} --serve vllm   # how each weight will be served
vllm serve {name}                      # no flag: vLLM finds tensorize by itself
```

"""


def write_card(directory: Path, report: Report, model: Mapping[str, Any], draft: Path) -> None:
    """Write the card of a Hugging Face model; one that somebody else wrote stays.

    ``model``: what the manifest says of it.
    """
    place = directory / CARD
    if place.exists() and _OURS not in place.read_text(encoding="utf-8", errors="replace"):
        return
    draft.write_text(card(report, model, directory.name), encoding="utf-8")
    into_place(draft, place)


def card(report: Report, model: Mapping[str, Any], name: str) -> str:
    """Its text, in Markdown."""
    kind = model["class"].rpartition(":")[2]
    forms = Counter(
        f"{site.format.replace('_', ' ')}{f' in {site.precision}' if site.precision else ''}"
        for site in report.sites
    )
    listed = ", ".join(f"{many} {form}" for form, many in forms.most_common())
    return f"""---
library_name: tensorize
tags: [tensorize, low-rank, compressed]
---
{_OURS}

# {name}

A {kind} whose weights tensorize {__version__} compressed. It is no checkpoint that transformers or
an engine can read by itself: tensorize has to be installed beside them.

## Load it

```python
import tensorize  # before from_pretrained
from transformers import {kind}

model = {kind}.from_pretrained("{name}")
```

Without the import transformers refuses the folder, and says why. `tensorize.load("{name}")` gives
the same model, with its report.

{_SERVE.format(name=name) if _writes_text(model) else ""}## What it costs

{_table(report)}

{_quality(report)}

Weights: {listed}. `tensorize report {name}` lists them one by one.
"""


def _table(report: Report) -> str:
    before, after, share = report.totals.before, report.totals.after, report.totals.share
    rows = [
        ("parameters", count(before.parameters), count(after.parameters), share.parameters),
        ("bytes", bytes_(before.bytes), bytes_(after.bytes), share.bytes),
        ("FLOPs of a row", count(before.flops), count(after.flops), share.flops),
    ]
    lines = [f"| {what} | {old} | {new} | {percent(part)} |" for what, old, new, part in rows]
    return "\n".join(["| | dense | compressed | share |", "|---|---|---|---|", *lines])


def _writes_text(model: Mapping[str, Any]) -> bool:
    known = model["generation_config"] is not None
    return known and not model["config"].get("is_encoder_decoder", False)


def _quality(report: Report) -> str:
    predicted, measured = report.plan.predicted, report.measured_loss
    if measured is not None:
        return f"Rise of the loss, measured on calibration data: {number(measured)}."
    if predicted.loss is not None:
        return f"Rise of the loss, predicted from calibration data: {number(predicted.loss)}."
    return (
        "How much worse its answers are was not measured: it was compressed without calibration "
        "data. `tensorize eval` compares it with the dense model."
    )
