"""Dead views and identities leave a graph; what writes or is written to stays."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tensorize.passes.lowering.cleanup import RemoveDead, RemoveIdentities, RemoveRepeats
from tensorize.passes.lowering.graph import Lowered, lower, memory_of, written
from tests.backend.lowered_models import X, calls, lowered_and_run, traced


def test_cleanup_removes_dead_views_and_keeps_writes() -> None:
    def forward(x: Tensor) -> Tensor:
        x.transpose(0, 1).reshape(-1)  # dead
        x.view(-1).add_(1)  # dead to the graph, not to x
        return x * 2

    graph = fx.symbolic_trace(forward)
    cleaned = lower(Lowered(graph, {}), (RemoveDead(),)).graph
    assert calls(cleaned) == ["view", "add_", "mul"]


def test_identities_are_removed_and_nothing_that_computes() -> None:
    def forward(x: Tensor) -> Tensor:
        x = F.dropout(x + 1, 0.5, False).to(torch.float32).contiguous()
        x = F.dropout(input=x, training=False)
        y = F.dropout(x, 0.5, True)
        return y.t().contiguous().to(torch.float64)

    program = traced(forward, torch.randn(3, 4))  # type: ignore[arg-type]
    cleaned = lower(program, (RemoveIdentities(),)).graph
    assert calls(cleaned) == ["add", "dropout", "t", "contiguous", "to"]


def test_an_identity_that_is_written_to_stays() -> None:
    def forward(x: Tensor) -> Tensor:
        x = x + 1
        y = F.dropout(x, 0.5, False)
        y.view(-1).mul_(2)
        return x

    program = traced(forward, torch.randn(3, 4))  # type: ignore[arg-type]
    assert "dropout" in calls(lower(program, (RemoveIdentities(),)).graph)


def test_repeats_are_computed_once() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        one, two = F.linear(x.reshape(-1, 4), w), F.linear(x.reshape(-1, 4), w)
        return (one * two)[:, 1:] + (one * two)[:, 1:] + F.linear(x.reshape(-1, 4), w + 1)[:, 1:]

    x, w = torch.randn(3, 4), torch.randn(4, 4)
    lowered, result = lowered_and_run(forward, (x, w), RemoveRepeats())  # type: ignore[arg-type]
    kept = ["reshape", "linear", "mul", "getitem", "add", "add", "linear", "getitem", "add"]
    assert calls(lowered.graph) == kept
    assert torch.equal(result, forward(x, w))


def test_what_is_written_to_or_returned_is_no_repeat() -> None:
    def written_to(x: Tensor, w: Tensor) -> Tensor:
        before = F.linear(x, w)
        x.mul_(2)
        return before - F.linear(x, w)

    def returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w), F.linear(x, w)

    def random(x: Tensor, w: Tensor) -> Tensor:
        return F.dropout(x, 0.5, True) + F.dropout(x, 0.5, True) * w

    def in_modes(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = F.linear(x, w)
        return half.float() - F.linear(x, w)

    for forward in (written_to, returned, random, in_modes):
        x, w = torch.randn(4, 4), torch.randn(4, 4)
        program = traced(forward, (x, w))  # type: ignore[arg-type]
        before = calls(program.graph)
        assert calls(lower(program, (RemoveRepeats(),)).graph) == before


def test_what_is_written_to_is_known_through_views() -> None:
    def forward(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x, y, z, free = x + 1, y + 1, z + 1, x + 2
        x.view(-1)[1:].mul_(2)
        F.relu(y, inplace=True)
        z[0] = 1.0
        return torch.add(x, y, out=torch.empty_like(x)) + z + free

    seen: list[list[bool]] = []

    def keep(graph: fx.GraphModule, inputs: list) -> object:
        changed = written(graph.graph)
        added = [node for node in graph.graph.nodes if node.target is operator.add][:4]
        seen.append([memory_of(node) in changed for node in added])
        return graph.forward

    torch.compile(forward, backend=keep)(X[0], X[0] + 0, X[0] * 1)
    assert seen[0] == [True, True, True, False]
