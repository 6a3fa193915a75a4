"""The weight of a factorized layer: answers what a dense matrix would, without being one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tensorize.base import dynamo
from tensorize.base.errors import TensorizeError
from tensorize.capture import uses, views
from tensorize.capture.matmul import Frame, Matmul
from tensorize.formats.registry import format_of
from tensorize.ir.spec import Spec, TTSpec
from tensorize.weight import products
from tensorize.weight.contractions import Contractions


class FactoredWeight:
    """Stands for a dense matrix W that is never stored; ``frame`` says how W is looked at.

    Shape, dtype and device cost nothing. ``dense()`` builds the matrix, differentiably.
    """

    __slots__ = (
        *("__weakref__", "contractions", "cores", "format", "frame", "indices", "nonlinearity"),
        *("shape", "spec"),
    )

    _is_hf_initialized = True  # so that transformers' initialization leaves it alone

    def __init__(
        self,
        spec: Spec,
        cores: tuple[Tensor, ...],
        frame: Frame,
        contractions: Contractions | None = None,
        nonlinearity: str | None = None,
        indices: tuple[Tensor, ...] = (),
    ) -> None:
        self.spec: Any = spec  # of the class that its format has
        self.cores, self.frame, self.nonlinearity = cores, frame, nonlinearity
        self.indices = indices
        self.format, self.contractions = format_of(spec), contractions or {}
        shape = spec.shape
        if frame.expert is not None:
            several = frame.expert.shape if self._is_several else ()
            shape = (*several, *spec.single.shape)
        if frame.shape is not None:
            shape = frame.shape
        if frame.rows is not None:
            shape = (frame.rows[1] - frame.rows[0], shape[1])
        if frame.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        self.shape = torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.cores[0].dtype

    @property
    def device(self) -> torch.device:
        return self.cores[0].device

    @property
    def requires_grad(self) -> bool:
        return any(core.requires_grad for core in self.cores)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        for core in self.cores:
            core.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> FactoredWeight:
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> None:
        """Always None: gradients are those of the cores."""
        return None

    @property
    def data(self) -> FactoredWeight:
        return self.seen(self.frame, detach=True)

    @data.setter
    def data(self, value: Any) -> None:
        raise cannot_be_assigned("data of a weight")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise cannot_be_assigned("weight whose entries are written")

    @property
    def is_meta(self) -> bool:
        return self.cores[0].is_meta

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> FactoredWeight | Tensor:
        return self.t()

    @property
    def mT(self) -> FactoredWeight | Tensor:
        return self.transpose(-1, -2)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def dense(self) -> Tensor:
        """The weight as the model looks at it, built from the cores.

        Raises:
            TensorizeError: there is a non-linearity between the cores, so they are no matrix.
        """
        self.require_matrix()
        spec, cores = self.looked_at()
        if self._is_several:  # stacks are low rank, or dense in codes
            weight = functools.reduce(torch.matmul, self.format.computed(spec, cores))
        else:
            weight = format_of(spec).reconstruct(spec, cores)
        weight = self.frame.shaped(weight)
        if self.frame.scale != 1:
            weight = weight * self.frame.scale
        return weight.transpose(-1, -2) if self.frame.transposed else weight

    @property
    def plain_cores(self) -> tuple[Tensor, ...]:
        """The cores of ``spec.plain``: with what is not stored, differentiably."""
        return self.format.computed(self.spec, self.cores + self.indices)

    def whole(self) -> FactoredWeight:
        """The same weight of cores that hold all of their numbers."""
        how = self.frame, self.contractions, self.nonlinearity
        return FactoredWeight(self.spec.plain, self.plain_cores, *how)

    def require_matrix(self, name: str | None = None) -> None:
        """Raises TensorizeError where no dense weight, of this name, stands for the cores."""
        if self.nonlinearity is not None:
            raise TensorizeError(
                f"there is a {self.nonlinearity} between its factors: no dense weight is the same",
                site=name,
                way_out="train without nonlinearity= where a dense model is wanted",
            )

    def looked_at(self) -> tuple[Spec, tuple[Tensor, ...]]:
        """Spec and cores of the expert or the rows that the frame shows.

        Of several experts the spec of each, and the cores of all.
        """
        if self.spec.pivoted and self.format.planned:
            return self.whole().looked_at()
        spec, cores = self.spec if self.frame.expert is None else self.spec.single, self._shown()
        if self.frame.rows is None:
            return spec, cores
        first, end = self.frame.rows
        if self.format.pair:
            sizes = end - first, spec.shape[1], spec.ranks[0]
            return TTSpec.low_rank(*sizes, pivoted=spec.pivoted), cores
        weight = self.format.reconstruct(spec, cores)[first:end]  # rows of a train are no train
        exact = TTSpec((end - first,), (spec.shape[1],), ())
        return exact, (weight,)

    def _shown(self) -> tuple[Tensor, ...]:
        """Cores and indices of the experts that the frame shows; of its rows, in low rank."""
        cores = self.cores + self.indices
        if self.frame.expert is not None:
            cores = tuple(core[self.frame.expert] for core in cores)
        if self.frame.rows is None or not self.format.pair:
            return cores
        first, end = self.frame.rows
        return cores[0][first:end], *cores[1:]

    @property
    def _is_several(self) -> bool:
        """Whether it shows several experts of a stack, each where the model asks for it."""
        return isinstance(self.frame.expert, Tensor) and self.frame.expert.dim() > 0

    def t(self) -> FactoredWeight | Tensor:
        return torch.t(self)  # type: ignore[arg-type]

    def transpose(self, dim0: int, dim1: int) -> FactoredWeight | Tensor:
        return torch.transpose(self, dim0, dim1)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> FactoredWeight | Tensor:
        return FactoredWeight.__torch_function__(torch.Tensor.__getitem__, (), (self, index))

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def _refuse_hook(self, *_: Any, **__: Any) -> Any:
        raise TensorizeError(
            "its weight is factorized: the factors are trained, and no gradient of the dense "
            "weight is ever computed that a hook could see or change",
            way_out="exclude= the weight when compiling, or hook its factors: layer.weight.cores",
        )

    register_hook = register_post_accumulate_grad_hook = _refuse_hook

    @property
    def grad_fn(self) -> None:
        """None, as of a parameter: the cores are what is trained."""
        return None

    def __getattr__(self, name: str) -> Any:
        # Whatever else a tensor can do: a view, or an operation on the dense matrix.
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or method is None:
            raise AttributeError(name)
        if not callable(method):
            return getattr(self.dense(), name)
        return lambda *args, **kwargs: FactoredWeight.__torch_function__(
            method, (), (self, *args), kwargs
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        view = ", transposed" if self.frame.transposed else ""
        return f"FactoredWeight({tuple(self.shape)}, {self.spec}{view})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in views.COMPOSITES:
            return views.COMPOSITES[func](*args, **kwargs)
        weight = next(_factored(args, kwargs))
        if func in _OF_GRADIENTS:
            return weight._refuse_hook()
        matmul = uses.read(func, args, kwargs, weight)
        if matmul is not None and (runs := weight._running(matmul)) is not None:
            return runs.run(weight.frame.turn(matmul))
        frame = views.view(func, args, kwargs, weight.frame, weight)
        if isinstance(frame, tuple):
            return tuple(weight.seen(part) for part in frame)
        if frame is not None:
            return weight.seen(frame, detach=func in views.DETACHES)
        if not torch.compiler.is_compiling() and _writes(func, args, kwargs):
            raise cannot_be_assigned(f"weight that {func.__name__} writes to")
        dense = {id(w): w.dense() for w in _factored(args, kwargs)}

        def plain(value: Any) -> Any:
            return dense[id(value)] if isinstance(value, FactoredWeight) else value

        args, keywords = pytree.tree_map(plain, (args, kwargs))
        return func(*args, **keywords)

    def with_cores(self, cores: tuple[Tensor, ...]) -> FactoredWeight:
        """The same weight of other cores."""
        how = self.frame, self.contractions, self.nonlinearity, self.indices
        return FactoredWeight(self.spec, cores, *how)

    def seen(self, frame: Frame, *, detach: bool = False) -> FactoredWeight:
        """The same weight, looked at in another way."""
        cores = tuple(core.detach() for core in self.cores) if detach else self.cores
        how = frame, self.contractions, self.nonlinearity, self.indices
        return FactoredWeight(self.spec, cores, *how)

    def _running(self, matmul: Matmul) -> FactoredWeight | None:
        """What can answer a call: the weight, or its factors as numbers; None: nothing can."""
        if self.can_run(matmul):
            return self
        if self.spec.precision is None or not self.spec.ranks or self.frame.expert is not None:
            return None
        pair = self.as_pair()
        return pair if pair.can_run(matmul) else None

    def as_pair(self) -> FactoredWeight:
        """The same weight as numbers, in two factors: one may be an identity. It can run any call
        that low rank can."""
        factors = self.plain_cores
        if len(factors) == 1:
            (matrix,) = factors
            *lead, m, n = matrix.shape
            one = torch.eye(min(m, n), dtype=matrix.dtype, device=matrix.device)
            one = one.expand(*lead, *one.shape)
            factors = (one, matrix) if m < n else (matrix, one)
        *experts, m, n = self.spec.shape
        spec = TTSpec.low_rank(m, n, factors[0].shape[-1], experts=sum(experts))
        return FactoredWeight(spec, factors, self.frame)

    def can_run(self, matmul: Matmul) -> bool:
        """Whether the cores can answer the call; else the dense weight does."""
        pair, frame = self.format.pair, self.frame
        if isinstance(matmul.x, FactoredWeight) or self.nonlinearity is not None:
            return False
        folds = not pair or self.spec.pivoted
        if folds and matmul.x.layout != torch.strided:
            return False  # a contraction folds its input, which a sparse one cannot be
        if matmul.convolution is not None:
            groups = self.spec.shape[0] if self.spec.batch else 1
            return pair and frame.shape is not None and matmul.convolution.groups == groups
        if matmul.modes:
            return pair and frame.modes == matmul.modes
        if matmul.split:
            rows = math.prod(self.shape[: matmul.split])
            return frame.shape is not None and not self.spec.batch and rows == self.spec.shape[0]
        if frame.shape is not None or (frame.rows is not None and not self.format.pair):
            return False
        if matmul.bag is not None:
            return pair and not self.spec.batch
        one = frame.expert is not None and not self._is_several
        if not self.spec.batch or one:
            return not matmul.stacked and matmul.offsets is None
        return pair and (matmul.stacked or matmul.offsets is not None)

    def run(self, matmul: Matmul) -> Tensor:
        """What a call gives that is told in terms of the parameter itself."""
        if self.spec.pivoted and self.format.planned:
            return self.whole().run(matmul)
        x, contract = matmul.x, matmul.contract
        if matmul.convolution is not None:
            shape, call = self.shape, matmul.convolution
            return products.convolution(self.plain_cores, x, shape, call, matmul.bias)
        cores = self._shown()
        if matmul.offsets is not None:
            return products.grouped_matmul(cores, x, matmul.offsets, contract)
        if matmul.stacked:
            y = products.stacked_matmul(cores, x, contract, matmul.bias)
            return matmul.from_rows(y)
        if matmul.bag is not None:
            return products.bag_lookup(cores, x, matmul.bag)
        # Those of the whole weight; parts of a low-rank one have two matmuls.
        whole = self.frame.rows is None and self.frame.expert is None
        known = self.contractions if whole else {}
        if contract == "lookup":
            kernel: Any = known.get("lookup")
            return products.lookup(self.spec, cores, x, matmul.padding_idx, kernel)
        y = products.matmul(self.spec, known, cores, x, contract, matmul.bias)
        return matmul.from_rows(y)


_OF_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.register_hook)
"""Functions that want to know of the gradient of a weight itself."""


ARITHMETIC = (
    *("add", "radd", "sub", "rsub", "mul", "rmul"),
    *("truediv", "rtruediv", "pow", "neg", "abs"),
)
"""Operators, without their underscores."""


def give_operators(kind: Any, names: Iterable[str]) -> None:
    """Let what stands for a tensor answer operators, as functions of torch on its numbers."""
    for name in names:
        setattr(kind, f"__{name}__", _operator(kind, f"__{name}__"))


def _operator(kind: Any, name: str) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def operate(lazy: Any, *others: Any) -> Any:
        return kind.__torch_function__(method, (), (lazy, *others))

    return operate


give_operators(FactoredWeight, (*ARITHMETIC, "lt", "le", "gt", "ge", "eq", "ne"))


# Calls that dynamo does not hand to a lazy weight as Python does: the private ones are those of
# ``F.grouped_mm`` and of weight norm.
dynamo.answer_matmul_from_the_left()
dynamo.answer_private_functions("_grouped_mm", "_weight_norm")


def _writes(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a call would write into a lazy weight, where what is written has no place to stay."""
    name = getattr(func, "__name__", "")
    targets = [kwargs.get("out")]
    if name.endswith("_") and not name.startswith("_"):  # in place
        targets += args[:1] or kwargs.values()
    return any(isinstance(target, FactoredWeight) for target in targets)


def cannot_be_assigned(what: str) -> TypeError:
    return TypeError(
        f"the {what} is factorized and cannot be assigned; use tensorize.densify(model) first"
    )


def _factored(args: tuple, kwargs: dict) -> Iterator[FactoredWeight]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, FactoredWeight):
            yield value
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, FactoredWeight))
