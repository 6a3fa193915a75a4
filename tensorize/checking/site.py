"""A covered weight in a model: hooks that check what comes out of it, and what is done then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensorize.capture.matmul import Matmul
from tensorize.checking import graph
from tensorize.checking.faults import FORWARD, INPUT_GRADIENT, Fault, Mend
from tensorize.checking.gradients import watch
from tensorize.checking.identity import COLUMNS, LOOKUP, ROWS, Weight, times, unrounded, working
from tensorize.checking.limits import Limit, Seen
from tensorize.checking.memory import COUNT, state_of
from tensorize.checking.use import Product, Use, in_rows, name_of, unrounded_name
from tensorize.weight.cores import Cores, FactoredLinear
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.low_rank import LowRankLinear

if TYPE_CHECKING:
    from tensorize.checking.guarding import Guard

log = logging.getLogger("tensorize")


class Site:
    """One covered weight, under its qualified name.

    ``gradient_kind``: how its gradients can be checked better than those of any weight ("": no
    better). ``alone``: and nothing else uses its parameters.
    """

    gradient_kind = ""
    alone = False

    def __init__(self, name: str, kind: str, module: nn.Module, guard: Guard) -> None:
        self.name, self.kind, self.module, self.guard = name, kind, module, guard
        self.log = guard.log
        self.uses: dict[str, Use] = {}

    @property
    def count(self) -> Tensor:
        """How many wrong rows compiled graphs found."""
        counted = self.module._buffers[COUNT]
        assert counted is not None
        return counted

    def attach(self) -> list[Any]:
        """Let the weight's products come here; what is to be removed again."""
        raise NotImplementedError

    def matrix(self) -> Weight:
        """The weight as it is now."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what checks multiply with; of a use whose bias a call brings, that call does."""

    def is_stale(self) -> bool:
        """Whether the weight was written to since what checks multiply with was made."""
        held = self.tensors()
        states = [use.exact.state for use in self.uses.values() if use.exact is not None]
        return any(state[: len(held)] != tuple(map(state_of, held)) for state in states)

    def refresh(self) -> None:
        """Make what checks multiply with of the weight as it was written."""
        for use in self.uses.values():
            if use.exact is not None and use.renew(self.matrix()):
                now = tuple(map(state_of, self.tensors()))
                use.exact = replace(use.exact, state=now + use.exact.state[len(now) :])

    def tensors(self) -> list[Tensor]:
        """What the weight is held in."""
        raise NotImplementedError

    def renewed(self) -> Iterator[Mend]:
        """Make what checks multiply with anew, of a weight that is whole; what was damaged."""
        for use in self.uses.values():
            if use.exact is not None and use.renew(self.matrix()):
                yield Mend(f"{self.name} (its check)", 1, "the weight")

    def use(self, contract: str) -> Use:
        """The use in which x meets one side of the weight."""
        found = self.uses.get(contract)
        if found is None:
            found = self.uses[contract] = Use(contract)
        return found

    def checked(self, contract: str, product: Product, y: Tensor) -> Tensor | None:
        """A result that may stand in the place of y; None: y itself may.

        Raises:
            FaultError: y is wrong, and stays so; or nothing is to be mended.
        """
        use, x = self.use(contract), product.x
        if not _is_plain(x) or not _is_plain(y):
            self.miss(use, "a tensor of a special kind, a transform of torch.func, or a trace")
            return None
        gradients = y.requires_grad and torch.is_grad_enabled()
        inputs, outputs = in_rows(x, y, contract)
        if len(outputs) == 0:
            return None
        vectors = use.vectors(product, outputs.dtype, gradients=gradients)
        use.rows += len(outputs)
        limit, better = use.limit(x, y, gradients=gradients), None
        if self.log.calibrating:
            seen = use.seen.setdefault(use.name(x, y, gradients=gradients), Seen())
            seen.note(vectors.off(inputs, outputs), vectors.scale(inputs, outputs))
            if vectors.many is not None and contract != LOOKUP and not gradients:
                self._note_unrounded(use, product, inputs, outputs)
        elif limit is None:
            self.miss(use, f"calibration saw nothing of it in {name_of(x, y)}")
        elif not use.fast(vectors, limit, inputs, outputs):
            found = use.wrong(limit, inputs, outputs)
            if found is not None:
                fault = self.log.note(self.name, FORWARD, y, *found)
                y = better = self._again(fault, use, limit, product)
        if gradients:
            self._watch(use, product, y)
        return better

    @torch.no_grad()
    def _note_unrounded(self, use: Use, product: Product, x: Tensor, y: Tensor) -> None:
        """What kernels are to be held to, which check a product of 16 bits before it is rounded."""
        exact = use.exact
        assert exact is not None
        y = unrounded(product.make(), product.x, use.contract, otherwise=y)
        one = replace(exact, many=None)
        seen = use.seen.setdefault(unrounded_name(product.x), Seen())
        seen.note(one.off(x.double(), y.double()), one.scale(x, y))

    def _again(self, fault: Fault, use: Use, limit: Limit, product: Product) -> Tensor:
        """The product computed anew: with the weight as it is, and then as it was."""
        for attempt in range(_ATTEMPTS):
            if attempt > 0 and self.guard.mend(self)[0]:
                fault.outcome = "mended"
            y = product.again()
            if use.wrong(limit, *in_rows(product.x, y, use.contract)) is None:
                fault.outcome = "recomputed" if fault.outcome == "open" else fault.outcome
                return y
        raise self.log.refused(fault, "it stays wrong when it is computed again")

    def _watch(self, use: Use, product: Product, y: Tensor) -> None:
        """Let the gradients of a product be checked."""
        weight, bias = product.make()

        def back(gy: Tensor) -> Tensor:
            flat = times(weight, gy.reshape(-1, gy.shape[-1]).double(), _BACK[use.contract])
            return flat.to(gy.dtype).reshape(*gy.shape[:-1], flat.shape[-1])

        known = use.contract in _BACK
        watch(self, use, weight, bias, product.x, y, back if known else None)

    def wrong_gradient(
        self, use: Use, gy: Tensor, gx: Tensor, again: Callable[[], Tensor]
    ) -> Tensor | None:
        """A gradient of the input that may stand in the place of gx; None: gx itself may.

        Raises:
            FaultError: it is wrong, and nothing is to be mended.
        """
        rows_y, rows_x = gy.reshape(-1, gy.shape[-1]), gx.reshape(-1, gx.shape[-1])
        dtypes = name_of(gy, gx)
        if self.log.calibrating:
            use.back_seen.setdefault(dtypes, Seen()).note(*use.back_off(rows_y, rows_x))
            return None
        limit = use.back_limits.get(dtypes)
        if limit is None:
            self.miss(use, f"calibration saw no gradients of it in {dtypes}")
            return None
        found = use.wrong_back(limit, rows_y, rows_x)
        if found is None:
            return None
        fault = self.log.note(self.name, INPUT_GRADIENT, gx, *found)
        gx = again()
        if use.wrong_back(limit, rows_y, gx.reshape(-1, gx.shape[-1])) is None:
            fault.outcome = "recomputed"
            return gx
        self.log.skip(fault)
        return None

    def miss(self, use: Use, why: str) -> None:
        """Count a product that is not checked, and say so once."""
        if not self.log.calibrating and why not in use.missed:
            log.warning("%s: a product is not checked: %s", self.name, why)
        use.missed[why] = use.missed.get(why, 0) + 1


_ATTEMPTS = 4
"""How often a product is computed again: while faults are many, the second one may be hit too."""

_BACK = {COLUMNS: ROWS, ROWS: COLUMNS}


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor)
    plain = (kind is Tensor or kind is nn.Parameter) and not tensor.is_meta
    return plain and tensor.layout is torch.strided and not _transformed()


def _transformed() -> bool:
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return tracing or torch._C._are_functorch_transforms_active()


# ------------------------------------------------------------------------- modules as they are


class ModuleSite(Site):
    """A module that is a product by itself, checked by its input and its output: a hook.

    ``module`` forward hooks get the module, so that a copy of it is checked by a copy of this.
    """

    def __init__(
        self, name: str, kind: str, module: nn.Module, guard: Guard, contract: str
    ) -> None:
        super().__init__(name, kind, module, guard)
        self.contract = contract
        if isinstance(module, LowRankLinear) and module.spec.precision is None:
            self.gradient_kind = "pair"
        elif isinstance(module, nn.Linear):
            self.gradient_kind = "matrix"

    def attach(self) -> list[Any]:
        before = self.module.register_forward_pre_hook(self.before, with_kwargs=True)
        return [before, self.module.register_forward_hook(self, with_kwargs=True)]

    def matrix(self) -> Weight:
        weight: Any = self.module.weight
        return weight.t() if self.kind == CONV1D else weight  # (in, out) as it is held

    def tensors(self) -> list[Tensor]:
        return _held(self.module)

    def refresh(self) -> None:
        use = self.use(self.contract)
        if use.exact is not None:
            use.exact = replace(use.exact, state=())  # a bias is made of as well
        self.prepare()

    def prepare(self) -> None:
        held = _held(self.module)
        product = Product(held, self._made, held[0], self.module, self.guard.remember)
        self.use(self.contract).vectors(product, working(held[0].dtype), gradients=False)

    def _made(self) -> tuple[Weight, Tensor | None]:
        bias: Any = None if self.contract == LOOKUP else self.module.bias
        return self.matrix(), bias

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give the input a name of its own, so that its gradient by this module is seen."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        named = next(iter(kwargs)) if not args else None
        x = args[0] if named is None else kwargs[named]
        if not (isinstance(x, Tensor) and x.requires_grad):
            return None
        own = x.view_as(x)
        return ((own, *args[1:]), kwargs) if named is None else (args, {**kwargs, named: own})

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        if torch.compiler.is_compiling():
            graph.count(self, self.use(self.contract), *self._made(), x, y)
            return None

        def again() -> Tensor:
            if isinstance(module, LowRankLinear) and module.input_product is not None:
                module.input_product.forget()
            return module.forward(*args, **kwargs)

        return self.checked(
            self.contract, Product(_held(module), self._made, x, again, self.guard.remember), y
        )


CONV1D = "linear of (in, out)"


def _held(module: nn.Module) -> list[Tensor]:
    """The tensors that a module's product is made of."""
    modules, own = module._modules, module._parameters
    if isinstance(module, LowRankLinear):
        second: Any = modules["second"]
        first: Any = modules["first"]
        found = [second._parameters["weight"], first._parameters["weight"]]
        if (bias := second._parameters.get("bias")) is not None:
            found.append(bias)
        return found
    if isinstance(module, FactoredLinear):
        holder: Any = modules["weight_cores"]
        bias = own.get("bias")
        held = [*holder._parameters.values(), *_indices(holder)]
        return held if bias is None else [*held, bias]
    return [part for part in (own.get("weight"), own.get("bias")) if part is not None]


def _indices(holder: Cores) -> Iterator[Tensor]:
    for index in holder.spec.indices:
        yield getattr(holder, index.name)


# ------------------------------------------------------------------------ weights used by functions


class GuardedWeight(FactoredWeight):
    """A lazy weight whose products are checked, whatever function asks for them."""

    __slots__ = ("site",)

    def with_cores(self, cores: tuple[Tensor, ...]) -> FactoredWeight:
        return guarded_weight(super().with_cores(cores), self.site)

    def seen(self, frame: Any, *, detach: bool = False) -> FactoredWeight:
        return guarded_weight(super().seen(frame, detach=detach), self.site)

    def run(self, matmul: Matmul) -> Tensor:
        return self.site.run(self, matmul)

    def plainly(self, matmul: Matmul) -> Tensor:
        """What a call gives, unchecked."""
        return super().run(matmul)


def guarded_weight(weight: FactoredWeight, site: HolderSite) -> GuardedWeight:
    """The same weight, checked."""
    how = weight.contractions, weight.nonlinearity, weight.indices
    made = GuardedWeight(weight.spec, weight.cores, weight.frame, *how)
    made.site = site
    return made


class HolderSite(Site):
    """Cores that stand for a parameter of a module with a forward of its own: a hook."""

    def attach(self) -> list[Any]:
        return [self.module.register_forward_hook(self)]

    def matrix(self) -> Weight:
        return self.module.forward()  # type: ignore[operator]

    def tensors(self) -> list[Tensor]:
        weight: Any = self.matrix()
        return [*weight.cores, *weight.indices]

    def __call__(self, holder: Cores, args: Any, weight: FactoredWeight) -> FactoredWeight:
        if not isinstance(weight, FactoredWeight):
            return weight
        return guarded_weight(weight, self)

    def run(self, weight: GuardedWeight, matmul: Matmul) -> Tensor:
        """The product of a call, checked where its kind is known."""
        why = _unknown(weight, matmul)
        if why is not None:
            if not torch.compiler.is_compiling():
                self.miss(self.use(matmul.kind), why)
            return weight.plainly(matmul)
        contract, bias = matmul.contract, matmul.bias
        if torch.compiler.is_compiling():
            y = weight.plainly(matmul)
            rows = matmul.to_rows(y)
            graph.count(self, self.use(contract), weight, bias, matmul.x, rows)
            return y
        if torch.is_grad_enabled() and matmul.x.requires_grad:
            matmul = replace(matmul, x=matmul.x.view_as(matmul.x))

        def again() -> Tensor:
            return matmul.to_rows(weight.plainly(matmul))

        y = weight.plainly(matmul)
        held = [*weight.cores, *weight.indices, *([] if bias is None else [bias])]
        product = Product(held, lambda: (weight, bias), matmul.x, again, self.guard.remember)
        found = self.checked(contract, product, matmul.to_rows(y))
        return y if found is None else matmul.from_rows(found)


def _unknown(weight: FactoredWeight, matmul: Matmul) -> str | None:
    """Why a product has no check; None: it has one."""
    frame = weight.frame
    if matmul.convolution is not None:
        return "convolutions are not checked"
    if matmul.offsets is not None or matmul.stacked or frame.expert is not None:
        return "stacks of experts are not checked"
    if matmul.bag is not None:
        return "bags are not checked"
    if frame.rows is not None:
        return "parts of a packed weight are not checked"
    if matmul.split:
        return "weights of several leading axes are not checked"
    return None
