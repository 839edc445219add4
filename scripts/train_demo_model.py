"""Train the model that ships in `torchcam/demo`, measure it, and write its weights and sample pictures.

Needs the handwriting that scikit-learn ships: pip install -e ".[test]"
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import torchcam.demo
from torchcam.demo import DemoNet, Scenes, make_scenes

# What the pictures show is decided by these seeds: name, number of digits, seed.
SAMPLES = (
    ("two_digits", 2, 106),
    ("two_digits_dark", 2, 117),
    ("three_digits", 3, 106),
    ("one_digit", 1, 138),
    ("one_digit_dark", 1, 133),
)
PALETTE = (0, 0, 0, 230, 159, 0, 86, 180, 233, 0, 158, 115)  # background, then one colour per digit


def make_training_set(num_scenes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make scenes of 0 to 3 digits: images as uint8, to save memory, and which classes are present."""
    rng = np.random.default_rng(seed)
    images, presence = [], []
    with tqdm(total=num_scenes, desc="making scenes", unit="scene") as progress:
        for start in range(0, num_scenes, 512):
            scenes = make_scenes(min(512, num_scenes - start), split="train", num_digits=(0, 3), warp=0.06, seed=rng)
            images.append((scenes.images * 255).round().byte())
            presence.append(scenes.presence)
            progress.update(len(scenes))
    return torch.cat(images), torch.cat(presence)


def train(model: DemoNet, images: Tensor, presence: Tensor, *, epochs: int, batch_size: int, seed: int) -> None:
    """Train with one binary cross-entropy per class; colours are permuted and inverted at random."""
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(images) // batch_size
    # Smoothed targets ask for logits near +3.7 and -3.7: digits that are equally present then share the softmax.
    targets = 0.025 + 0.95 * presence
    peak = 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * steps_per_epoch, pct_start=0.2)
    model.train()
    with tqdm(total=epochs * steps_per_epoch, desc="training", unit="step") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * batch_size]
            losses = []
            for batch in torch.split(order, batch_size):
                x = images[batch].float() / 255
                x = x[:, torch.randperm(3, generator=generator)]
                if torch.rand((), generator=generator) < 0.5:
                    x = 1 - x
                loss = F.binary_cross_entropy_with_logits(model(x), targets[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                progress.update()
            progress.set_postfix(loss=f"{torch.stack(losses).mean():.4f}")
    model.eval()


@torch.inference_mode()
def evaluate(model: DemoNet, num_scenes: int, seed: int) -> dict[str, float]:
    """Measure the model on handwriting that it was not trained on. All results are shares in [0, 1]."""

    def predict(scenes: Scenes) -> Tensor:
        return torch.cat([model(batch) for batch in torch.split(scenes.images, 100)])

    one = make_scenes(num_scenes, num_digits=1, seed=seed)
    # Five times as many: whether a share is 10 % or only near it takes more scenes to tell.
    erased = make_scenes(5 * num_scenes, num_digits=1, seed=seed, erase=True)
    erased_logits = predict(erased)
    two = make_scenes(num_scenes, num_digits=2, seed=seed + 1)
    found = predict(two).topk(2).indices.sort(dim=1).values == two.labels[:, :2].sort(dim=1).values
    results = {
        "accuracy, one digit": (predict(one).argmax(dim=1) == one.labels[:, 0]).float().mean().item(),
        "accuracy, digit erased": (erased_logits.argmax(dim=1) == erased.labels[:, 0]).float().mean().item(),
        "a digit seen where it is erased": (erased_logits > 0).any(dim=1).float().mean().item(),
        "both of two digits on top": found.all(dim=1).float().mean().item(),
    }

    energy = []
    for start in range(0, num_scenes, 100):
        part = slice(start, start + 100)
        x = model.layer4(model.layer3(model.layer2(model.layer1(two.images[part]))))
        weights = model.fc.weight[two.labels[part, :2]]  # (N, 2, C)
        maps = torch.einsum("nkc,nchw->nkhw", weights, x).relu()
        maps = F.interpolate(maps, size=two.images.shape[-2:], mode="bilinear", align_corners=False)
        inside = torch.einsum("nkhw,nlhw->nkl", maps, two.masks[part, :2].float())
        energy.append(inside / maps.sum(dim=(2, 3)).clamp_min(1e-12)[..., None])
    share = torch.cat(energy).mean(dim=0)
    results["CAM energy on the asked digit"] = share.diagonal().mean().item()
    results["CAM energy on the other digit"] = share.flip(1).diagonal().mean().item()
    results["(share of pixels in a digit's mask)"] = two.masks[:, :2].float().mean().item()
    return results


def write_samples(model: DemoNet, folder: Path) -> Iterable[str]:
    """Write the sample pictures, their masks and `samples.json`; describe what the model makes of each."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, num_digits, seed in SAMPLES:
        scene = make_scenes(1, num_digits=num_digits, digit_size=(32, 42), seed=seed)
        labels = scene.labels[0, :num_digits].tolist()
        pixels = (scene.images[0] * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png", optimize=True)
        owner = (scene.masks[0].byte() * torch.arange(1, 4, dtype=torch.uint8)[:, None, None]).sum(dim=0).byte()
        mask = Image.fromarray(owner.numpy()).convert("P")
        mask.putpalette(PALETTE)
        mask.save(folder / f"{name}_mask.png", optimize=True)
        entries.append(
            {
                "name": name,
                "image": f"{name}.png",
                "mask": f"{name}_mask.png",
                "labels": labels,
                "boxes": scene.boxes[0, :num_digits].tolist(),
            }
        )
        with torch.inference_mode():
            ranked = model(scene.images)[0].softmax(dim=0).topk(num_digits)
        pairs = zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)
        guess = ", ".join(f"{digit} ({share:.0%})" for digit, share in pairs)
        yield f"{name}: holds {', '.join(map(str, labels))}; the model says {guess}"
    (folder / "samples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the arguments, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="decides the scenes, the first weights and their order")
    parser.add_argument("--scenes", type=int, default=20_000, help="number of training scenes")
    parser.add_argument("--epochs", type=int, default=14, help="passes over the training scenes")
    parser.add_argument("--batch-size", type=int, default=64, help="scenes per step")
    parser.add_argument("--test-scenes", type=int, default=2000, help="number of scenes for each measurement")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number changes the last digits")
    parser.add_argument(
        "--output", type=Path, default=Path(torchcam.demo.__file__).parent, help="folder for weights.pt and samples/"
    )
    parser.add_argument("--skip-training", action="store_true", help="measure the weights that are there already")
    args = parser.parse_args()

    weights = args.output / "weights.pt"
    if args.skip_training and not weights.is_file():
        parser.error(f"--skip-training needs {weights}, which does not exist")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    model = DemoNet()
    if args.skip_training:
        model.load_state_dict(torch.load(weights, weights_only=True))
        model.eval()
    else:
        start = time.perf_counter()
        images, presence = make_training_set(args.scenes, args.seed)
        train(model, images, presence, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed)
        torch.save(model.state_dict(), weights)
        print(f"made the scenes and trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    print(f"{weights.name}: {weights.stat().st_size / 1000:.0f} kB")
    for what, share in evaluate(model, args.test_scenes, seed=args.seed + 10_000).items():
        print(f"{what}: {share:.2%}")
    for line in write_samples(model, args.output / "samples"):
        print(line)


if __name__ == "__main__":
    main()
