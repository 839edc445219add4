"""Hooks on and off: what extractors share with what else records passes."""

from __future__ import annotations

from typing import Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from ._recorder import Recorder


class Hooked:
    """What holds a recorder: its model, its target layers, and its hooks."""

    _recorder: Recorder

    @property
    def model(self) -> nn.Module:
        """The model to explain."""
        return self._recorder.model

    @property
    def target_names(self) -> list[str]:
        """The names of the target layers."""
        return self._recorder.target_names

    @property
    def submodule_dict(self) -> dict[str, nn.Module]:
        """The modules of the model by name."""
        return self._recorder.modules

    @property
    def hook_handles(self) -> list[RemovableHandle]:
        """The handles of the hooks on the model's modules."""
        return self._recorder.handles

    @property
    def hooks_enabled(self) -> bool:
        """Whether forward passes are recorded."""
        return self._recorder.enabled

    def enable_hooks(self) -> None:
        """Record the forward passes from now on."""
        self._recorder.enabled = True

    def disable_hooks(self) -> None:
        """Ignore the forward passes from now on."""
        self._recorder.enabled = False

    def reset_hooks(self) -> None:
        """Forget the pass of this thread: its activations, gradients, input and scores."""
        self._recorder.forget()

    def remove_hooks(self) -> None:
        """Take all hooks off the model. May be called more than once."""
        self._recorder.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove_hooks()
        self._recorder.forget(every=True)
