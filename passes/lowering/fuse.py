"""Let kernels take in what is around their weights: norms before, elementwise work behind.

In the graph of a model that runs by kernels every weight is one operation. Here one launch comes in
place of each of these, where kernels cover it (and, where they have to be measured, won):

    a norm all of whose uses are weights of one launch             norm(x) Wᵀ
    an activation, a factor, a residual behind a weight            residual + scale · act(x Wᵀ + b)
    activation of one weight times another one of the same input   act(x W_0ᵀ) · (x W_1ᵀ)
    weights of one input, one first factor computed once           x W_0ᵀ, x W_1ᵀ, …

What anything else reads, or writes to, is not taken in. A launch has no gradients: the graph must
need none.
"""

from __future__ import annotations

import json
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tensorize.base.dynamo import VALUE, value_of
from tensorize.formats.registry import format_of
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Norm, Work
from tensorize.passes.lowering.checks import Check, take_checks
from tensorize.passes.lowering.graph import Lowered, memory_of, written
from tensorize.passes.lowering.norms import PLUS, TIMES, one_function, written_out


class Kernels(Protocol):
    """The operations of kernels, and where they are used.

    ``contract`` is that of one weight: (x, cores, bias, spec as JSON, contract, saved, measured).
    ``fused`` is that of one launch: (inputs, work as text), which gives the list of results.
    ``guarded`` takes what is known of every weight as well, (…, signs, sums, limits), and gives how
    many rows of each were wrong, last.
    """

    contract: Any
    fused: Any
    guarded: Any

    def uses(self, work: Work, x: Tensor, measured: bool) -> bool:
        """Whether a launch is used for x; ``measured``: only where it was seen to win."""
        ...


@dataclass(frozen=True)
class FuseKernels:
    """Lowered with launches in place of weights and what is around them."""

    kernels: Kernels
    name: str = "fuse"

    def run(self, program: Lowered) -> Lowered:
        graph = program.graph.graph
        changed = written(graph)
        checks = take_checks(graph, self.kernels.contract)
        fused, seen = [], set()
        for node in list(graph.nodes):
            if node.target is not self.kernels.contract or node in seen:
                continue
            # A launch before may have given its input a new node, so readers are asked for now.
            readers = list(node.args[0].users)
            seen.update(readers)
            found = (self._weight(reader, checks) for reader in readers)
            for weights in _alike_in_kind([weight for weight in found if weight is not None]):
                for launch in _launches(weights, changed):
                    attempts = (*_with_norm(launch), launch)
                    used = next((each for each in attempts if self._used(each, changed)), None)
                    if used is not None:
                        _replace(graph, used, self.kernels)
                        fused.append(_record(used, program.parameters))
        for check in checks.values():
            check.put_back()
        many = f"{len(fused)} launches take in what is around their weights"
        return replace(program, fused=tuple(fused), summary=many)

    def _weight(self, node: fx.Node, checks: Mapping[fx.Node, Check]) -> _Weight | None:
        """A call of one weight, whose result alone is used."""
        if node.target is not self.kernels.contract:
            return None
        x, cores, bias, spec, contract, saved, measured = node.args
        y = _only_user(node)
        if saved or y is None or y.target is not operator.getitem:
            return None
        spec = TTSpec.from_dict(json.loads(spec))
        check = checks.get(y)
        return _Weight(node, y, x, tuple(cores), bias, spec, contract, measured, check)

    def _used(self, launch: _Launch, changed: set[int]) -> bool:
        x, work = value_of(launch.x), launch.work
        if x is None or not work.fused:  # one weight by itself is what it was
            return False
        inputs = [*launch.inputs, *(node for check in launch.checks for node in check.known)]
        if any(memory_of(node) in changed for node in inputs):
            return False
        known = all(node < min(launch.results) for node in inputs)
        return known and self.kernels.uses(work, x, launch.weights[0].measured)


# ------------------------------------------------------------------------------ what one launch is


@dataclass(frozen=True)
class _Weight:
    """A call of one weight and its result."""

    node: fx.Node
    y: fx.Node
    x: fx.Node
    cores: tuple[fx.Node, ...]
    bias: fx.Node | None
    spec: TTSpec
    contract: str
    measured: bool
    check: Check | None

    @property
    def is_pair(self) -> bool:
        """Whether it is two matrices."""
        return format_of(self.spec).pair


def _alike_in_kind(weights: Sequence[_Weight]) -> list[list[_Weight]]:
    """Those that one launch may compute together, by what it has one of."""
    found: dict[tuple[Any, ...], list[_Weight]] = defaultdict(list)
    for weight in weights:
        has = weight.bias is not None, weight.check is not None
        found[weight.contract, weight.measured, *has].append(weight)
    return list(found.values())


@dataclass(frozen=True)
class _Launch:
    """What one launch comes in place of.

    ``results`` are the nodes that it gives the values of; ``taken`` those that are gone with it.
    """

    weights: tuple[_Weight, ...]
    x: fx.Node
    results: tuple[fx.Node, ...]
    taken: tuple[fx.Node, ...] = ()
    norm: Norm | None = None
    scales: tuple[fx.Node, ...] = ()
    epilogue: Epilogue = field(default_factory=Epilogue)
    residual: tuple[fx.Node, ...] = ()
    gated: bool = False

    @property
    def work(self) -> Work:
        weights = self.weights
        return Work(
            tuple(weight.spec for weight in weights),
            weights[0].contract,
            self.norm,
            replace(self.epilogue, bias=weights[0].bias is not None),
            self.gated,
            shared=self._shared,
            guarded=weights[0].check is not None,
        )

    @property
    def checks(self) -> list[Check]:
        """Those of its weights."""
        return [weight.check for weight in self.weights if weight.check is not None]

    @property
    def _shared(self) -> bool:
        weights = self.weights
        low_rank = all(weight.is_pair for weight in weights)
        columns = weights[0].contract == "columns"
        same = len({weight.cores[1:] for weight in weights}) == 1
        return len(weights) > 1 and low_rank and columns and same

    @property
    def inputs(self) -> list[fx.Node]:
        """In the order that ``Work`` says."""
        found = [self.x, *self.scales]
        for k, weight in enumerate(self.weights):
            found += weight.cores[: 1 if self._shared and k else None]
            found += [] if weight.bias is None else [weight.bias]
        return [*found, *self.residual]


def _record(launch: _Launch, parameters: Mapping[str, Tensor]) -> tuple[Work, tuple[Tensor, ...]]:
    """A launch and, of each of its weights, the core that no other one has."""
    firsts = [weight.cores[0].name for weight in launch.weights]
    return launch.work, tuple(parameters[name] for name in firsts if name in parameters)


# ------------------------------------------------------------------------------- behind the weights


def _launches(weights: Sequence[_Weight], changed: set[int]) -> Iterator[_Launch]:
    """What weights of one input become, each in one launch."""
    left = dict.fromkeys(weights)
    for weight in weights:
        product = _gated(weight, left, changed)
        if product is not None:
            yield _followed(product, changed)
            for each in product.weights:
                del left[each]
    together = []
    for weight in left:
        alone = _followed(_Launch((weight,), weight.x, (weight.y,)), changed)
        if alone.results == (weight.y,) and weight.is_pair:
            together.append(weight)
        else:
            yield alone
    if together:
        results = tuple(weight.y for weight in together)
        yield _Launch(tuple(together), together[0].x, results)


def _gated(weight: _Weight, among: Mapping[_Weight, None], changed: set[int]) -> _Launch | None:
    """act(x W_0ᵀ) · (x W_1ᵀ), of this weight as the first one."""
    activated = _next(weight.y, changed)
    activation = _activation(activated)
    if weight not in among or not weight.is_pair or activated is None:
        return None
    product = _next(activated, changed)
    if activation is None or product is None or product.target not in TIMES:
        return None
    for up in among:
        if weight.spec.pivoted and weight.cores[1:] != up.cores[1:]:
            continue  # each reads the columns of x in an order of its own
        both = set(product.args) == {activated, up.y} and _next(up.y, changed) is product
        if both and up is not weight and up.is_pair:
            epilogue, taken = Epilogue(activation=activation), (weight.y, up.y, activated)
            return _Launch((weight, up), weight.x, (product,), taken, epilogue=epilogue, gated=True)
    return None


def _followed(launch: _Launch, changed: set[int]) -> _Launch:
    """With the activation, the factor and the residual behind its one result."""
    for add in (_with_activation, _with_scale, _with_residual):
        (result,) = launch.results
        user = _next(result, changed)
        launch = launch if user is None else add(launch, user)
    return launch


def _further(launch: _Launch, user: fx.Node, **epilogue: Any) -> _Launch:
    """With one more step, of which ``user`` is the result."""
    taken = (*launch.taken, *launch.results)
    what = replace(launch.epilogue, **epilogue)
    return replace(launch, results=(user,), taken=taken, epilogue=what)


def _with_activation(launch: _Launch, user: fx.Node) -> _Launch:
    activation = None if launch.gated else _activation(user)
    return launch if activation is None else _further(launch, user, activation=activation)


def _with_scale(launch: _Launch, user: fx.Node) -> _Launch:
    numbers = [value for value in user.args if type(value) in (int, float)]
    if user.target not in TIMES or len(numbers) != 1:
        return launch
    return _further(launch, user, scale=float(numbers[0]))


def _with_residual(launch: _Launch, user: fx.Node) -> _Launch:
    (result,) = launch.results
    others = [value for value in user.args if value is not result]
    if user.target not in PLUS or user.kwargs or len(others) != 1:
        return launch
    if not _alike(others[0], result):
        return launch
    return replace(_further(launch, user, residual=True), residual=tuple(others))


_ACTIVATIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    "relu": "relu",
    F.silu: "silu",
    F.gelu: "gelu",
}


def _activation(node: fx.Node | None) -> str | None:
    if node is None or node.target not in _ACTIVATIONS:
        return None
    if node.target is F.gelu and "tanh" in (*node.args[1:], *node.kwargs.values()):
        return "gelu_tanh"
    return _ACTIVATIONS[node.target]  # type: ignore[index]


def _next(node: fx.Node, changed: set[int]) -> fx.Node | None:
    """The only reader of a value that nobody writes to, if it gives one just like it."""
    user = _only_user(node)
    if user is None or not _alike(user, node) or {memory_of(node), memory_of(user)} & changed:
        return None
    return user


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are tensors of one shape, dtype and device."""
    a, b = value_of(one), value_of(other)
    if a is None or b is None:
        return False
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


# ----------------------------------------------------------------------------- before the weights


def _with_norm(launch: _Launch) -> Iterator[_Launch]:
    """With the norm that nothing but its weights reads, if there is one."""
    weights = {weight.node for weight in launch.weights}
    found = one_function(launch.x) or written_out(launch.x)
    if found is None or set(launch.x.users) != weights:
        return
    norm, x, scales, between = found
    inside = {launch.x, *between}
    read_elsewhere = any(set(node.users) - inside for node in between)
    width = value_of(launch.x).shape[-1:]  # type: ignore[union-attr]
    fits = all(_is_scale(scale, width, launch.x) for scale in scales)
    if read_elsewhere or not fits or not _alike(x, launch.x):
        return
    taken = (*launch.taken, *between, launch.x)
    yield replace(launch, x=x, norm=norm, scales=tuple(scales), taken=taken)


def _is_scale(node: Any, width: torch.Size, x: fx.Node) -> bool:
    value, other = value_of(node), value_of(x)
    return value is not None and value.shape == width and value.dtype == other.dtype  # type: ignore[union-attr]


def _replace(graph: fx.Graph, launch: _Launch, kernels: Kernels) -> None:
    """Put one call in place of the weights and of what it takes in."""
    checks = launch.checks
    arguments: tuple[Any, ...] = (launch.inputs, launch.work.to_text())
    target = kernels.guarded if checks else kernels.fused
    if checks:
        signs, sums = ([check.known[k] for check in checks] for k in range(2))
        arguments += (signs, sums, [limit for check in checks for limit in check.limits])
    with graph.inserting_before(min(launch.results)):
        call = graph.call_function(target, arguments)
        call.meta[VALUE] = [value_of(result) for result in launch.results]
        if checks:
            wrong = graph.call_function(operator.getitem, (call, len(launch.results)))
            for k, check in enumerate(checks):
                check.count(graph.call_function(operator.getitem, (wrong, k)))
        for k, result in enumerate(launch.results):
            part = graph.call_function(operator.getitem, (call, k))
            part.meta.update(result.meta)
            result.replace_all_uses_with(part)
    calls = [node for weight in launch.weights for node in (weight.node, weight.y)]
    gone = dict.fromkeys((*launch.results, *launch.taken, *calls))
    for node in sorted(gone, reverse=True):
        if not node.users:
            graph.erase_node(node)
