"""Vision-language models: an image and a question in, words out; compressed through its processor.

    python -m examples.vlm --shape smolvlm --budgets 0.75 0.5

Three shapes, small, with classes of transformers: LLaVA (an image is so many words), Qwen2.5-VL
(images of any size, whose patches of all images lie in one list) and SmolVLM (an image is cut into
tiles). The task is made here: a square of one of six colours stands in a corner, and the answer
names both. What a model is calibrated on is what its processor gives for pairs of image and text,
with `to_inputs=`; the places where an image stands in the text count in nothing.

Shapes: B pairs, S pixels a side, T words.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import tensorize
from examples.budgets import Row, shown
from examples.fitting import fit
from tensorize.base.printer import number, percent

COLOURS = {
    "red": (200, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 200),
    "yellow": (210, 200, 50), "violet": (140, 50, 170), "white": (235, 235, 235),
}  # fmt: skip
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
QUESTION = "what is where ?"
IMAGE, VIDEO = "<image>", "<video>"
WORDS = ("<pad>", "<unk>", IMAGE, VIDEO, *QUESTION.split(), *COLOURS, *ROWS, *COLUMNS)
SIDE, PATCH, WIDTH, LAYERS = 32, 8, 64, 2
NOISE = 30  # of 255, of every pixel
Pair = tuple[Image.Image, str]
"""An image and its text."""


# ------------------------------------------------------------------------------------- the task


def pairs(number: int, generator: torch.Generator) -> list[Pair]:
    """Images of a square in a corner, with the question and its answer: colour, row, column."""
    found = []
    for _ in range(number):
        colour, row, column = (
            list(names)[int(torch.randint(len(names), (), generator=generator))]
            for names in (COLOURS, ROWS, COLUMNS)
        )
        pixels = 60.0 + NOISE * torch.randn(SIDE, SIDE, 3, generator=generator)
        half = SIDE // 2
        top, left = half * ROWS.index(row), half * COLUMNS.index(column)
        pixels[top : top + half, left : left + half] += torch.tensor(COLOURS[colour]) - 60.0
        image = Image.fromarray(pixels.clamp(0, 255).byte().numpy())
        found.append((image, f"{IMAGE} {QUESTION} {colour} {row} {column}"))
    return found


def make_tokenizer() -> Any:
    """A tokenizer of whole words."""
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE, VIDEO],
    )


# ------------------------------------------------------------------------------------ the shapes


class Processor:
    """Makes what a model's forward takes of pairs: ids, mask, and what it reads of the images.

    That of transformers does the same, one for each model, but asks for torchvision where the
    model takes videos as well: here are their image processors and a tokenizer. Where an image
    stands in the text, as many places are kept as the model puts features there.
    """

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, given: Sequence[Pair]) -> dict[str, Tensor]:
        images = dict(self.images([[image] for image, _ in given], return_tensors="pt"))
        places = [" ".join([IMAGE] * number) for number in self.places(images, len(given))]
        texts = [
            re.sub(re.escape(IMAGE), place, text)
            for place, (_, text) in zip(places, given, strict=True)
        ]
        words = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids = {name: words[name] for name in ("input_ids", "attention_mask")}
        return ids | self.beside(words["input_ids"]) | images

    def places(self, images: dict[str, Tensor], number: int) -> list[int]:
        """The number of features of every image."""
        return [(SIDE // PATCH) ** 2] * number

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        """What a model takes beside ids and images."""
        return {}


class MergedPatches(Processor):
    """Of Qwen's models, in which four patches are one feature, and each feature knows its place."""

    def places(self, images: dict[str, Tensor], number: int) -> list[int]:
        return [int(grid.prod()) // self.images.merge_size**2 for grid in images["image_grid_thw"]]

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == WORDS.index(IMAGE)).int()}


class Tiles(Processor):
    """Of SmolVLM, which reads an image in tiles and as a whole, each of so many features."""

    FEATURES = (SIDE // PATCH // 2) ** 2

    def places(self, images: dict[str, Tensor], number: int) -> list[int]:
        return [self.FEATURES * images["pixel_values"].shape[1]] * number


def _text() -> dict[str, Any]:
    return {
        "vocab_size": len(WORDS), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip


def llava(tokenizer: Any) -> tuple[nn.Module, Processor]:
    """CLIP's patches, projected to be words of a Llama."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_vision()),
        text_config=hf.LlamaConfig(**_text()),
        image_token_index=WORDS.index(IMAGE),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    square = {"height": SIDE, "width": SIDE}
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    return hf.LlavaForConditionalGeneration(config), Processor(images, tokenizer)


def qwen(tokenizer: Any) -> tuple[nn.Module, Processor]:
    """Patches of images of any size, in windows, four of them merged to one word of a Qwen2."""
    vision = {
        "depth": LAYERS, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4,
        "patch_size": PATCH, "out_hidden_size": WIDTH, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 2 * PATCH, "fullatt_block_indexes": [1],
    }  # fmt: skip
    turning = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=_text() | {"rope_parameters": turning},
        image_token_id=WORDS.index(IMAGE),
        video_token_id=WORDS.index(VIDEO),
    )
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, min_pixels=1, max_pixels=SIDE**2
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), MergedPatches(images, tokenizer)


def smolvlm(tokenizer: Any) -> tuple[nn.Module, Processor]:
    """Tiles of an image and the whole of it, their patches merged by four to words of a Llama."""
    config = hf.SmolVLMConfig(
        vision_config=_vision(),
        text_config=hf.LlamaConfig(**_text()),
        image_token_id=WORDS.index(IMAGE),
        scale_factor=2,
    )
    images = hf.SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return hf.SmolVLMForConditionalGeneration(config), Tiles(images, tokenizer)


SHAPES = {"llava": llava, "qwen": qwen, "smolvlm": smolvlm}


# ---------------------------------------------------------------------------------------- the run


def train(
    model: nn.Module, processor: Processor, steps: int, batch: int, generator: torch.Generator
) -> float:
    """Learn the answers to random pairs; the last loss, in nats a word."""

    def loss() -> Tensor:
        inputs = processor(pairs(batch, generator))
        return model(**inputs, labels=_answers(inputs["input_ids"])).loss

    return fit(model, loss, steps, rate=3e-3)


def _answers(ids: Tensor) -> Tensor:
    """Labels: the three last words, -100 in every other place."""
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    return labels


@torch.no_grad()
def right(model: Any, processor: Processor, unseen: Sequence[Pair]) -> float:
    """The share of answers that are right, word by word as the model writes them."""
    asked = [(image, text.removesuffix(_answer(text))) for image, text in unseen]
    inputs = processor(asked)
    options = hf.GenerationConfig(do_sample=False, max_new_tokens=3, pad_token_id=0)
    written = model.generate(**inputs, generation_config=options)[:, -3:]
    words = processor.tokenizer.batch_decode(written)
    wanted = [_answer(text).strip() for _, text in unseen]
    return sum(a == b for a, b in zip(words, wanted, strict=True)) / len(wanted)


def _answer(text: str) -> str:
    return text.partition(QUESTION)[2]


def compare(
    model: nn.Module,
    processor: Processor,
    budgets: Sequence[float],
    known: Sequence[Pair],
    unseen: Sequence[Pair],
) -> list[Row]:
    """The dense model, and one for every budget, calibrated on the pairs that are known."""
    batches = [known[k : k + 16] for k in range(0, len(known), 16)]
    analysis = tensorize.analyze(model, calibration=batches, to_inputs=processor, refine=None)
    plans = {b: analysis.plan(b, refine=None) for b in sorted(budgets, reverse=True)}
    small = {percent(b): tensorize.apply(model, plan) for b, plan in plans.items()}
    found = tensorize.evaluate(small, model, [processor(unseen)], time=False)
    rows = [Row(None, found.dense.parameters, right(model, processor, unseen))]
    for budget, plan in plans.items():
        name = percent(budget)
        figures, answers = found[name], right(small[name], processor, unseen)
        lost, span = figures.quality.distance, plan.predicted.loss_interval
        rows.append(Row(budget, figures.parameters, answers, lost, span))
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Learn, compress, answer; the rows of every shape."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--known", type=int, default=128, help="pairs to calibrate on")
    parser.add_argument("--unseen", type=int, default=64, help="pairs to measure on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tokenizer, found = make_tokenizer(), {}
    for name in options.shape:
        torch.manual_seed(options.seed)
        generator = torch.Generator().manual_seed(options.seed)
        model, processor = SHAPES[name](tokenizer)
        loss = train(model, processor, options.steps, options.batch, generator)
        print(f"{name}: trained {options.steps} steps to {number(loss)} nats a word")
        known, unseen = (pairs(n, generator) for n in (options.known, options.unseen))
        found[name] = compare(model, processor, options.budgets, known, unseen)
        print(shown(found[name], "right", "KL, nats a word", percent))
    return found


if __name__ == "__main__":
    main()
