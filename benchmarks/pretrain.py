"""A GPT pre-trained dense and compressed, three seeds: losses at equal tokens and at equal FLOPs.

    python -m benchmarks.pretrain --out runs

Runs ``examples.pretrain_gpt``, whose options it takes, and keeps the validation losses. It goes on
from what is in ``--out``.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks.record import keep
from examples import pretrain_gpt


def main() -> None:
    given = sys.argv[1:]
    found = pretrain_gpt.main(["--seeds", "0", "1", "2", "--steps", "400", *given])
    dense = statistics.median(log[-1]["validation"] for log in found["dense"])
    result: dict[str, Any] = {"options": given}
    for name, logs in found.items():
        losses = [log[-1]["validation"] for log in logs]
        result[name] = {
            "steps": logs[0][-1]["step"],
            "TFLOP": logs[0][-1]["flops"] / 1e12,
            "validation": losses,
            "median over dense": statistics.median(losses) / dense - 1,
        }
        print(f"{name}: median {statistics.median(losses):.4f}, {losses}")
    print(f"kept in {keep('pretrain', result)}")


if __name__ == "__main__":
    main()
