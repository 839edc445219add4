r"""Measure the maps of several methods over a data set.

Measure how faithful the maps of several methods are, over a folder of images
with a subfolder for each class. Each method explains each image once, and all
metrics measure the same maps. In the table, an arrow says whether a high or a
low number is good; RandomCAM is what a method has to beat.

The folders' names are looked up among the model's classes: by name, by number,
or in sorted order if there are as many and their names are WordNet's. The
state is kept after every batch: interrupted, the same command goes on where it
was.

Examples:
  torchcam evaluate --demo
      the model that ships with the package, on pictures made for it; it is
      known what is where in them
  torchcam evaluate val --limit 200 --output results.csv --output results.md
      a resnet50 on 200 images of a folder, evenly spread over its classes
  torchcam evaluate photos --class-source predicted \
      --methods ScoreCAM,GradCAM --metrics ROAD,ADCC
      a folder without known classes: what the model predicts is explained
  torchcam evaluate val --model-factory mine.models:load \
      --class-map classes.json --json
      your own model, and a file that gives the number of each folder's class

on several GPUs or machines, with the same result:
  torchrun --nproc-per-node 4 -m torchcam evaluate val --device cuda
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from . import _options
from ._folder import read_folder
from ._images import check_output, file_errors, save_reports
from ._messages import UserError, library_errors, print_line, print_table
from ._models import find_device, load_model

METHODS = "GradCAM,GradCAMpp,LayerCAM,EigenCAM,RandomCAM"
METRICS = ["ClassificationMetric", "DeletionInsertionMetric"]
DEMO_SCENES = 32
SCORES = ("softmax", "sigmoid", "none")


def add_options(evaluate: Any) -> None:
    """Add the options of the command to its parser."""
    evaluate.add_argument("data", metavar="DIR", nargs="?", type=Path, help="a folder of images")
    evaluate.add_argument(
        "--demo", action="store_true", help=f"in place of DIR and a model: those of the demo ({DEMO_SCENES} images)"
    )
    _options.add_model(evaluate)
    what = evaluate.add_argument_group("what is measured")
    _options.add_methods(what, METHODS)
    what.add_argument(
        "--metrics",
        metavar="NAMES",
        action="extend",
        type=_options.names,
        help=f"metrics of torchcam.metrics (default: {','.join(METRICS)}; with --demo, Localization too)",
    )
    _options.add_layers(what)
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
    _options.add_count(what, "--limit", "take N images, evenly spread over the folder")
    how = evaluate.add_argument_group("how it runs")
    _options.add_count(how, "--batch-size", "images at a time (default: %(default)s)", default=16)
    _options.add_count(how, "--chunk-size", "variants of images at a time, where many are tried (default: 32)")
    _options.add_count(how, "--workers", "processes that read images (default: 0)", lowest=0, default=0)
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
    _options.add_reports(evaluate.add_argument_group("the result"), "it", (".json", ".csv", ".md", ".txt"))


def run(arguments: Any) -> None:
    """Evaluate, alone or with the other processes that torchrun has started."""
    outputs = list(dict.fromkeys(arguments.output))
    methods = _check(arguments, outputs)
    first = outputs[0] if outputs else Path("torchcam-evaluate")
    checkpoint = arguments.checkpoint or first.with_name(f"{first.name}.partial")
    with _processes(arguments.device, arguments.timeout) as rank:
        if arguments.restart:
            _discard(checkpoint)
            _wait_for_all()
        model, data, title, facts = _demo(arguments) if arguments.demo else _folder(arguments)
        if rank == 0 and not arguments.json:
            print(f"{title}\n", flush=True)
        result = _evaluate(arguments, model, data, facts, methods, checkpoint)
        if rank == 0:
            save_reports(result, outputs)
            if arguments.json:
                print(result.to_json())
            else:
                print_table(result)
                for path in outputs:
                    print_line(f"-> {path}")
        _wait_for_all()
        _discard(checkpoint)


# The processes that torchrun has started.


@contextmanager
def _processes(device: str, timeout: float) -> Iterator[int]:
    """Join the processes that torchrun has started, if any, and yield this one's number; each has a GPU of its own."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    found = find_device(device)
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        on_gpu = found.type == "cuda"
        if on_gpu and found.index is None:
            local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= count:
                raise UserError(f"--device cuda: there are {count} GPUs for more processes than that")
            found = torch.device("cuda", local)
            torch.cuda.set_device(found)
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                timeout=timedelta(minutes=timeout),
                device_id=found if on_gpu else None,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the other processes cannot be reached: {error}") from error
    yield dist.get_rank() if dist.is_initialized() else 0
    if joins:
        dist.destroy_process_group()  # not after an error: the others may have ended, and this process ends anyway


def _wait_for_all() -> None:
    """Wait until all processes are here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


# What is evaluated.


def _check(arguments: Any, outputs: Sequence[Path]) -> list[type[Any]]:
    """Check what can be checked before anything is loaded, and return the methods."""
    from torchcam import metrics
    from torchcam.evaluation import find_class

    if arguments.demo == (arguments.data is not None):
        raise UserError("name either a folder of images or --demo (`torchcam evaluate --help` explains)")
    if arguments.demo:
        for option in ("arch", "timm", "hf", "model_factory", "weights", "class_map"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--demo has a model and classes of its own: leave out --{option.replace('_', '-')}")
    elif not arguments.data.is_dir():
        raise UserError(f"DIR '{arguments.data}' is not a folder")
    if not arguments.timeout > 0:
        raise UserError(f"--timeout must be positive, got {arguments.timeout:g}")
    with library_errors():
        for name in arguments.metrics or []:
            find_class("metrics", name, metrics)
    check_output(outputs, [], arguments.overwrite)
    return _options.find_methods(arguments.methods, METHODS)


def _discard(checkpoint: Path) -> None:
    from torchcam.evaluation import discard_checkpoint

    with file_errors(checkpoint):
        discard_checkpoint(checkpoint)


def _demo(arguments: Any) -> tuple[Any, Any, str, dict[str, Any]]:
    """Return the demo model, pictures that hold two digits each, the first of which is explained, and what that is."""
    from torchcam import demo

    count = arguments.limit or DEMO_SCENES
    with library_errors():
        scenes = demo.make_scenes(count, num_digits=2)
    data = [
        (image, int(labels[0]), {"masks": masks[0]})
        for image, labels, masks in zip(scenes.images, scenes.labels, scenes.masks, strict=True)
    ]
    title = f"demo model on {count} pictures of two digits each, one of which is explained"
    return demo.load_model().to(arguments.device), data, title, {"demo": count}


def _folder(arguments: Any) -> tuple[Any, Any, str, dict[str, Any]]:
    """Return a model, the images of a folder, or as many of them as are asked for, and what that is."""
    from torch.utils.data import Subset

    classifier = load_model(arguments)
    folder = read_folder(arguments, classifier)
    count = len(folder)
    limit = min(arguments.limit or count, count)
    data: Any = Subset(folder, [i * count // limit for i in range(limit)])  # type: ignore[arg-type]
    title = f"{classifier.name}, on {len(data)} of {count} images in {folder.root}; {folder.how}"
    return classifier.model, data, title, {**folder.facts, "limit": arguments.limit}


def _scored(kind: str, output: Any) -> Any:
    """Return softmax or sigmoid of the scores in a model's output."""
    from torchcam.targets import read_logits

    logits = read_logits(output)
    return logits.softmax(1) if kind == "softmax" else logits.sigmoid()


def _evaluate(
    arguments: Any,
    model: Any,
    data: Any,
    facts: Mapping[str, Any],
    methods: Sequence[type[Any]],
    checkpoint: Path,
) -> Any:
    from torch.utils.data import DataLoader

    from torchcam.evaluation import evaluate

    scores = arguments.scores or ("sigmoid" if arguments.demo else "softmax")
    metrics = [*METRICS, "Localization"] if arguments.demo else METRICS
    layers = arguments.target_layer or None
    try:
        with file_errors(checkpoint), library_errors(arguments.target_layer):
            return evaluate(
                model,
                DataLoader(data, batch_size=arguments.batch_size, num_workers=arguments.workers),
                methods,
                arguments.metrics or metrics,
                target_layer=layers,
                logits_fn=None if scores == "none" else partial(_scored, scores),
                class_source=arguments.class_source,
                batch_size=arguments.chunk_size,
                checkpoint=checkpoint,
                keep_checkpoint=True,
                progress=sys.stderr.isatty(),
                settings={**facts, "target_layer": layers},
            )
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt, "__notes__", [])
        raise KeyboardInterrupt(*notes, "the same command goes on from there (--restart begins anew)") from None
    except UserError as error:  # of a worker that reads images: the last line of its message says it
        raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from error
