"""How the sides of a matrix are cut into modes, and the largest ranks between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

from torch import Tensor

from tensorize.algebra.svd import computable
from tensorize.ir.spec import TTSpec


def max_ranks(row_modes: Sequence[int], column_modes: Sequence[int]) -> tuple[int, ...]:
    """The largest inner ranks that can ever be needed: the smaller side of each unfolding.

    Args:
        row_modes: factors of the number of rows, one a core.
        column_modes: factors of the number of columns, one a core.

    Returns:
        d-1 integers; entry k is min(∏ modes up to core k, ∏ modes after core k).
    """
    modes = [m * n for m, n in zip(row_modes, column_modes, strict=True)]
    return tuple(
        min(math.prod(modes[: k + 1]), math.prod(modes[k + 1 :])) for k in range(len(modes) - 1)
    )


@lru_cache(maxsize=4096)
def balanced_modes(size: int, count: int) -> tuple[int, ...]:
    """``size`` as a product of ``count`` factors that are as equal as they can be.

    The factors have the smallest sum (for a fixed product: the most equal ones); among equal sums
    the smallest largest factor is taken. They come in non-increasing order: 12 in two is (4, 3), a
    prime p in three is (p, 1, 1).

    Raises:
        ValueError: ``size`` or ``count`` is not positive.
    """
    if size < 1 or count < 1:
        raise ValueError(f"size and count are positive, got {size} and {count}")
    divisors = _divisors(size)

    @cache
    def best(rest: int, left: int, largest: int) -> tuple[int, tuple[int, ...]] | None:
        """(sum, factors) of the best split of ``rest`` with no factor above ``largest``."""
        if left == 1:
            return (rest, (rest,)) if rest <= largest else None
        found: tuple[int, tuple[int, ...]] | None = None
        for factor in divisors:
            if factor > largest:
                break
            if rest % factor or factor**left < rest:
                continue
            # The other factors sum to at least (left-1) times their geometric mean. This bound
            # rises with the factor; one is taken off because the root is a rounded float.
            others = (left - 1) * (rest / factor) ** (1 / (left - 1))
            if found is not None and factor + others - 1 > found[0]:
                break
            tail = best(rest // factor, left - 1, factor)
            if tail is not None:
                candidate = (factor + tail[0], (factor, *tail[1]))
                found = candidate if found is None else min(found, candidate)
        return found

    result = best(size, count, size)
    assert result is not None, "(size, 1, …, 1) is always a solution"
    return result[1]


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``."""
    return max(divisor for divisor in _divisors(size) if divisor <= limit)


def _divisors(size: int) -> tuple[int, ...]:
    small = [k for k in range(1, math.isqrt(size) + 1) if size % k == 0]
    return tuple(sorted({*small, *(size // k for k in small)}))


def interleaved(matrix: Tensor, row_modes: Sequence[int], column_modes: Sequence[int]) -> Tensor:
    """The matrix as a tensor of (m0, n0, m1, n1, …)."""
    count = len(row_modes)
    check_matrix(matrix, TTSpec(row_modes, column_modes, (1,) * (count - 1)))
    tensor = computable(matrix).reshape(*row_modes, *column_modes)
    return tensor.permute([axis for k in range(count) for axis in (k, count + k)])


def check_matrix(matrix: Tensor, spec: TTSpec) -> None:
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"a real matrix is needed, got {matrix.dtype} of {tuple(matrix.shape)}; "
            "stacked experts are decomposed one by one"
        )
    if spec.shape != tuple(matrix.shape):
        raise ValueError(
            f"row modes {spec.row_modes} and column modes {spec.column_modes} make a matrix of "
            f"{spec.shape}, the given one is {tuple(matrix.shape)}"
        )
