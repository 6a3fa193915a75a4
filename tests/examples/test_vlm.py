"""Vision-language models of three shapes: what their processors give, and what is left of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import tensorize
from examples import vlm
from examples.vlm import SHAPES, Pair, Processor


def given(number: int, seed: int = 0) -> list[Pair]:
    return vlm.pairs(number, torch.Generator().manual_seed(seed))


def made(name: str) -> tuple[nn.Module, Processor]:
    """A shape with random weights, large enough for an image to matter."""
    torch.manual_seed(0)
    model, processor = SHAPES[name](vlm.make_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval(), processor


def test_an_image_shows_what_its_answer_says() -> None:
    for image, text in given(20):
        *_, colour, row, column = text.split()
        pixels = torch.from_numpy(np.array(image)).double()
        corners = pixels.reshape(2, vlm.SIDE // 2, 2, vlm.SIDE // 2, 3).mean((1, 3))
        near = (corners - torch.tensor(vlm.COLOURS[colour])).norm(dim=-1)
        place = vlm.ROWS.index(row), vlm.COLUMNS.index(column)
        assert int(near.argmin()) == 2 * place[0] + place[1]


def test_the_processor_of_llava_gives_what_transformers_own_does() -> None:
    _, processor = made("llava")
    some = given(3)
    theirs = hf.LlavaProcessor(
        processor.images,
        processor.tokenizer,
        patch_size=vlm.PATCH,
        vision_feature_select_strategy="full",
    )
    images, texts = ([each[k] for each in some] for k in (0, 1))
    wanted = theirs(images=images, text=texts, return_tensors="pt", padding=True)
    got = processor(some)
    assert got.keys() == {*wanted} - {"token_type_ids"}
    assert all(torch.equal(got[name], wanted[name]) for name in got)


@pytest.mark.parametrize("name", SHAPES)
def test_the_answer_depends_on_the_image(name: str) -> None:
    model, processor = made(name)
    (one, text), (other, _) = given(2)
    with torch.no_grad():
        logits = model(**processor([(one, text), (other, text)])).logits
    difference = (logits[0, -1] - logits[1, -1]).norm() / logits[0, -1].norm()
    assert float(difference) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_compressed_on_what_its_processor_gives(name: str) -> None:
    """As dicts, or by ``to_inputs=``, to the same plan; the places of images count in nothing."""
    model, processor = made(name)
    known = [given(4, seed) for seed in range(8)]
    dicts = [processor(some) for some in known]
    analysis = tensorize.analyze(model, calibration=dicts, refine=None)
    by_pairs = tensorize.analyze(model, calibration=known, to_inputs=processor, refine=None)
    for budget in (0.5, 0.25):
        assert analysis.plan(budget) == by_pairs.plan(budget)
    plan = analysis.plan(0.5)
    small = tensorize.apply(model, plan)
    found = tensorize.evaluate({"half": small}, model, [processor(given(16, 9))], time=False)
    ids = processor(given(16, 9))["input_ids"]
    places = (ids == vlm.WORDS.index(vlm.IMAGE)).sum()
    assert found.kind == "text"
    assert found.rows == ids.numel() - int(places) + (16 if ids[0, 0] == 2 else 0)
    assert found["half"].parameters <= 0.5 * found.dense.parameters
    low, high = plan.predicted.loss_interval
    assert 0.5 * low < found["half"].quality.distance < 2 * high
    options = hf.GenerationConfig(do_sample=False, max_new_tokens=3, pad_token_id=0)
    written = small.generate(**dicts[0], generation_config=options)
    assert written.shape == (4, dicts[0]["input_ids"].shape[1] + 3)


@pytest.mark.slow
def test_answers_are_learnt_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--shape llava --steps 120 --budgets 0.75 0.15 --known 64 --unseen 32"
    (rows,) = vlm.main(arguments.split()).values()
    dense, large, small = rows
    assert dense.own > 0.6  # by chance one of 24
    assert large.own > dense.own - 0.1
    assert small.lost > 10 * large.lost
    assert large.parameters <= 0.75 * dense.parameters
    assert "nats a word" in capsys.readouterr().out
