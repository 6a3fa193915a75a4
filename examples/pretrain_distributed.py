"""Pre-trains a compressed Llama on the sources of the standard library, on one process or many.

    python -m examples.pretrain_distributed --out runs/llama
    torchrun --nproc-per-node 4 -m examples.pretrain_distributed --out runs/llama --dp 2 --tp 2

Killed at any moment and started again, it goes on from its last checkpoint, on any other mesh. The
lines marked with "mesh" are all that one machine does not need.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import tensorize
from examples.stdlib_text import sources

SIZES = {
    **{"vocab_size": 256, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0},
    **{"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4},
}


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="of checkpoints and the result")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the parameters")
    for name, default in (("steps", 200), ("batch", 16), ("context", 128), ("every", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("dp", "tp"):
        parser.add_argument(f"--{name}", type=int, default=1, help="ranks of this dimension")
    for name, value in SIZES.items():
        if type(value) is int:
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args(given)


def batch_of(text: Tensor, step: int, count: int, length: int) -> Tensor:
    """The windows of a step, the same on every mesh."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts]).long()


def loss_fn(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def main(given: Sequence[str] | None = None) -> list[float]:
    asked = arguments(given)
    text = torch.frombuffer(bytearray(sources("train").encode()), dtype=torch.uint8)
    config = LlamaConfig(**{name: getattr(asked, name, value) for name, value in SIZES.items()})
    with torch.device("meta"):
        model = tensorize.initialize(LlamaForCausalLM(config), asked.budget, device="meta")
    mesh = mesh_of(asked)  # mesh
    if mesh is not None:  # mesh
        model = tensorize.distributed.parallelize(model, mesh)  # mesh
    tensorize.training.fill(model).train()
    optimizer = torch.optim.AdamW(tensorize.training.parameter_groups(model, lr=1e-3))
    tensorize.training.checkpoint_low_rank(model)
    checkpoints, first, saving = asked.out / "checkpoints", 0, None
    if any(checkpoints.glob("step-*/.metadata")):
        first = tensorize.distributed.load(model, optimizer, checkpoints)
    device, losses = next(model.parameters()).device, []
    for step in range(first, asked.steps):
        ids = batch_of(text, step, asked.batch, asked.context).to(device)
        if mesh is not None:  # mesh
            ids = ids.chunk(asked.dp)[mesh["dp"].get_local_rank()]  # mesh
        loss = loss_fn(model(ids, use_cache=False).logits, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % asked.every == 0 or step + 1 == asked.steps:
            saving = tensorize.distributed.save(model, optimizer, checkpoints, step=step + 1)
            print(f"step {step + 1}: loss {losses[-1]:.3f}", flush=True)
    if saving is not None:
        saving.wait()
    tensorize.save(model, asked.out / "model")
    return losses


def mesh_of(asked: argparse.Namespace) -> DeviceMesh | None:
    """The mesh that torchrun's processes make; None where it did not start this one."""
    if "RANK" not in os.environ:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, (asked.dp, asked.tp), mesh_dim_names=("dp", "tp"))


if __name__ == "__main__":
    main()
