"""The checks of a guarded model's products: out of the way of fusing, and counted by launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from tensorize.passes.lowering.graph import memory_of, written

_OPERATION = "tensorize.wrong_rows"
"""(x, y, signs, sums, offset, many sums or none, limits, limits before rounding, the guard's key),
which gives how many rows of y are wrong."""


@dataclass(frozen=True)
class Check:
    """The check of one product, taken off it; ``add`` adds what it finds to the weight's count."""

    node: fx.Node
    add: fx.Node
    x: fx.Node
    y: fx.Node

    @property
    def known(self) -> tuple[fx.Node, fx.Node]:
        """The signs and the sums of the weight: before rounding one is enough of 16 bits too."""
        signs, sums = self.node.args[2:4]
        return signs, sums  # type: ignore[return-value]

    @property
    def limits(self) -> tuple[float, float]:
        relative, floor = self.node.args[7]  # type: ignore[misc]
        return relative, floor  # type: ignore[return-value]

    @property
    def taken_over(self) -> bool:
        """Whether a launch counts."""
        return self.node not in self.add.args

    def count(self, wrong: fx.Node) -> None:
        """Let it be ``wrong`` that is added, a value that comes later than the product did."""
        self.add.replace_input_with(self.node, wrong)
        wrong.append(self.add)

    def put_back(self) -> None:
        """Check the product again as before, unless a launch does."""
        if self.taken_over:
            self.node.graph.erase_node(self.node)
            return
        self.node.update_arg(0, self.x)
        self.node.update_arg(1, self.y)


def guards_of(graph: fx.Graph) -> list[str]:
    """The keys of the guards whose checks are in a graph that leaves nothing behind but their
    counts: where it finds a fault, it may be run again. None of any other graph."""
    checks = [node for node in graph.nodes if _is_check(node)]
    counts = {memory_of(user.args[0]) for node in checks for user in node.users}
    outside = {memory_of(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    if (written(graph) & outside) - counts:
        return []
    return list(dict.fromkeys(str(node.args[8]) for node in checks))


def _is_check(node: fx.Node) -> bool:
    return str(node.target).startswith(_OPERATION)


def take_checks(graph: fx.Graph, contract: Any) -> dict[fx.Node, Check]:
    """Those of products by one operation, by the node of the product; they read them no more."""
    found = {}
    for node in graph.nodes:
        if not _is_check(node) or len(node.users) != 1:
            continue
        x, y, (add,) = node.args[0], node.args[1], node.users
        made: Any = y.args[0] if y.args else None  # y is a part of what the operation gives
        of_product = isinstance(made, fx.Node) and made.target is contract
        if add.target != "add_" or add.users or not of_product or made.args[0] is not x:
            continue
        found[y] = Check(node, add, x, y)
        node.update_arg(0, None)
        node.update_arg(1, None)
    return found
