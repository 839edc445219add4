"""The network of the demo: small, fully convolutional, with a receptive field of about one digit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("weights.pt")


class DemoNet(nn.Module):
    """Find handwritten digits in cluttered colour images of any size.

    Seven convolutions, global average pooling and a linear layer. Images come as `(N, 3, H, W)` floats in [0, 1], 96
    pixels being the size it was trained on; no further normalisation is needed. The output holds one logit per digit,
    `(N, 10)`.

    Each logit was trained to detect its digit independently (binary cross-entropy), since an image may hold several
    digits or none. This loss is also better for maps: softmax cross-entropy is invariant to a constant added to all
    class maps, while here the map of an absent class has to stay low by itself. Positive values in a map are then
    evidence for that class, not for any object. The targets were smoothed (0.975 and 0.025), so that a digit's logit is
    near 3.7 if it is present and near -3.7 if it is absent: the argmax is the clearest digit, the sigmoid is the
    probability that a digit is present, and a softmax is shared by the digits that are present.

    The receptive field before the pooling is 43 pixels, about one digit, with a stride of 8 pixels: a 96-pixel image
    gives 12 x 12 maps in `layer3` and `layer4`, 24 x 24 in `layer2` and 48 x 48 in `layer1`.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(_block(3, 16, stride=2), _block(16, 16))  # receptive field 7, stride 2
        self.layer2 = nn.Sequential(_block(16, 40, stride=2), _block(40, 40))  # receptive field 19, stride 4
        self.layer3 = nn.Sequential(_block(40, 72, stride=2), _block(72, 72))  # receptive field 43, stride 8
        self.layer4 = _block(72, 96, kernel_size=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits `(N, 10)` of images `(N, 3, H, W)`."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 96, H / 8, W / 8)
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def _block(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Build a convolution with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def load_model() -> DemoNet:
    """Load the trained demo model, in eval mode, on the CPU.

    Example:
        >>> from torchcam.demo import load_model, sample_images
        >>> model = load_model()
        >>> logits = model(sample_images()[0].to_tensor())
    """
    model = DemoNet()
    model.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
    return model.eval()
