"""Class activation maps of fixed images while the Trainer of Lightning trains."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from torchcam._extras import extra
from torchcam.integrations._callback import MonitorCallback
from torchcam.targets import ClassIndex

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    def _find_callback() -> type:
        """Return the base class of callbacks, from the package in use if both are installed."""
        names = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
        for name in names:
            try:
                return import_module(name).Callback
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] not in {"lightning", "pytorch_lightning"}:
                    raise
        raise ModuleNotFoundError(
            f"torchcam.integrations.lightning needs Lightning: {extra('lightning')}", name="lightning"
        )

    Callback = _find_callback()

__all__ = ["CAMCallback"]


class CAMCallback(MonitorCallback, Callback):
    """Explain fixed images while a Trainer trains. The trained model is bit for bit the same as without the callback.

    The pictures and scalars go to a folder and to the loggers of the Trainer: see
    :class:`torchcam.monitor.CAMMonitor`, whose arguments it takes. A checkpoint holds the state of the callback.

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
        submodule: the name of the part of the LightningModule to call with the images, such as ``"model"``; names of
            target layers are relative to it. By default the LightningModule itself.
        directory: where to write; by default ``cam`` in the log folder of the Trainer
        log: whether to log to the Trainer's loggers
        options: further arguments of :class:`torchcam.monitor.CAMMonitor`

    Attributes:
        monitor: the monitor; None before the training

    Raises:
        TypeError: if an option is not an argument of the monitor
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
        super().__init__(
            images,
            class_idx,
            every_n_steps=every_n_steps,
            every_n_epochs=every_n_epochs,
            at_start=at_start,
            directory=directory,
            log=log,
            **options,
        )
        self._submodule = submodule
        self._state: Mapping[str, Any] = {}

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint, unique among callbacks with other tags or directories."""
        return self._generate_state_key(tag=self._options.get("tag", "cam"), directory=str(self._directory))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the monitor, and explain the images for the first time."""
        folder = Path(self._directory or Path(trainer.log_dir or trainer.default_root_dir, "cam"))
        writers = [_Loggers(trainer)] if self._log and trainer.loggers else []
        model = pl_module if self._submodule is None else pl_module.get_submodule(self._submodule)
        monitor = self._create_monitor(model, folder, writers)
        if self._state:
            monitor.load_state_dict(self._state)
        elif self._at_start:
            monitor.probe(0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Explain the images if the number of optimisation steps is due."""
        if self.monitor is not None and trainer.global_step:
            self.monitor.step(trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain the images if the number of epochs is due."""
        if self.monitor is not None:
            self.monitor.epoch(trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the strip."""
        self._close_monitor()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the strip of an interrupted training."""
        if isinstance(exception, KeyboardInterrupt):
            self._close_monitor()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return dict(self._state) if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the training starts."""
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
