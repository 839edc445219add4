"""An app in the browser: drop a picture, choose class, layer and methods, and see the maps (``torchcam app``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from torchcam._extras import extra

__all__ = ["build"]


def build(
    model: nn.Module | None = None,
    *,
    transform: Any = None,
    class_names: Sequence[str] | None = None,
    to_probabilities: Callable[[Tensor], Tensor] | None = None,
    pictures: Sequence[str | Path | Image.Image] | None = None,
    title: str | None = None,
    setup: str | None = None,
) -> Any:
    """Build the app for a classifier, as a ``gradio.Blocks``: for a script, a notebook or a Space.

    Nothing is sent anywhere: Gradio's analytics are off, and the page fetches nothing from other hosts. ``launch()``
    takes Gradio's arguments. By default only this computer is served: requests that name another host, or come from
    the page of another, are refused. ``launch(server_name="0.0.0.0")`` serves others as well, ``launch(share=True)``
    everyone; ``hosts=`` names the hosts that may be asked for. What people upload is kept in a private temporary
    folder, which ``close()`` and the end of the process remove. Each person gets their own answers, also at the same
    time; the model is left as it was.

    Example:
        >>> import torchcam.app
        >>> window = torchcam.app.build()  # doctest: +SKIP
        >>> window.launch()  # doctest: +SKIP

    Args:
        model: the classifier; by default the one that ships with the package
        transform: function from a PIL image to a tensor (C, H, W), or an image processor of transformers; not needed
            for models of timm
        class_names: the names of all classes, in the order of the scores
        to_probabilities: function from the scores (1, classes) to probabilities, softmax by default
        pictures: the pictures to begin with; by default the package's own for its own model, or a photograph
        title: the heading, by default the name of the model's class
        setup: the lines of Python that make ``model`` and, where they are given here, ``transform``, ``class_names``
            and ``to_probabilities``, for the code that the app shows

    Returns:
        the app, not yet running

    Raises:
        ImportError: if Gradio is not installed
        TypeError: if ``model`` is not a module
        ValueError: if the model makes no class scores of the first picture, ``transform`` is needed, or ``class_names``
            has the wrong length
    """
    try:
        from ._window import Window
    except ImportError as error:
        raise ImportError(f"the app needs Gradio: {extra('app')}") from error
    from ._subject import Subject, bundled

    if model is None:
        given = {"transform": transform, "class_names": class_names, "to_probabilities": to_probabilities}
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise ValueError(f"`{named[0]}` is given without a `model`")
        return Window(bundled(), pictures, title or "torchcam: digits in clutter, by the model that ships with it")
    subject = Subject(model, transform, class_names, to_probabilities, setup)
    return Window(subject, pictures, title or f"torchcam: {type(model).__name__}")
