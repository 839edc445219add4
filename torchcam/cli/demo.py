"""Explain a picture that ships with the package.

Explain a picture that ships with the package, with a model that ships with it:
two handwritten digits in clutter, by several methods. It is known which pixels
belong to which digit, so the maps can be checked: the table gives the share of
each map's energy that lies on the digit that was asked for, and on the other
one. Needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _options
from ._images import check_output, save_figure
from ._messages import BEST, print_json, print_line, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from torchcam.demo import Sample

METHODS = {  # and the layers of the demo model that each looks at
    "GradCAM": ["layer4"],
    "FinerCAM": ["layer4"],
    "GradCAMpp": ["layer4"],
    "LayerCAM": ["layer2"],
    "RefineCAM": ["layer2", "layer3", "layer4"],
}


def add_options(demo: Any) -> None:
    """Add the options of the command to its parser."""
    _options.add_picture(demo, "torchcam-demo.png")


def run(arguments: Any) -> None:
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
    save_figure(arguments, explanation, "The demo model on a picture of two digits", path)
    maps = [
        _measured(name, result.target_layers, digit, result.fused[digit], sample)
        for name, result in explanation.results.items()
        for digit in sample.labels
    ]
    flat_maps = [_measured("(flat map)", (), digit, torch.ones(1, 1), sample) for digit in sample.labels]
    probabilities = explanation.logits[0].sigmoid()
    if arguments.json:
        about = {"digits": list(sample.labels), "probabilities": probabilities.tolist(), "picture": str(path)}
        print_json({**about, "maps": maps, "flat_map": flat_maps})
        return

    from rich.text import Text

    from torchcam._tables import make_table

    ranking = probabilities.argsort(descending=True).tolist()[: len(sample.labels) + 1]
    answer = ", ".join(f"{digit} ({probabilities[digit]:.1%})" for digit in ranking)
    print(f"The picture holds a {' and a '.join(map(str, sample.labels))}. The model finds: {answer}.\n")
    print("How much of each map lies on the digit it explains, on the other digit, and on neither:\n")
    header = ("  method", "layers", "explains", "on it", "on the other", "on neither")
    best = {digit: max(m["on_it"] for m in maps if m["class_idx"] == digit) for digit in sample.labels}
    rows = []
    for m in (*maps, *flat_maps):
        digit, layers = m["class_idx"], dict.fromkeys([*m["target_layers"][:1], *m["target_layers"][-1:]])
        on_it = Text(f"{m['on_it']:.1%}", BEST if m["on_it"] == best[digit] else "")
        others = f"{m['on_the_other']:.1%}", f"{m['on_neither']:.1%}"
        rows.append((f"  {m['method']}", " to ".join(layers), str(digit), on_it, *others))
    print_table(make_table(header, rows, right=range(2, 6)))
    print_line(f"\nThe maps are drawn in {path}.")


def _measured(method: str, layers: Sequence[str], digit: int, cam: Tensor, sample: Sample) -> dict[str, Any]:
    """Measure which shares of a map (height, width) lie on the digit that it explains, on the other, and on neither."""
    from torchcam._tensors import resize

    cam = resize(cam[None, None], sample.masks.shape[1:])[0, 0]
    shares = (cam * sample.masks).sum((1, 2)) / cam.sum().clamp_min(1e-12)
    own = float(shares[sample.labels.index(digit)])
    other = float(shares.sum()) - own
    on = {"on_it": own, "on_the_other": other, "on_neither": 1 - own - other}
    return {"method": method, "target_layers": list(layers), "class_idx": digit, **on}
