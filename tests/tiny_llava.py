"""The tiny LLaVA of the benchmark, trained on known evidence, for tests and for the guide."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", minversion="5.0")

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # the scripts import each other as a script does
import _tiny_llava as llava  # noqa: E402
import benchmark_answers  # noqa: E402

sys.path.remove(str(SCRIPTS))

__all__ = ["benchmark_answers", "example", "llava"]


def example() -> tuple[Any, Any, Image.Image]:
    """Return the model, its processor, and a picture with a red bar and a blue cross."""
    generator = torch.Generator().manual_seed(0)
    colors, shapes = list(llava.COLORS), [*llava.SHAPES, llava.NONE]
    pictures, asked, found, _ = llava.sample(1000, generator)
    wanted = {"red": "bar", "blue": "cross"}
    for pixels, question, answer in zip(pictures, asked.tolist(), found.tolist(), strict=True):
        if {colors[color]: shapes[shape] for color, shape in zip(question, answer, strict=True)} == wanted:
            return *llava.load(), llava.to_picture(pixels)
    raise AssertionError("no such picture")
