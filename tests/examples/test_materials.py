"""A trained potential, where its packages are; and what is said where they are not."""

from __future__ import annotations

import importlib.util

import pytest

from examples import materials


def test_what_is_missing_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "make materials" in (materials.missing() or "")
    with pytest.raises(SystemExit, match="chgnet, pymatgen, ase not installed"):
        materials.load_pretrained()


def test_a_row_says_whether_errors_are_where_they_were_predicted() -> None:
    errors = {materials.ENERGY: 3.0, materials.FORCES: 11.0, materials.STRESS: 0.1}
    good = materials.Row("90 %, ranks alone", 1_485_000, errors, {materials.ENERGY: (2.0, 4.0)})
    bad = materials.Row("75 %, ranks alone", 1_237_000, errors, {materials.FORCES: (2.0, 4.0)})
    assert good.inside
    assert not bad.inside
    text = materials.shown([good, bad])
    assert "3.00 (2.00 to 4.00)" in text
    assert "meV/Å" in text


@pytest.mark.slow
@pytest.mark.skipif(materials.missing() is not None, reason=materials.missing() or "")
def test_crystals_are_compressed_measured_healed_and_relaxed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = "--crystals 24 --unseen 8 --most-atoms 4 --budgets 0.9 0.5 --heal 10 --relax 3"
    rows = materials.main(arguments.split())
    names = [row.name for row in rows]
    pairs = [f"{kept} %, {how}" for kept in (90, 50) for how in ("bits and ranks", "ranks alone")]
    assert [name.replace(".0", "") for name in names] == [*pairs, "50 %, healed"]
    mixed, kept, small, cut, _ = rows
    for name in (materials.ENERGY, materials.FORCES, materials.STRESS):
        assert 0 < mixed.errors[name] < cut.errors[name]
        assert 0 < kept.errors[name] < cut.errors[name]
        assert 0 < small.errors[name] < cut.errors[name] / 2
    assert mixed.bytes <= 0.9 * 4 * 412_525
    assert capsys.readouterr().out.count(" relaxed, ") == 3
