"""What is different after a map was made: with this package, TorchCAM 0.5.0 and pytorch-grad-cam 1.5.7.

Each answers in a process of its own, on the same ResNet-18 with random weights; the other packages are installed into
folders of their own, without their dependencies. Prints what README.md has in its table of side effects.

python scripts/compare_side_effects.py
python scripts/compare_side_effects.py --torchcam-dir /path/to/torchcam --gradcam-dir /path/to/grad-cam
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peers import Peer, install
from torch import nn
from torchvision.models import resnet18

OURS, TORCHCAM, GRADCAM = NAMES = ("torchcam", "TorchCAM 0.5.0", "pytorch-grad-cam 1.5.7")
PEERS = {
    TORCHCAM: Peer(["torchcam==0.5.0"], "torchcam", __file__),
    GRADCAM: Peer(["grad-cam==1.5.7", "ttach==0.0.3", "opencv-python-headless>=4.8"], "pytorch_grad_cam", __file__),
}
ROOT = Path(__file__).resolve().parent.parent
SIZE = (3, 64, 64)


def network(training: bool = False) -> nn.Module:
    """Make the model that all are asked about."""
    torch.manual_seed(0)
    model: nn.Module = resnet18(num_classes=10)
    return model.train(training)


def explain(package: str, method: str, model: nn.Module, class_idx: Any = 0) -> torch.Tensor:
    """Make the maps of two images, as the package's documentation has it."""
    images = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(0))
    if package == GRADCAM:
        peer, targets = import_module("pytorch_grad_cam"), import_module("pytorch_grad_cam.utils.model_targets")
        with getattr(peer, method)(model, [model.layer4]) as cam:
            maps = cam(images, [targets.ClassifierOutputTarget(class_idx)] * 2)
        return torch.as_tensor(maps)
    methods = import_module("torchcam.methods")
    with getattr(methods, method)(model, "layer4", input_shape=SIZE) as extractor:
        scores = model(images)
        (found,) = extractor(class_idx, scores)
    kept: torch.Tensor = found
    return kept


def gradients(package: str) -> str:
    """Look at the parameters after Grad-CAM."""
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    explain(package, "GradCAM", model)
    kept = all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    return "untouched" if kept else "overwritten"


def modes(package: str) -> str:
    """Look at a model in training after Grad-CAM."""
    model = network(training=True)
    explain(package, "GradCAM", model)
    return "kept" if all(module.training for module in model.modules()) else "switched off"


def statistics(package: str) -> str:
    """Count the passes that batch normalisation saw beyond the caller's own."""
    if package == GRADCAM:
        return "–"
    model = network(training=True)
    explain(package, "SmoothGradCAMpp", model)
    extra = int(model.get_buffer("bn1.num_batches_tracked")) - 1
    return f"updated {extra} times more" if extra else "kept"


def random_state(package: str) -> str:
    """Look at the global streams of torch and NumPy after a method that draws noise."""
    model = network()
    before = _streams()
    explain(package, "RandomCAM" if package == GRADCAM else "SmoothGradCAMpp", model)
    moved = [name for name, state in _streams().items() if not np.array_equal(state, before[name])]
    return f"{' and '.join(moved)} moves on" if moved else "kept"


def _streams() -> dict[str, Any]:
    return {"torch's": torch.get_rng_state(), "NumPy's": np.random.get_state(legacy=False)["state"]["pos"]}  # noqa: NPY002


def missing_class(package: str) -> str:
    """Ask for a class that the model does not have."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            explain(package, "GradCAM", network(), 99)
    except UnboundLocalError:
        return f"swallowed in the `with` block, after a printed line: {said.getvalue().strip()[:40]}..."
    except Exception as error:  # noqa: BLE001 - whatever a package raises is the answer
        return f"`{type(error).__name__}`: {str(error).splitlines()[0]}"
    return "a map"


def boolean_class(package: str) -> str:
    """Ask for the class `True`."""
    if package == GRADCAM:
        return "–"
    try:
        explain(package, "GradCAM", network(), True)
    except TypeError as error:
        return f"`TypeError`: {error}"
    return "a map"


def broken_weight(package: str) -> str:
    """Look at the map of a model with a NaN among its weights."""
    model = network()
    with torch.no_grad():
        model.get_parameter("layer4.1.bn2.weight")[3] = float("nan")
    return "a finite map" if bool(explain(package, "GradCAM", model).isfinite().all()) else "a NaN map"


def inference_mode(package: str) -> str:
    """Make a map within `torch.inference_mode()`."""
    return _tried(package, torch.inference_mode(), network())


def frozen(package: str) -> str:
    """Make a map of a model whose parameters are frozen."""
    return _tried(package, contextlib.nullcontext(), network().requires_grad_(False))


def _tried(package: str, mode: Any, model: nn.Module) -> str:
    try:
        with mode:
            explain(package, "GradCAM", model)
    except RuntimeError as error:
        return f"`RuntimeError`: {str(error).splitlines()[0]}"
    return "a map"


QUESTIONS: dict[str, Callable[[str], str]] = {
    "`.grad` of the parameters after Grad-CAM": gradients,
    "training mode": modes,
    "batch-norm statistics, Smooth Grad-CAM++ in training": statistics,
    "global random state, a method that draws noise": random_state,
    "a class that does not exist": missing_class,
    "`class_idx=True`": boolean_class,
    "a NaN among the weights": broken_weight,
    "Grad-CAM in `inference_mode`": inference_mode,
    "Grad-CAM with frozen parameters": frozen,
}


def main() -> int:
    """Ask every package every question, and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scratch = Path(tempfile.gettempdir())
    parser.add_argument("--torchcam-dir", type=Path, default=scratch / "torchcam-0.5.0", help="folder for TorchCAM")
    parser.add_argument("--gradcam-dir", type=Path, default=scratch / "grad-cam-1.5.7", help="folder for grad-cam")
    parser.add_argument("--answer-as", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer_as is not None:
        warnings.simplefilter("ignore")
        print(json.dumps([question(options.answer_as) for question in QUESTIONS.values()]))
        return 0
    folders = {OURS: ROOT, TORCHCAM: options.torchcam_dir, GRADCAM: options.gradcam_dir}
    answers = {}
    for name, folder in folders.items():
        if name in PEERS:
            install(PEERS[name], folder)
        done = subprocess.run(  # noqa: S603 - nothing in it comes from elsewhere
            [sys.executable, __file__, "--answer-as", name],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )
        answers[name] = json.loads(done.stdout.splitlines()[-1])
    print(f"| | {' | '.join(NAMES)} |\n|{'---|' * 4}")
    for question, *row in zip(QUESTIONS, *answers.values(), strict=True):
        print(f"| {question} | {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
