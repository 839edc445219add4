"""The command line: `torchcam demo`, `torchcam explain` and `torchcam layers`.

Only the standard library is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torchcam import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor, nn

__all__ = ["main"]

SEED = 0
MAX_COLUMNS = 4
DEMO_METHODS = {  # and the layers of the demo model that each looks at
    "GradCAM": ["layer4"],
    "FinerCAM": ["layer4"],
    "GradCAMpp": ["layer4"],
    "LayerCAM": ["layer2"],
    "RefineCAM": ["layer2", "layer3", "layer4"],
}
DEMO_COLORMAP = "inferno"
DEMO_COLORS = ("#2ee6d6", "#7dff5a")

DESCRIPTION = "Class activation maps for PyTorch: see which regions of an image made a model's score."

EPILOG = """\
start here:
  torchcam demo
      explain a picture of two digits with a model that ships with the package; needs no network
  torchcam explain photo.jpg
      what does a resnet50 see in a photo, and where? (downloads its weights, once)

`torchcam COMMAND --help` says more of a command.
"""

DEMO_HELP = """\
Explain a picture that ships with the package, with a model that ships with it: two handwritten digits in clutter, by
several methods. It is known which pixels belong to which digit, so the maps can be checked: the table gives the share
of each map's energy that lies on the digit that was asked for, and on the other one. Needs no network.
"""

EXPLAIN_HELP = """\
Explain what a classification model of torchvision sees in images. Each image gives one picture: the image as the model
sees it (resized and cropped as the weights want it), and a map over it for every class that is explained.
"""

EXPLAIN_EPILOG = """\
examples:
  torchcam explain dog.jpg
      the most probable class of a resnet50, Grad-CAM on its last layer with positions
  torchcam explain dog.jpg cat.jpg --top-k 3 --output maps
      three classes of each of two images, in one picture per image
  torchcam explain dog.jpg --arch convnext_tiny --method LayerCAM --target-layer features.5,features.7
      the maps of two layers, fused into one
  torchcam explain dog.jpg --arch resnet18 --weights resnet18-f37072fd.pth --class-idx 207
      weights from a file: for machines without network
  torchcam explain dog.jpg --arch resnet18 --weights none
      random weights: to try the command, not to learn about the image

what to try first: GradCAM is quick and a good default. LayerCAM gives fine maps in early layers. ScoreCAM needs no
gradients, but one forward pass per channel. FinerCAM shows what tells a class from those most like it.
"""


LAYERS_HELP = """\
List the layers of a classification model of torchvision that a map can be made from, in the order in which they finish:
the grid of positions in each, its channels, and the share of the positions that the scores depend on. Projections
within a layer, and layers that the scores do not depend on, are left out but for --all. Needs no weights.
"""

LAYERS_EPILOG = """\
examples:
  torchcam layers --arch vit_b_16
      in the last block only the class token counts: the default is the layer before its attention
  torchcam layers --arch swin_t --size 224x320
      the grids for images that are not square
"""


class _UserError(Exception):
    """What the user can mend: printed as one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UserError(f"{message} (`{self.prog} --help` explains)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, by default those of the process

    Returns:
        the exit code: 0, 2 after a wrong input, 130 after Ctrl-C
    """
    parser = _make_parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.run is None:
            parser.print_help()
        else:
            with _plain_messages():
                arguments.run(arguments)
    except _UserError as error:
        print(f"torchcam: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("torchcam: interrupted", file=sys.stderr)
        return 130
    return 0


def _make_parser() -> _Parser:
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser(prog="torchcam", description=DESCRIPTION, epilog=EPILOG, **style)
    parser.add_argument("--version", action="version", version=f"torchcam {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="explain a picture that ships with the package", description=DEMO_HELP, **style
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--output", metavar="DIR", type=Path, default=Path(), help="where to write torchcam-demo.png")
    demo.add_argument("--overwrite", action="store_true", help="replace the picture if it is there")

    explain = commands.add_parser(
        "explain",
        help="explain images with a model of torchvision",
        description=EXPLAIN_HELP,
        epilog=EXPLAIN_EPILOG,
        **style,
    )
    explain.set_defaults(run=_explain)
    explain.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="an image file")
    model = explain.add_argument_group("the model")
    model.add_argument(
        "--arch", default="resnet50", help="a classification model of torchvision (default: %(default)s)"
    )
    model.add_argument(
        "--weights",
        default="DEFAULT",
        metavar="DEFAULT|none|PATH",
        help="DEFAULT or another name of torchvision's weights for the model, downloaded once; none for random "
        "weights; or a file with its state dict (default: %(default)s)",
    )
    model.add_argument("--device", default="cpu", help="where it runs: cpu, cuda, cuda:1, mps (default: %(default)s)")
    maps = explain.add_argument_group("the maps")
    maps.add_argument(
        "--method", default="GradCAM", help="a method of torchcam.methods, in any case (default: %(default)s)"
    )
    maps.add_argument(
        "--target-layer",
        metavar="NAME",
        action="append",
        default=[],
        help="layer to look at, as in `model.named_modules()`; several, separated by commas or by repeating the "
        "option, are fused (default: the last one whose output still has positions)",
    )
    maps.add_argument(
        "--class-idx",
        metavar="N",
        action="append",
        default=[],
        help="class to explain, by its number; several as with --target-layer",
    )
    maps.add_argument(
        "--top-k",
        metavar="K",
        type=int,
        help="explain the K most probable classes, before those of --class-idx (default: 1, or 0 with --class-idx)",
    )
    pictures = explain.add_argument_group("the pictures")
    pictures.add_argument(
        "--output", metavar="DIR", type=Path, default=Path(), help="where to write IMAGE-METHOD.png (default: here)"
    )
    pictures.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    pictures.add_argument(
        "--alpha", type=float, default=0.5, help="opacity of the image under its maps, in [0, 1) (default: %(default)s)"
    )
    pictures.add_argument("--colormap", default="jet", help="a colormap of matplotlib (default: %(default)s)")

    layers = commands.add_parser(
        "layers",
        help="list the layers of a model that maps can be made from",
        description=LAYERS_HELP,
        epilog=LAYERS_EPILOG,
        **style,
    )
    layers.set_defaults(run=_layers)
    layers.add_argument(
        "--arch", default="resnet50", help="a classification model of torchvision (default: %(default)s)"
    )
    layers.add_argument("--size", metavar="HxW", help="height and width of the images (default: what the model is for)")
    layers.add_argument("--all", action="store_true", help="list every layer whose output has positions")
    return parser


# Messages.


@contextmanager
def _plain_messages() -> Iterator[None]:
    """Print warnings as one line each, without a place in the code; log messages are for programs."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"torchcam: warning: {_one_line(message)}", file=sys.stderr)

    logger, handler = logging.getLogger("torchcam"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        logger.removeHandler(handler)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


@contextmanager
def _library_errors(layers: Sequence[str] = ()) -> Iterator[None]:
    """Turn what the library says of its arguments into what the user of the command line can mend."""
    try:
        yield
    except AssertionError as error:
        raise _UserError(
            f"the model does not run every layer of --target-layer {','.join(layers)} in evaluation mode: name another"
        ) from error
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TypeError) and "`target_layer`" not in str(error):
            raise  # no option has a type that the user could get wrong: a bug
        message = re.sub(
            r"pass `reshape_transform`.*, or another", "name another", str(error)
        )  # no option for a function
        message = re.sub(r"`(target_layer|alpha|colormap)`", lambda match: "--" + match[1].replace("_", "-"), message)
        raise _UserError(message) from error


def _closest(name: str, known: Sequence[str]) -> str:
    """Say which known names are meant, or else what there is."""
    by_case = {candidate.lower(): candidate for candidate in known}
    close = [by_case[match] for match in get_close_matches(name.lower(), by_case, n=3, cutoff=0.5)]
    return f"closest: {', '.join(close)}" if close else f"there are {', '.join(known)}"


# Files.


def _read_image(path: Path) -> Image.Image:
    """Read an image file as RGB, upright."""
    import numpy as np
    from PIL import Image, ImageOps

    if not path.exists():
        raise _UserError(f"IMAGE '{path}' does not exist")
    if path.is_dir():
        raise _UserError(f"IMAGE '{path}' is a directory: name the images in it")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Exception as error:  # decoders raise whatever they stumble over
        what = f"({type(error).__name__}: {error})"
        raise _UserError(f"IMAGE '{path}' is not an image that Pillow can read {what}") from error
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise _UserError(f"IMAGE '{path}' has floating-point pixels of unknown range: save it with 8 or 16 bits")
    return image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")


def _check_output(paths: Sequence[Path], inputs: Sequence[Path], overwrite: bool) -> None:
    """Check that pictures can be written, before any is made."""
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise _UserError(
            f"several images would be written to '{twice[0]}': explain them one by one, with an --output each"
        )
    folder = next(place for place in (paths[0].parent, *paths[0].parent.parents) if place.exists())
    if not folder.is_dir():
        raise _UserError(f"--output '{paths[0].parent}' cannot be made: '{folder}' is not a directory")
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more exist" if len(there) > 1 else " exists"
        raise _UserError(f"'{there[0]}'{more}: pass --overwrite, or another directory as --output")
    taken = {path.resolve() for path in inputs} & {path.resolve() for path in paths}
    if taken or any(path.is_dir() for path in there):
        raise _UserError(f"'{min(taken, default=there[0] if there else None)}' is in the way: pass another --output")


def _write(figure: Figure, path: Path) -> None:
    from torchcam.explain import written_whole

    try:
        with written_whole(path) as part:
            figure.savefig(part, format="png", metadata={"Software": f"torchcam {__version__}"})
    except OSError as error:
        raise _UserError(f"cannot write '{path}': {error.strerror or error}") from error


# torchcam explain.


@dataclass(frozen=True)
class _Classifier:
    """A model of torchvision, ready to run."""

    model: nn.Module
    name: str  # architecture and weights
    preprocess: Any  # torchvision's preset of the weights
    categories: Sequence[str]

    def picture(self, batch: Tensor) -> Image.Image:
        """Show an input (1, 3, H, W) as it was before it was normalised."""
        from PIL import Image

        mean, std = (batch.new_tensor(values)[:, None, None] for values in (self.preprocess.mean, self.preprocess.std))
        pixels = (batch[0] * std + mean).clamp(0, 1).mul(255).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _explain(arguments: argparse.Namespace) -> None:
    from torchcam.explain import explain_classes
    from torchcam.layers import layer_names

    method = _find_method(arguments.method)
    layers = list(dict.fromkeys(_split(arguments.target_layer)))
    _check_layer_count(method.__name__, layers)
    class_indices = _as_integers(_split(arguments.class_idx))
    top_k = arguments.top_k if arguments.top_k is not None else int(not class_indices)
    paths = [arguments.output / f"{path.stem}-{method.__name__}.png" for path in arguments.images]
    _check_output(paths, arguments.images, arguments.overwrite)
    for path in arguments.images:
        _read_image(path)
    _check_colours(arguments.alpha, arguments.colormap)
    device = _find_device(arguments.device)

    classifier = _load_classifier(arguments.arch, arguments.weights)
    num_classes = len(classifier.categories)
    for option, values, lowest, highest in (
        ("--class-idx", class_indices, 0, num_classes - 1),
        ("--top-k", [top_k], 0 if class_indices else 1, num_classes),
    ):
        for value in values:
            if not lowest <= value <= highest:
                raise _UserError(
                    f"{option} must lie between {lowest} and {highest} for the {num_classes} classes of "
                    f"{arguments.arch}, got {value}"
                )
    model = classifier.model.to(device)
    if layers:
        with _library_errors():
            layers = layer_names(model, layers)
    # One name means one layer; none leaves the choice to the method.
    target_layer = (layers if len(layers) > 1 else layers[0]) if layers else None

    def choose(logits: Tensor) -> list[int]:
        return [*logits[0].topk(top_k).indices.tolist(), *class_indices]

    title = ""
    for source, path in zip(arguments.images, paths, strict=True):
        batch = classifier.preprocess(_read_image(source)).unsqueeze(0).to(device)
        with _library_errors(layers):
            logits, cams, extractor = explain_classes(
                model, batch, choose, method=method, target_layer=target_layer, method_kwargs=_progress(method)
            )
            maps = {index: extractor.fuse_cams(list(layer_maps))[0] for index, layer_maps in cams.items()}
        for cam in maps.values():
            if cam.ndim != 2:
                shape = tuple(cam.shape)
                raise _UserError(f"{method.__name__} gives maps of shape {shape}, which cannot be drawn over an image")
        if not title:
            title = f"{classifier.name}: {method.__name__} of {', '.join(extractor.target_names)}"
            print(title)
        probabilities = logits[0].softmax(0)
        names = {index: f"{classifier.categories[index]} ({index})" for index in maps}
        panels = [
            (f"{textwrap.fill(names[index], 26)}\n{_percent(probabilities[index])}", cam) for index, cam in maps.items()
        ]
        _write(_draw_classes(classifier.picture(batch), panels, title, arguments.alpha, arguments.colormap), path)
        print(f"{source} -> {path}")
        for index in maps:
            print(f"  {_percent(probabilities[index]):>6}  {names[index]}")
    if arguments.weights.lower() == "none":
        print("The weights are random: these maps say nothing of the images.")


# torchcam layers.


def _layers(arguments: argparse.Namespace) -> None:
    import torch

    from torchcam.layers import Candidates, candidates

    classifier = _load_classifier(arguments.arch, "none")
    crop = classifier.preprocess.crop_size
    height, width = (crop[0], crop[-1]) if arguments.size is None else _as_size(arguments.size)
    noise = torch.randn((1, 3, height, width), generator=torch.Generator().manual_seed(SEED))
    try:
        found = candidates(classifier.model, noise)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _UserError(f"--size {height}x{width} is not taken by {arguments.arch}: {error}") from error
    print(f"{arguments.arch}, images of {height} x {width}")
    print(found if arguments.all else Candidates([c for c in found if c.depends and c.is_stage]))


def _as_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise _UserError(f"--size must be height and width as in 224x320, got '{text}'")
    return int(match[1]), int(match[2])


# What the commands share.


def _percent(probability: Tensor) -> str:
    return "<0.1%" if 0 < probability < 0.0005 else f"{probability:.1%}"


def _split(values: Sequence[str]) -> list[str]:
    """Split what was given by commas, by repeating the option, or both."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _as_integers(values: Sequence[str]) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError as error:
        raise _UserError(f"--class-idx must be the number of a class, or several with commas, got {values}") from error


def _find_method(name: str) -> type[Any]:
    import inspect

    from torchcam import methods

    classes = [
        name
        for name in methods.__all__
        if isinstance(entry := getattr(methods, name), type)
        and "class_idx" in inspect.signature(entry.__call__).parameters
    ]
    # Papers write Grad-CAM++, Python cannot.
    wanted = name.lower().replace("-", "").replace("+", "p")
    for entry in classes:
        if entry.lower() == wanted:
            method: type[Any] = getattr(methods, entry)
            return method
    raise _UserError(f"--method '{name}' is not a method of torchcam; {_closest(wanted, classes)}")


def _check_layer_count(method: str, layers: Sequence[str]) -> None:
    if method == "LeGrad" and not layers:
        raise _UserError("LeGrad reads the blocks of a vision transformer: name them with --target-layer")
    if method == "RefineCAM" and len(layers) < 2:
        raise _UserError("RefineCAM multiplies the maps of layers: name two or more with --target-layer")
    if method == "CAM" and len(layers) > 1:
        raise _UserError(f"CAM explains one layer, the one before the pooling: --target-layer names {len(layers)}")


def _check_colours(alpha: float, colormap: str) -> None:
    from PIL import Image

    from torchcam.utils import overlay_mask

    with _library_errors():
        overlay_mask(Image.new("L", (1, 1)), Image.new("L", (1, 1)), colormap, alpha)


def _find_device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise _UserError(f"--device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _progress(method: type[Any]) -> dict[str, Any]:
    """Let slow methods show a progress bar, on a terminal."""
    import inspect

    shown = sys.stderr.isatty() and "progress" in inspect.signature(method).parameters
    return {"progress": True} if shown else {}


def _load_classifier(arch: str, weights: str) -> _Classifier:
    import torch
    from torchvision import models

    known = models.list_models(module=models)
    arch = arch.lower()
    if arch not in known:
        close = get_close_matches(arch, known, n=3, cutoff=0.5) or ["resnet50", "mobilenet_v3_large", "convnext_tiny"]
        raise _UserError(f"--arch '{arch}' is not a classification model of torchvision; try {', '.join(close)}")
    entries = models.get_model_weights(arch)
    entry = entries.DEFAULT
    if weights.lower() == "none":
        # These two warn that they take long to draw their own kind of random weights, unless told not to.
        options = {"init_weights": False} if arch in {"googlenet", "inception_v3"} else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = models.get_model(arch, weights=None, **options)
        name = f"{arch}, random weights (seed {SEED})"
    else:
        if weights.upper() in entries.__members__:
            entry = entries[weights.upper()]
            path = _download(arch, entry.url)
            name = f"{arch}, weights {entry.name}"
        else:
            path = Path(weights)
            name = f"{arch}, weights {path.name}"
            if not path.is_file():
                names = ", ".join(entries.__members__)
                raise _UserError(f"--weights '{weights}' is neither a file nor one of {names}, none")
        model = _build(arch, entries, entry, path)
    return _Classifier(model.eval(), name, entry.transforms(), entry.meta["categories"])


def _download(arch: str, url: str) -> Path:
    """Give the file that torchvision keeps weights in, downloaded if it is not there."""
    from http.client import HTTPException

    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        checksum = torch.hub.HASH_REGEX.search(path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if sys.stderr.isatty():
                print(f"downloading {url}", file=sys.stderr)
            torch.hub.download_url_to_file(url, str(path), checksum and checksum[1], progress=sys.stderr.isatty())
        except (HTTPException, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", error)
            raise _UserError(
                f"the weights of {arch} could not be downloaded ({reason}): fetch {url} where there is a network and "
                "pass the file with --weights PATH, or try the command with --weights none (random weights)"
            ) from error
    return path


def _build(arch: str, entries: Any, entry: Any, path: Path) -> nn.Module:
    """Build a model with the weights of a file, as torchvision would with the weights it downloads."""
    import torch
    from torchvision import models

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes can raise anything
        raise _UserError(
            f"--weights '{path}' is not a file of weights ({type(error).__name__}): it must hold a state dict, "
            "written by torch.save(model.state_dict(), PATH)"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _UserError(f"--weights '{path}' holds no state dict, the result of model.state_dict()")
    # When torchvision loads weights it renames parameters of some models, and sets others up differently: let it.
    entries.get_state_dict = lambda *_args, **_kwargs: state
    try:
        model: nn.Module = models.get_model(arch, weights=entry)
    except (RuntimeError, ValueError) as error:
        problems = str(error).split("\n\t")[1:] or [str(error)]
        shown = "; ".join(textwrap.shorten(problem, 160, placeholder=" ...").rstrip(". ") for problem in problems[:2])
        more = f"; and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise _UserError(f"--weights '{path}' does not fit {arch}: {shown}{more}") from error
    finally:
        del entries.get_state_dict
    return model


def _overlay(image: Image.Image, cam: Tensor, alpha: float, colormap: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    from torchcam.utils import overlay_mask

    return overlay_mask(image, Image.fromarray(cam.cpu().numpy().astype(np.float32)), colormap, alpha)


def _draw_classes(
    image: Image.Image, panels: Sequence[tuple[str, Tensor]], title: str, alpha: float, colormap: str
) -> Figure:
    """Draw an image and its maps side by side."""
    from matplotlib.figure import Figure

    count = 1 + len(panels)
    columns = min(count, MAX_COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(0.9 + 3 * columns, 0.6 + 3.6 * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    _show(axes.flat[0], image, "input")
    for axis, (caption, cam) in zip(list(axes.flat)[1:], panels, strict=False):
        _show(axis, _overlay(image, cam, alpha, colormap), caption)
    _add_colorbar(figure, axes, colormap)
    figure.suptitle("\n".join(textwrap.wrap(title, 26 * columns)), fontsize=11, parse_math=False)
    return figure


def _show(axis: Axes, image: Image.Image, caption: str) -> None:
    axis.imshow(image)
    axis.set_title(caption, fontsize=10, parse_math=False)


def _add_colorbar(figure: Figure, axes: Any, colormap: str) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap=colormap), ax=axes, shrink=0.6, aspect=25, pad=0.02, ticks=[0, 0.5, 1])
    bar.set_label("relevance, map by map", fontsize=9)
    bar.ax.tick_params(labelsize=8)


# torchcam demo.


@dataclass(frozen=True)
class _DemoMap:
    """The map of one digit by one method, and the share of its energy that lies on each digit."""

    method: str
    layers: str
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


def _demo(arguments: argparse.Namespace) -> None:
    path = arguments.output / "torchcam-demo.png"
    _check_output([path], [], arguments.overwrite)

    from torchcam import methods
    from torchcam.demo import load_model, sample_images
    from torchcam.explain import explain_classes

    model, sample = load_model(), sample_images()[0]
    batch = sample.to_tensor()
    maps = []
    for name, layers in DEMO_METHODS.items():
        logits, cams, extractor = explain_classes(
            model, batch, lambda _: sample.labels, method=getattr(methods, name), target_layer=layers
        )
        span = layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
        for digit, layer_maps in cams.items():
            cam = extractor.fuse_cams(layer_maps, tuple(batch.shape[2:]))[0]
            maps.append(_DemoMap(name, span, digit, cam, _shares(cam, sample)))
    probabilities = logits[0].sigmoid()
    _write(_draw_demo(sample, maps, probabilities), path)

    ranking = probabilities.argsort(descending=True).tolist()[: len(sample.labels) + 1]
    answer = ", ".join(f"{digit} ({probabilities[digit]:.1%})" for digit in ranking)
    print(f"The picture holds a {' and a '.join(map(str, sample.labels))}. The model finds: {answer}.\n")
    print("How much of each map lies on the digit it explains, on the other digit, and on neither:\n")
    print(f"  {'method':<11}{'layers':<18}{'explains':>8}{'on it':>10}{'on the other':>15}{'on neither':>13}")
    flat = batch.new_ones(batch.shape[2:])
    flat_maps = [_DemoMap("(flat map)", "", digit, flat, _shares(flat, sample)) for digit in sample.labels]
    for entry in [*maps, *flat_maps]:
        row = f"{entry.own:>10.1%}{entry.other:>15.1%}{1 - entry.own - entry.other:>13.1%}"
        print(f"  {entry.method:<11}{entry.layers:<18}{entry.digit:>8}{row}")
    print(f"\nThe maps are drawn in {path}")


def _shares(cam: Tensor, sample: Any) -> dict[int, float]:
    """Give the share of a map's energy inside each digit's mask."""
    total = cam.sum().clamp_min(1e-12)
    return {label: float((cam * mask).sum() / total) for label, mask in zip(sample.labels, sample.masks, strict=True)}


def _draw_demo(sample: Any, maps: Sequence[_DemoMap], probabilities: Tensor) -> Figure:
    """Draw the picture and the ground truth, and beside them the maps: a row per digit, a column per method."""
    from matplotlib.figure import Figure
    from PIL import Image

    size = (6 * sample.image.width, 6 * sample.image.height)
    image = sample.image.resize(size, Image.Resampling.BICUBIC)
    grey = image.convert("L").convert("RGB")  # below the maps, so that all colour comes from them
    columns = [entry.method for entry in maps if entry.digit == sample.labels[0]]
    figure = Figure(figsize=(1.0 + 2.45 * (1 + len(columns)), 6.2), dpi=120, layout="constrained")
    axes = figure.subplots(len(sample.labels), 1 + len(columns), squeeze=False)
    _show(axes[0, 0], image, "picture\n")
    _show(axes[1, 0], grey, "")
    axes[1, 0].set_xlabel("ground truth\n", fontsize=10)
    for label, color in zip(sample.labels, DEMO_COLORS, strict=True):
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
        _show(
            axis, _overlay(grey, entry.cam, 0.4, DEMO_COLORMAP), f"{entry.method}\n{entry.layers}" if row == 0 else ""
        )
        axis.set_xlabel(f"{entry.own:.0%} on the {entry.digit},\n{entry.other:.0%} on the other digit", fontsize=10)
        if entry.method == columns[0]:
            probability = f"(probability {probabilities[entry.digit]:.1%})"
            axis.set_ylabel(f"evidence for a {entry.digit}\n{probability}", fontsize=11)
        _outline(axis, sample, entry.digit, DEMO_COLORS[row])
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    _add_colorbar(figure, axes, DEMO_COLORMAP)
    return figure


def _outline(axis: Axes, sample: Any, digit: int, color: str) -> None:
    """Draw the outline of a digit's mask."""
    from torchcam._tensors import resize

    height, width = axis.images[0].get_size()
    mask = sample.masks[sample.labels.index(digit)]
    smooth = resize(mask[None, None].float(), (height, width))[0, 0]
    axis.contour(smooth.numpy(), levels=[0.5], colors=[color], linewidths=1.5)
