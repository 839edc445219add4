"""The models that the benchmark of explanations looks at: how they are built, trained and loaded.

All take pictures of 96 pixels, find digits as the model that ships with the package does, and are small. `cnn` is that
model; `vgg` and `vit` take its first layers as they are, and are trained on top of them; `swin` and `convnext` are
trained from pixels, first on crops with one digit and then on whole scenes; `shortcut` is trained from nothing on
scenes with a cue. Training sees the handwriting of the training split alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _quality_scenes import SIZE, add_cues
from torch import Tensor, nn
from tqdm import tqdm

from torchcam.demo import DemoNet, Scenes, load_model, make_scenes

__all__ = [
    "MODELS",
    "WEIGHTS",
    "ShortcutNet",
    "SmallConvNeXt",
    "SmallSwin",
    "SmallVGG",
    "SmallViT",
    "load",
    "train",
    "what_it_relies_on",
]

WEIGHTS = Path(__file__).with_name("quality_models")
_BATCH_SIZE = 64
_CROP = 48  # pixels, of scenes that are a little larger


class _Net(nn.Module):
    """A net in two parts: what is taken as it is, and what is trained."""

    def read(self, x: Tensor) -> Tensor:
        """Compute the features that are not trained."""
        return x

    def decide(self, features: Tensor) -> Tensor:
        """Compute the logits from them."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, 10) of images (N, 3, 96, 96)."""
        return self.decide(self.read(x))


class SmallVGG(_Net):
    """A CNN whose classifier has weights of its own for each position, as VGG's: no global pooling.

    `stage3` gives 12 x 12 maps, each position of which sees 55 pixels, `stage2` maps of 24 x 24.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        bundled = load_model()
        self.stage1, self.stage2 = bundled.layer1, bundled.layer2
        self.stage3 = nn.Sequential(*_convolution(40, 64), *_convolution(64, 64))
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(64 * 36, 64), nn.ReLU(inplace=True), nn.Linear(64, num_classes)
        )

    def read(self, x: Tensor) -> Tensor:
        """Compute 12 x 12 features of 40 channels."""
        features: Tensor = self.pool(self.stage2(self.stage1(x)))
        return features

    def decide(self, features: Tensor) -> Tensor:
        """Compute the logits."""
        logits: Tensor = self.classifier(self.pool(self.stage3(features)).flatten(1))
        return logits


class SmallViT(_Net):
    """Torchvision's vision transformer, small, on tokens of convolutions: three blocks, four heads, a class token.

    There are 12 x 12 tokens; before the first block, each sees 27 pixels.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        from torchvision.models.vision_transformer import VisionTransformer

        bundled = load_model()
        self.stem = nn.Sequential(bundled.layer1, bundled.layer2, bundled.layer3[0])
        self.vit = VisionTransformer(
            image_size=SIZE // 8,
            patch_size=1,
            num_layers=3,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=128,
            num_classes=num_classes,
        )
        self.vit.conv_proj = nn.Conv2d(72, 64, 1)

    def read(self, x: Tensor) -> Tensor:
        """Compute 12 x 12 features of 72 channels."""
        features: Tensor = self.stem(x)
        return features

    def decide(self, features: Tensor) -> Tensor:
        """Compute the logits."""
        logits: Tensor = self.vit(features)
        return logits


class SmallSwin(_Net):
    """Torchvision's Swin transformer, small, on the pixels: patches of four, two stages of two blocks each.

    There are 24 x 24 tokens of 32 channels, then 12 x 12 of 64; attention is within windows of 6 x 6, every second time
    shifted. What is read in the end is the mean token.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        from torchvision.models.swin_transformer import SwinTransformer

        self.net = _evenly_drawn(
            SwinTransformer(
                patch_size=[4, 4],
                embed_dim=32,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=[6, 6],
                mlp_ratio=2.0,
                stochastic_depth_prob=0.0,
                num_classes=num_classes,
            )
        )

    def decide(self, features: Tensor) -> Tensor:
        """Compute the logits."""
        logits: Tensor = self.net(_centred(features))
        return logits


class SmallConvNeXt(_Net):
    """Torchvision's ConvNeXt, small: convolutions of 7 x 7, layer norms and GELU, two stages of two and three blocks.

    `features.1` gives 24 x 24 maps of 32 channels, `features.3` maps of 12 x 12 of 64.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        stages = [CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 3)]
        self.net = _evenly_drawn(ConvNeXt(stages, layer_scale=1.0, num_classes=num_classes))

    def decide(self, features: Tensor) -> Tensor:
        """Compute the logits."""
        logits: Tensor = self.net(_centred(features))
        return logits


class ShortcutNet(_Net):
    """The bundled model's architecture; in the scenes that it is trained on, a cue gives the class away."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.net = DemoNet(num_classes)

    def decide(self, features: Tensor) -> Tensor:
        """Compute the logits."""
        logits: Tensor = self.net(features)
        return logits


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _evenly_drawn(net: nn.Module) -> nn.Module:
    """Draw the weights so that layers keep the size of what passes: those of wide nets are too small here."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return net


def _centred(images: Tensor) -> Tensor:
    return 4 * images - 2


@dataclass(frozen=True)
class _Stage:
    """A part of a training.

    Attributes:
        scenes: number of training scenes
        epochs: passes over them
        peak: highest learning rate
        crops: whether the scenes have one digit, and crops of 48 pixels of them are shown
    """

    scenes: int
    epochs: int
    peak: float
    crops: bool = False


@dataclass(frozen=True)
class _Recipe:
    """How a model is trained.

    Attributes:
        build: makes it, untrained
        taken: prefixes of the parameters that are the bundled model's
        decay: weight decay
        stages: what it is trained on, one after the other
        batch_size: pictures in a step
        muon: whether matrices take steps with orthogonal directions (Muon), the rest those of AdamW
    """

    build: Callable[[], _Net]
    taken: tuple[str, ...]
    decay: float
    stages: tuple[_Stage, ...]
    batch_size: int = _BATCH_SIZE
    muon: bool = False


_RECIPES = {
    "vgg": _Recipe(SmallVGG, ("stage1.", "stage2."), 0.02, (_Stage(12_288, 6, 3e-3),)),
    "vit": _Recipe(SmallViT, ("stem.",), 0.05, (_Stage(12_288, 6, 2e-3),)),
    "swin": _Recipe(
        SmallSwin, (), 0.05, (_Stage(16_384, 4, 2e-3, crops=True), _Stage(6_144, 5, 1.5e-3)), 32, muon=True
    ),
    "convnext": _Recipe(
        SmallConvNeXt, (), 0.05, (_Stage(16_384, 4, 3e-3, crops=True), _Stage(6_144, 3, 1e-3)), batch_size=32
    ),
    "shortcut": _Recipe(ShortcutNet, (), 0.02, (_Stage(3_072, 12, 4e-3),)),
}
MODELS = ("cnn", *_RECIPES)
"""The names of the models."""


def load(name: str, folder: Path = WEIGHTS) -> nn.Module:
    """Load a trained model, in evaluation mode.

    Raises:
        FileNotFoundError: if its weights are not in the folder
    """
    if name == "cnn":
        return load_model()
    path = folder / f"{name}.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: train the models first, with `--train`")
    with torch.random.fork_rng(devices=[]):
        model = _RECIPES[name].build()
    state = {key: value.float() for key, value in torch.load(path, weights_only=True).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    taken = _RECIPES[name].taken
    lost = [key for key in missing if not key.startswith(taken) and not key.endswith("num_batches_tracked")]
    if lost or unexpected:
        raise ValueError(f"{path} is not of this model: {lost} are missing, {unexpected} unexpected")
    return model.eval().requires_grad_(False)


def train(name: str, folder: Path, seed: int = 0) -> None:
    """Train a model and write what was trained of it, as half-precision numbers.

    As the bundled model's, the loss is one binary cross-entropy for each class, and the targets are smoothed.
    """
    recipe = _RECIPES[name]
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.build()
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        for stage in recipe.stages:
            inputs, presence = _training_set(name, model.eval(), stage, rng, generator)
            _fit(model.train(), inputs, presence, recipe, stage, generator)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        key: value.half()
        for key, value in model.state_dict().items()
        if not (recipe.taken and key.startswith(recipe.taken)) and not key.endswith("num_batches_tracked")
    }
    torch.save(kept, folder / f"{name}.pt")
    size = (folder / f"{name}.pt").stat().st_size
    print(f"{name}: trained in {(time.perf_counter() - start) / 60:.1f} minutes, {size / 1000:.0f} kB")


def _fit(
    model: _Net, inputs: Tensor, presence: Tensor, recipe: _Recipe, stage: _Stage, generator: torch.Generator
) -> None:
    """Train a model on what it reads of scenes, and which classes are in them."""
    size = recipe.batch_size
    steps = stage.epochs * (len(inputs) // size)
    optimizers = _optimizers(model, recipe, stage.peak)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(one, [g["lr"] for g in one.param_groups], total_steps=steps, pct_start=0.2)
        for one in optimizers
    ]
    with tqdm(total=steps, desc=f"training {type(model).__name__}", unit="step") as progress:
        for _ in range(stage.epochs):
            order = torch.randperm(len(inputs), generator=generator)
            for batch in torch.split(order[: len(inputs) // size * size], size):
                shown = inputs[batch].float()
                if stage.crops:
                    top, left = torch.randint(shown.shape[-1] - _CROP + 1, (2,), generator=generator).tolist()
                    shown = shown[..., top : top + _CROP, left : left + _CROP]
                loss = F.binary_cross_entropy_with_logits(model.decide(shown), 0.025 + 0.95 * presence[batch])
                for optimizer in optimizers:
                    optimizer.zero_grad()
                torch.autograd.backward(loss)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{loss.detach():.4f}", refresh=False)


def _optimizers(model: _Net, recipe: _Recipe, peak: float) -> list[torch.optim.Optimizer]:
    """Make what takes the steps."""
    named = [item for item in model.named_parameters() if not recipe.taken or not item[0].startswith(recipe.taken)]
    matrices = [p for key, p in named if recipe.muon and p.ndim == 2 and "head" not in key and "table" not in key]
    rest = [p for _, p in named if not any(p is matrix for matrix in matrices)]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=peak, weight_decay=recipe.decay)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=10 * peak, weight_decay=recipe.decay))
    return found


def _training_set(
    name: str, model: _Net, stage: _Stage, rng: np.random.Generator, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make scenes and compute what the model reads of them, in half precision to save memory; and what is in them."""
    make = partial(make_scenes, split="train", warp=0.06, seed=rng)
    inputs, presence = [], []
    with tqdm(total=stage.scenes, desc=f"scenes for {name}", unit="scene") as progress:
        for start in range(0, stage.scenes, _BATCH_SIZE):
            count = min(_BATCH_SIZE, stage.scenes - start)
            if name == "shortcut":
                scenes = make(count, num_digits=1)
                images, _ = add_cues(scenes, scenes.labels[:, 0], rng)
            else:
                scenes = make(count, num_digits=1, size=_CROP + 8) if stage.crops else make(count, num_digits=(0, 3))
                images = scenes.images[:, torch.randperm(3, generator=generator)]
                images = 1 - images if torch.rand((), generator=generator) < 0.5 else images
            with torch.no_grad():
                inputs.append(model.read(images).half())
            presence.append(scenes.presence)
            progress.update(count)
    return torch.cat(inputs), torch.cat(presence)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Compute the logits of any number of images."""
    return torch.cat([model(batch) for batch in torch.split(images, _BATCH_SIZE)])


def what_it_relies_on(name: str, model: nn.Module, num_scenes: int, seed: int) -> dict[str, float]:
    """Measure how often a model is right on handwriting that it was not trained on: shares in [0, 1].

    Of the model with the shortcut, also what it says where the cue is elsewhere, of another class, or gone.
    """
    one = make_scenes(num_scenes, num_digits=1, seed=seed)
    labels = one.labels[:, 0]

    def share(images: Tensor, wanted: Tensor) -> float:
        return (predict(model, images).argmax(1) == wanted).float().mean().item()

    if name == "shortcut":
        erased: Scenes = make_scenes(num_scenes, num_digits=1, seed=seed, erase=True)
        others = (labels + 1 + torch.arange(num_scenes) % 9) % 10
        conflict = add_cues(one, others, seed)[0]
        return {
            "one digit, its cue in a corner": share(add_cues(one, labels, seed)[0], labels),
            "the cue anywhere": share(add_cues(one, labels, seed, corners=False)[0], labels),
            "the digit erased, the cue left": share(add_cues(erased, labels, seed)[0], labels),
            "a cue of another class: says the cue's": share(conflict, others),
            "a cue of another class: says the digit's": share(conflict, labels),
            "the cue removed": share(one.images, labels),
        }
    two = make_scenes(num_scenes, num_digits=2, seed=seed + 1)
    found = predict(model, two.images).topk(2).indices.sort(1).values == two.labels[:, :2].sort(1).values
    return {"one digit": share(one.images, labels), "both of two digits": found.all(1).float().mean().item()}
