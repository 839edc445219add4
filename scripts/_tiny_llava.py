"""A tiny LLaVA that reads the shapes of coloured things in pictures, so that the evidence for each word is known.

A picture has 5 × 5 cells, one for each visual token. Up to four of them hold a thing, each of another colour, of any
shape. The prompt names two colours, and the answer is the shapes of these two things in that order, "none" for one
that is not there. So the evidence for each shape is one cell: without it, the answer would be "none". The features of
pictures are those before the vision tower's attention, so that nothing of a cell is in another one's token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = [
    "ANSWER",
    "CELL",
    "COLORS",
    "NONE",
    "SHAPES",
    "SIDE",
    "WEIGHTS",
    "build",
    "load",
    "sample",
    "to_picture",
    "to_prompt",
]

WEIGHTS = Path(__file__).parent / "quality_models" / "tiny_llava.pt"
CELL, SIDE = 8, 5  # pixels of a cell, cells of a side
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 230), "yellow": (230, 210, 50)}
SHAPES = {
    "square": "######## ######## ##....## ##....## ##....## ##....## ######## ########",
    "cross": "##....## ###..### .######. ..####.. ..####.. .######. ###..### ##....##",
    "plus": "...##... ...##... ...##... ######## ######## ...##... ...##... ...##...",
    "bar": "........ ........ ######## ######## ######## ######## ........ ........",
}
ANSWER = 2  # words
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
ABSENT = 0.2  # the share of things that are not there
NONE = "none"
_WORDS = [*_SPECIAL, *COLORS, *SHAPES, NONE, "and", ":"]


def build() -> tuple[Any, Any]:
    """Return the model with random weights, and its processor."""
    import tokenizers
    import transformers as library

    transformers: Any = library  # partly untyped
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=False))
    places = {word: place for place, word in enumerate(_WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(places, unk_token=special["unk_token"]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    edge = SIDE * CELL
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": edge}, crop_size=edge, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=CELL, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=edge,
        patch_size=CELL,
    )
    text = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(_WORDS),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=_WORDS.index("<image>"), vision_feature_layer=-2
    )
    return transformers.LlavaForConditionalGeneration(config).eval(), processor


def load() -> tuple[Any, Any]:
    """Return the trained model and its processor."""
    model, processor = build()
    state = torch.load(WEIGHTS, weights_only=True)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model, processor


def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw pictures and questions.

    Returns:
        the pictures (N, 40, 40, 3) in [0, 255], the asked colours (N, 2), the shapes that answer (N, 2), where one more
        than the last is "none", and the cells of the things that are asked for (N, 2)
    """
    masks = torch.tensor([[pixel == "#" for pixel in rows.replace(" ", "")] for rows in SHAPES.values()])
    masks = torch.cat([masks, masks[:1] & False]).reshape(-1, CELL, CELL)  # (S + 1, 8, 8)
    colors = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    places = torch.rand(count, SIDE * SIDE, generator=generator).argsort(1)[:, : len(COLORS)]  # (N, colours)
    shapes = torch.randint(len(SHAPES), (count, len(COLORS)), generator=generator)
    shapes[torch.rand(shapes.shape, generator=generator) < ABSENT] = len(SHAPES)
    noise = 90 + 50 * torch.rand(count, SIDE * SIDE, CELL, CELL, 1, generator=generator)
    cells = noise.expand(-1, -1, -1, -1, 3).clone()  # (N, cells, 8, 8, 3)
    rows = torch.arange(count)
    for number, color in enumerate(colors):
        place, mask = places[:, number], masks[shapes[:, number]].unsqueeze(-1)
        cells[rows, place] = torch.where(mask, color, cells[rows, place])
    grid = cells.reshape(count, SIDE, SIDE, CELL, CELL, 3).transpose(2, 3)
    asked = torch.rand(count, len(COLORS), generator=generator).argsort(1)[:, :ANSWER]
    return (
        grid.reshape(count, SIDE * CELL, SIDE * CELL, 3).round(),
        asked,
        shapes.gather(1, asked),
        places.gather(1, asked),
    )


def to_picture(pixels: Tensor) -> Image.Image:
    """Return pixels (40, 40, 3) as a picture."""
    return Image.fromarray(pixels.byte().numpy())


def to_prompt(asked: Tensor) -> str:
    """Return the prompt that asks for colours (2,)."""
    first, second = (list(COLORS)[color] for color in asked.tolist())
    return f"<image> {first} and {second} :"
