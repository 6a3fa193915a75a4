"""Where models of transformers keep what is sharded: which linears read and write which tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tensorize.base.errors import CaptureError


@dataclass(frozen=True)
class Reading:
    """Linears of a block that read one tensor, and the norm (None: none) that gives it to them."""

    linears: tuple[str, ...]
    norm: str | None = None


@dataclass(frozen=True)
class Experts:
    """The norm, the router and the experts of a block, by their names there."""

    norm: str
    router: str
    experts: str
    opens: str
    closes: str


@dataclass(frozen=True)
class Shape:
    """Names in a causal language model; those of a block's parts are within the block.

    ``readings``: of the residual stream. ``writers``: linears that add to it. ``keys``: those whose
    rows are the key and value heads, where they are linears of their own; ``fused``: the linear
    whose rows are queries, keys and values one after the other. ``head_norms``: over single heads.
    ``experts``: what chooses among experts, and these, in the place of an MLP. ``rms``: whether
    norms are RMSNorms, whose statistic goes along with a product; others have theirs reduced
    before. ``places``: tables that are added to the embedding. ``rotary``: what makes the turns of
    queries and keys. ``inner``: the configuration's name for the MLP's size.
    """

    blocks: str
    embedding: str
    norm: str
    head: str
    attention: str
    readings: tuple[Reading, ...]
    writers: tuple[str, ...]
    keys: tuple[str, ...] = ()
    fused: str | None = None
    head_norms: tuple[str, ...] = ()
    experts: Experts | None = None
    rms: bool = True
    places: tuple[str, ...] = ()
    rotary: str | None = None
    inner: str = "intermediate_size"

    def of_blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.blocks).children())


_LLAMA = Shape(
    blocks="model.layers",
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    attention="self_attn",
    readings=(
        Reading(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"
        ),
        Reading(("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    keys=("self_attn.k_proj", "self_attn.v_proj"),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    rotary="model.rotary_emb",
)

_MIXTRAL = replace(
    _LLAMA,
    readings=_LLAMA.readings[:1],
    writers=_LLAMA.writers[:1],
    experts=Experts(
        "post_attention_layernorm", "mlp.gate", "mlp.experts", "gate_up_proj", "down_proj"
    ),
)

_GPT2 = Shape(
    blocks="transformer.h",
    embedding="transformer.wte",
    norm="transformer.ln_f",
    head="lm_head",
    attention="attn",
    readings=(Reading(("attn.c_attn",), norm="ln_1"), Reading(("mlp.c_fc",), norm="ln_2")),
    writers=("attn.c_proj", "mlp.c_proj"),
    fused="attn.c_attn",
    rms=False,
    places=("transformer.wpe",),
    inner="n_inner",
)

SHAPES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": _GPT2,
}
"""By the name that the class has in transformers."""


def shape_of(model: nn.Module) -> Shape:
    """The shape of a model.

    Raises:
        CaptureError: its class is none of those that are known, or it has a part that is not.
    """
    kind = type(model).__name__
    if kind not in SHAPES:
        raise CaptureError(
            f"tensor and pipeline parallelism know where linears stand in {', '.join(SHAPES)}, and "
            f"nothing of a {kind}",
            way_out="a mesh with dp alone takes any model: "
            'init_device_mesh("cuda", (8,), mesh_dim_names=("dp",))',
        )
    if getattr(model.config, "add_cross_attention", False):
        raise CaptureError(
            f"this {kind} attends to an encoder, whose linears no rule shards",
            way_out="add_cross_attention=False, or a mesh with dp alone",
        )
    return SHAPES[kind]


@dataclass(frozen=True)
class Sizes:
    """What ranks have to divide."""

    hidden: int
    inner: int
    heads: int
    keys: int
    words: int

    @classmethod
    def of(cls, model: nn.Module, shape: Shape) -> Sizes:
        config: Any = model.config
        hidden, heads = config.hidden_size, config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", heads)
        return cls(
            hidden, getattr(config, shape.inner) or 4 * hidden, heads, keys, config.vocab_size
        )

    def refuse(self, ranks: int) -> None:
        """Raises CaptureError where the ranks do not divide them."""
        fewer = next(n for n in range(ranks, 0, -1) if not self._undivided(n))
        if odd := self._undivided(ranks):
            raise CaptureError(
                f"the {odd}, which {ranks} ranks of tp do not divide", way_out=f"tp={fewer}"
            )
        if self.words % ranks:
            raise CaptureError(
                f"there are {self.words} words, which {ranks} ranks of tp do not divide",
                way_out=f"model.resize_token_embeddings(pad_to_multiple_of={ranks}) before it is "
                "compressed",
            )

    def _undivided(self, ranks: int) -> str | None:
        """The first size that so many ranks do not divide, with its number."""
        whole = {
            "hidden size": self.hidden,
            "inner size of the MLP": self.inner,
            "number of attention heads": self.heads,
        }
        for what, size in whole.items():
            if size % ranks:
                return f"{what} is {size}"
        if self.keys % ranks and ranks % self.keys:
            return f"number of key and value heads is {self.keys}"
        return None
