"""What is said where torchtitan is not there, or another one is."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import pytest

from tensorize import TensorizeError


def import_ours(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    """``import tensorize.torchtitan`` beside a torchtitan of some version."""

    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    for name in [name for name in sys.modules if name.startswith("tensorize.torchtitan")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.metadata, "version", version)
    importlib.import_module("tensorize.torchtitan")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "torchtitan is not installed"),
        ("0.4.0", "torchtitan 0.4.0 is installed"),
        ("0.30.1", "torchtitan 0.30.1 is installed"),
        ("0.2.2", "torchtitan 0.2.2 is installed"),
    ],
)
def test_it_is_said_which_torchtitan_is_needed(
    found: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TensorizeError, match=said) as error:
        import_ours(monkeypatch, found)
    assert error.value.way_out == "pip install torchtitan==0.3.0"
