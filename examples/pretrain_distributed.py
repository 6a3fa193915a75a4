"""Pre-trains a compressed Llama on the sources of the standard library, on one process or many.

    python -m examples.pretrain_distributed --out runs/llama
    torchrun --nproc-per-node 8 -m examples.pretrain_distributed --out runs/llama \\
        --pp 2 --dp 2 --tp 2

Killed at any moment and started again, it goes on from its last checkpoint, on any other mesh. The
six lines marked with "mesh" are all that differs from one machine. With stages (pp) there are
checkpoints alone: one process that is started after it goes on from the last and writes the model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import tensorize
from examples.stdlib_text import sources
from tensorize.distributed import schedule

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
    for name in ("pp", "dp", "tp"):
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


def alone(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What runs a batch forward and backward, and gives its loss."""

    def step(ids: Tensor) -> Tensor:
        loss = loss_fn(model(ids, use_cache=False).logits, ids)
        loss.backward()
        return loss.detach()

    return step


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
    run = alone(model) if asked.pp == 1 else schedule(model, loss_fn).step  # mesh
    checkpoints, first, saving = asked.out / "checkpoints", 0, None
    if any(checkpoints.glob("step-*/.metadata")):
        first = tensorize.distributed.load(model, optimizer, checkpoints)
    device, losses = next(model.parameters()).device, []
    for step in range(first, asked.steps):
        ids = batch_of(text, step, asked.batch, asked.context).to(device)
        losses.append(float(run(own(ids, mesh))))  # mesh
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % asked.every == 0 or step + 1 == asked.steps:
            saving = tensorize.distributed.save(model, optimizer, checkpoints, step=step + 1)
            print(f"step {step + 1}: loss {losses[-1]:.3f}", flush=True)
    if saving is not None:
        saving.wait()
    if asked.pp == 1:  # mesh
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
    sizes = {"pp": asked.pp} if asked.pp > 1 else {}
    sizes |= {"dp": asked.dp, "tp": asked.tp}
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def own(ids: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """This rank's part of a batch: those of pp and of tp share one."""
    return ids if mesh is None else ids.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]


if __name__ == "__main__":
    main()
