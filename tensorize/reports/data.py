"""What a report holds: weights, totals, points of a curve, stages."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from tensorize.formats.dense import is_dense
from tensorize.ir.plan import Prediction, RankPlan, Totals


@dataclass(frozen=True)
class RunsBy:
    """What a weight runs by for some numbers of rows, from ``first`` to ``last`` (None: any more).

    ``winner`` is ``"library"`` or the family of a kernel, ``ratio`` the kernel's time over that of
    the library's matmuls where it was measured on this machine, ``why`` what decided otherwise.
    """

    first: int
    last: int | None
    winner: str
    ratio: float | None = None
    why: str = ""

    def __str__(self) -> str:
        rows = f"{self.first} rows and more" if self.last is None else f"up to {self.last} rows"
        timed = f"the kernel takes {self.ratio or 0:.2f} of the library's time"
        why = self.why if self.ratio is None else timed
        return f"{rows}: {self.winner}{f' ({why})' if why else ''}"


@dataclass(frozen=True)
class SiteReport:
    """What became of one parameter.

    ``format`` is ``"dense"``, ``"low_rank"``, ``"tt"`` or ``"block"``. ``predicted_error`` is the
    relative error of the weight in the plan's metric, ``actual_error`` the same measured on the
    cores (0.0 when dense), ``predicted_loss`` the site's share of the predicted rise of the loss.
    ``runs_by`` is empty where a weight runs by torch operations whatever the rows. ``precision`` is
    what its entries are rounded to (None: they are not).
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    format: str
    ranks: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    predicted_error: float
    actual_error: float
    predicted_loss: float
    reason: str
    runs_by: tuple[RunsBy, ...] = ()
    precision: str | None = None

    @classmethod
    def of(
        cls, choice: RankPlan, aliases: tuple[str, ...], actual_error: float = 0.0
    ) -> SiteReport:
        """What a plan said of a parameter, and the error that was measured."""
        names = {f.name for f in fields(cls)} - {"aliases", "actual_error", "runs_by"}
        planned = {name: getattr(choice, name) for name in names}
        return cls(aliases=aliases, actual_error=actual_error, **planned)

    @property
    def left(self) -> bool:
        """Whether it is the dense weight still."""
        return is_dense(self.format) and self.precision is None

    @property
    def share(self) -> float:
        """Parameters that are left, as a share."""
        return share_of(self.parameters_after, self.parameters_before)


@dataclass(frozen=True)
class Shares:
    """What is left of each figure, 1.0 for all of it."""

    parameters: float
    bytes: float
    flops: float


@dataclass(frozen=True)
class ReportTotals:
    """The whole model before and after, parameters that are no site included.

    ``packed``: the bytes that a CPU holds beside those after, once all weights have run. ``image``:
    FLOPs of an image before and after, of a model that has one row of outputs for each.
    """

    before: Totals
    after: Totals
    packed: int = 0
    image: tuple[int, int] | None = None

    @property
    def counted_flops(self) -> tuple[str, float, float]:
        """FLOPs before and after, and of what: an image where that is known, else a row."""
        if self.image is not None:
            return ("image", *self.image)
        return "row", self.before.flops, self.after.flops

    @property
    def share(self) -> Shares:
        """After over before."""
        return Shares(
            **{
                f.name: share_of(getattr(self.after, f.name), getattr(self.before, f.name))
                for f in fields(Shares)
            }
        )


@dataclass(frozen=True)
class CurvePoint(Prediction):
    """What one budget is predicted to give: a share of the parameters, or of the bytes with bits.

    ``ranks_alone``: where bits were analysed, the quality of ranks without them at as many bytes.
    """

    budget: float = field(kw_only=True)
    ranks_alone: float | None = field(default=None, kw_only=True)

    @property
    def quality(self) -> float:
        """The predicted rise of the loss, the error of the outputs where there is none."""
        return self.output_error if self.loss is None else self.loss


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline: how long it took, and in one line what it did."""

    name: str
    seconds: float
    summary: str


def share_of(after: float, before: float) -> float:
    return after / before if before else 1.0
