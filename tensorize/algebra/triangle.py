"""Hermitian and lower triangular matrices in half of the memory: one triangle is all they hold."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# A narrower matrix takes less than a page of memory.
_LEAST = 32


class Triangle:
    """The lower triangle of a matrix (N, N), in some N (N + 2) / 2 entries.

    Cut in two, the matrix has a triangle for each half, which lie in one square on both sides of
    its diagonal, a square between them, and a diagonal.

    Examples:
        >>> packed = Triangle(torch.eye(3))
        >>> packed.add_(torch.eye(3))
        >>> packed.symmetric().diagonal()
        tensor([2., 2., 2.])
    """

    def __init__(self, matrix: Tensor) -> None:
        self._half = len(matrix) // 2
        self._parts = tuple(part.clone() for part in self._cut(matrix))

    def _cut(self, matrix: Tensor) -> Iterator[Tensor]:
        """Both halves' triangles, what is between them, and the diagonal."""
        half = self._half
        both = matrix[half:, half:].mT.triu(1)
        both[:half, :half] += matrix[:half, :half].tril(-1)
        yield both
        yield matrix[half:, :half]
        yield matrix.diagonal()

    def add_(self, matrix: Tensor) -> Triangle:
        """Add a matrix of the same kind."""
        for part, more in zip(self._parts, self._cut(matrix), strict=True):
            part.add_(more)
        return self

    def div_(self, by: float) -> Triangle:
        for part in self._parts:
            part.div_(by)
        return self

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def dim(self) -> int:
        return 2

    def __len__(self) -> int:
        return len(self._parts[-1])

    def diagonal(self) -> Tensor:
        return self._parts[-1]

    def lower(self) -> Tensor:
        """The lower triangular matrix (N, N)."""
        both, between, diagonal = self._parts
        half, width = self._half, len(diagonal)
        matrix = both.new_zeros(width, width)
        matrix[half:, half:] = both.triu(1).mT
        matrix[:half, :half] = both[:half, :half].tril(-1)
        matrix[half:, :half] = between
        matrix.diagonal().copy_(diagonal)
        return matrix

    def symmetric(self) -> Tensor:
        """The Hermitian matrix (N, N)."""
        matrix = self.lower()
        return matrix + matrix.tril(-1).mH


Held = Tensor | Triangle
"""A matrix as it is held: a large square one as its triangle."""


def hermitian(held: Held) -> Tensor:
    """A Hermitian matrix as it is worked with."""
    return held.symmetric() if isinstance(held, Triangle) else held


def triangular(held: Held) -> Tensor:
    """A lower triangular matrix as it is worked with."""
    return held.lower() if isinstance(held, Triangle) else held


def packed(matrix: Tensor) -> Held:
    """A Hermitian or a lower triangular matrix as it is to be held; others stay as they are."""
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] >= _LEAST
    return Triangle(matrix) if square else matrix


def entries(width: int) -> int:
    """How many entries of a square matrix are held."""
    return ((width + 1) // 2 + 1) * width if width >= _LEAST else width**2
