"""Small nets written here: signals, two inputs, and what torch makes of a model."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from _family import Family, noise
from torch import Tensor, nn


class Mean(nn.Module):
    """The mean over some dimensions."""

    def __init__(self, *dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean."""
        return x.mean(self.dimensions)


def convolutions(channels: int, width: int, padding: int = 1, kernel: int = 3) -> nn.Module:
    """Two convolutions over time and a head."""
    return nn.Sequential(
        nn.Conv1d(channels, width, kernel, padding=padding),
        nn.ReLU(),
        nn.Conv1d(width, width, kernel, padding=padding),
        nn.ReLU(),
        Mean(2),
        nn.Linear(width, 4),
    )


class LSTM(nn.Module):
    """A recurrent net over (N, T, C)."""

    def __init__(self, channels: int, width: int, head: str) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, width, batch_first=True)
        self.fc = nn.Linear(width, 4)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        """Return class scores."""
        states, _ = self.lstm(x)
        return self.fc(states[:, -1] if self.head == "last" else states.mean(1))


class SeriesTransformer(nn.Module):
    """A transformer over a series: (N, T, C) or (N, C, T), with the batch first or second inside."""

    def __init__(self, channels: int, length: int, channels_first: bool, batch_first: bool, token: bool) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.batch_first = batch_first
        self.embed = nn.Linear(channels, 24)
        self.place = nn.Parameter(torch.randn(1, length + token, 24) * 0.1)
        self.token = nn.Parameter(torch.randn(1, 1, 24)) if token else None
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Any:
        """Return class scores."""
        x = self.embed(x.transpose(1, 2) if self.channels_first else x)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.place
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.fc(x.mean(1) if self.token is None else x[:, 0])


def eegnet(electrodes: int, samples: int) -> nn.Module:
    """EEGNet (Lawhern et al. 2018): the second convolution takes in all electrodes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, (1, 33), padding=(0, 16), bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, (electrodes, 1), groups=8, bias=False),
        nn.BatchNorm2d(16),
        nn.ELU(),
        nn.AvgPool2d((1, 4)),
        nn.Conv2d(16, 16, (1, 17), padding=(0, 8), groups=16, bias=False),
        nn.Conv2d(16, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ELU(),
        nn.AvgPool2d((1, 8)),
        nn.Flatten(),
        nn.Linear(16 * (samples // 32), 4),
    )


def mel_pictures(strides: tuple[int, int]) -> nn.Module:
    """A net that sees a mel spectrogram (N, 1, mels, frames) as a picture."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(strides),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(strides),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        Mean(2, 3),
        nn.Linear(16, 4),
    )


class Siamese(nn.Module):
    """One net for two pictures, and how alike they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = pictures()[:-1]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return (N, 1)."""
        return nn.functional.cosine_similarity(self.net(a), self.net(b))[:, None]


class Triplet(Siamese):
    """The same net for three pictures."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Any:  # type: ignore[override]
        """Return three embeddings."""
        return self.net(anchor), self.net(positive), self.net(negative)


def pictures() -> nn.Sequential:
    """A small net of pictures."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Mean(2, 3),
        nn.Linear(16, 4),
    )


def _compiled_inside() -> nn.Module:
    net = pictures()
    net[3].compile(backend="eager")
    return net


def _traced() -> Any:
    trace: Any = torch.jit.trace
    return trace(pictures().eval(), noise((1, 3, 64, 64)))


def _scripted_inside() -> nn.Module:
    net = pictures()
    net[3] = torch.jit.script(net[3])
    return net


def _quantised(static: bool) -> Any:
    quantization: Any = importlib.import_module("torch.ao.quantization")
    with warnings.catch_warnings(action="ignore"):
        if not static:
            return quantization.quantize_dynamic(pictures().eval(), {nn.Linear}, dtype=torch.qint8)
        net = nn.Sequential(quantization.QuantStub(), *pictures(), quantization.DeQuantStub()).eval()
        net.qconfig = quantization.get_default_qconfig("fbgemm")
        prepared = quantization.prepare(net)
        prepared(noise((4, 3, 64, 64)))
        return quantization.convert(prepared)


def _exported() -> Any:
    net: Any = torch.export.export(pictures().eval(), (noise((1, 3, 64, 64)),)).module()
    net.eval = lambda: net  # there is one mode, and `eval` raises
    return net


def series() -> Iterator[Family]:
    """Yield nets of signals."""
    for channels in range(2, 9):
        build = partial(convolutions, channels, channels)
        yield Family(f"Conv1d, {channels} channels", build, (1, channels, 40), (1, channels, 64))
    yield Family("Conv1d, 1 to 3 channels, 3 samples", partial(convolutions, 1, 3, 2), (3, 1, 40))
    yield Family("Conv1d, 2 to 64 channels", partial(convolutions, 2, 64, 0), (1, 2, 64))
    yield Family("Conv1d, as many channels as positions", partial(convolutions, 4, 40), (1, 4, 40))
    for head in ("last", "mean"):
        for channels, width in ((6, 32), (32, 32)):
            name = f"LSTM, {channels} features, {head} state"
            yield Family(name, partial(LSTM, channels, width, head), (1, 48, channels), (1, 60, channels), axes=(1,))
    for first in (False, True):
        for batch_first in (True, False):
            for token in (False, True):
                order = "(N, C, T)" if first else "(N, T, C)"
                name = f"transformer of {order}, batch {'first' if batch_first else 'second'} inside"
                net = partial(SeriesTransformer, 6, 48, first, batch_first, token)
                shape, axes = ((1, 6, 48), (2,)) if first else ((1, 48, 6), (1,))
                yield Family(name + (", class token" if token else ""), net, shape, axes=axes)
    yield Family("EEGNet", partial(eegnet, 22, 640), (1, 1, 22, 640))
    yield Family("EEGNet, 16 electrodes", partial(eegnet, 16, 1280), (1, 1, 16, 1280))
    yield Family("mel spectrogram as a picture", partial(mel_pictures, (2, 2)), (1, 1, 64, 200), (1, 1, 64, 128))
    yield Family("mel spectrogram, time kept", partial(mel_pictures, (4, 1)), (1, 1, 64, 100), (1, 1, 64, 64))
    yield Family("mel spectrogram, 1D convolutions", partial(convolutions, 64, 32), (1, 64, 100), (1, 64, 64))


def two_inputs() -> Iterator[Family]:
    """Yield nets that take more than one picture."""

    def pair(x: Tensor) -> Any:
        return x, noise(tuple(x.shape), 7)

    def triple(x: Tensor) -> Any:
        return x, noise(tuple(x.shape), 7), noise(tuple(x.shape), 8)

    def distance(output: Any) -> Any:
        anchor, positive, negative = output
        return (anchor * positive).sum() - (anchor * negative).sum()

    yield Family("siamese", Siamese, other=(1, 3, 64, 96), call=pair, target=0)
    yield Family("triplet", Triplet, other=(1, 3, 64, 96), call=triple, target=distance)


def wrapped() -> Iterator[Family]:
    """Yield what torch makes of a net."""
    own = partial(Family, other=(1, 3, 64, 96))
    yield own("torch.compile", lambda: torch.compile(pictures(), backend="eager"))
    yield own("torch.compile, of one layer", _compiled_inside)
    yield own("DataParallel", lambda: nn.DataParallel(pictures()))
    yield own("quantised, weights", partial(_quantised, static=False))
    yield own("quantised, activations as well", partial(_quantised, static=True))
    yield own("torch.jit.trace", _traced)
    yield own("torch.jit.script", lambda: torch.jit.script(pictures()))
    yield own("torch.jit.script, of one layer", _scripted_inside)
    yield own("torch.fx", lambda: torch.fx.symbolic_trace(pictures().eval()))
    yield Family("torch.export", _exported)
    yield own("bfloat16", lambda: pictures().bfloat16(), call=lambda x: (x.bfloat16(),))
    yield own("float64", lambda: pictures().double(), call=lambda x: (x.double(),))


def families() -> Iterator[Family]:
    """Yield all that need nothing but torch."""
    yield from series()
    yield from two_inputs()
    yield from wrapped()


def lightning_families() -> Iterator[Family]:
    """Yield a net in a module of Lightning."""
    import lightning

    class Module(lightning.LightningModule):
        """A net as users of Lightning write it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = pictures()

        def forward(self, x: Tensor) -> Any:
            """Return class scores."""
            return self.net(x)

    yield Family("LightningModule", Module, other=(1, 3, 64, 96))
