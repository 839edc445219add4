"""`torchcam demo`: explain a picture that ships with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _options
from ._images import save_figure
from ._messages import BEST, print_json, print_line, print_table
from ._paths import check_output

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

    from torchcam._explanation import PredictionExplanation
    from torchcam.demo import Sample

__all__ = ["add_to"]

METHODS = {  # and the layers of the demo model that each looks at
    "GradCAM": ["layer4"],
    "FinerCAM": ["layer4"],
    "GradCAMpp": ["layer4"],
    "LayerCAM": ["layer2"],
    "RefineCAM": ["layer2", "layer3", "layer4"],
}
SHARES = ("on_it", "on_the_other", "on_neither")
COLORS = ("#2ee6d6", "#7dff5a")
SCALE = 6  # pixels of the drawn picture for each of the picture's own

HELP = """\
Explain a picture that ships with the package, with a model that ships with it: two handwritten digits in clutter, by
several methods. It is known which pixels belong to which digit, so the maps can be checked: the table gives the share
of each map's energy that lies on the digit that was asked for, and on the other one. Needs no network.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    demo = _options.add_command(
        commands, "demo", short="explain a picture that ships with the package", long=HELP, run=run
    )
    _options.add_picture(demo, "torchcam-demo.png")


def run(arguments: argparse.Namespace) -> None:
    """Explain the picture, draw the maps, and print how much of each lies on its digit."""
    path = arguments.output / "torchcam-demo.png"
    check_output([path], [], arguments.overwrite)

    import torch

    from torchcam.demo import CLASS_NAMES, load_model, sample_images
    from torchcam.explain import explain

    sample = sample_images()[0]
    explanation = explain(
        load_model(),
        sample.to_tensor(),
        method=list(METHODS),
        target_layer=METHODS,
        class_idx=sample.labels,
        class_names=CLASS_NAMES,
        to_probabilities=torch.sigmoid,
    )
    maps = [
        _measured(name, result.target_layers, digit, result.fused[digit], sample)
        for name, result in explanation.results.items()
        for digit in sample.labels
    ]
    save_figure(_draw(sample, explanation, maps), path, dpi=110)
    flat_maps = [_measured("(flat map)", (), digit, torch.ones(1, 1), sample) for digit in sample.labels]
    probabilities = explanation.logits[0].sigmoid()
    if arguments.json:
        print_json(
            {
                "digits": list(sample.labels),
                "probabilities": probabilities.tolist(),
                "maps": maps,
                "flat_map": flat_maps,
                "picture": str(path),
            }
        )
        return

    from rich.text import Text

    from torchcam._tables import make_table

    ranking = probabilities.argsort(descending=True).tolist()[: len(sample.labels) + 1]
    answer = ", ".join(f"{digit} ({probabilities[digit]:.1%})" for digit in ranking)
    print(f"The picture holds a {' and a '.join(map(str, sample.labels))}. The model finds: {answer}.\n")
    print("How much of each map lies on the digit it explains, on the other digit, and on neither:\n")
    header = ("  method", "layers", "explains", "on it", "on the other", "on neither")
    best = {digit: max(m["on_it"] for m in maps if m["class_idx"] == digit) for digit in sample.labels}
    rows = [
        (
            f"  {m['method']}",
            _span(m),
            str(m["class_idx"]),
            Text(f"{m['on_it']:.1%}", BEST if m["on_it"] == best[m["class_idx"]] else ""),
            *(f"{m[key]:.1%}" for key in SHARES[1:]),
        )
        for m in (*maps, *flat_maps)
    ]
    print_table(make_table(header, rows, right=range(2, 6)))
    print_line(f"\nThe maps are drawn in {path}.")


def _measured(method: str, layers: Sequence[str], digit: int, cam: Tensor, sample: Sample) -> dict[str, Any]:
    """Measure which shares of a map (height, width) lie on the digit that it explains, on the other, and on neither."""
    from torchcam._tensors import resize

    cam = resize(cam[None, None], sample.masks.shape[1:])[0, 0]
    shares = (cam * sample.masks).sum((1, 2)) / cam.sum().clamp_min(1e-12)
    own = float(shares[sample.labels.index(digit)])
    other = float(shares.sum()) - own
    measured = dict(zip(SHARES, (own, other, 1 - own - other), strict=True))
    return {"method": method, "target_layers": list(layers), "class_idx": digit, **measured}


def _span(entry: dict[str, Any]) -> str:
    """Name the layers of a map, from the first to the last."""
    layers = entry["target_layers"]
    return " to ".join(dict.fromkeys((layers[0], layers[-1]))) if layers else ""


def _draw(sample: Sample, explanation: PredictionExplanation, maps: Sequence[dict[str, Any]]) -> Figure:
    """Draw the picture and its maps: a row for each digit, and in it the ground truth and a map of each method."""
    from PIL import Image

    from torchcam._figures import Cell, Column, Row, Sheet, draw

    size = (SCALE * sample.image.width, SCALE * sample.image.height)
    picture = sample.image.resize(size, Image.Resampling.BICUBIC)
    rows = []
    for digit, mask, color in zip(sample.labels, sample.masks, COLORS, strict=True):
        mine = [entry for entry in maps if entry["class_idx"] == digit]
        cells = [Cell(_outlined(picture.convert("L").convert("RGB"), mask, color), f"the {digit}")]
        for entry in mine:
            over = explanation.overlay(digit, entry["method"], image=picture)
            note = f"{entry['on_it']:.0%} on the {digit}, {entry['on_the_other']:.0%} on the other"
            cells.append(Cell(_outlined(over, mask, color), note))
        rows.append(Row(f"evidence for a {digit}", f"probability {explanation.value_of(digit)}", cells))
    columns = [Column("ground truth"), *(Column(entry["method"], _span(entry)) for entry in mine)]
    return draw([Sheet(picture, columns, rows)], "The demo model on a picture of two digits", None, dark=False)


def _outlined(picture: Image.Image, mask: Tensor, color: str) -> Image.Image:
    """Draw the outline of a mask into a picture."""
    from PIL import Image, ImageChops, ImageFilter

    smooth = Image.fromarray(mask.numpy()).convert("L").resize(picture.size, Image.Resampling.BILINEAR)
    inside = smooth.point(lambda value: 255 * (value > 127))
    edge = ImageChops.difference(inside, inside.filter(ImageFilter.MinFilter(7)))
    picture.paste(color, mask=edge)
    return picture
