"""Weights and their uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_FULL_MOMENT = 8192
"""A side of a weight with more entries keeps only the diagonal of its second moment (in float64 a
full one of 8192 takes 512 MB)."""


@dataclass(frozen=True)
class Use:
    """One way in which the model uses a weight.

    ``contract``: ``"columns"`` (y = x Wᵀ), ``"rows"`` (y = x W), ``"lookup"`` (rows of W) or
    ``"whole"`` (a function of W itself: factorized, W is rebuilt at every call).
    ``rows`` is the number of input rows of one forward pass of the example inputs (0: unknown).
    ``split``: how many leading axes of the weight make up its rows; 0: its last two axes are the
    matrix. ``groups`` of a convolution. ``partial``: it uses some of the weight's rows. ``modes``:
    how many of its last axes count matrices (the frequencies of a spectral convolution), so that
    its first two are the matrix. ``apart``: the matrices of a stack are small and many, and see
    rows so different that each is judged by its own.
    """

    kind: str
    contract: str
    rows: int = 0
    split: int = 0
    groups: int = 1
    partial: bool = False
    modes: int = 0
    apart: bool = False

    @property
    def convolves(self) -> bool:
        """Whether its input are patches of an image, which are never laid out as rows."""
        return self.kind.startswith("conv")


@dataclass(frozen=True)
class Site:
    """One parameter and every matmul-like use of it; a tied weight has several names and uses.

    ``shape`` is the parameter's own: (m, n), a stack (experts, m, n), or any other whose leading
    axes make up the rows (a convolution's (m, in, *kernel), a projection of several heads).
    ``blocked`` is the reason why it cannot be factorized, ``None`` where it can; ``last_resort``
    the reason why it is only where the budget cannot be met otherwise. ``input_group`` is the name
    of the first of several linears that read the same input (q, k, v; gate, up).

    Examples:
        >>> def first_layer(site):
        ...     return site.shape == (64, 16)
        >>> some = tensorize.compile(dense, 0.9, example_inputs=inputs, include=first_layer)
        >>> [site.name for site in tensorize.report(some).factorized]
        ['0.weight']
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[Use, ...]
    aliases: tuple[str, ...] = ()
    blocked: str | None = None
    last_resort: str | None = None
    input_group: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def kind(self) -> str:
        """The kinds of its uses, such as ``"linear"`` or ``"embedding+linear"``."""
        return "+".join(dict.fromkeys(use.kind for use in self.uses)) or "unknown"

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def reals(self) -> int:
        """How many real numbers an entry is."""
        return 2 if self.dtype.startswith("complex") else 1

    @property
    def modes(self) -> int:
        """How many of the last axes count matrices; 0: if any does, it is the first."""
        return self.uses[0].modes if self.uses else 0

    @property
    def apart(self) -> bool:
        """Whether each matrix of a stack is judged by the rows that it meets itself."""
        return bool(self.uses) and all(use.apart for use in self.uses)

    @property
    def split(self) -> int:
        """How many leading axes make up the rows; 0: the last two axes are the matrix."""
        return self.uses[0].split if self.uses else 0

    @property
    def groups(self) -> int:
        """The groups of a convolution: as many matrices."""
        return self.uses[0].groups if self.uses else 1

    @property
    def experts(self) -> int:
        """How many matrices the weight stacks; 0: it is one."""
        if self.groups > 1:
            return self.groups
        if self.modes:
            return math.prod(self.shape[-self.modes :])
        return self.shape[0] if len(self.shape) == 3 and not self.split else 0

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight, of one of them where there are several."""
        if self.modes:
            return self.shape[0], self.shape[1]
        if not self.split:
            return self.shape[-2], self.shape[-1]
        rows, columns = math.prod(self.shape[: self.split]), math.prod(self.shape[self.split :])
        return rows // self.groups, columns

    @property
    def takes_trains(self) -> bool:
        """Whether a tensor train can run every use of it; low rank always can."""
        only_low_rank = ("conv", "embedding_bag", "grouped_mm")
        plain = not self.experts and not self.last_resort and self.reals == 1
        plain = plain and not any(use.partial for use in self.uses)
        return plain and not any(use.kind.startswith(only_low_rank) for use in self.uses)


CALIBRATION, EXAMPLE, ALONE = "calibration", "example_inputs", "batch"
"""Options that batches come by: several, or one alone."""

SELF_MADE = "the model's own data"


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the model: its arguments, and what the caller gave (a ``loss_fn`` gets that).

    ``names`` are those of the positional arguments, where they are known; ``number`` is its place
    among the batches that the caller gave by the option ``source``.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Any
    names: tuple[str, ...] = ()
    number: int = 0
    source: str = CALIBRATION

    def argument(self, name: str) -> Any:
        """What forward gets by a name; None where it is not passed."""
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}.get(name)
