"""What is recommended for a kind of model, and where it is used."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.models import resnet, tiny_vit
from tests.test_layers import fresh_vit, image, seeded, small_swin, small_timm_vit
from torchcam._recommended import recommended
from torchcam.explain import explain
from torchcam.methods import GradCAM, HiResCAM
from torchcam.trust import trust

BALANCED = {"gradients": "balanced"}


class PooledByAttention(nn.Module):
    """Convolutions whose positions are pooled by attention: no transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).relu().flatten(2).mT
        scores: Tensor = self.fc(self.pool(tokens.mean(1, keepdim=True), tokens, tokens)[0][:, 0])
        return scores


class Hybrid(nn.Module):
    """Attention, and convolutions between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.stem(x)
        for layer in (self.first, self.second):
            tokens = grid.flatten(2).mT
            grid = self.conv(layer(tokens, tokens, tokens)[0].mT.reshape(grid.shape))
        scores: Tensor = self.fc(grid.mean((2, 3)))
        return scores


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (fresh_vit, ["conv_proj"]),
        (lambda: small_timm_vit(embed_dim=24), ["patch_embed"]),
        (lambda: small_timm_vit(embed_dim=24, reg_tokens=4), ["patch_embed"]),
        (
            lambda: small_timm_vit(embed_dim=24, class_token=False, global_pool="avg", fc_norm=False),
            ["patch_embed", "norm"],
        ),
        (small_swin, ["features.0", "permute"]),
    ],
)
def test_transformers_are_explained_at_the_first_tokens(build: Callable[[], nn.Module], layers: list[str]) -> None:
    side = 64 if build is small_swin else 32
    found = recommended(seeded(build), image(side, side))
    assert (found.method, found.target_layer, found.method_kwargs) == ("HiResCAM", layers, BALANCED)


def test_a_transformer_of_transformers() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config.image_size, config.patch_size = 32, 8
    model = seeded(ViTForImageClassification, config)
    found = recommended(model, pixel_values=image(32, 32))
    assert found.target_layer == ["vit.embeddings.patch_embeddings"]


@pytest.mark.parametrize("build", [resnet, PooledByAttention, Hybrid])
def test_others_keep_the_default(build: Callable[[], nn.Module]) -> None:
    found = recommended(seeded(build), image(32, 32))
    assert (found.method, found.target_layer, found.method_kwargs) == ("GradCAM", None, {})


def test_the_maps_of_several_layers_are_joined_by_their_mean() -> None:
    coarse, fine = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.5], [0.25]]])
    expected = torch.tensor([[[0.25, 0.75], [0.125, 0.625]]])
    torch.testing.assert_close(HiResCAM.fuse_cams([coarse, fine]), expected)
    assert torch.equal(HiResCAM.fuse_cams([fine]), fine)


class TestTrust:
    def test_a_map_is_compared_with_what_is_recommended(self) -> None:
        model, x = tiny_vit(torch.float32), image(16, 16)
        report = trust(model, x, 1)
        assert report.method.startswith("GradCAM(")
        assert report.others == ("HiResCAM", "LayerCAM", "ReciproCAM")
        assert trust(model, x, 1, target_layer="conv_proj").others == ("LayerCAM", "ReciproCAM")

    def test_it_is_tried_as_recommended(self) -> None:
        model, x = tiny_vit(torch.float32, seed=4), image(16, 16)
        model.get_parameter("conv_proj.weight").data.mul_(10)  # so that the input counts, and the map is doubted
        model.get_parameter("heads.head.weight").data.mul_(3)
        removal = trust(model, x, 2)[0].checks[2]
        by_hand = trust(
            model,
            x,
            2,
            methods=["GradCAM", "HiResCAM"],
            target_layer={"HiResCAM": "conv_proj"},
            method_kwargs={"HiResCAM": BALANCED},
        )[0].checks[2]
        assert math.isfinite(removal.values["HiResCAM"])
        assert removal.values["HiResCAM"] == by_hand.values["HiResCAM"]

    def test_of_an_explanation(self) -> None:
        model, x = tiny_vit(torch.float32), image(16, 16)
        assert explain(model, x).trust().others == ("HiResCAM", "LayerCAM", "ReciproCAM")
        best = recommended(model, x)
        found = explain(model, x, method=best.method, target_layer=best.target_layer, method_kwargs=best.method_kwargs)
        report = found.trust()
        assert report.others == ("GradCAM", "LayerCAM", "ReciproCAM")
        with GradCAM(model, input_shape=(3, 16, 16)) as extractor:
            assert extractor.target_names != best.target_layer  # the others look at the default layer
