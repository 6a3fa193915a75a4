"""What a call that multiplies with a weight computes, in one form for all functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2)


@dataclass(frozen=True)
class Convolution:
    """The arguments of a convolution; ``output_padding`` is not None where it is transposed."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int = 1
    output_padding: Any = None


@dataclass(frozen=True)
class Matmul:
    """A call read as ``from_rows(x · W) + bias``.

    ``x`` has the contracted index last (or holds row numbers, for a lookup). ``from_rows`` turns
    the product, whose last index is the output's, into the layout that the call returns, and
    ``to_rows`` turns it back. ``split`` is the number of leading axes of the weight that make up
    its rows, 0 where its last two axes are the matrix; then a third axis in front stacks several,
    and x meets each of them: ``stacked``, or by the ends of each one's rows, ``offsets``. Of a
    spectral convolution's weight (in, out, *modes) the last ``modes`` axes stack them.
    ``convolution``: x is the image, and its patches are the rows. ``bag``: the other arguments of
    an ``embedding_bag``.
    """

    kind: str
    contract: str
    x: Tensor
    bias: Tensor | None = None
    from_rows: Layout = _same
    to_rows: Layout = _same
    offsets: Tensor | None = None
    padding_idx: int | None = None
    split: int = 0
    modes: int = 0
    stacked: bool = False
    convolution: Convolution | None = None
    bag: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Frame:
    """How a tensor that the model holds derives from a parameter's matrix.

    It may be transposed, of one ``expert`` in a stack or of several (a tensor of their numbers),
    some of the ``rows`` (first, end), times a number, ``scale``, or in another ``shape`` than the
    matrix (a convolution's, a projection of several heads; a spectral convolution's, whose last
    ``modes`` axes stack them).
    """

    transposed: bool = False
    expert: Any = None
    shape: tuple[int, ...] | None = None
    rows: tuple[int, int] | None = None
    modes: int = 0
    scale: float = 1.0

    @classmethod
    def of(cls, shape: tuple[int, ...], stack: tuple[int, ...]) -> Frame:
        """How a parameter of a shape is seen, for a matrix or a stack of them, of their shape."""
        if shape == stack:
            return cls()
        # Of a grouped convolution the first axis has the rows of all matrices.
        apart = len(stack) == 3 and shape[0] == stack[1]
        return cls(shape=shape, modes=len(shape) - 2 if apart else 0)

    def shaped(self, matrix: Tensor) -> Tensor:
        """A matrix, or a stack of them, in this frame's shape."""
        if self.shape is None:
            return matrix
        return (matrix.movedim(0, -1) if self.modes else matrix).reshape(self.shape)

    def allows(self, matmul: Matmul) -> bool:
        """Whether a call on what this frame shows can be told in terms of the parameter itself."""
        if matmul.contract == "lookup":
            return not self.transposed and self.rows is None and self.scale == 1
        if matmul.split or matmul.modes:
            return not self.transposed and self.expert is None and self.rows is None
        return True

    def turn(self, matmul: Matmul) -> Matmul:
        """The same call, told in terms of the parameter itself: what scales it scales its input."""
        if self.scale != 1:
            matmul = replace(matmul, x=matmul.x * self.scale)
        if not self.transposed or matmul.contract == "lookup":
            return matmul
        flipped = "rows" if matmul.contract == "columns" else "columns"
        return replace(matmul, contract=flipped)

    def slice_rows(self, first: int, end: int) -> Frame:
        """Rows first … end of what this frame shows."""
        start = 0 if self.rows is None else self.rows[0]
        return replace(self, rows=(start + first, start + end))
