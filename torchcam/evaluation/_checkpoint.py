"""Checkpoints of an evaluation, to resume it after an interruption."""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._files import atomic_write, write_all


class Checkpoint:
    """A folder with one file per process, each replaced as a whole, with a checksum of its content.

    Args:
        folder: the folder
        rank: the number of this process
        size: the number of processes
    """

    def __init__(self, folder: str | Path, rank: int = 0, size: int = 1) -> None:
        self.folder = Path(folder)
        self.rank, self.size = rank, size
        self.path = self.folder / f"process-{rank}-of-{size}.pt"

    def load(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the state that was saved last, or None if there is none.

        Raises:
            ValueError: if the checkpoint belongs to an evaluation with other settings, is damaged, or is no checkpoint
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`checkpoint` '{self.folder}' is not a folder: name another")
        for path in self.files():
            size = int(path.stem.rpartition("-")[2])
            if size != self.size:
                raise ValueError(
                    f"`checkpoint` '{self.folder}' belongs to an evaluation by {size} processes, this one is by "
                    f"{self.size}: {_WAY_OUT}"
                )
        if not self.path.exists():
            return None
        try:
            content = self.path.read_bytes()
            payload = content.partition(b"\n")[2]
            intact = content == _signed(payload)
            state: dict[str, Any] = (
                torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True) if intact else {}
            )
        except Exception as error:  # unpickling can raise anything
            raise self.refusal(f"cannot be read ({type(error).__name__}: {error})") from error
        if not intact:
            raise self.refusal("is damaged, or was not written by this version of torchcam")
        differences = list(_differences(state["settings"], dict(settings)))
        if differences:
            raise ValueError(
                f"`checkpoint` '{self.folder}' belongs to an evaluation with other settings: {'; '.join(differences)}. "
                f"{_WAY_OUT[0].upper()}{_WAY_OUT[1:]}"
            )
        return state

    def save(self, settings: Mapping[str, Any], **state: Any) -> None:
        """Replace the state of this process.

        Raises:
            OSError: if the disk is full; the earlier state remains
        """
        payload = io.BytesIO()
        torch.save({"settings": dict(settings), **state}, payload)
        with atomic_write(self.path) as part, part.open("wb", buffering=0) as file:
            write_all(file, _signed(payload.getvalue()))
            os.fsync(
                file.fileno()
            )  # a machine that loses its power must not leave an empty file in the old one's place

    def refusal(self, reason: str) -> ValueError:
        """Return the error for a file that is no state of an evaluation."""
        return ValueError(f"`checkpoint` '{self.path}' {reason}: name another folder, or remove it")

    def files(self) -> list[Path]:
        """Return the files of all processes."""
        return sorted(path for path in self.folder.glob("process-*-of-*.pt") if re.search(r"-\d+-of-\d+$", path.stem))

    def remove(self) -> None:
        """Remove the files of all processes, and the folder if nothing else is in it."""
        with suppress(FileNotFoundError):  # another process may do the same
            for path in (*self.files(), *self.folder.glob(".process-*.part")):  # a killed process leaves the latter
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _signed(payload: bytes) -> bytes:
    """Return the content of a file: the format and a checksum in the first line, then the payload."""
    return b"torchcam evaluation 3 %s\n%s" % (sha256(payload).hexdigest().encode(), payload)


_WAY_OUT = "use those settings, name another folder, or remove it to begin anew"


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield a description of each difference between two trees of settings."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            below = f"{name}.{key}" if name else str(key)
            yield from _differences(before.get(key, "nothing"), now.get(key, "nothing"), below)
    elif before != now:
        yield f"{name} was {before}, is {now}"


def checksum(model: nn.Module) -> str:
    """Return a checksum of the model's parameters and buffers."""
    value = 0
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(_bytes(tensor), value)
    return f"{value:08x}"


def _bytes(tensor: Tensor) -> Any:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return repr(tuple(tensor.shape)).encode()
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def describe(thing: Any) -> str:
    """Return a description of a class, a function or an object, the same in every run.

    Functions are described by their names, so that two lambda expressions of one module look the same.
    """
    if isinstance(thing, partial):
        options = [*map(describe, thing.args), *(f"{key}={describe(value)}" for key, value in thing.keywords.items())]
        return f"{describe(thing.func)}({', '.join(options)})"
    if callable(thing) and hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    if isinstance(thing, Tensor):
        return f"tensor of shape {tuple(thing.shape)}, {zlib.crc32(_bytes(thing)):08x}"
    if isinstance(thing, (list, tuple)):
        return f"[{', '.join(map(describe, thing))}]"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))
