"""`torchcam evaluate`: methods and metrics over a data set, in one table."""

from __future__ import annotations

import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._messages import UserError, add_command, add_outputs, closest, one_line
from ._methods import add_layers, check_layer_count, find_method, split, target_layer
from ._models import Classifier, add_model, find_device, load_model
from ._pictures import check_output, read_image, writing

if TYPE_CHECKING:
    import argparse

    import torch
    from torch import Tensor
    from torch.utils.data import Dataset

__all__ = ["add_to"]

METHODS = "GradCAM,GradCAMpp,LayerCAM,EigenCAM,RandomCAM"
METRICS = "ClassificationMetric,DeletionInsertionMetric"
DEMO_SCENES = 32
SCORES = ("softmax", "sigmoid", "none")

HELP = """\
Measure how faithful the maps of several methods are, over a folder of images with a subfolder for each class. Each
method explains each image once, and all metrics measure the same maps. In the table, an arrow says whether a high or a
low number is good; RandomCAM is what a method has to beat.

The folders' names are looked up among the model's classes: by name, by number, or in sorted order if there are as many
and their names are WordNet's. The state is kept after every batch: interrupted, the same command goes on where it was.
"""

EXAMPLES = """\
examples:
  torchcam evaluate --demo
      the model that ships with the package, on pictures made for it; it is known what is where in them
  torchcam evaluate val --limit 200 --output results.csv --output results.md
      a resnet50 on 200 images of a folder, evenly spread over its classes
  torchcam evaluate photos --class-source predicted --methods ScoreCAM,GradCAM --metrics ROAD,ADCC
      a folder without known classes: what the model predicts is explained
  torchcam evaluate val --model-factory mine.models:load --class-map classes.json --json
      your own model, and a file that gives the number of each folder's class

on several GPUs or machines, with the same result:
  torchrun --nproc-per-node 4 -m torchcam evaluate val --device cuda
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    evaluate = add_command(
        commands,
        "evaluate",
        short="measure the maps of several methods over a data set",
        long=HELP,
        examples=EXAMPLES,
        run=run,
    )
    evaluate.add_argument("data", metavar="DIR", nargs="?", type=Path, help="a folder of images")
    evaluate.add_argument(
        "--demo", action="store_true", help=f"in place of DIR and a model: those of the demo ({DEMO_SCENES} images)"
    )
    add_model(evaluate)
    what = evaluate.add_argument_group("what is measured")
    what.add_argument(
        "--methods",
        metavar="NAMES",
        action="append",
        help=f"methods of torchcam.methods, separated by commas (default: {METHODS})",
    )
    what.add_argument(
        "--metrics",
        metavar="NAMES",
        action="append",
        help=f"metrics of torchcam.metrics (default: {METRICS}; with --demo, Localization too)",
    )
    add_layers(what)
    what.add_argument(
        "--scores",
        choices=SCORES,
        help="what is made of the model's output before it is explained and measured (default: softmax)",
    )
    what.add_argument(
        "--class-source",
        choices=("label", "predicted"),
        default="label",
        help="explain the class of an image's folder, or the one that the model predicts (default: %(default)s)",
    )
    what.add_argument(
        "--class-map", metavar="FILE", type=Path, help='JSON with the number of each folder\'s class: {"dog": 207}'
    )
    what.add_argument("--limit", metavar="N", type=int, help="take N images, evenly spread over the folder")
    how = evaluate.add_argument_group("how it runs")
    how.add_argument("--batch-size", metavar="N", type=int, default=16, help="images at a time (default: %(default)s)")
    how.add_argument(
        "--chunk-size", metavar="N", type=int, help="variants of images at a time, where many are tried (default: 32)"
    )
    how.add_argument("--workers", metavar="N", type=int, default=0, help="processes that read images (default: 0)")
    how.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="where the state is kept until the result is there (default: beside the first --output)",
    )
    how.add_argument("--restart", action="store_true", help="forget what an interrupted run has finished")
    how.add_argument(
        "--timeout",
        metavar="MINUTES",
        type=float,
        default=60.0,
        help="under torchrun: how long processes wait for each other, a batch at most (default: %(default)g)",
    )
    result = evaluate.add_argument_group("the result")
    add_outputs(result, "write it there, too, as .json, .csv, .md or .txt")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, alone or with the other processes that torchrun has started."""
    methods = _check(arguments)
    checkpoint = arguments.checkpoint or _beside(arguments.output)
    with processes(arguments.device, arguments.timeout) as (rank, device):
        if arguments.restart:
            _discard(checkpoint)
            _wait()
        task = _demo(arguments) if arguments.demo else _folder(arguments)
        model = task.classifier.model.to(device)
        layers = list(dict.fromkeys(split(arguments.target_layer)))
        for method in methods:
            check_layer_count(method.__name__, layers)
        if rank == 0 and not arguments.json:
            print(f"{task.title}\n", flush=True)
        result = _evaluate(arguments, task, model, methods, target_layer(model, layers), checkpoint)
        if rank == 0:
            _report(result, arguments)
        _wait()
        _discard(checkpoint)


def _check(arguments: argparse.Namespace) -> list[Any]:
    """Check what can be checked before anything is loaded, and give the methods."""
    from torchcam.evaluation import check_format

    if arguments.demo == (arguments.data is not None):
        raise UserError("name either a folder of images or --demo (`torchcam evaluate --help` explains)")
    if arguments.demo:
        for option in ("arch", "model_factory", "weights", "class_map"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--demo has a model and classes of its own: leave out --{option.replace('_', '-')}")
    for option, lowest in (("batch_size", 1), ("chunk_size", 1), ("limit", 1), ("workers", 0)):
        value = getattr(arguments, option)
        if value is not None and value < lowest:
            raise UserError(f"--{option.replace('_', '-')} must be at least {lowest}, got {value}")
    if not arguments.timeout > 0:
        raise UserError(f"--timeout must be positive, got {arguments.timeout:g}")
    arguments.output = list(dict.fromkeys(arguments.output))
    for path in arguments.output:
        try:
            check_format(path)
        except ValueError as error:
            raise UserError(f"--output {error}") from error
    check_output(arguments.output, [], arguments.overwrite)
    methods = [find_method(name, "--methods") for name in split(arguments.methods or [METHODS])]
    for name in split(arguments.metrics or []):
        find_metric(name)
    return methods


def find_metric(name: str) -> Any:
    """Find a metric by its name."""
    from torchcam import metrics
    from torchcam.evaluation import find_class

    try:
        return find_class("metrics", name, metrics)
    except ValueError as error:
        known = sorted(entry for entry in metrics.__all__ if isinstance(getattr(metrics, entry), type))
        raise UserError(f"--metrics '{name}' is not a metric of torchcam; {closest(name, known)}") from error


def _beside(outputs: Sequence[Path]) -> Path:
    """Choose where to keep the state."""
    first = outputs[0] if outputs else Path("torchcam-evaluate")
    return first.with_name(f"{first.name}.partial")


def _discard(checkpoint: Path) -> None:
    from torchcam.evaluation import discard_checkpoint

    try:
        discard_checkpoint(checkpoint)
    except OSError as error:
        raise UserError(f"cannot remove '{checkpoint}': {error.strerror or error}") from error


# Several processes.


@contextmanager
def processes(device: str, timeout: float) -> Iterator[tuple[int, torch.device]]:
    """Join the processes that torchrun has started, if it has, and give this one's number and device."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    found = find_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        with _termination_as_interrupt():
            yield (dist.get_rank() if dist.is_initialized() else 0), found
        return
    if found.type == "cuda" and found.index is None:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"--device cuda: there are {count} GPUs for more processes than that")
        found = torch.device("cuda", local)
        torch.cuda.set_device(found)
    try:
        dist.init_process_group(
            "nccl" if found.type == "cuda" else "gloo",
            timeout=timedelta(minutes=timeout),
            device_id=found if found.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the other processes cannot be reached: {error}") from error
    with _termination_as_interrupt():
        yield dist.get_rank(), found
    dist.destroy_process_group()  # after an error there may be nobody to agree with: the process ends anyway


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """End as after Ctrl-C when a scheduler or torchrun asks for it."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


# The data.


@dataclass(frozen=True)
class Task:
    """What is evaluated on what.

    Attributes:
        classifier: the model
        data: the data set
        title: both, in a line
        scores: what is made of the model's output
        metrics: the names of the metrics
        facts: what makes the data what they are, for the record
    """

    classifier: Classifier
    data: Dataset[Any]
    title: str
    scores: str
    metrics: list[str]
    facts: Mapping[str, Any]


def _demo(arguments: argparse.Namespace) -> Task:
    """Make pictures with the digits that the demo model knows: two in each, the first of which is explained."""
    from torchcam import demo

    count = arguments.limit or DEMO_SCENES
    try:
        scenes = demo.make_scenes(count, num_digits=2)
    except ImportError as error:
        raise UserError(str(error)) from error
    data: Any = [
        (image, int(labels[0]), {"masks": masks[0]})
        for image, labels, masks in zip(scenes.images, scenes.labels, scenes.masks, strict=True)
    ]
    names = split(arguments.metrics or [METRICS, "Localization"])
    classifier = Classifier(demo.load_model(), "demo model", _pixels, demo.CLASS_NAMES)
    title = f"demo model on {count} pictures of two digits each, one of which is explained"
    return Task(classifier, data, title, arguments.scores or "sigmoid", names, {"demo": count})


def _pixels(image: Any) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    pixels: Tensor = pil_to_tensor(image)
    return pixels / 255


def _folder(arguments: argparse.Namespace) -> Task:
    """Read a folder of images."""
    from torch.utils.data import Subset

    root: Path = arguments.data
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"DIR '{root}' {what}")
    classifier = load_model(arguments)
    data: Any
    if arguments.class_source == "predicted":
        files = sorted(path for path in root.rglob("*") if _is_image(path))
        if not files:
            raise UserError(f"DIR '{root}' holds no images")
        data, how = _Files(files, classifier.preprocess), "what the model predicts is explained"
        named = [path.relative_to(root).as_posix() for path in files]
        classes: dict[str, int] = {}
    else:
        data, classes, how = _image_folder(arguments, classifier)
        files = [Path(path) for path, _ in data.samples]
        named = [path.relative_to(root).as_posix() for path in files]
    count = len(files)
    if arguments.limit is not None and arguments.limit < count:
        data = Subset(data, [i * count // arguments.limit for i in range(arguments.limit)])
    title = f"{classifier.name}, on {len(data)} of {count} images in {root}; {how}"
    facts = {
        "model": classifier.name,
        "folder": str(root.resolve()),
        "files": f"{count}, {zlib.crc32(chr(10).join(named).encode()):08x}",
        "classes": classes,
        "limit": arguments.limit,
    }
    names = split(arguments.metrics or [METRICS])
    return Task(classifier, data, title, arguments.scores or "softmax", names, facts)


class _Files:
    """Images without classes."""

    def __init__(self, files: Sequence[Path], preprocess: Any) -> None:
        self.files, self.preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.preprocess(read_image(self.files[index]))


def _is_image(path: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return path.suffix.lower() in IMG_EXTENSIONS and path.is_file()


def _image_folder(arguments: argparse.Namespace, classifier: Classifier) -> tuple[Any, dict[str, int], str]:
    """Give the images of a folder with a subfolder for each class, the subfolders' classes, and how they were found."""
    from torchvision.datasets import ImageFolder

    root: Path = arguments.data
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise UserError(
            f"DIR '{root}' has no subfolder for each class: pass --class-source predicted to explain what the model "
            "predicts"
        )
    if arguments.class_map is None:
        classes, how = match_classes(folders, classifier)
    else:
        classes, how = _read_class_map(arguments.class_map, folders), f"classes as in {arguments.class_map}"
    try:
        data = ImageFolder(root, classifier.preprocess, loader=read_image)
    except FileNotFoundError as error:
        raise UserError(f"DIR '{root}': {str(error).splitlines()[0]}") from error
    data.target_transform = [classes[name] for name in data.classes].__getitem__
    return data, classes, how


def match_classes(folders: Sequence[str], classifier: Classifier) -> tuple[dict[str, int], str]:
    """Find the class of each folder by its name.

    Returns:
        the number of each folder's class, and how they were found
    """
    categories = classifier.categories
    num_classes = len(categories) if categories is not None else _num_outputs(classifier)
    if categories is not None:
        by_name: dict[str, list[int]] = {}
        for index, category in enumerate(categories):
            by_name.setdefault(_plain(category), []).append(index)
        found = {name: by_name.get(_plain(name), []) for name in folders}
        if all(len(indices) == 1 for indices in found.values()):
            return {name: indices[0] for name, indices in found.items()}, "classes by the folders' names"
    if all(re.fullmatch(r"\d+", name) and int(name) < num_classes for name in folders):
        return {name: int(name) for name in folders}, "classes by the folders' numbers"
    in_order = {name: index for index, name in enumerate(folders)}
    if len(folders) == num_classes and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return in_order, "classes in the order of the folders' WordNet names"
    if len(folders) == num_classes and categories is None:
        return in_order, "classes in the order of the folders' names"
    ways = (
        'pass --class-map FILE with the number of each folder\'s class, as in {"dog": 207}, or --class-source '
        "predicted to explain what the model predicts"
    )
    if categories is None:
        raise UserError(
            f"there are {len(folders)} folders for the {num_classes} classes of {classifier.name}, whose names are not "
            f"known: {ways}"
        )
    unknown = [name for name, indices in found.items() if len(indices) != 1]
    twice = [name for name in unknown if found[name]]
    why = "is the name of several classes" if unknown == twice else "is not the name of a class"
    example = f"'{unknown[0]}'" + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
    raise UserError(f"the folder {example} {why} of {classifier.name}: {ways}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _num_outputs(classifier: Classifier) -> int:
    import torch
    from PIL import Image

    from torchcam._passes import untouched
    from torchcam.targets import read_logits

    blank = classifier.preprocess(Image.new("RGB", (256, 256))).unsqueeze(0)
    with untouched(classifier.model), torch.inference_mode():
        return read_logits(classifier.model(blank)).shape[1]


def _read_class_map(path: Path, folders: Sequence[str]) -> dict[str, int]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--class-map '{path}' cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(found, dict) or not all(type(index) is int and index >= 0 for index in found.values()):
        raise UserError(f"--class-map '{path}' must hold the numbers of classes by folder, as in {{\"dog\": 207}}")
    missing = [name for name in folders if name not in found]
    if missing:
        raise UserError(f"--class-map '{path}' does not name the class of the folder '{missing[0]}'")
    return {name: found[name] for name in folders}


# The evaluation.


def _evaluate(
    arguments: argparse.Namespace,
    task: Task,
    model: Any,
    methods: Sequence[Any],
    layers: str | list[str] | None,
    checkpoint: Path,
) -> Any:
    from torch.utils.data import DataLoader

    from torchcam.evaluation import evaluate

    loader = DataLoader(task.data, batch_size=arguments.batch_size, num_workers=arguments.workers)
    try:
        return evaluate(
            model,
            loader,
            methods,
            [find_metric(name) for name in task.metrics],
            target_layer=layers,
            logits_fn=_scores(task.scores),
            class_source=arguments.class_source,
            batch_size=arguments.chunk_size,
            checkpoint=checkpoint,
            keep_checkpoint=True,
            progress=sys.stderr.isatty(),
            settings={**task.facts, "target_layer": layers},
        )
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt, "__notes__", [])
        raise KeyboardInterrupt(*notes, "the same command goes on from there (--restart begins anew)") from None
    except UserError as error:  # of a worker that reads images: the last line of its message says it
        raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from error
    except OSError as error:
        raise UserError(
            f"cannot keep the state in '{checkpoint}': {error.strerror or error}; pass another --checkpoint"
        ) from error
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TypeError) and "`" not in str(error):
            raise  # no option has a type that the user could get wrong: a bug
        message = str(error).replace("`checkpoint`", "--checkpoint").replace("`target_layer`", "--target-layer")
        message = message.replace("remove it to begin anew", "pass --restart to begin anew")
        notes = "; ".join(note.removeprefix("torchcam.evaluate: ") for note in getattr(error, "__notes__", []))
        raise UserError(f"{message} ({notes})" if notes else message) from error


def _scores(name: str) -> Any:
    from functools import partial

    import torch

    return {"softmax": partial(torch.softmax, dim=1), "sigmoid": torch.sigmoid, "none": None}[name]


def _report(result: Any, arguments: argparse.Namespace) -> None:
    """Print the table, and write it."""
    from torchcam.evaluation import check_format

    for path in arguments.output:
        text = getattr(result, check_format(path))()
        with writing(path) as part:
            part.write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
    if arguments.json:
        print(result.to_json())
        return
    from rich.console import Console

    # A file or a pipe has no width: the table is not broken there.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(result)
    for path in arguments.output:
        print(f"-> {path}")
