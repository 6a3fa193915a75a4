"""Run the result beside its dense form: it must do the same, and read no dense weight any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tensorize.base.errors import AnalysisError, ModelError, TensorizeError
from tensorize.formats.quantized import inputs_in_full
from tensorize.ir.sites import Batch
from tensorize.passes.beside import behaviour
from tensorize.passes.beside.behaviour import Calls
from tensorize.passes.beside.dense_reads import DenseReads, Memory
from tensorize.passes.beside.rebuilt import rebuilt
from tensorize.passes.rewrite.copies import copy_sharing
from tensorize.passes.stages import Rewritten
from tensorize.weight.cores import Cores
from tensorize.weight.install import factored, restore
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.low_rank import LowRankLinear


@dataclass(frozen=True)
class CompareRuns:
    """Runs the result, and a copy in which each weight is rebuilt from its factors at every call.

    Args:
        batch: what they are run on; None: nothing is known that the model takes.
        memory: where the dense weights were that have factors now.

    Raises:
        AnalysisError: they differ by more than rounding, the result fails where the dense form
            does not, or it still reads a dense weight; all weights to blame are named.
    """

    batch: Batch | None
    memory: tuple[Memory, ...] = ()
    name: str = "compare"

    @inputs_in_full()
    def run(self, done: Rewritten) -> Rewritten:
        names = [name for name, weight in factored(done.model) if not weight.is_meta]
        if self.batch is None or not names:
            return replace(done, summary="not run: no inputs are known")
        try:
            runs = _Runs(done.model, self.batch)
        except ModelError as error:
            return replace(done, summary=f"not run: {error.cause}")
        reads, failed = DenseReads(done.model, self.memory), None
        found: Calls = []
        try:
            found = behaviour.calls_of(done.model, self.batch, runs.paths, reads)
        except TensorizeError as error:
            failed = error
        if reads.seen:
            func = next(iter(reads.seen.values()))
            cause = f"{func} still reads the dense weight, which something holds"
            raise _fault(list(reads.seen), cause)
        try:
            dense = runs.dense(names)
        except ModelError as error:  # its dense form cannot be had
            if failed is not None:
                raise failed from None
            return replace(done, summary=f"not compared: {behaviour.words_of(error)}")
        if failed is None and not runs.differ(found, dense, names):
            apart = behaviour.difference(found, dense)
            return replace(done, summary=f"as its dense form, to {apart:.1e} of what modules give")

        def wrong(some: Sequence[str]) -> bool:
            try:
                mixed = runs.dense([name for name in names if name not in some])
            except TensorizeError:
                return True
            return runs.differ(mixed, dense, names)

        blamed = behaviour.to_blame(names, wrong)
        if failed is not None:
            raise _fault(blamed, f"it fails: {behaviour.words_of(failed)}") from failed
        raise _fault(blamed, "it gives something else than with the weights that they make")


class _Runs:
    """Runs of a result in its dense form, or in part of it; each begins with the same state."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = _copy(model), batch
        self.paths, self.unit = _common_paths(model), behaviour.unit_of(model)

    def dense(self, names: Sequence[str], noise: float = 0.0) -> Calls:
        """The calls of a copy that has no factors under these names."""
        copied = _copy(self.model)

        def build(weight: FactoredWeight) -> nn.Parameter:
            return rebuilt(weight, weight.dense, noise)

        restore(copied, build, set(names))
        return behaviour.calls_of(copied, self.batch, self.paths)

    def differ(self, found: Calls, dense: Calls, names: Sequence[str]) -> bool:
        return behaviour.differs(
            found, dense, self.unit, lambda: self.dense(names, noise=self.unit)
        )


def _copy(model: nn.Module) -> nn.Module:
    return copy_sharing(model, dict(model.named_parameters()), to_run=True)


def _common_paths(model: nn.Module) -> list[str]:
    """The modules that there are in the dense form as well."""
    own = {id(m) for m in model.modules() if isinstance(m, LowRankLinear | Cores)}
    inside = [m for m in model.modules() if id(m) in own]
    hidden = {id(child) for m in inside for child in m.modules() if child is not m}
    hidden |= {id(m) for m in inside if isinstance(m, Cores)}
    return [path for path, m in model.named_modules() if id(m) not in hidden]


def _fault(names: Sequence[str], cause: str) -> AnalysisError:
    return AnalysisError(
        f"the model cannot have factors in the place of {', '.join(names)}: {cause}",
        site=names[0],
        way_out=f"exclude={list(names)!r}",
    )
