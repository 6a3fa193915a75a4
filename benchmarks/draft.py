"""Compressed models that write drafts for the dense one: what is accepted, and how fast text comes.

    python -m benchmarks.draft --threads 1

Text that the models were not trained on. For each share of the parameters: the KL in nats a token,
predicted and measured; the acceptance that follows from it, 1 - √(KL / π), and that of greedy
tokens; then real generation with transformers' ``assistant_model=``, whose text is compared with
plain decoding: tokens that one call of the dense model gave, and tokens a second beside plain
decoding, interleaved, in seconds of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import tensorize
from benchmarks.record import keep
from examples import gpt, llama, stdlib_text
from tensorize.api.draft import MOST_TOKENS, acceptance, best_speculation

BUDGETS = (0.25, 0.5, 0.7, 0.9)
WINDOW, PROMPT, WRITTEN = 256, 96, 64


def windows(kind: str, documents: int, most: int) -> Tensor:
    tokenizer = gpt.load_tokenizer()
    texts = [each.text for each in stdlib_text.documents(kind)[:documents]]
    return gpt.encode(tokenizer, texts).unfold(0, WINDOW, WINDOW)[:most]


@torch.inference_mode()
def compared(dense: Any, small: Any, ids: Tensor) -> tuple[float, float]:
    """KL in nats, and how often the likeliest token is the same."""
    p, q = (model(ids).logits.log_softmax(-1) for model in (dense, small))
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    return float((p.exp() * (p - q)).sum(-1).mean()), float(same)


@torch.inference_mode()
def written(dense: Any, prompts: Tensor, **options: Any) -> tuple[list[list[int]], float, int]:
    """Greedy text after each prompt, seconds of the processor, and calls of the dense model."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = dense.register_forward_pre_hook(count)
    how = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    start, texts = time.process_time(), []
    for prompt in prompts:
        ids = prompt[None]
        mask = torch.ones_like(ids)
        made = dense.generate(
            ids, attention_mask=mask, use_cache=True, pad_token_id=0, **how, **options
        )
        texts.append(made[0, PROMPT:].tolist())
    hook.remove()
    return texts, time.process_time() - start, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = llama.load_pretrained()
    batches = [{"input_ids": part} for part in windows("train", 32, 96).split(8)]
    analysis = tensorize.analyze(model, calibration=batches, progress=False)
    held_out = windows("held_out", 1000, 16)
    prompts = held_out[: options.prompts, :PROMPT]
    rows = tuple(range(1, MOST_TOKENS + 2))
    results = []
    for budget in BUDGETS:
        plan = analysis.plan(budget, batch_sizes=rows)
        small: Any = tensorize.apply(model, plan)
        kl, same = compared(model, small, held_out)
        # The best length by times of matmuls alone, as in a model in which they are all the time.
        best = best_speculation(kl, plan.predicted.latency[0], plan.dense.latency)
        small.generation_config.num_assistant_tokens = best.tokens
        small.generation_config.num_assistant_tokens_schedule = "constant"
        ratios = []
        for _ in range(options.rounds):
            plain, alone, _ = written(model, prompts)
            drafted, beside, calls = written(model, prompts, assistant_model=small)
            assert drafted == plain, "the text is another"
            ratios.append(alone / beside)
        found = {
            "budget": budget,
            "predicted_kl": plan.predicted.loss,
            "kl": kl,
            "acceptance_of_the_kl": acceptance(kl),
            "acceptance": same,
            "tokens_of_a_draft": best.tokens,
            "tokens_a_dense_call": len(prompts) * WRITTEN / calls,
            "times_as_fast": statistics.median(ratios),
        }
        results.append(found)
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
    print(keep("draft", results))


if __name__ == "__main__":
    main()
