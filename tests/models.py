"""Small networks that several tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
IMAGE_SHAPES = {1: (3, 13), 2: (3, 9, 11), 3: (2, 5, 7, 6)}
NUM_CLASSES = 5


def image(dim: int, batch_size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch of inputs with one, two or three spatial dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch_size, *IMAGE_SHAPES[dim]), generator=generator, dtype=dtype)


def shuffled(model: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Give a model, in evaluation mode, parameters and statistics that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(scale * noise / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return model.eval()


class SplitNet(nn.Module):
    """Two convolutional stages and a head, all of which can be called on their own.

    Everything is smooth but for the last activation function of a stage, and the head sees every position in another
    way, so that gradients differ from position to position and their powers matter.
    """

    layers = ("first", "second")

    def __init__(self, dim: int, channels: int = 4, nonlinear_head: bool = True) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dim]
        in_channels, *_ = IMAGE_SHAPES[dim]
        self.first = nn.Sequential(convolution(in_channels, channels, 3, padding=1), nn.Tanh())
        self.second = nn.Sequential(convolution(channels, channels + 1, 3, stride=2, padding=1), nn.Softplus())
        self.mix = convolution(channels + 1, 6, 3, padding=1) if nonlinear_head else None
        self.fc = nn.Linear(6 if nonlinear_head else channels + 1, NUM_CLASSES)

    def body(self, x: Tensor, layer: str) -> Tensor:
        """From the input to the output of a layer."""
        x = self.first(x)
        return x if layer == "first" else self.second(x)

    def head(self, activation: Tensor, layer: str) -> Tensor:
        """From the output of a layer to the logits."""
        if layer == "first":
            activation = self.second(activation)
        if self.mix is not None:
            activation = F.gelu(self.mix(activation)) ** 2
        return self.fc(activation.flatten(2).mean(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, "second"), "second")


def split_net(dim: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: bool | int) -> SplitNet:
    """A `SplitNet` with seeded weights."""
    net = SplitNet(dim, **options).to(dtype)  # type: ignore[arg-type]
    shuffled(net, seed, scale=1.5)
    return net


class GapNet(nn.Module):
    """A feature map with values of both signs or, with a ReLU, none below 0; global average pooling; a linear head."""

    def __init__(self, relu: bool = True, channels: int = 6, symmetric: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.ReLU() if relu else nn.Tanh(), nn.AvgPool2d(2)
        )
        self.fc = nn.Linear(channels, NUM_CLASSES)
        shuffled(self)
        if symmetric:  # the kernels are their own mirror images
            with torch.no_grad():
                weight = self.features[0].weight
                weight.copy_(weight + weight.flip(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class HandNet(nn.Module):
    """A net whose activation is its input, and whose logits are what `head` makes of it.

    `features` has a 1 x 1 kernel, the identity, so that an activation can be written down in a test.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], channels: int = 2, dim: int = 2) -> None:
        super().__init__()
        self.features = CONVOLUTIONS[dim](channels, channels, 1, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(channels).reshape(self.features.weight.shape))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class UNet(nn.Module):
    """A connection runs around the middle: its output is concatenated with what went in, or added to it."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.join = join
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.decoder = nn.Sequential(
            nn.ReLU(inplace=True), nn.Conv2d(8 if join == "cat" else 4, NUM_CLASSES, 3, padding=1)
        )
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x)
        middle = self.middle(skip)
        joined = torch.cat([skip, middle], 1) if self.join == "cat" else skip + middle
        return self.decoder(joined).mean((2, 3))


class BatchSizeOfInput(nn.Module):
    """The head asks the input for the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.features = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, NUM_CLASSES)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(self.stem(x).relu())
        return self.fc(features.view(x.shape[0], 4, -1).amax(-1))


class CalledTwice(nn.Module):
    """A layer runs twice in one forward pass, and so does another one before and between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, NUM_CLASSES)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x))
        x = self.block(x)
        x = self.shared(x)
        x = self.block(x)
        return self.fc(self.shared(x).amax((2, 3)))


class ReturnIgnored(nn.Module):
    """Relies on what `ReLU(inplace=True)` does to its argument, before the target layer and around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, NUM_CLASSES)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.relu(x)
        return self.fc((x + self.middle(x)).square().mean((2, 3)))


def tiny_vit(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """torchvision's vision transformer with three blocks, two heads and 4 x 4 patches."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=NUM_CLASSES
    )
    return shuffled(model.to(dtype), seed)


def resnet(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """torchvision's resnet18 with random weights."""
    from torchvision.models import resnet18

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return resnet18(num_classes=10).eval().to(dtype)
