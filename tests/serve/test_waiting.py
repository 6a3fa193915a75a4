"""Factors wait for their layers; what is missing has a name, and what was taken is let go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorize.base.errors import CheckpointError
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.spec import TTSpec
from tensorize.serve.waiting import Waiting, bias_names, keys_of, sorted_out
from tensorize.store.contents import SiteRecord

PLAIN = TTSpec.low_rank(6, 4, 2)


def site(*names: str, spec: object = PLAIN) -> SiteRecord:
    return SiteRecord(names, (6, 4), spec)  # type: ignore[arg-type]


def passed(
    tensors: dict[str, Tensor], waiting: Waiting, *sites: SiteRecord, **given: object
) -> list[str]:
    how = {"biases": bias_names(sites), "dropped": (), **given}
    return [key for key, _ in sorted_out(tensors.items(), waiting, **how)]  # type: ignore[arg-type]


def test_a_weight_has_a_key_for_every_form_that_it_is_stored_in() -> None:
    assert keys_of(site("a.q.weight"), {}) == [
        ("a.q.second.weight", "a.q.weight_cores.core_0"),
        ("a.q.first.weight", "a.q.weight_cores.core_1"),
    ]
    pivoted = site("a.q.weight", spec=TTSpec.low_rank(6, 4, 2, pivoted=True))
    assert keys_of(pivoted, {})[2] == ("a.q.order", "a.q.weight_cores.order")
    bits = site("w", spec=QuantizedSpec(DenseSpec((6, 4)), "int4"))
    assert [keys[-1] for keys in keys_of(bits, {})] == [
        "w_cores.core_0", "w_cores.codes_0", "w_cores.zeros_0",
    ]  # fmt: skip


def test_factors_wait_and_the_rest_passes() -> None:
    own = site("a.q.weight")
    waiting = Waiting([own], {})
    first, second = torch.randn(2, 4), torch.randn(6, 2)
    tensors = {
        "norm": torch.ones(1), "a.q.first.weight": first, "a.q.second.weight": second,
        "a.q.second.bias": torch.ones(6), "b.weight": torch.ones(1),
    }  # fmt: skip
    assert passed(tensors, waiting, own) == ["norm", "a.q.bias", "b.weight"]
    held, source = waiting.take(own)
    assert held[0] is second
    assert held[1] is first
    assert source == "a.q.first.weight"


def test_a_first_factor_in_common_is_let_go_with_its_last_weight() -> None:
    q, k = site("q.weight"), site("k.weight")
    waiting = Waiting([q, k], {"k.first.weight": "q.first.weight"})
    tensors = {
        "q.first.weight": torch.randn(2, 4), "q.second.weight": torch.randn(6, 2),
        "k.second.weight": torch.randn(6, 2),
    }  # fmt: skip
    assert passed(tensors, waiting, q, k) == []
    assert waiting.take(q)[1] == waiting.take(k)[1] == "q.first.weight"
    assert waiting._held == {}


def test_a_tied_weight_is_found_under_the_first_of_its_names() -> None:
    own = site("embed.weight", "head.weight")
    waiting = Waiting([own], {"head.second.weight": "embed.weight_cores.core_0"})
    tensors = {
        "embed.weight_cores.core_0": torch.randn(6, 2),
        "embed.weight_cores.core_1": torch.randn(2, 4),
    }
    assert passed(tensors, waiting, own) == []
    assert waiting.take(own)[1] == "embed.weight_cores.core_1"


def test_what_does_not_arrive_has_a_name() -> None:
    own = site("a.q.weight")
    waiting = Waiting([own], {})
    passed({"a.q.second.weight": torch.randn(6, 2)}, waiting, own)
    with pytest.raises(CheckpointError, match=r"a\.q\.weight.*no a\.q\.first\.weight"):
        waiting.take(own)
    with pytest.raises(CheckpointError, match=r"norm\.weight: the checkpoint does not hold it"):
        passed({}, waiting, own, expected={"norm.weight"})


def test_another_shape_has_a_name() -> None:
    own = site("a.q.weight")
    waiting = Waiting([own], {})
    wrong = {"a.q.second.weight": torch.randn(6, 3), "a.q.first.weight": torch.randn(2, 4)}
    passed(wrong, waiting, own)
    with pytest.raises(CheckpointError, match=r"shape \(6, 3\).*asks for \(6, 2\)"):
        waiting.take(own)


def test_layers_of_another_process_are_dropped() -> None:
    waiting = Waiting([], {})
    tensors = {"a.q.first.weight": torch.ones(1), "norm": torch.ones(1)}
    assert passed(tensors, waiting, dropped={"a.q.first.weight"}) == ["norm"]
