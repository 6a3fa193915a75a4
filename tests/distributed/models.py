"""Small language models, compressed in the ways that are split differently over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import tensorize
from tensorize.api.forms import in_parts
from tensorize.weight.install import factored
from tests.models import relative

WORDS, WIDTH, INNER, HEADS, RANK, LAYERS = 128, 64, 96, 8, 16, 2


EMBEDDING, ENDS = "*embed*", ("*embed*", "lm_head*")


def _jittered(model: nn.Module) -> nn.Module:
    """Gains and biases that are no ones and zeros."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def llama_of(kind: str = "Llama", **sizes: Any) -> Any:
    usual: dict[str, Any] = {
        **{"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 4},
    }
    config = getattr(hf, f"{kind}Config")(**{**usual, **sizes})
    return getattr(hf, f"{kind}ForCausalLM")(config)


def llama(kind: str = "Llama", *, keys: int = 4, tied: bool = False, layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": keys, "num_hidden_layers": layers, "head_dim": WIDTH // HEADS}
    return _jittered(llama_of(kind, **sizes, tie_word_embeddings=tied))


def gpt2_of(**sizes: Any) -> Any:
    usual: dict[str, Any] = {
        **{"vocab_size": WORDS, "n_positions": 32, "n_embd": WIDTH, "n_layer": LAYERS},
        **{"n_head": HEADS, "bos_token_id": 0, "eos_token_id": 0},
    }
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**usual, **sizes}))


def gpt2(*, tied: bool = True) -> Any:
    torch.manual_seed(0)
    return _jittered(gpt2_of(tie_word_embeddings=tied))


def low_rank(model: nn.Module, *dense: str, rank: int = RANK, **options: Any) -> nn.Module:
    """All weights of one rank, but the dense ones."""
    return tensorize.initialize(
        model, ranks={"*": rank}, budget=None, exclude=list(dense) or None, **options
    )


def shared() -> nn.Module:
    """Weights of one input have one first factor."""
    model: Any = low_rank(llama(), *ENDS)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for one, *others in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
        ):
            for other in others:
                other.first.weight = one.first.weight
    return model


def shared_by_compile() -> nn.Module:
    """The same, where that was chosen."""
    data = [words(4, seed) for seed in range(2)]
    options: dict[str, Any] = {"exclude": list(ENDS), "refine": None}
    model = tensorize.compile(llama(), 0.5, formats="shared", calibration=data, **options)
    return tensorize.weight.plain(model)


def integers(model: nn.Module, precision: str, budget: float, **options: Any) -> nn.Module:
    """Factors and dense weights whose entries are integers of a few bits; scales train."""
    options |= {"metric": "frobenius", "example_inputs": (words(2),)}
    model = tensorize.compile(model, budget, precision=precision, **options)
    return model.requires_grad_()


@contextlib.contextmanager
def identities_cost() -> Iterator[None]:
    """In here a machine is faster without identities; here and now it is not, at such sizes."""
    with mock.patch("tensorize.weight.forms.first_time", lambda spec, *_: not spec.pivoted):
        yield


def no_identity(model: nn.Module, parts: int) -> nn.Module:
    """The form that so many ranks split."""
    with identities_cost():
        in_parts(model, parts)
    assert any(weight.spec.pivoted for _, weight in factored(model))
    return model


CASES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: low_rank(llama(), *ENDS),
    "tied": lambda: low_rank(llama(tied=True), EMBEDDING),
    "silu between": lambda: low_rank(llama(), *ENDS, nonlinearity="silu"),
    "shared first factors": shared,
    "shared first factors, compiled": shared_by_compile,
    "fewer key heads than ranks": lambda: low_rank(llama(keys=1), *ENDS),
    "compressed ends": lambda: low_rank(llama()),
    "compressed tied ends": lambda: low_rank(llama(tied=True)),
    "dense": llama,
    "some dense": lambda: low_rank(llama(), *ENDS, "*q_proj*", "*down_proj*", "*0.mlp*"),
    "Qwen2": lambda: low_rank(llama("Qwen2"), *ENDS),
    "Qwen3": lambda: low_rank(llama("Qwen3"), *ENDS),
    "no identity": lambda: no_identity(low_rank(llama(tied=True), pivoted=True), 4),
    "no identity, shared": lambda: no_identity(tensorize.weight.pivoted(shared()), 4),
    "integers of 8 bits": lambda: integers(llama(), "int8", 0.16),
    "integers of 4 bits": lambda: integers(llama(tied=True), "int4", 0.09),
    "integers alone": lambda: integers(llama(), "int4", 0.9, formats="dense"),
    "fewer key heads, dense": lambda: llama(keys=1),
    "GPT-2, integers of 8 bits": lambda: integers(gpt2(), "int8", 0.16),
    "GPT-2, integers of 3 bits": lambda: integers(gpt2(), "int3", 0.07),
    "Mixtral": lambda: low_rank(llama("Mixtral"), *ENDS),
    "Mixtral, dense": lambda: llama("Mixtral"),
    "Mixtral, some dense": lambda: low_rank(llama("Mixtral"), *ENDS, "*gate.*", "*0*down_proj"),
    "Mixtral, integers of 8 bits": lambda: integers(llama("Mixtral"), "int8", 0.2),
    "Mixtral, integers of 4 bits": lambda: integers(llama("Mixtral"), "int4", 0.1),
    "Mixtral, integers alone": lambda: integers(llama("Mixtral"), "int4", 0.9, formats="dense"),
    "GPT-2": lambda: low_rank(gpt2(), "*wte*", "*wpe*"),
    "GPT-2 dense, untied": lambda: gpt2(tied=False),
}


def words(count: int, seed: int = 3) -> Tensor:
    return torch.randint(0, WORDS, (count, 16), generator=torch.Generator().manual_seed(seed))


def mine(ids: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's share of a batch: ranks of tp share one."""
    if "dp" not in (mesh.mesh_dim_names or ()):
        return ids
    return ids.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return loss_fn(model(ids, use_cache=False).logits, ids)


def loss_fn(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def farthest(model: nn.Module, want: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient."""
    got = gradients(model)
    assert got.keys() == want.keys()
    return max(relative(got[name], want[name]) for name in want)
