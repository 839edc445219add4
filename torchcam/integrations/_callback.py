"""The part that the callbacks of all trainers share: their options, and the monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchcam.monitor import CAMMonitor, as_writers, check_options
from torchcam.targets import ClassIndex


class MonitorCallback:
    """Holds the options of a monitor, and creates it when the training starts."""

    def __init__(
        self,
        images: Tensor,
        class_idx: ClassIndex | None = None,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        at_start: bool = True,
        directory: str | Path | None = None,
        log: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self._options = check_options(images, class_idx, every_n_steps, every_n_epochs, options)
        self._at_start = at_start
        self._directory = directory
        self._log = log
        self.monitor: CAMMonitor | None = None

    def _create_monitor(self, model: nn.Module, folder: Path, writers: list[Any]) -> CAMMonitor:
        """Create the monitor, with further writers."""
        options = {**self._options, "writer": as_writers(self._options.get("writer")) + writers}
        self.monitor = CAMMonitor(model, directory=folder, **options)
        return self.monitor

    def _close_monitor(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
