"""Class activation maps of fixed images while the Trainer of transformers trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchcam.monitor import CAMMonitor, check_options
from torchcam.targets import ClassIndex

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"torchcam.integrations.transformers needs transformers and what its Trainer needs, and {error.name!r} is "
        'missing: pip install "torchcam[transformers]"',
        name=error.name,
    ) from error

__all__ = ["CAMTrainerCallback"]


class CAMTrainerCallback(TrainerCallback):
    """Explain fixed images while a Trainer trains; what is trained stays bit for bit what it would be without.

    The pictures and scalars go to a folder and to where the Trainer reports: see
    :class:`torchcam.monitor.CAMMonitor`, whose arguments it takes. Of the places in ``report_to`` it knows
    ``"tensorboard"`` (events in ``directory``) and ``"wandb"`` (the run that is active); for others pass a ``writer``.

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
        log: whether to report where the Trainer does
        options: further arguments of :class:`torchcam.monitor.CAMMonitor`

    Attributes:
        monitor: the monitor; None before the training, and in all processes but the first

    Raises:
        TypeError: if an option is none of the monitor's
        ValueError: if ``every_n_steps`` and ``every_n_epochs`` are both given
    """

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
        self._options = check_options(images, class_idx, every_n_steps, every_n_epochs, options)
        self._at_start = at_start
        self._directory = directory
        self._log = log
        self._own_writer: Any = None
        self.monitor: CAMMonitor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the monitor, and explain the images for the first time."""
        self.monitor = None
        if model is None or not state.is_world_process_zero:
            return
        options = dict(self._options)
        folder = Path(self._directory or Path(str(args.output_dir), "cam"))
        given = options.pop("writer", None)
        writers = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
        if self._log:
            writers += self._reports(list(args.report_to or []), folder)
        self.monitor = CAMMonitor(model, directory=folder, writer=writers, **options)
        if state.global_step:  # from a checkpoint
            self.monitor.resume(state.global_step if self.monitor.unit == "step" else int((state.epoch or 0) + 1e-6))
        elif self._at_start:
            self.monitor.probe(0)

    def _reports(self, names: list[str], folder: Path) -> list[Any]:
        """Give the writers for where the Trainer reports."""
        writers: list[Any] = []
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self._own_writer = SummaryWriter(log_dir=str(folder))
            writers.append(self._own_writer)
        run = getattr(sys.modules.get("wandb"), "run", None)  # the Trainer's own callback has begun it
        if "wandb" in names and run is not None:
            writers.append(run)
        return writers

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Explain the images if the number of optimisation steps says so."""
        if self.monitor is not None:
            self.monitor.step(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Explain the images if the number of epochs says so."""
        if self.monitor is not None:
            self.monitor.epoch(round(state.epoch or 0))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send the strip to where the Trainer reports."""
        if self.monitor is not None:
            self.monitor.close()
        if self._own_writer is not None:
            self._own_writer.close()
            self._own_writer = None
