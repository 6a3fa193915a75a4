"""Remove what nothing depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensorize.passes.lowering import Lowered


@dataclass(frozen=True)
class RemoveDead:
    """The same graph without nodes whose results are not used and that change nothing."""

    name: str = "cleanup"

    def run(self, program: Lowered) -> Lowered:
        before = len(program.graph.graph.nodes)
        program.graph.graph.eliminate_dead_code()
        gone = before - len(program.graph.graph.nodes)
        return replace(program, summary=f"{gone} dead nodes removed")
