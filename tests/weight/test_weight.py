"""What a module holds in place of its dense weight: the same answers, and no dense matrix.

Shapes: B and T rows, M rows and N columns of the weight W, E experts, C channels.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tensorize.algebra import reconstruct as decompose
from tensorize.algebra.reconstruct import reconstruct
from tensorize.capture.matmul import Frame
from tensorize.ir.spec import TTSpec
from tensorize.weight.contractions import contractions
from tensorize.weight.cores import Cores, FactoredLinear
from tensorize.weight.install import (
    core_names,
    factored,
    install,
    restore,
)
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.low_rank import LowRankLinear
from tests.capture.test_uses import (
    CALLS,
    IDS,
    NO_MATMULS,
    ROWS,
)

B, T, M, N, E = 4, 3, 6, 5, 3


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_cores(spec: TTSpec, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(s, seed, dtype)) for seed, s in enumerate(spec.core_shapes)]


def specs_for(shape: tuple[int, ...], split: int = 0, groups: int = 1) -> list[TTSpec]:
    """Low rank, and for a plain (M, N) also trains of two and three cores, and blocks."""
    if split:
        m, n = math.prod(shape[:split]), math.prod(shape[split:])
        return [TTSpec.low_rank(m // groups, n, 2, experts=groups if groups > 1 else 0)]
    low = TTSpec.low_rank(*shape[-2:], 2, experts=shape[0] if len(shape) == 3 else 0)
    if shape != (M, N):
        return [low]
    trains = [TTSpec((2, 3), (5, 1), (4,)), TTSpec((2, 1, 3), (1, 5, 1), (2, 3))]
    return [low, *trains, TTSpec.block((2, 3), (1, 5), 2), TTSpec.block((3, 2), (5, 1), 1)]


def lazy(spec: TTSpec, cores: Sequence[Tensor], shape: tuple[int, ...] | None = None) -> Any:
    frame = Frame() if shape in (None, spec.shape) else Frame(shape=shape)
    return FactoredWeight(spec, tuple(cores), frame, contractions(spec))


@contextlib.contextmanager
def no_dense() -> Iterator[None]:
    """Building the dense matrix is an error here."""

    def refuse(spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
        raise AssertionError(f"the dense matrix of {spec} was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompose, "reconstruct", refuse)
        yield


def close(got: Tensor, want: Tensor, terms: int = 64) -> None:
    """Equal to the rounding of chained sums of ``terms`` products, relative to the largest."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    largest = float(want.detach().abs().max()) if want.numel() else 0.0
    allowed = 8 * terms * torch.finfo(want.dtype).eps * max(largest, 1.0)
    assert ((got - want).abs() <= allowed).all()


def same_gradients(got: Tensor, want: Tensor, cores: Sequence[Tensor]) -> None:
    """Value and gradients of the two ways to compute from the same cores."""
    close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), cores, allow_unused=True),
        torch.autograd.grad(want.square().sum(), cores, allow_unused=True),
        strict=True,
    ):
        assert a is not None
        assert b is not None
        close(a, b, 512)


# ------------------------------------------------------------------------- the table of uses.py


@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_the_table_is_a_contraction(name: str) -> None:
    call = CALLS[name]
    for spec in specs_for(call.weight, call.split, call.groups):
        cores = draw_cores(spec)
        with no_dense():
            got = call.run(lazy(spec, cores, call.weight))
        want = call.run(reconstruct(spec, cores).reshape(call.weight))
        same_gradients(got, want, cores)


def test_a_transposed_convolution_is_a_contraction() -> None:
    spec, shape = TTSpec.low_rank(N, M * 3 * 2, 2), (N, M, 3, 2)
    cores = draw_cores(spec)

    def run(w: Any) -> Tensor:
        return F.conv_transpose2d(draw((B, N, 5, 4)), w, draw((M,)), stride=2, padding=1)

    with no_dense():
        got = run(lazy(spec, cores, shape))
    same_gradients(got, run(reconstruct(spec, cores).reshape(shape)), cores)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 1])
def test_a_bag_is_a_contraction(mode: str, padding: int | None) -> None:
    spec = TTSpec.low_rank(M, N, 2)
    cores, ends = draw_cores(spec), torch.tensor([0, 4])

    def run(w: Any) -> Tensor:
        return F.embedding_bag(IDS.flatten(), w, ends, mode=mode, padding_idx=padding)

    with no_dense():
        got = run(lazy(spec, cores))
    same_gradients(got, run(reconstruct(spec, cores)), cores)


@pytest.mark.parametrize("name", ROWS)
def test_some_rows_are_a_contraction(name: str) -> None:
    look, rows = ROWS[name]
    if "detach" in name:
        return
    for spec in specs_for((M, N)):
        cores = draw_cores(spec)
        for run in (
            lambda w: F.linear(draw((B, N)), w),
            lambda w: draw((B, rows[1] - rows[0])) @ w,
            lambda w: draw((B, N)) @ w.t(),
        ):
            # Rows of a train are no train: they are built.
            with no_dense() if spec.format == "low_rank" else contextlib.nullcontext():
                got = run(look(lazy(spec, cores)))
            same_gradients(got, run(look(reconstruct(spec, cores))), cores)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "t()": lambda w: w.t(),
    "torch.t": torch.t,
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose, keywords": lambda w: torch.transpose(w, dim0=-1, dim1=-2),
    "twice": lambda w: w.t().t().t(),
    "contiguous": lambda w: w.t().contiguous(),
    "to": lambda w: w.to(torch.float64).t(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_transposed_weight_is_a_contraction(look: Callable[[Any], Any]) -> None:
    for spec in specs_for((M, N)):
        cores = draw_cores(spec)
        for run in (lambda w: F.linear(draw((B, M)), w), lambda w: draw((B, N)) @ w):
            with no_dense():
                seen = look(lazy(spec, cores))
                assert seen.shape == (N, M)
                got = run(seen)
            same_gradients(got, run(look(reconstruct(spec, cores))), cores)


@pytest.mark.parametrize(
    "look",
    [
        lambda w: w[1],
        lambda w: w[-1],
        lambda w: w[torch.tensor(2)],
        lambda w: w[1].t().t(),
        lambda w: w.transpose(1, 2)[0].t(),
    ],
)
def test_one_expert_is_a_contraction(look: Callable[[Any], Any]) -> None:
    spec = TTSpec.low_rank(M, N, 2, experts=E)
    cores = draw_cores(spec)
    with no_dense():
        got = F.linear(draw((B, N)), look(lazy(spec, cores)))
    same_gradients(got, F.linear(draw((B, N)), look(reconstruct(spec, cores))), cores)


@pytest.mark.parametrize("rank", [1, 4, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_experts_are_contractions(rank: int, transposed: bool) -> None:
    spec = TTSpec.low_rank(8, 16, rank, experts=E)
    cores = draw_cores(spec, torch.float32)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    x = draw((10, 16 if transposed else 8), dtype=torch.float32)

    def run(w: Any) -> Tensor:
        w = w.transpose(1, 2) if transposed else w
        return F.grouped_mm(x, w, offs=ends)

    with no_dense():
        got = run(lazy(spec, cores))
    same_gradients(got, run(reconstruct(spec, cores)), cores)


@pytest.mark.parametrize("name", NO_MATMULS)
def test_any_other_function_gets_the_dense_matrix(name: str) -> None:
    shape, run = NO_MATMULS[name]
    if len(shape) < 2:
        return
    stack = shape[0] if len(shape) == 3 and "onvolution" not in name else 0
    if stack:
        spec = TTSpec.low_rank(*shape[1:], 2, experts=stack)
    else:
        spec = TTSpec.low_rank(shape[0], math.prod(shape[1:]), 2)
    cores = draw_cores(spec)
    got = run(lazy(spec, cores, shape))
    want = run(reconstruct(spec, cores).reshape(shape))
    assert isinstance(got, Tensor)
    if want.requires_grad and "sparse" not in name:
        same_gradients(got, want, cores)
    else:
        close(got, want)


ARITHMETIC: dict[str, Callable[[Any], Any]] = {
    "times a number": lambda w: w * 2.0,
    "a number times": lambda w: 2.0 * w,
    "times a tensor": lambda w: w * draw((M, N)),
    "a tensor times": lambda w: draw((M, N)) * w,
    "plus": lambda w: w + draw((M, N)),
    "minus": lambda w: 1.0 - w,
    "with itself": lambda w: w + w,
    "over": lambda w: w / 3.0,
    "negative": lambda w: -w,
    "power": lambda w: w**2,
    "norm": lambda w: w.norm(dim=1),
    "torch.norm": lambda w: torch.linalg.vector_norm(w),
    "a slice": lambda w: w[1:, ::2],
    "a row": lambda w: w[torch.tensor([1, 4])],
    "flatten": lambda w: w.flatten(),
    "chunk": lambda w: torch.cat(w.chunk(2)),
    "abs": lambda w: torch.abs(w).sum(),
    "clone": lambda w: w.clone(),
}


@pytest.mark.parametrize("run", ARITHMETIC.values(), ids=ARITHMETIC)
def test_arithmetic_is_done_on_the_dense_matrix(run: Callable[[Any], Any]) -> None:
    for spec in specs_for((M, N)):
        cores = draw_cores(spec)
        same_gradients(run(lazy(spec, cores)), run(reconstruct(spec, cores)), cores)


COMPARISONS: dict[str, Callable[[Any], Any]] = {
    "less": lambda w: w < 0,
    "at least": lambda w: (w >= 0.5).sum(),
    "equal": lambda w: w == 0,
    "to itself": lambda w: (w == w).all(),
    "torch.equal": lambda w: torch.tensor(torch.equal(w, w)),
    "finite": lambda w: torch.isfinite(w),
}


@pytest.mark.parametrize("run", COMPARISONS.values(), ids=COMPARISONS)
def test_comparisons_are_those_of_the_dense_matrix(run: Callable[[Any], Any]) -> None:
    spec = TTSpec.low_rank(M, N, 2)
    cores = draw_cores(spec)
    assert torch.equal(run(lazy(spec, cores)), run(reconstruct(spec, cores)))
    assert {lazy(spec, cores): 1}  # a key, as a tensor is


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(M, N)),
    "zero_": lambda w: w.zero_(),
    "init": lambda w: nn.init.normal_(w),
    "init of a table": lambda w: nn.init.kaiming_uniform_(w, a=1),
    "out=": lambda w: torch.add(torch.zeros(M, N), 1, out=w),
    "an entry": lambda w: w.__setitem__(0, 1.0),
    "data": lambda w: setattr(w, "data", torch.zeros(M, N)),
    "into data": lambda w: w.data.copy_(torch.zeros(M, N)),
    "into a view": lambda w: w.t().mul_(2),
    "into rows": lambda w: w[1:3].fill_(0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_nothing_is_written_to_where_it_would_be_lost(write: Callable[[Any], Any]) -> None:
    spec = TTSpec.low_rank(M, N, 2)
    cores = draw_cores(spec)
    before = [core.clone() for core in cores]
    with pytest.raises(TypeError, match=r"factorized and cannot be assigned; use tensorize\.dens"):
        write(lazy(spec, cores))
    assert all(torch.equal(a, b) for a, b in zip(cores, before, strict=True))


def test_a_lazy_weight_is_written_from() -> None:
    spec = TTSpec.low_rank(M, N, 2)
    cores = draw_cores(spec)
    want, got = reconstruct(spec, cores), torch.zeros(M, N, dtype=torch.float64)
    with torch.no_grad():
        got[:2] = lazy(spec, cores).data[:2]
        got[2:].copy_(lazy(spec, cores)[2:])
    close(got, want)


def test_a_detached_weight_takes_no_gradient() -> None:
    spec = TTSpec.low_rank(M, N, 2)
    x = draw((B, N)).requires_grad_()
    for look in (lambda w: w.detach(), torch.detach):
        assert F.linear(x, look(lazy(spec, draw_cores(spec)))).grad_fn is not None
        y = F.linear(draw((B, N)), look(lazy(spec, draw_cores(spec))))
        assert not y.requires_grad


def test_shape_dtype_and_device_cost_nothing() -> None:
    for spec, shape in ((TTSpec.low_rank(M, N, 2), (M, N)), (TTSpec((2, 3), (5, 1), (4,)), (M, N))):
        w = lazy(spec, draw_cores(spec, torch.bfloat16))
        with no_dense():
            assert w.shape == w.size() == shape
            assert (w.size(0), w.size(-1), len(w), w.numel()) == (M, N, M, M * N)
            assert w.ndim == w.dim() == 2
            assert w.t().shape == w.T.shape == w.mT.shape == (N, M)
            assert (w.dtype, w.device) == (torch.bfloat16, torch.device("cpu"))
            assert w.requires_grad
            assert w.is_floating_point()
            assert not w.is_meta
            assert repr(w).startswith("FactoredWeight((6, 5), TTSpec(")
        assert w.dense().shape == shape


# ---------------------------------------------------------------------------- padding of a lookup


@pytest.mark.parametrize("padding", [1, -5])
def test_the_padding_row_takes_no_gradient(padding: int) -> None:
    """As in a dense embedding: whatever arrives at a padding position changes no core."""
    ids = torch.tensor([[0, 1, 3], [1, 1, 5]])
    for spec in specs_for((M, N)):
        cores = draw_cores(spec)
        with no_dense():
            got = F.embedding(ids, lazy(spec, cores), padding)
        want = F.embedding(ids, reconstruct(spec, cores), padding)
        same_gradients(got, want, cores)


@pytest.mark.parametrize("wrong", [M, M + 7, -1, 2 * M])
def test_a_row_number_out_of_range_is_an_error_as_in_a_dense_table(wrong: int) -> None:
    for spec in specs_for((M, N)):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([0, wrong]), lazy(spec, draw_cores(spec)))


def test_a_lookup_of_nothing_is_empty() -> None:
    for spec in specs_for((M, N)):
        got = F.embedding(torch.zeros(0, 3, dtype=torch.long), lazy(spec, draw_cores(spec)))
        assert got.shape == (0, 3, N)


# ------------------------------------------------------------------------------- whole models


class Functional(nn.Module):
    """Uses a bare parameter by ``F.linear``, and another by ``@``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(draw((M, N)))
        self.b = nn.Parameter(draw((M, N)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a) @ self.b


class Tied(nn.Module):
    """A head that is the embedding, and knows it by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(M, N)
        self.head = nn.Linear(N, M, bias=False)
        self.double()
        self.tie()

    def tie(self) -> None:
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class Experts(nn.Module):
    """A stack of experts, each applied to some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(draw((E, M, N)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, self.stack[e]) for e in range(E)])


def linear() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return nn.Linear(N, M).double(), {"weight": ("weight",)}, draw((B, N))


def conv1d_of_transformers() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return Conv1D(N, M).double(), {"weight": ("weight",)}, draw((B, T, M))


def embedding() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return nn.Embedding(M, N, padding_idx=1).double(), {"weight": ("weight",)}, IDS


def functional() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return Functional(), {"a": ("a",), "b": ("b",)}, draw((B, N))


def tied() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return Tied(), {"embedding.weight": ("embedding.weight", "head.weight")}, IDS


def convolution() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    model = nn.Conv2d(2, 6, (3, 2), stride=2, padding=1).double()
    return model, {"weight": ("weight",)}, draw((B, 2, 7, 8))


def experts() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    return Experts(), {"stack": ("stack",)}, draw((B, N))


def nested() -> tuple[nn.Module, dict[str, tuple[str, ...]], Tensor]:
    model = nn.Sequential(nn.Embedding(7, N), Functional(), nn.Tanh(), nn.Linear(N, M)).double()
    names = ("0.weight", "1.a", "1.b", "3.weight")
    return model, {name: (name,) for name in names}, IDS


MODELS = {
    build.__name__: build
    for build in (
        linear,
        conv1d_of_transformers,
        embedding,
        functional,
        tied,
        convolution,
        experts,
        nested,
    )
}
ALL = pytest.mark.parametrize("name", MODELS)


def spec_of(parameter: Tensor) -> TTSpec:
    shape = tuple(parameter.shape)
    if len(shape) == 3:
        return TTSpec.low_rank(*shape[1:], 2, experts=shape[0])
    return TTSpec.low_rank(shape[0], math.prod(shape[1:]), 2)


def factorize(
    model: nn.Module, names: dict[str, tuple[str, ...]], train: bool = False
) -> nn.Module:
    """Install random cores in place, and return a dense model with the same weights."""
    oracle = copy.deepcopy(model)
    parameters, dense = dict(model.named_parameters()), dict(oracle.named_parameters())
    for name, aliases in names.items():
        parameter = parameters[name]
        train = train and len(parameter.shape) == 2
        spec = TTSpec((parameter.shape[0], 1), (N, 1), (2,)) if train else spec_of(parameter)
        cores = draw_cores(spec, parameter.dtype)
        with torch.no_grad():
            dense[name].copy_(reconstruct(spec, cores).reshape(parameter.shape))
        install(model, aliases, spec, cores)
    return oracle


@ALL
def test_a_rewritten_model_gives_the_same_outputs_without_a_dense_matrix(name: str) -> None:
    model, names, x = MODELS[name]()
    oracle = factorize(model, names)
    assert all(n not in dict(model.named_parameters()) for n in names)
    with no_dense():
        got = model(x)
    close(got, oracle(x), 512)


@ALL
def test_the_dense_weight_is_freed(name: str) -> None:
    model, names, _ = MODELS[name]()
    watched = [weakref.ref(p) for n, p in model.named_parameters() if n in names]
    storages = [weakref.ref(ref().untyped_storage()) for ref in watched]  # type: ignore[union-attr]
    for n, aliases in names.items():
        spec = spec_of(dict(model.named_parameters())[n])
        install(model, aliases, spec, draw_cores(spec))
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(names)
    assert [ref() for ref in storages] == [None] * len(names)


@ALL
def test_install_and_restore_give_back_the_model_that_was(name: str) -> None:
    model, names, x = MODELS[name]()
    types = {path: type(module) for path, module in model.named_modules()}
    keys = [(key, value.shape) for key, value in model.state_dict().items()]
    own = {path: set(module.__dict__) for path, module in model.named_modules()}
    modules = dict(model.named_modules())
    oracle = factorize(model, names)
    restore(model, lambda w: nn.Parameter(w.dense().detach().contiguous()))
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert all(modules[path] is module for path, module in model.named_modules())
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == own
    assert sorted((key, value.shape) for key, value in model.state_dict().items()) == sorted(keys)
    close(model(x), oracle(x))
    state = oracle.state_dict()
    for key, value in model.state_dict().items():
        close(value, state[key])


def test_restored_ties_are_ties() -> None:
    model, names, _ = tied()
    factorize(model, names)
    restore(model, lambda w: nn.Parameter(w.dense().detach()))
    assert model.head.weight is model.embedding.weight


@ALL
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_from_cores_of_their_own(
    name: str, clone: Callable[[nn.Module], nn.Module]
) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    twin = clone(model)
    with no_dense():
        assert torch.equal(twin(x), model(x))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    own, other = dict(model.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == other.keys()
    assert all(own[key] is not other[key] for key in own)
    before = model(x)
    with torch.no_grad():
        for parameter in other.values():
            parameter.add_(1.0)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


@ALL
def test_state_dict_holds_the_cores_and_loads_again(name: str) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {core for n in names for core in core_names(model, n)}
    assert expected <= set(state)
    assert not set(names) & set(state)
    before = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    assert torch.equal(model(x), before)


def test_the_names_of_the_cores() -> None:
    model, names, _ = nested()
    factorize(model, names)
    assert list(model.state_dict()) == [
        "0.weight_cores.core_0",
        "0.weight_cores.core_1",
        "1.a_cores.core_0",
        "1.a_cores.core_1",
        "1.b_cores.core_0",
        "1.b_cores.core_1",
        "3.first.weight",
        "3.second.weight",
        "3.second.bias",
    ]
    assert [n for n, _ in factored(model)] == ["0.weight", "1.a", "1.b", "3.weight"]


@ALL
def test_every_core_takes_its_gradient(name: str) -> None:
    model, names, x = MODELS[name]()
    oracle = factorize(model, names)
    with no_dense():
        model(x).square().sum().backward()
    oracle(x).square().sum().backward()
    gradients = dict(oracle.named_parameters())
    for n, lazily in factored(model):
        if n not in names:
            continue  # the other name of a tied weight
        dense = lazily.dense()
        wanted = torch.autograd.grad(dense, lazily.cores, gradients[n].grad)
        for core, want in zip(lazily.cores, wanted, strict=True):
            owner = core if core.grad is not None else None
            assert owner is not None, f"{n} has a core without a gradient"
            close(core.grad, want, 4096)


@ALL
def test_frozen_weights_have_frozen_cores_and_modes_reach_every_part(name: str) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    model.requires_grad_(False)
    assert not model(x).requires_grad
    for training in (False, True):
        model.train(training)
        assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_new_parts_are_in_the_mode_of_their_owner(training: bool) -> None:
    for build in MODELS.values():
        model, names, _ = build()
        model.train(training)
        factorize(model, names)
        assert all(module.training is training for module in model.modules())


@ALL
def test_every_dtype_cast_reaches_the_cores(name: str) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {w.dtype for _, w in factored(model)} == {torch.float32}
    assert model(x.float() if x.is_floating_point() else x).dtype == torch.float32


@ALL
@pytest.mark.parametrize("way", ["compile", "export"])
def test_torch_traces_the_contractions(name: str, way: str) -> None:
    model, names, x = MODELS[name]()
    factorize(model, names)
    want = model(x)
    with no_dense():
        if way == "compile":
            traced: Callable = torch.compile(model, backend="eager", fullgraph=True)
        else:
            traced = torch.export.export(model.eval(), (x,)).module()
        close(traced(x), want)


def test_torch_traces_tensor_trains() -> None:
    class Train(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(draw((M, N)))

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(F.embedding(ids, self.w), self.w)

    model = Train()
    spec = TTSpec((2, 3), (5, 1), (4,))
    install(model, ("w",), spec, draw_cores(spec))
    want = model(IDS)
    with no_dense():
        close(torch.compile(model, backend="eager", fullgraph=True)(IDS), want)
        close(torch.export.export(model, (IDS,)).module()(IDS), want)


# ---------------------------------------------------------------------------- the linear layer


def test_a_linear_becomes_two_real_ones() -> None:
    layer = nn.Linear(N, M).double()
    bias = layer.bias
    spec = TTSpec.low_rank(M, N, 2)
    left, right = draw_cores(spec)
    install(nn.Sequential(layer), ("0.weight",), spec, [left, right])
    assert type(layer) is LowRankLinear
    assert [(path, type(child)) for path, child in layer.named_children()] == [
        ("first", nn.Linear),
        ("second", nn.Linear),
    ]
    assert (layer.first.in_features, layer.first.out_features) == (N, 2)
    assert (layer.second.in_features, layer.second.out_features) == (2, M)
    assert (layer.in_features, layer.out_features) == (N, M)
    assert layer.first.weight is right
    assert layer.second.weight is left
    assert layer.first.bias is None
    assert layer.second.bias is layer.bias is bias
    assert (layer.weight.shape, layer.weight.dtype) == ((M, N), torch.float64)


def test_a_linear_that_becomes_a_train_is_no_linear_to_other_tools() -> None:
    model = nn.Sequential(nn.Linear(N, M)).double()
    spec = TTSpec((2, 3), (5, 1), (4,))
    cores = draw_cores(spec)
    install(model, ("0.weight",), spec, cores)
    layer = model[0]
    assert isinstance(layer, FactoredLinear)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert (layer.in_features, layer.out_features) == (N, M)
    x = draw((B, N))
    with no_dense():
        got = model(x)
    close(got, F.linear(x, reconstruct(spec, cores), layer.bias))


def test_the_module_that_the_caller_holds_keeps_its_class() -> None:
    for dense in (nn.Linear(N, M).double(), Conv1D(M, N).double(), nn.Embedding(M, N).double()):
        kind = type(dense)
        factorize(dense, {"weight": ("weight",)})
        assert isinstance(dense, kind)


def test_a_linear_without_bias_has_none() -> None:
    layer = nn.Linear(N, M, bias=False).double()
    spec = TTSpec.low_rank(M, N, 2)
    install(layer, ("weight",), spec, draw_cores(spec))
    assert layer.bias is None
    restore(layer, lambda w: nn.Parameter(w.dense().detach()))
    assert list(layer.state_dict()) == ["weight"]
    assert layer.bias is None


def test_hooks_of_the_dense_layer_stay() -> None:
    layer, calls = nn.Linear(N, M).double(), []
    layer.register_forward_pre_hook(lambda module, args: calls.append("before"))
    layer.register_forward_hook(lambda module, args, output: calls.append("after"))
    layer.register_full_backward_hook(lambda module, gin, gout: calls.append("backward"))
    factorize(layer, {"weight": ("weight",)})
    layer(draw((B, N)).requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]
    restore(layer, lambda w: nn.Parameter(w.dense().detach()))
    layer(draw((B, N)))
    assert calls[3:] == ["before", "after"]


def test_a_subclass_of_linear_keeps_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Doubled(N, M).double()
    oracle = factorize(layer, {"weight": ("weight",)})
    assert isinstance(layer, Doubled)
    with no_dense():
        close(layer(draw((B, N))), oracle(draw((B, N))))


def test_a_transformers_layer_stores_its_matrix_turned() -> None:
    layer = Conv1D(N, M).double()
    factorize(nn.Sequential(layer), {"0.weight": ("0.weight",)})
    assert type(layer) is LowRankLinear
    assert layer.weight.shape == (M, N)
    assert (layer.first.in_features, layer.second.out_features) == (M, N)


def test_shared_linears_share_their_cores() -> None:
    model = nn.ModuleList([nn.Linear(N, M), nn.Linear(N, M)]).double()
    model[1].weight = model[0].weight
    factorize(model, {"0.weight": ("0.weight", "1.weight")})
    assert model[0].first.weight is model[1].first.weight
    assert model[0].bias is not model[1].bias
    assert sum(p.numel() for p in model.parameters()) == 2 * (M + N) + 2 * M


def test_one_module_under_two_names_is_rewritten_once() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(N, M).double()
    factorize(model, {"a.weight": ("a.weight", "b.weight")})
    assert model.a is model.b
    assert type(model.a) is LowRankLinear


# --------------------------------------------------------------------------------- assignment


def test_tying_again_is_allowed() -> None:
    model, names, _ = tied()
    factorize(model, names)
    before = model(IDS)
    model.tie()
    model.embedding.weight = model.head.weight
    assert torch.equal(model(IDS), before)
    assert sum(p.numel() for p in model.parameters()) == 2 * (M + N)


@pytest.mark.parametrize(
    "value",
    [
        lambda: nn.Parameter(draw((M, N))),
        lambda: draw((M, N)),
        lambda: None,
        lambda: lazy(TTSpec.low_rank(M, N, 2), draw_cores(TTSpec.low_rank(M, N, 2))),
        lambda: lazy(
            TTSpec((2, 1, 3), (1, 5, 1), (2, 3)), draw_cores(TTSpec((2, 1, 3), (1, 5, 1), (2, 3)))
        ),
    ],
    ids=["parameter", "tensor", "None", "other cores", "other format"],
)
@pytest.mark.parametrize("owner", ["embedding", "head"])
def test_assigning_anything_else_says_what_to_do(owner: str, value: Callable[[], Any]) -> None:
    model, names, _ = tied()
    factorize(model, names)
    before = model(IDS)
    with pytest.raises(TypeError, match=r"weight of .* is factorized .* tensorize\.densify"):
        getattr(model, owner).weight = value()
    assert torch.equal(model(IDS), before)


def test_cores_are_a_module_of_parameters() -> None:
    spec = TTSpec((2, 3), (5, 1), (4,))
    cores = draw_cores(spec)
    module = Cores(spec, cores)
    assert [n for n, _ in module.named_parameters()] == ["core_0", "core_1"]
    assert all(a is b for a, b in zip(module().cores, cores, strict=True))
    assert "TTSpec" in repr(module)
