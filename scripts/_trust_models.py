"""The models on which the limits of `torchcam.trust` were chosen, and no number is reported for.

They are built like those of `_quality_models`, on first layers of the bundled model, and differ from all of them in
what follows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcam.demo import load_model, make_scenes

__all__ = ["LAYERS", "OTHERS", "load_other", "train_other"]

_WEIGHTS = Path(__file__).with_name("trust_models")
_SCENES, _EPOCHS, _BATCH_SIZE = 4096, 8, 64


class Depthwise(nn.Module):
    """A CNN of depthwise convolutions with GELU and layer normalisation, then global average pooling.

    `blocks` gives 12 x 12 maps.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        from torchvision.models.convnext import CNBlock, LayerNorm2d

        bundled = load_model()
        self.stem = nn.Sequential(bundled.layer1, bundled.layer2)
        self.down = nn.Sequential(nn.Conv2d(40, 64, 2, stride=2), LayerNorm2d(64, eps=1e-6))
        self.blocks = nn.Sequential(*(CNBlock(64, 1.0, 0.0) for _ in range(2)))
        self.head = nn.Linear(64, num_classes)

    def decide(self, features: Tensor) -> Tensor:
        """Compute the logits from features (N, 40, 24, 24)."""
        logits: Tensor = self.head(self.blocks(self.down(features)).mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, 10) of images (N, 3, 96, 96)."""
        return self.decide(self.stem(x))


class Pooled(nn.Module):
    """A transformer without a class token: two blocks over 12 x 12 tokens, whose mean is classified."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        bundled = load_model()
        self.stem = nn.Sequential(bundled.layer1, bundled.layer2, bundled.layer3[0])
        self.embed = nn.Linear(72, 64)
        self.place = nn.Parameter(torch.randn(1, 144, 64) * 0.02)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    64, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, num_classes)

    def decide(self, features: Tensor) -> Tensor:
        """Compute the logits from features (N, 72, 12, 12)."""
        tokens = self.embed(features.flatten(2).mT) + self.place
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, 10) of images (N, 3, 96, 96)."""
        return self.decide(self.stem(x))


OTHERS: dict[str, type[Depthwise | Pooled]] = {"depthwise": Depthwise, "pooled": Pooled}
"""The models by name."""
LAYERS = {"depthwise": "blocks", "pooled": "blocks.1"}
"""The layer that methods look at."""
_PEAKS = {"depthwise": 4e-3, "pooled": 2e-3}


def load_other(name: str) -> nn.Module:
    """Load a trained model, in evaluation mode."""
    model = OTHERS[name]()
    state = torch.load(_WEIGHTS / f"{name}.pt", weights_only=True)
    missing, unexpected = model.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    lost = [key for key in missing if not key.startswith("stem.")]
    if lost or unexpected:
        raise ValueError(f"{name}.pt is not of this model: {lost} are missing, {unexpected} unexpected")
    return model.eval().requires_grad_(False)


def train_other(name: str, seed: int = 0) -> None:
    """Train what follows the first layers of a model, and write it as half-precision numbers."""
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = OTHERS[name]().eval()
    inputs, presence = [], []
    for _ in range(_SCENES // _BATCH_SIZE):
        scenes = make_scenes(_BATCH_SIZE, split="train", num_digits=(0, 3), warp=0.06, seed=rng)
        images = scenes.images[:, torch.randperm(3, generator=generator)]
        images = 1 - images if torch.rand((), generator=generator) < 0.5 else images
        with torch.no_grad():
            inputs.append(model.stem(images).half())
        presence.append(scenes.presence)
    model.train()
    trained = [parameter for key, parameter in model.named_parameters() if not key.startswith("stem.")]
    steps = _EPOCHS * len(inputs)
    optimizer = torch.optim.AdamW(trained, lr=_PEAKS[name], weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAKS[name], total_steps=steps, pct_start=0.2)
    features, present = torch.cat(inputs), torch.cat(presence)
    for _ in range(_EPOCHS):
        for batch in torch.split(torch.randperm(_SCENES, generator=generator), _BATCH_SIZE):
            targets = 0.025 + 0.95 * present[batch]
            loss = F.binary_cross_entropy_with_logits(model.decide(features[batch].float()), targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    kept = {key: value.half() for key, value in model.state_dict().items() if not key.startswith("stem.")}
    _WEIGHTS.mkdir(exist_ok=True)
    torch.save(kept, _WEIGHTS / f"{name}.pt")
