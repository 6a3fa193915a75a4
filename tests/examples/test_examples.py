"""The examples at a small size: what they print is true, and what they promise is kept."""

from __future__ import annotations

import pytest
import torch

from examples import compress_vit, llama, lora, science_surrogate, serve
from examples.science_surrogate import Solver, Surrogate


def test_every_figure_can_be_told_from_every_other() -> None:
    side = torch.linspace(-1.5, 1.5, 61)
    figures = [compress_vit.inside(f, side[None, :], side[:, None]) for f in compress_vit.FIGURES]
    for k, one in enumerate(figures):
        assert 0.03 < float(one.float().mean()) < 0.6
        for other in figures[:k]:
            assert float((one & other).sum() / (one | other).sum()) < 0.9


def test_images_are_drawn_by_their_seed() -> None:
    drawn = [compress_vit.images(5, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.slow
def test_compress_vit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--budgets 0.75 0.1 --width 48 --layers 2 --patch 8 --steps 300 --batch 48"
    dense, large, small = compress_vit.main(arguments.split())
    assert "as the dense one" in capsys.readouterr().out
    assert dense.right > 0.4  # chance is 0.125: something was learned
    assert (dense.agreement, dense.divergence) == (1.0, 0.0)
    assert large.parameters <= 0.75 * dense.parameters
    assert small.parameters <= 0.1 * dense.parameters
    assert large.agreement > 0.9
    assert large.right > dense.right - 0.05
    assert small.divergence > 4 * large.divergence
    assert large.predicted == pytest.approx(large.divergence, rel=1.0)


# -------------------------------------------------------------------------------- a surrogate


def test_the_solver_keeps_what_the_equation_keeps() -> None:
    """Without a flow a wave decays at the rate of diffusion; with it means stay, energy falls."""
    solver = Solver(32)
    fields = solver.initial(4, torch.Generator().manual_seed(0))
    later = solver.advance(fields)
    torch.testing.assert_close(later.mean((1, 2)), fields.mean((1, 2)), atol=1e-5, rtol=0)
    assert bool((later.square().sum((1, 2)) < fields.square().sum((1, 2))).all())
    assert float((later - fields).norm() / fields.norm()) > 0.2  # it is no small step
    x = torch.arange(32) * 2 * torch.pi / 32
    wave = (2 * x)[None, None, :].cos().expand(1, 32, 32).contiguous()
    solver.flow = torch.zeros(()), torch.ones(())  # along the wave's crests
    rate = torch.tensor(-4 * science_surrogate.VISCOSITY * science_surrogate.INTERVAL)
    torch.testing.assert_close(solver.advance(wave), wave * rate.exp(), atol=1e-5, rtol=0)
    solver.flow = torch.ones(()), torch.zeros(())  # across them
    moved = (2 * (x - science_surrogate.INTERVAL))[None, None, :].cos().expand(1, 32, 32)
    torch.testing.assert_close(solver.advance(wave), moved * rate.exp(), atol=1e-4, rtol=0)


def test_the_flow_has_no_sources() -> None:
    """What flows in flows out: the divergence is zero."""
    solver = Solver(32)
    u, v = solver.flow
    k = torch.fft.fftfreq(32, 1 / 32)
    spectra = [torch.fft.fft2(part.expand(32, 32)) for part in (u, v)]
    divergence = k[None, :] * spectra[0] + k[:, None] * spectra[1]
    assert float(divergence.abs().max()) < 1e-3


def test_the_solver_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the step, a sixteenth of the error: Runge–Kutta of fourth order."""
    solver = Solver(32)
    fields = solver.initial(2, torch.Generator().manual_seed(0)).double()
    results = []
    for steps in (5, 10, 80):
        monkeypatch.setattr(science_surrogate, "STEPS", steps)
        results.append(solver.advance(fields))
    coarse, fine = ((result - results[-1]).norm() for result in results[:2])
    assert 10 < float(coarse / fine) < 24


def test_patches_come_back_where_they_were() -> None:
    model = Surrogate(16, 32, 0)
    with torch.no_grad():
        model.read.weight.copy_(torch.eye(32, 16))
        model.write.weight.copy_(torch.eye(16, 32))
        model.read.bias.zero_()
        model.write.bias.zero_()
        model.place.zero_()
    model.norm = torch.nn.Identity()  # type: ignore[assignment]
    field = torch.randn(2, 16, 16)
    assert torch.equal(model(field), field)


@pytest.mark.slow
def test_science_surrogate(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--side 16 --width 48 --layers 2 --steps 500 --fields 96 --times 4"
    rows, persistence = science_surrogate.main(
        [*arguments.split(), "--budgets", "0.9", "0.75", "0.1", "--within", "1.25"]
    )
    dense, smallest = rows[0], rows[-1]
    assert dense.mean < 0.5 * float(persistence.mean())  # it has learned to forecast
    best = science_surrogate.chosen(rows)
    assert best is not dense
    assert best.mean <= 1.25 * dense.mean
    assert not smallest.within
    assert smallest.mean > 1.25 * dense.mean
    assert f"{best.parameters / dense.parameters:.1%}".rstrip("%") in capsys.readouterr().out


@pytest.mark.slow
def test_an_operator_rolls_out_as_before_at_half_its_parameters() -> None:
    arguments = "--operator --side 16 --width 12 --layers 2 --steps 400 --fields 64 --times 6"
    rows, persistence = science_surrogate.main([*arguments.split(), "--budgets", "0.5", "0.25"])
    dense, half, quarter = rows
    assert dense.mean < 0.75 * float(persistence.mean())  # it has learned something
    for one, other in zip(half.errors, dense.errors, strict=True):
        assert one < 1.1 * other
    assert quarter.parameters <= 0.25 * dense.parameters


# ------------------------------------------------------------------------------------- a server


@pytest.mark.slow  # it compresses a model of its own
def test_serve(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--port 0 --requests 4 --tokens 4 --documents 2 --budget 0.6"
    found = serve.main(arguments.split())
    assert found["tokens_per_second"] > 0
    assert "tokens a second" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ LoRA


# peft's own, of transformers.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    arguments = "--budget 0.25 --steps 12 --batch 4 --windows 4 --held-out 8 --rank 4 --refine none"
    result = lora.main(arguments.split())
    assert result.kept <= 0.25
    assert result.dense < result.tuned < result.compressed
    assert result.recovered > 0.05
    assert result.trainable < 0.1 * sum(p.numel() for p in llama.build().parameters())
    assert result.loads_to_the_same_bits
    assert "taken back" in capsys.readouterr().out
