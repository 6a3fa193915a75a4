"""Shows that two trees do the same: what users see of a commit and of this working tree, compared.

    python -m benchmarks.same BASE [--quick] [--only PART ...]

``probe`` runs in both, in fresh processes side by side, with the same interpreter, one
thread, and machine figures that were never measured. What comes out is compared bit for bit:
weights, outputs, gradients, plans, reports, kernels, graphs, files, texts. What BASE writes is read
by both. The time of ``import tensorize`` is measured in turns. The exit status is 1 where anything
differs. Nothing is kept: bits differ between processors, so both trees are run here and now.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
QUICK = ("interface", "kinds", "trains", "compiled", "command", "write", "read")
SLOW = ("others", "gpt", "llama", "minilm", "inductor", "interpreted", "import")
BEFORE, SHOWN, SHOWN_NAMES = 60, 160, 12
"""Of a difference: characters in front of it, characters in all, and how many are shown."""
IMPORTS, SLOWER = 15, 1.05
"""How often ``import tensorize`` is timed in each tree, and what the ratio may be."""
IMPORT = """
import time
begin = time.process_time()
import torch
middle = time.process_time()
import tensorize
print(middle - begin, time.process_time() - middle)
"""


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The tree of a commit, in a folder of its own for the time of a block."""
    git = ("git", "-C", str(ROOT), "worktree")
    with tempfile.TemporaryDirectory(prefix="same-base-") as folder:
        place = Path(folder).resolve() / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", place, commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", place], check=True)


def environment(tree: Path, scratch: Path) -> dict[str, str]:
    """Of a run of a tree: the same for both but for the folders, of which each has its own."""
    (scratch / "home").mkdir(parents=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TENSORIZE")}
    return kept | {
        "PYTHONPATH": f"{tree}{os.pathsep}{scratch.parent / 'parts'}",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": str(scratch / "home"),
        "TENSORIZE_CACHE_DIR": str(scratch / "machine"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "NO_COLOR": "1",
        "COLUMNS": "100",
    }


def probe(
    part: str, trees: Sequence[Path], scratch: Path
) -> list[dict[str, dict[str, str]]] | None:
    """What a part gave in both trees, which run at the same time; None where one failed."""
    old = scratch / "write-0"
    places = [scratch / f"{part}-{k}" for k in range(len(trees))]
    runs = []
    for tree, place in zip(trees, places, strict=True):
        place.mkdir()
        own = environment(tree, scratch / f"{place.name}-own")
        if part == "interpreted":
            own["TRITON_INTERPRET"] = "1"
        # -P: the working directory is not looked into for modules.
        command = [sys.executable, "-P", "-m", "same.probe", part, place / "found.json", old]
        with open(place.with_suffix(".log"), "w") as log:
            runs.append(subprocess.Popen(command, cwd=place, env=own, stdout=log, stderr=log))
    failed = [place for run, place in zip(runs, places, strict=True) if run.wait()]
    for place in failed:
        tree = trees[places.index(place)]
        said = place.with_suffix(".log").read_text()
        print(f"{part}: failed in {tree}\n{said[-3000:]}", flush=True)
    return None if failed else [json.loads((p / "found.json").read_text()) for p in places]


def differences(part: str, base: dict[str, str], new: dict[str, str]) -> list[str]:
    """The names of what differs; of the first few it is shown how."""
    names = [name for name in {**base, **new} if base.get(name) != new.get(name)]
    for name in names[:SHOWN_NAMES]:
        print(f"{part}: {name} differs")
        if name not in base or name not in new:
            print(f"    only in {'BASE' if name in base else 'this tree'}")
            continue
        pairs = zip(base[name], new[name], strict=False)
        same = next((k for k, (a, b) in enumerate(pairs) if a != b), len(base[name]))
        start = max(same - BEFORE, 0)
        for whose, text in (("BASE", base[name]), ("this tree", new[name])):
            print(f"    {whose}: …{text[start : start + SHOWN]!r}…")
    if len(names) > SHOWN_NAMES:
        print(
            f"{part}: and {len(names) - SHOWN_NAMES} more: {' '.join(names[SHOWN_NAMES:])[:2000]}"
        )
    return names


def compare(part: str, trees: Sequence[Path], scratch: Path) -> bool:
    """Run a part in both trees; whether all is the same."""
    start = time.perf_counter()
    found = probe(part, trees, scratch)
    took = f"{time.perf_counter() - start:.0f} s"
    if found is None:
        return False
    base, new = found
    different = differences(part, base["same"], new["same"])
    for name, text in base["told"].items():
        print(f"{part}: {name}: BASE: {text}; this tree: {new['told'].get(name)}")
    state = f"{len(different)} differ" if different else "the same"
    print(f"{part}: {len(base['same'])} compared, {state}, {took}", flush=True)
    return not different


def compare_imports(trees: Sequence[Path], scratch: Path) -> bool:
    """Processor time of ``import tensorize`` after torch, in turns; whether it is as fast."""
    own = [environment(tree, scratch / f"import-{k}-own") for k, tree in enumerate(trees)]
    samples: list[list[tuple[float, float]]] = [[], []]
    for turn in range(IMPORTS + 1):
        for k in (0, 1) if turn % 2 else (1, 0):
            done = subprocess.run(
                [sys.executable, "-P", "-c", IMPORT],
                cwd=scratch, env=own[k], check=True, capture_output=True, text=True,
            )  # fmt: skip
            if turn:  # the first one compiles the sources
                torch, ours = map(float, done.stdout.split())
                samples[k].append((torch, ours))
    medians = [[statistics.median(each) for each in zip(*of, strict=True)] for of in samples]
    for name, (torch, ours) in zip(("BASE", "this tree"), medians, strict=True):
        print(f"import: {name}: torch {torch:.3f} s, then tensorize {ours:.3f} s")
    ratio = medians[1][1] / medians[0][1]
    whole = sum(medians[1]) / sum(medians[0])
    print(f"import: {ratio:.3f} of the time of BASE, with torch {whole:.3f}; at most {SLOWER}")
    return ratio <= SLOWER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="a commit")
    parser.add_argument("--quick", action="store_true", help="without what takes long")
    parser.add_argument("--only", nargs="+", choices=(*QUICK, *SLOW), metavar="PART",
                        help=f"of {', '.join((*QUICK, *SLOW))}")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="a folder for what came out, to look at")
    options = parser.parse_args()
    asked = options.only or (QUICK if options.quick else (*QUICK, *SLOW))
    parts = [
        part for part in (*QUICK, *SLOW) if part in asked or (part == "write" and "read" in asked)
    ]
    start, failed = time.perf_counter(), []
    with worktree(options.base) as base, tempfile.TemporaryDirectory(prefix="same-") as folder:
        trees, scratch = (base, ROOT), Path(folder).resolve()
        shutil.copytree(HERE, scratch / "parts" / "same")
        for part in parts:
            alike = compare_imports if part == "import" else partial(compare, part)
            if not alike(trees, scratch):
                failed.append(part)
        if options.keep is not None:
            for path in scratch.glob("*/found.json"):
                options.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, options.keep / f"{path.parent.name}.json")
    took = f"{time.perf_counter() - start:.0f} s"
    print(f"different: {', '.join(failed)}; {took}" if failed else f"nothing differs; {took}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
