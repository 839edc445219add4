"""Class activation maps of fixed images while the Trainer of transformers trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from torchcam._extras import extra
from torchcam.integrations._callback import MonitorCallback

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"torchcam.integrations.transformers needs transformers and what its Trainer needs, and {error.name!r} is "
        f"missing: {extra('transformers')}",
        name=error.name,
    ) from error

__all__ = ["CAMTrainerCallback"]


class CAMTrainerCallback(MonitorCallback, TrainerCallback):
    """Explain fixed images while a Trainer trains. The trained model is bit for bit the same as without the callback.

    The pictures and scalars go to a folder and to the loggers of the Trainer: see
    :class:`torchcam.monitor.CAMMonitor`, whose arguments it takes. Of the loggers in ``report_to`` it supports
    ``"tensorboard"`` (events in ``directory``) and ``"wandb"`` (the active run); for others pass a ``writer``.

    Example:
        >>> from transformers import Trainer  # doctest: +SKIP
        >>> callback = CAMTrainerCallback(images, labels, every_n_steps=100)  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP

    Args:
        images: the probe images as the model takes them (``pixel_values``), (N, C, *spatial)
        class_idx: the class to explain, one for all images or one per image
        every_n_steps: explain after every so many optimisation steps (``state.global_step``)
        every_n_epochs: explain after every so many epochs; by default each, unless ``every_n_steps`` is given
        at_start: whether to explain before the first step as well
        directory: where to write; by default ``cam`` in the Trainer's output folder
        log: whether to log to the loggers of the Trainer
        options: further arguments of :class:`torchcam.monitor.CAMMonitor`

    Attributes:
        monitor: the monitor; None before the training, and in all processes but the first

    Raises:
        TypeError: if an option is not an argument of the monitor
        ValueError: if ``every_n_steps`` and ``every_n_epochs`` are both given
    """

    _own_writer: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the monitor, and explain the images for the first time."""
        self.monitor = None
        if model is None or not state.is_world_process_zero:
            return
        folder = Path(self._directory or Path(str(args.output_dir), "cam"))
        writers = self._loggers(list(args.report_to or []), folder) if self._log else []
        monitor = self._create_monitor(model, folder, writers)
        if state.global_step:  # from a checkpoint
            monitor.resume(state.global_step if monitor.unit == "step" else int((state.epoch or 0) + 1e-6))
        elif self._at_start:
            monitor.probe(0)

    def _loggers(self, names: list[str], folder: Path) -> list[Any]:
        """Return the writers for the loggers of the Trainer."""
        writers: list[Any] = []
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self._own_writer = SummaryWriter(log_dir=str(folder))
            writers.append(self._own_writer)
        run = getattr(sys.modules.get("wandb"), "run", None)  # started by the Trainer's own callback
        if "wandb" in names and run is not None:
            writers.append(run)
        return writers

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Explain the images if the number of optimisation steps is due."""
        if self.monitor is not None:
            self.monitor.step(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Explain the images if the number of epochs is due."""
        if self.monitor is not None:
            self.monitor.epoch(round(state.epoch or 0))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the strip."""
        self._close_monitor()
        if self._own_writer is not None:
            self._own_writer.close()
            self._own_writer = None
