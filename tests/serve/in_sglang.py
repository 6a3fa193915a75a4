"""SGLang in a process of its own: `python -m tests.serve.in_sglang FOLDER` prints what it says."""

from __future__ import annotations

import json
import sys

from tests.serve import models


def main(directory: str) -> None:
    import sglang  # pyright: ignore[reportMissingImports]

    engine = sglang.Engine(
        model_path=directory,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        dtype="float32",
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        max_total_tokens=2048,
        mem_fraction_static=0.3,
        log_level="info",
    )
    how = {"temperature": 0, "max_new_tokens": models.TOKENS, "ignore_eos": True}
    answers = engine.generate(input_ids=models.prompts(), sampling_params=how, return_logprob=True)
    of_tokens = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    found = {
        "tokens": [answer["output_ids"] for answer in answers],
        "log_probabilities": [[value for value, *_ in each] for each in of_tokens],
    }
    print(f"\n{json.dumps(found)}", flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
