"""Class activation maps of fixed images while the Trainer of Lightning trains."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from torchcam.monitor import CAMMonitor, check_options
from torchcam.targets import ClassIndex

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    def _find_callback() -> type:
        """Give the base class of callbacks: of the package that is in use, where both names are installed."""
        names = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
        for name in names:
            try:
                return import_module(name).Callback
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] not in {"lightning", "pytorch_lightning"}:
                    raise
        raise ModuleNotFoundError(
            'torchcam.integrations.lightning needs Lightning: pip install "torchcam[lightning]"', name="lightning"
        )

    Callback = _find_callback()

__all__ = ["CAMCallback"]


class CAMCallback(Callback):
    """Explain fixed images while a Trainer trains; what is trained stays bit for bit what it would be without.

    The pictures and scalars go to a folder and to the loggers of the Trainer: see
    :class:`torchcam.monitor.CAMMonitor`, whose arguments it takes. A checkpoint holds what the callback needs to go on
    from it.

    Example:
        >>> from lightning.pytorch import Trainer  # doctest: +SKIP
        >>> callback = CAMCallback(images, labels, every_n_steps=100, target_layer="model.layer4")  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP

    Args:
        images: the probe images as the model takes them, (N, C, *spatial)
        class_idx: the class to explain, one for all images or one per image
        every_n_steps: explain after every so many optimisation steps (``trainer.global_step``)
        every_n_epochs: explain after every so many epochs; by default each, unless ``every_n_steps`` is given
        at_start: whether to explain before the first step as well
        submodule: the name of the part of the LightningModule that is called with the images, such as ``"model"``,
            which the names of target layers then start from; by default the LightningModule itself, with its forward
        directory: where to write; by default ``cam`` in the log folder of the Trainer
        log: whether to log to the Trainer's loggers
        options: further arguments of :class:`torchcam.monitor.CAMMonitor`

    Attributes:
        monitor: the monitor; None before the training

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
        submodule: str | None = None,
        directory: str | Path | None = None,
        log: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self._options = check_options(images, class_idx, every_n_steps, every_n_epochs, options)
        self._at_start = at_start
        self._submodule = submodule
        self._directory = directory
        self._log = log
        self._state: Mapping[str, Any] = {}
        self.monitor: CAMMonitor | None = None

    @property
    def state_key(self) -> str:
        """What tells this callback's state in a checkpoint from those of others like it."""
        return self._generate_state_key(tag=self._options.get("tag", "cam"), directory=str(self._directory))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the monitor, and explain the images for the first time."""
        options = dict(self._options)
        folder = self._directory or Path(trainer.log_dir or trainer.default_root_dir, "cam")
        given = options.pop("writer", None)
        writers = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
        if self._log and trainer.loggers:
            writers.append(_Loggers(trainer))
        model = pl_module if self._submodule is None else pl_module.get_submodule(self._submodule)
        self.monitor = CAMMonitor(model, directory=folder, writer=writers, **options)
        if self._state:
            self.monitor.load_state_dict(self._state)
        elif self._at_start:
            self.monitor.probe(0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Explain the images if the number of optimisation steps says so."""
        if self.monitor is not None and trainer.global_step:
            self.monitor.step(trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain the images if the number of epochs says so."""
        if self.monitor is not None:
            self.monitor.epoch(trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the strip."""
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the strip of a training that was cut short."""
        if self.monitor is not None and isinstance(exception, KeyboardInterrupt):
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint has to hold."""
        return dict(self._state) if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint held; it is used when the training starts."""
        self._state = state_dict


class _Loggers:
    """The loggers of a Trainer as one writer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def log(self, data: Mapping[str, Any]) -> None:
        """Log scalars and pictures (height, width, 3) at the Trainer's step."""
        step = self._trainer.global_step
        pictures = {name: value for name, value in data.items() if isinstance(value, np.ndarray)}
        scalars = {name: value for name, value in data.items() if name not in pictures}
        for logger in self._trainer.loggers:
            logger.log_metrics(scalars, step=step)
            for name, picture in pictures.items():
                if callable(log_image := getattr(logger, "log_image", None)):
                    log_image(name, [picture], step=step)
                elif callable(add_image := getattr(getattr(logger, "experiment", None), "add_image", None)):
                    add_image(name, picture, step, dataformats="HWC")
