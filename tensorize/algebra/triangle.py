"""Hermitian and lower triangular matrices in half of the memory: one triangle is all they hold."""

from __future__ import annotations

import torch
from torch import Tensor

# The width up to which a matrix is held as it is: many small blocks take longer than they save.
_LARGEST_WHOLE = 64


class Triangle:
    """The lower triangle of a matrix (N, N), in some N (N + 50) / 2 entries.

    Cut in two, the matrix has a triangle for each half, held in the same way, and a square between
    them. Sums of products of rows are made in these blocks, with no matrix beside them.

    Examples:
        >>> packed = Triangle(torch.eye(100))
        >>> packed.add_products(torch.ones(1, 100))
        >>> packed.symmetric()[:2, :2]
        tensor([[2., 1.],
                [1., 2.]])
    """

    def __init__(self, matrix: Tensor) -> None:
        half = len(matrix) // 2
        self._first = _part(matrix[:half, :half])
        self._between = matrix[half:, :half].clone()
        self._last = _part(matrix[half:, half:])

    def add_(self, matrix: Tensor) -> Triangle:
        """Add a matrix of the same kind."""
        half = self._between.shape[1]
        self._first.add_(matrix[:half, :half])
        self._between.add_(matrix[half:, :half])
        self._last.add_(matrix[half:, half:])
        return self

    def add_products(self, x: Tensor) -> None:
        """Add Σ x xᴴ over rows (R, N) of the same dtype, on the same device."""
        half = self._between.shape[1]
        left, right = x[:, :half], x[:, half:]
        self._between.addmm_(right.t(), left.conj())
        add_products(self._first, left)
        add_products(self._last, right)

    def div_(self, by: float) -> Triangle:
        for part in (self._first, self._between, self._last):
            part.div_(by)
        return self

    @property
    def nbytes(self) -> int:
        return self._first.nbytes + self._between.nbytes + self._last.nbytes

    @property
    def device(self) -> torch.device:
        return self._between.device

    def dim(self) -> int:
        return 2

    def __len__(self) -> int:
        return sum(self._between.shape)

    def diagonal(self) -> Tensor:
        return torch.cat([self._first.diagonal(), self._last.diagonal()])

    def lower(self) -> Tensor:
        """The lower triangular matrix (N, N)."""
        matrix = self._between.new_zeros(len(self), len(self))
        self._write(matrix)
        return matrix

    def symmetric(self) -> Tensor:
        """The Hermitian matrix (N, N)."""
        matrix = self.lower()
        return matrix + matrix.tril(-1).mH

    def _write(self, matrix: Tensor) -> None:
        half = self._between.shape[1]
        matrix[half:, :half] = self._between
        for part, its in ((self._first, matrix[:half, :half]), (self._last, matrix[half:, half:])):
            if isinstance(part, Triangle):
                part._write(its)
            else:
                torch.tril(part, out=its)


Held = Tensor | Triangle
"""A matrix as it is held: a large square one as its triangle."""


def add_products(held: Held, x: Tensor) -> None:
    """Add Σ x xᴴ over rows (R, N) to a Hermitian matrix as it is held."""
    if isinstance(held, Triangle):
        held.add_products(x)
    else:
        held.addmm_(x.t(), x.conj())


def hermitian(held: Held) -> Tensor:
    """A Hermitian matrix as it is worked with."""
    return held.symmetric() if isinstance(held, Triangle) else held


def triangular(held: Held) -> Tensor:
    """A lower triangular matrix as it is worked with."""
    return held.lower() if isinstance(held, Triangle) else held


def packed(matrix: Tensor) -> Held:
    """A Hermitian or a lower triangular matrix as it is to be held; others stay as they are."""
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] > _LARGEST_WHOLE
    return Triangle(matrix) if square else matrix


def entries(width: int) -> int:
    """How many entries of a square matrix are held."""
    if width <= _LARGEST_WHOLE:
        return width**2
    half = width // 2
    return entries(half) + half * (width - half) + entries(width - half)


def _part(matrix: Tensor) -> Held:
    """A matrix on the diagonal, as memory of its own."""
    held = packed(matrix)
    return matrix.clone() if held is matrix else held
