"""The lines of the package that run, one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torchcam

_PACKAGE = str(Path(torchcam.__file__).parent)


@contextmanager
def at_each_line(visit: Callable[[tuple[str, int]], Any]) -> Iterator[None]:
    """Call a function before each line of the package that this thread runs inside the block.

    Args:
        visit: called with the file and the number of the line; what it raises is raised by that line, the last visited
    """

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        if event == "line":
            visit((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
