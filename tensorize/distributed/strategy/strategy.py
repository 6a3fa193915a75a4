"""How a step is spread over devices, as a frozen record."""

from __future__ import annotations

from dataclasses import dataclass

from tensorize.base.errors import TensorizeError, check_one_of

PLAIN, MEGATRON, NAIVE, BTP = "plain", "megatron", "naive", "btp"
"""How the weights of a layer are split: not at all; dense ones by columns, then by rows; each
factor pair so, by its rank; each first factor by its rows, each second one by its columns."""
STYLES = (PLAIN, MEGATRON, NAIVE, BTP)

KEEP, PRODUCTS, INPUTS = "nothing", "low rank", "layers"
"""What checkpointing drops and computes again: nothing; all but the products with first factors;
all but the inputs of layers."""
CHECKPOINTS = (KEEP, PRODUCTS, INPUTS)


@dataclass(frozen=True, order=True)
class Strategy:
    """Devices of the pipeline, of data and of tensor parallelism, and what goes with them.

    ``style`` is how weights are split, ``rows`` the sequences of a micro-batch, ``micro`` their
    number, ``checkpoint`` what is computed again, ``sharded`` that parameters are spread over
    the data-parallel group as well (FSDP; else the optimizer's states alone are), ``offload`` that
    these states are on the host.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    style: str = PLAIN
    rows: int = 1
    micro: int = 1
    checkpoint: str = KEEP
    sharded: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        check_one_of("style", self.style, STYLES)
        check_one_of("checkpoint", self.checkpoint, CHECKPOINTS)
        counts = (self.pp, self.dp, self.tp, self.rows, self.micro)
        if any(not isinstance(n, int) or n < 1 for n in counts):
            raise TensorizeError(
                f"pp, dp, tp, rows and micro are positive integers, got {counts}",
                way_out='Strategy(pp=2, dp=4, tp=4, style="btp", rows=1, micro=8)',
            )
        if (self.tp == 1) != (self.style == PLAIN):
            raise TensorizeError(
                f"style={self.style!r} does not go with tp={self.tp}",
                way_out=f"style={PLAIN!r} on one device, another one on several",
            )

    @property
    def devices(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return self.dp * self.rows * self.micro

    @property
    def mesh(self) -> str:
        """Its devices and how they share weights, for people."""
        return f"pp {self.pp}, dp {self.dp}, tp {self.tp} {self.style}"

    def __str__(self) -> str:
        parts = [self.mesh, f"{self.micro} x {self.rows}"]
        parts += [f"again: {self.checkpoint}"] if self.checkpoint != KEEP else []
        parts += ["fsdp"] * self.sharded + ["offload"] * self.offload
        return ", ".join(parts)
