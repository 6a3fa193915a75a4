"""What the planner knows of a model: the products of its layers, by sizes and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tensorize.base.errors import TensorizeError


@dataclass(frozen=True)
class Linear:
    """A weight of ``outputs`` rows: dense, or of a rank.

    Members of a group with the same ``first`` have one first factor; ``pivoted``: it does not store
    the identity that it holds in ``rank`` of its columns.
    """

    inputs: int
    outputs: int
    rank: int | None = None
    first: int = 0
    pivoted: bool = False

    @property
    def read(self) -> int:
        """Columns of the first factor as it is stored: the width of its product."""
        return self.inputs - (self.rank or 0) * self.pivoted


@dataclass(frozen=True)
class Group:
    """Linears of one input; ``closes``: they lead back to the residual stream."""

    linears: tuple[Linear, ...]
    closes: bool = False

    @property
    def inputs(self) -> int:
        return self.linears[0].inputs

    @property
    def outputs(self) -> int:
        return sum(linear.outputs for linear in self.linears)

    @property
    def dense(self) -> tuple[Linear, ...]:
        return tuple(linear for linear in self.linears if linear.rank is None)

    @property
    def low_rank(self) -> tuple[Linear, ...]:
        return tuple(linear for linear in self.linears if linear.rank is not None)

    @property
    def firsts(self) -> tuple[Linear, ...]:
        """One linear for each first factor."""
        return tuple({linear.first: linear for linear in self.low_rank}.values())

    @property
    def ranks(self) -> int:
        """The widths of the first products, together."""
        return sum(linear.rank or 0 for linear in self.firsts)

    @property
    def parameters(self) -> int:
        whole = sum(linear.inputs * linear.outputs for linear in self.dense)
        firsts = sum((linear.rank or 0) * linear.read for linear in self.firsts)
        seconds = sum(linear.outputs * (linear.rank or 0) for linear in self.low_rank)
        return whole + firsts + seconds


@dataclass(frozen=True)
class Layer:
    """A block on the residual stream of ``width``: groups of linears, in the order they run.

    ``heads`` of attention and those of its keys are ``kv_heads`` (0: none); ``attention`` is the
    width of the queries; ``others`` are parameters that are no weights: norms and biases.
    """

    groups: tuple[Group, ...]
    width: int
    heads: int = 0
    kv_heads: int = 0
    attention: int = 0
    others: int = 0

    @cached_property
    def parameters(self) -> int:
        return sum(group.parameters for group in self.groups) + self.others

    @cached_property
    def compressed(self) -> int:
        """How many of its parameters are those of factors."""
        dense = sum(lin.inputs * lin.outputs for group in self.groups for lin in group.dense)
        return self.parameters - self.others - dense

    @cached_property
    def norms(self) -> int:
        """Groups that read a norm of the residual stream."""
        return sum(not group.closes for group in self.groups)

    def parts(self, tp: int) -> str | None:
        """Why so many devices cannot share the layer; None where they can."""
        sides = {"width": self.width, "heads": self.heads, "heads of keys": self.kv_heads}
        for group in self.groups:
            sides |= {f"width of a weight ({x.outputs})": x.outputs for x in group.linears}
            sides |= {f"width of an input ({group.inputs})": group.inputs}
        odd = (name for name, size in sides.items() if size % tp)
        return next((f"{name} is not divisible by {tp}" for name in odd), None)


@dataclass(frozen=True)
class Workload:
    """A model as its planner sees it: layers in their order, and what stands at the two ends.

    ``head`` is the product with the vocabulary; ``ends`` are the parameters outside of the layers
    (the embedding, the head, the last norm).
    """

    layers: tuple[Layer, ...]
    head: Linear
    ends: int

    @property
    def width(self) -> int:
        return self.layers[0].width

    @cached_property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers) + self.ends

    @cached_property
    def compressed(self) -> int:
        """How many of its parameters are those of factors in layers."""
        return sum(layer.compressed for layer in self.layers)

    @classmethod
    def decoder(
        cls,
        width: int,
        inner: int,
        layers: int,
        heads: int,
        vocabulary: int,
        *,
        kv_heads: int | None = None,
        rank: int | None = None,
        gated: bool = True,
        joined: bool = False,
        tied: bool = False,
    ) -> Workload:
        """A decoder by its sizes, without a model; ``joined``: weights of one input have one first
        factor."""
        if width % heads:
            raise TensorizeError(
                f"width {width} is not a multiple of {heads} heads", way_out="other sizes"
            )
        keys = (kv_heads or heads) * (width // heads)

        def group(inputs: int, *outputs: int, closes: bool = False) -> Group:
            each = enumerate(outputs)
            members = (Linear(inputs, out, rank, 0 if joined else k) for k, out in each)
            return Group(tuple(members), closes)

        layer = Layer(
            (
                group(width, width, keys, keys),
                group(width, width, closes=True),
                group(width, *[inner] * (1 + gated)),
                group(inner, width, closes=True),
            ),
            width,
            heads,
            kv_heads or heads,
            width,
            2 * width,
        )
        ends = (1 if tied else 2) * vocabulary * width + width
        return cls((layer,) * layers, Linear(width, vocabulary), ends)
