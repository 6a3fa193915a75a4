"""What the documentation makes of the code itself: the list of names, and the command line's help.

A hook of mkdocs. It reads the tables in the sources, so nothing of the library is imported.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES, COMMANDS = "<!-- names -->", "<!-- commands -->"

GROUPS = {
    "Compress": (
        "compile", "analyze", "Analysis", "apply", "compile_checkpoint", "separate", "Budget",
    ),
    "Look": (
        "report", "Report", "Plan", "Prediction", "Site", "graphs", "kernels", "Kernel", "densify",
        "evaluate", "Evaluation",
    ),
    "Keep": ("save", "load", "restructure", "load_dense"),
    "Train": ("initialize", "heal", "Healing", "distillation_loss"),
    "Run": ("draft", "TTSpec", "plan_contraction", "ContractionPlan", "tune_kernels"),
    "Guard": ("guard", "guarded", "scrub", "guard_report", "inject"),
    "Errors": (
        "TensorizeError", "BudgetError", "CaptureError", "AnalysisError", "CheckpointError",
        "FaultError",
    ),
}  # fmt: skip
"""The public names, as the reference has them."""


def _assigned(path: Path, name: str) -> ast.expr:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise LookupError(f"{path} has no {name}")


def homes() -> dict[str, str]:
    """Every public name, and the module that holds it."""
    held = ast.literal_eval(_assigned(ROOT / "tensorize/__init__.py", "_HELD"))
    return {name: f"tensorize.{home}" for home, names in held.items() for name in names.split()}


def commands() -> list[tuple[str, str, str]]:
    """Every command with its help and its example."""
    table = _assigned(ROOT / "tensorize/cli/__init__.py", "COMMANDS")
    calls = [
        node
        for node in ast.walk(table)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Command"
    ]
    found = []
    for call in calls:
        name, _, help, example = map(ast.literal_eval, call.args)
        found.append((name, help, example))
    return found


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the lists where a page asks for them."""
    where = homes()
    listed = [
        f"## {title}\n" + "\n".join(f"\n::: {where[name]}.{name}" for name in names)
        for title, names in GROUPS.items()
    ]
    told = [
        f"## tensorize {name}\n\n{help}\n\n```console\n{example}\n```"
        for name, help, example in commands()
    ]
    markdown = markdown.replace(NAMES, "\n\n".join(listed))
    return markdown.replace(COMMANDS, "\n\n".join(told))
