"""`torchcam demo`: explain a picture that ships with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._messages import add_command, add_json, print_json
from ._pictures import add_colorbar, check_output, overlay, show, write

if TYPE_CHECKING:
    import argparse

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["add_to"]

METHODS = {  # and the layers of the demo model that each looks at
    "GradCAM": ["layer4"],
    "FinerCAM": ["layer4"],
    "GradCAMpp": ["layer4"],
    "LayerCAM": ["layer2"],
    "RefineCAM": ["layer2", "layer3", "layer4"],
}
COLORMAP = "inferno"
COLORS = ("#2ee6d6", "#7dff5a")

HELP = """\
Explain a picture that ships with the package, with a model that ships with it: two handwritten digits in clutter, by
several methods. It is known which pixels belong to which digit, so the maps can be checked: the table gives the share
of each map's energy that lies on the digit that was asked for, and on the other one. Needs no network.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    demo = add_command(commands, "demo", short="explain a picture that ships with the package", long=HELP, run=run)
    demo.add_argument("--output", metavar="DIR", type=Path, default=Path(), help="where to write torchcam-demo.png")
    demo.add_argument("--overwrite", action="store_true", help="replace the picture if it is there")
    add_json(demo)


@dataclass(frozen=True)
class DemoMap:
    """The map of one digit by one method, and the share of its energy that lies on each digit."""

    method: str
    layers: list[str]
    digit: int
    cam: Tensor
    shares: dict[int, float]

    @property
    def own(self) -> float:
        """The share on the digit that was asked for."""
        return self.shares[self.digit]

    @property
    def other(self) -> float:
        """The share on the other digit."""
        return sum(self.shares.values()) - self.own

    @property
    def neither(self) -> float:
        """The share on neither."""
        return 1 - self.own - self.other

    @property
    def span(self) -> str:
        """The layers, from the first to the last."""
        return " to ".join(dict.fromkeys((self.layers[0], self.layers[-1]))) if self.layers else ""

    def as_json(self) -> dict[str, Any]:
        """Give what is known, for other programs."""
        return {
            "method": self.method,
            "target_layers": self.layers,
            "class_idx": self.digit,
            "on_it": self.own,
            "on_the_other": self.other,
            "on_neither": self.neither,
        }


def run(arguments: argparse.Namespace) -> None:
    """Explain the picture, draw the maps, and say how well they fit."""
    path = arguments.output / "torchcam-demo.png"
    check_output([path], [], arguments.overwrite)

    from torchcam import methods
    from torchcam.demo import load_model, sample_images
    from torchcam.explain import explain_classes

    model, sample = load_model(), sample_images()[0]
    batch = sample.to_tensor()
    maps = []
    for name, layers in METHODS.items():
        logits, cams, extractor = explain_classes(
            model, batch, lambda _: sample.labels, method=getattr(methods, name), target_layer=layers
        )
        for digit, layer_maps in cams.items():
            cam = extractor.fuse_cams(layer_maps, tuple(batch.shape[2:]))[0]
            maps.append(DemoMap(name, layers, digit, cam, _shares(cam, sample)))
    probabilities = logits[0].sigmoid()
    write(draw(sample, maps, probabilities), path)
    flat = batch.new_ones(batch.shape[2:])
    flat_maps = [DemoMap("(flat map)", [], digit, flat, _shares(flat, sample)) for digit in sample.labels]

    if arguments.json:
        print_json(
            {
                "digits": list(sample.labels),
                "probabilities": probabilities.tolist(),
                "maps": [entry.as_json() for entry in maps],
                "flat_map": [entry.as_json() for entry in flat_maps],
                "picture": str(path),
            }
        )
        return
    ranking = probabilities.argsort(descending=True).tolist()[: len(sample.labels) + 1]
    answer = ", ".join(f"{digit} ({probabilities[digit]:.1%})" for digit in ranking)
    print(f"The picture holds a {' and a '.join(map(str, sample.labels))}. The model finds: {answer}.\n")
    print("How much of each map lies on the digit it explains, on the other digit, and on neither:\n")
    print(f"  {'method':<11}{'layers':<18}{'explains':>8}{'on it':>10}{'on the other':>15}{'on neither':>13}")
    for entry in [*maps, *flat_maps]:
        row = f"{entry.own:>10.1%}{entry.other:>15.1%}{entry.neither:>13.1%}"
        print(f"  {entry.method:<11}{entry.span:<18}{entry.digit:>8}{row}")
    print(f"\nThe maps are drawn in {path}")


def _shares(cam: Tensor, sample: Any) -> dict[int, float]:
    """Give the share of a map's energy inside each digit's mask."""
    total = cam.sum().clamp_min(1e-12)
    return {label: float((cam * mask).sum() / total) for label, mask in zip(sample.labels, sample.masks, strict=True)}


def draw(sample: Any, maps: Sequence[DemoMap], probabilities: Tensor) -> Figure:
    """Draw the picture and the ground truth, and beside them the maps: a row per digit, a column per method."""
    from matplotlib.figure import Figure
    from PIL import Image

    size = (6 * sample.image.width, 6 * sample.image.height)
    image = sample.image.resize(size, Image.Resampling.BICUBIC)
    grey = image.convert("L").convert("RGB")  # below the maps, so that all colour comes from them
    columns = [entry.method for entry in maps if entry.digit == sample.labels[0]]
    figure = Figure(figsize=(1.0 + 2.45 * (1 + len(columns)), 6.2), dpi=120, layout="constrained")
    axes = figure.subplots(len(sample.labels), 1 + len(columns), squeeze=False)
    show(axes[0, 0], image, "picture\n")
    show(axes[1, 0], grey, "")
    axes[1, 0].set_xlabel("ground truth\n", fontsize=10)
    for label, color in zip(sample.labels, COLORS, strict=True):
        _outline(axes[1, 0], sample, label, color)
        left, top, right, bottom = (6 * side for side in sample.boxes[sample.labels.index(label)])
        at_left = left + right > size[0]  # towards the middle, where there is room
        axes[1, 0].text(
            left - 15 if at_left else right + 15,
            (top + bottom) / 2,
            str(label),
            color=color,
            fontsize=16,
            fontweight="bold",
            ha="right" if at_left else "left",
            va="center",
        )
    for entry in maps:
        row = sample.labels.index(entry.digit)
        axis = axes[row, 1 + columns.index(entry.method)]
        show(axis, overlay(grey, entry.cam, 0.4, COLORMAP), f"{entry.method}\n{entry.span}" if row == 0 else "")
        axis.set_xlabel(f"{entry.own:.0%} on the {entry.digit},\n{entry.other:.0%} on the other digit", fontsize=10)
        if entry.method == columns[0]:
            probability = f"(probability {probabilities[entry.digit]:.1%})"
            axis.set_ylabel(f"evidence for a {entry.digit}\n{probability}", fontsize=11)
        _outline(axis, sample, entry.digit, COLORS[row])
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    add_colorbar(figure, axes, COLORMAP)
    return figure


def _outline(axis: Axes, sample: Any, digit: int, color: str) -> None:
    """Draw the outline of a digit's mask."""
    from torchcam._tensors import resize

    height, width = axis.images[0].get_size()
    mask = sample.masks[sample.labels.index(digit)]
    smooth = resize(mask[None, None].float(), (height, width))[0, 0]
    axis.contour(smooth.numpy(), levels=[0.5], colors=[color], linewidths=1.5)
