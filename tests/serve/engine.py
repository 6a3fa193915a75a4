"""vLLM in processes of their own: it is imported once, and every case is a fork."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def prepare() -> None:
    """Import vLLM with the settings of a small machine."""
    os.environ.update(SETTINGS)
    import vllm  # pyright: ignore[reportMissingImports]  # noqa: F401
    from vllm.plugins import load_general_plugins  # pyright: ignore[reportMissingImports]

    load_general_plugins()


def generated(
    directory: Path, prompts: list[list[int]], tokens: int, **options: Any
) -> dict[str, Any]:
    """Greedy ``tokens`` and their ``log_probabilities``, or the ``error`` that there was."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        child = os.fork()
        if child == 0:
            try:
                answer = _generate(directory, prompts, tokens, options)
            except BaseException as error:  # whatever it is, it is what the parent asks about
                traceback.print_exc()
                answer = {"error": _told(error)}
            file.write_text(json.dumps(answer))
            os._exit(0)
        os.waitpid(child, 0)
        return json.loads(file.read_text())


def _told(error: BaseException | None) -> str:
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(lines)


def _generate(
    directory: Path, prompts: list[list[int]], tokens: int, options: dict[str, Any]
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    usual = {
        "dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True,
        "skip_tokenizer_init": True, "seed": 0,
    }  # fmt: skip
    adapter = options.pop("adapter", None)
    engine = LLM(model=str(directory), **{**usual, **options})
    how = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True, detokenize=False
    )
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    lora = None if adapter is None else LoRARequest("adapter", 1, adapter)
    answers = engine.generate(given, how, use_tqdm=False, lora_request=lora)
    outputs = [request.outputs[0] for request in answers]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "log_probabilities": [
            [step[token].logprob for token, step in zip(o.token_ids, o.logprobs, strict=True)]
            for o in outputs
        ],
    }
