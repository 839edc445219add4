"""Where the visual tokens of a vision-language model are on its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from torchcam._inputs import transformed
from torchcam._views import FULL, View, find_view
from torchcam.layout import Cells

_COORDINATES = 5  # of a cell: its picture, top, left, bottom, right


@dataclass(frozen=True)
class _Picture:
    """A picture of a prompt, and what its places are read from.

    Attributes:
        model: the model
        processor: its processor
        inputs: the inputs that the processor made
        sample: the number of the prompt
        number: the number of the picture in the prompt
        index: the number of the picture in the batch
        image: the picture itself
        together: the number of pictures in the prompt
        tokens: the number of visual tokens of the prompt
    """

    model: Any
    processor: Any
    inputs: Mapping[str, Any]
    sample: int
    number: int
    index: int
    image: Image.Image
    together: int
    tokens: int

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of the picture."""
        return self.image.height, self.image.width

    def grid(self, height: int, width: int, view: View = FULL) -> Cells:
        """Return a grid of cells on a part of the picture."""
        return Cells.of_grid((height, width), view, self.number)


def find_cells(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Any],
    images: Sequence[Sequence[Image.Image]],
    tokens: Sequence[int],
) -> list[tuple[Cells, ...]]:
    """Find the places of a model's visual tokens.

    Args:
        model: the model
        processor: its processor
        inputs: the inputs that the processor made
        images: the pictures of each prompt
        tokens: the number of visual tokens of each prompt

    Returns:
        for each prompt the cells of each picture, numbered from 0, in the order of the tokens

    Raises:
        ValueError: if the model is of another family than those whose places are known, or the places are not as many
            as the tokens
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if kind not in _FAMILIES:
        raise ValueError(
            f"where the visual tokens of {type(model).__name__} are on a picture is not known; known are the families "
            f"{', '.join(sorted(_FAMILIES))}. If each token sees a part of the picture, pass these parts as `cells=` "
            "(a `torchcam.layout.Cells` for each picture); the queries of a resampler or a Q-Former see all of it and "
            "have no place: explain the vision tower instead"
        )
    index = 0
    found = []
    for sample, (pictures, count) in enumerate(zip(images, tokens, strict=True)):
        cells = []
        for number, image in enumerate(pictures):
            picture = _Picture(model, processor, inputs, sample, number, index, image, len(pictures), count)
            cells.append(_FAMILIES[kind](picture))
            index += 1
        places = sum(len(one.boxes) for one in cells)
        if places != count:
            raise ValueError(
                f"prompt {sample} has {count} visual tokens for its {len(pictures)} picture(s), but the places of "
                f"{places} were found: pass `cells=` (a `torchcam.layout.Cells` for each picture), or a `processor` "
                f"with the options that {type(model).__name__} was trained with"
            )
        found.append(tuple(cells))
    return found


def _joined(parts: Sequence[Cells]) -> Cells:
    """Return the cells of several grids on one picture."""
    return parts[0] if len(parts) == 1 else Cells(torch.cat([part.boxes for part in parts]))


def _tile(row: float, column: float, height: float, width: float) -> View:
    """Return the view of a tile, given the size of a picture in tiles."""
    return row / height, column / width, (row + 1) / height, (column + 1) / width


# One function for each way in which processors cut a picture.


def _whole(picture: _Picture) -> Cells:
    """Return the cells of a picture that is seen whole, or cropped."""
    side = math.isqrt(picture.tokens // picture.together)
    view = find_view(partial(transformed, picture.processor.image_processor, None), picture.image.size)
    if view is None:
        raise ValueError(
            f"where `processor` lays a picture of {picture.image.width} × {picture.image.height} pixels out for the "
            "model could not be found by experiment: pass `cells=`"
        )
    return picture.grid(side, side, view)


def _merged(picture: _Picture) -> Cells:
    """Return the cells of a picture of any resolution whose patches are merged."""
    frames, height, width = picture.inputs["image_grid_thw"][picture.index].tolist()
    merged = picture.processor.image_processor.merge_size
    return _joined([picture.grid(height // merged, width // merged)] * frames)


def _packed(picture: _Picture) -> Cells:
    """Return the cells of tiles that the model packs: what is packed here are the coordinates of their patches."""
    from transformers.models.llava_next import modeling_llava_next

    tiles_of: Any = modeling_llava_next.get_anyres_image_grid_shape  # untyped
    model = picture.model.model
    config = model.config
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    size = picture.inputs["image_sizes"][picture.index]
    parts = [picture.grid(side, side)]
    if picture.together == 1 or "batch_num_images" not in picture.inputs:
        rows, columns = tiles_of(size, config.image_grid_pinpoints, tile)
        height, width = picture.size
        scale = min(rows * tile / height, columns * tile / width)
        inner = height * scale / tile, width * scale / tile  # of the picture on the canvas, in tiles
        above, before = (rows - inner[0]) / 2, (columns - inner[1]) / 2
        tiles = [(row - above, column - before) for row in range(rows) for column in range(columns)]
        parts += [picture.grid(side, side, _tile(*place, *inner)) for place in tiles]
    coordinates = torch.stack([part.boxes for part in parts]).float()  # (tiles, patches, 5)
    options = {"vision_feature_select_strategy": "default"} if "batch_num_images" not in picture.inputs else {}
    newline = torch.full((_COORDINATES,), torch.nan)
    packed, _ = model.pack_image_features([coordinates], size[None].cpu(), image_newline=newline, **options)
    return Cells(packed[0].double())


def _split(picture: _Picture) -> Cells:
    """Return the cells of tiles with the whole picture last, as Idefics cuts them."""
    side = math.isqrt(picture.processor.image_seq_len)
    images = [[picture.image]]
    made = picture.processor.image_processor(images=images, return_row_col_info=True, return_tensors="pt")
    return _tiled(picture, side, made["rows"][0][0], made["cols"][0][0])


def _patched(picture: _Picture) -> Cells:
    """Return the cells of tiles with the whole picture last, as InternVL cuts them."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    processor = picture.processor.image_processor
    side = math.isqrt(picture.processor.image_seq_length)
    if picture.tokens == picture.together * side**2:
        return picture.grid(side, side)
    tile = (processor.size["height"], processor.size["width"])
    columns, rows = get_optimal_tiled_canvas(picture.size, tile, processor.min_patches, processor.max_patches)
    return _tiled(picture, side, rows, columns)


def _tiled(picture: _Picture, side: int, rows: int, columns: int) -> Cells:
    """Return the cells of tiles, row by row, and then those of the whole picture."""
    if rows * columns < 2:
        return picture.grid(side, side)
    tiles = [picture.grid(side, side, _tile(r, c, rows, columns)) for r in range(rows) for c in range(columns)]
    return _joined([*tiles, picture.grid(side, side)])


def _canvas(picture: _Picture) -> Cells:
    """Return the cells of the tiles of a canvas, padded at the right and at the bottom; a class token precedes each."""
    from transformers.models.mllama.image_processing_mllama import get_image_size_fit_to_canvas

    config = picture.model.config.vision_config
    tile = config.image_size
    side = tile // config.patch_size
    ratio = int(picture.inputs["aspect_ratio_ids"][picture.sample, picture.number])
    rows, columns = config.supported_aspect_ratios[ratio - 1] if ratio else (0, 0)
    height, width = get_image_size_fit_to_canvas(*picture.size, rows * tile, columns * tile, tile)
    inner = height / tile, width / tile  # of the picture on the canvas, in tiles
    nowhere = torch.full((1, _COORDINATES), torch.nan, dtype=torch.float64)
    parts = []
    for number in range(config.max_num_tiles):
        row, column = divmod(number, columns)
        is_used = row < rows
        parts.append(nowhere)
        view = _tile(row, column, *inner)
        parts.append(picture.grid(side, side, view).boxes if is_used else nowhere.expand(side**2, -1))
    if picture.number == picture.together - 1:  # other prompts of the batch may have more pictures
        own = config.max_num_tiles * (1 + side**2)
        parts.append(nowhere.expand(picture.tokens - own * picture.together, -1))
    return Cells(torch.cat(parts))


_FAMILIES: dict[str, Callable[[_Picture], Cells]] = {  # by `config.model_type`
    **dict.fromkeys(("gemma3", "llava", "paligemma", "vipllava"), _whole),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _merged),
    **dict.fromkeys(("llava_next", "llava_onevision"), _packed),
    **dict.fromkeys(("idefics3", "smolvlm"), _split),
    "internvl": _patched,
    "mllama": _canvas,
}
