"""List the layers of a model that maps can be made from.

List the layers of a classification model that a map can be made from, in the
order in which they finish: the grid of positions in each, its channels, and
the share of the positions that the scores depend on. Projections within a
layer, and layers that the scores do not depend on, are left out but for --all.
Needs no weights.

Examples:
  torchcam layers --arch vit_b_16
      in the last block only the class token counts: the default is the layer
      before its attention
  torchcam layers --arch swin_t --size 224x320
      the grids for images that are not square
"""

from __future__ import annotations

import re
from typing import Any

from . import _options
from ._messages import UserError, print_json, print_line, print_marked
from ._models import SEED, load_model


def add_options(layers: Any) -> None:
    """Add the options of the command to its parser."""
    _options.add_model(layers, weights=False)
    layers.add_argument("--size", metavar="HxW", help="height and width of the images (default: what the model is for)")
    layers.add_argument("--all", action="store_true", help="list every layer whose output has positions")
    _options.add_json(layers)


def run(arguments: Any) -> None:
    """List the layers."""
    import torch

    from torchcam.layers import Candidates, candidates

    classifier = load_model(arguments, "none")
    channels, height, width = classifier.blank.shape
    if arguments.size is not None:
        height, width = as_size(arguments.size)
    noise = torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(SEED))
    name = arguments.model_factory or classifier.name.split(",")[0]
    try:
        found = candidates(classifier.model, noise)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--size {height}x{width} is not taken by {name}: {error}") from error
    shown = found if arguments.all else Candidates([c for c in found if c.depends and c.is_stage])
    if arguments.json:
        entries = [
            {
                "name": c.name,
                "type": c.type,
                "grid": list(c.grid),
                "channels": c.channels,
                "influence": float(c.influence),
                "calls": c.calls,
                "default": c.name == found.choice,
            }
            for c in shown
        ]
        print_json({"model": name, "size": [height, width], "default": found.choice, "layers": entries})
    else:
        print_line(f"{name}, images of {height} x {width}")
        print_marked(shown, {r"<- default$": "bold green"})
        told = "No layer is fit to be the default: name one with --target-layer."
        print_line("\n" + (told if found.choice is None else f"Maps are made from {found.choice} by default."))


def as_size(text: str) -> tuple[int, int]:
    """Read height and width."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise UserError(f"--size must be height and width as in 224x320, got '{text}'")
    return int(match[1]), int(match[2])
