"""Any model, any call: detectors, segmentation, video, image and text, several inputs, wrappers, number types."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.methods_under_test import METHODS, make_input, make_model
from tests.models import resnet, shuffled, split_net, tiny_vit
from tests.test_layers import image, seeded
from tests.test_promises import count_hooks
from torchcam import methods
from torchcam.layers import candidates
from torchcam.targets import BoxScores, ClassLogit, Segmentation


def maps_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for cam, other in zip(found, expected, strict=True):
        torch.testing.assert_close(cam, other, rtol=tolerance, atol=tolerance)
        assert cam.isfinite().all()
        assert cam.max() > cam.min()


# torchvision's detectors


def detector(name: str, **options: Any) -> nn.Module:
    from torchvision.models import detection

    sizes = {"box_score_thresh": 0.0, "min_size": 64, "max_size": 96, "weights": None, "weights_backbone": None}
    return seeded(getattr(detection, name), **sizes, **options)


@pytest.mark.parametrize("layer", ["backbone", "backbone.fpn"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_faster_rcnn(layer: str, batch_size: int) -> None:
    """One map per box and level of the feature pyramid, which fuse into one of the image's aspect ratio."""
    model = detector("fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=4, box_detections_per_img=5)
    images = list(torch.rand((batch_size, 3, 64, 96), generator=torch.Generator().manual_seed(0)))
    with methods.GradCAM(model, layer) as extractor, torch.no_grad():
        output = model(images)
        wanted = [BoxScores(found["labels"][:1], found["boxes"][:1]) for found in output]
        maps = extractor(scores=output, targets=wanted, relu=False, normalized=False, retain_graph=True)
        assert [cam.shape for cam in maps] == [(batch_size, 2, 3), (batch_size, 2, 3), (batch_size, 1, 2)]
        assert all(cam.isfinite().all() for cam in maps)
        assert any(cam.any() for cam in maps)
        fused = extractor.fuse_cams(maps)
        assert fused.shape == (batch_size, 2, 3)
        assert torch.equal(extractor.fuse_cams([maps[0]]), maps[0])
        names = [f"{layer}['0']", f"{layer}['1']", f"{layer}['pool']"]
        assert extractor._recorder.find().names == names
        by_box = [
            [BoxScores(found["labels"][i : i + 1], found["boxes"][i : i + 1]) for i in (0, 3)] for found in output
        ]
        several = extractor(scores=output, targets=by_box, relu=False, normalized=False, retain_graph=True)
        for cam, expected in zip(several, maps, strict=True):
            assert cam.shape == (batch_size, 2, *expected.shape[1:])
            torch.testing.assert_close(cam[:, 0], expected, rtol=1e-4, atol=1e-6)
        nothing = [BoxScores([9], [[0, 0, 5, 5]])] * batch_size
        for cam in extractor(scores=output, targets=nothing):
            assert not cam.any()
    assert count_hooks(model) == 0


def test_the_levels_of_a_pyramid_that_a_box_does_not_use() -> None:
    """They have an empty map; a layer that none of whose levels counts is an error."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.levels = type("Levels", (nn.Module,), {"forward": self.make_levels})()
            shuffled(self)

        @staticmethod
        def make_levels(_self: nn.Module, x: Tensor) -> dict[str, Tensor]:
            return {"fine": x + 0, "coarse": nn.functional.avg_pool2d(x, 2)}

        def forward(self, x: Tensor) -> Tensor:
            levels = self.levels(self.stem(x))
            return torch.stack([levels["fine"].square().mean((1, 2, 3)), levels["coarse"].mean((1, 2, 3))], 1)

    model = seeded(Pyramid)
    with methods.HiResCAM(model, "levels") as extractor, torch.no_grad():
        model(image(8, 12))
        fine, coarse = extractor(0, relu=False, retain_graph=True)
        assert fine.abs().max() == 1
        assert not coarse.any()
        fine, coarse = extractor([[1, 0]], relu=False, retain_graph=True)
        assert fine.abs().amax((2, 3)).tolist() == [[0, 1]]
        assert coarse.abs().amax((2, 3)).tolist() == [[1, 0]]
        with pytest.raises(RuntimeError, match="not connected to every target layer"):
            extractor(targets=lambda y: y.detach().sum() + torch.zeros((), requires_grad=True))


def test_keypoint_rcnn() -> None:
    model = detector("keypointrcnn_resnet50_fpn", num_classes=2, box_detections_per_img=2)
    with methods.GradCAM(model, "backbone.fpn") as extractor, torch.no_grad():
        output = model([torch.rand((3, 64, 96), generator=torch.Generator().manual_seed(0))])
        assert output[0]["keypoints_scores"].shape == (2, 17)
        maps = extractor(scores=output, targets=lambda found: found["keypoints_scores"][0, 3], relu=False)
        # Levels of stride 4, 8, 16 and 32, and one more
        assert [cam.shape[1:] for cam in maps] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
        # The keypoints of a box are read from one level.
        assert sorted(cam.abs().max().item() for cam in maps) == [0, 0, 0, 0, 1]
        assert extractor.fuse_cams(maps).shape == (1, 16, 24)


# Segmentation, video


@pytest.mark.parametrize(
    ("name", "layer"),
    [("deeplabv3_mobilenet_v3_large", "classifier.3"), ("lraspp_mobilenet_v3_large", "classifier.cbr")],
)
def test_segmentation(name: str, layer: str) -> None:
    from torchvision.models import get_model

    model = seeded(get_model, name, weights=None, weights_backbone=None, num_classes=4)
    x = image(64, 96, batch_size=2)
    mask = torch.zeros(64, 96)
    mask[:16, :16] = 1
    with methods.HiResCAM(model, layer) as extractor, torch.no_grad():
        output = model(x)
        assert output["out"].shape == (2, 4, 64, 96)
        by_class = extractor([1, 3], relu=False, retain_graph=True)
        by_target = extractor(targets=[Segmentation(1), Segmentation(3)], relu=False, retain_graph=True)
        maps_equal(by_class, by_target)
        assert by_class[0].shape == (2, 4, 6)
        (corner,) = extractor(targets=Segmentation(2, mask), relu=False, normalized=False)
    with methods.ScoreCAM(model, extractor.target_names, batch_size=64) as extractor, torch.no_grad():
        model(x[:1])
        # The scores are sums over thousands of pixels, which are added in another order.
        maps_equal(extractor(1), extractor(targets=Segmentation(1)), 1e-4)
    # Nothing but convolutions follow the layer: the corner's pixels are explained by the corner.
    energy = corner.abs()
    assert (energy[:, :2, :2].sum((1, 2)) > 0.9 * energy.sum((1, 2))).all()


def test_a_video_model() -> None:
    from torchvision.models.video import r3d_18

    model = seeded(r3d_18, num_classes=4)
    clip = torch.randn((1, 3, 8, 32, 48), generator=torch.Generator().manual_seed(0))
    with methods.GradCAM(model, ["layer2", "layer4"]) as extractor, torch.no_grad():
        scores = model(clip)
        maps = extractor(1, scores, relu=False)
        assert [cam.shape for cam in maps] == [(1, 4, 8, 12), (1, 1, 2, 3)]
        assert extractor.fuse_cams(maps, (8, 32, 48)).shape == (1, 8, 32, 48)
        gradient, activation = extractor.hook_g[0], extractor.hook_a[0]
        expected = (gradient.mean((2, 3, 4), keepdim=True) * activation).sum(1)
        torch.testing.assert_close(maps[0], expected / expected.abs().max())


def test_a_video_transformer() -> None:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 16, 16, [], [], [], []),
        MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        MSBlockConfig(2, 32, 32, [], [], [], []),
    ]
    model = seeded(MViT, (32, 48), 8, blocks, False, False, False, False, num_classes=4)
    clip = torch.randn((2, 3, 8, 32, 48), generator=torch.Generator().manual_seed(0))
    with methods.GradCAM(model, input_shape=(3, 8, 32, 48)) as extractor, torch.no_grad():
        assert extractor.target_names == ["blocks.2.norm1"]
        model(clip)
        (cam,) = extractor(1, relu=False)
        assert cam.shape == (2, 4, 4, 6)
        assert cam.abs().flatten(1).amax(1).tolist() == pytest.approx([1, 1])


# transformers


def hf_sizes(**options: int) -> dict[str, int]:
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, **options}


def small_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = hf_sizes(vocab_size=50, max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = hf_sizes(image_size=32, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def test_clip_explains_how_an_image_fits_a_text() -> None:
    model = seeded(small_clip)
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 3, 2]])
    x = image(32, 32, batch_size=2)
    with methods.GradCAM(model) as extractor, torch.no_grad():
        output = model(input_ids=ids, pixel_values=x, attention_mask=torch.ones_like(ids))
        assert output.logits_per_image.shape == (2, 3)
        assert extractor.target_names == ["vision_model.encoder.layers.2.layer_norm1"]
        (cam,) = extractor([2, 0], output, relu=False)
    assert cam.shape == (2, 4, 4)
    for row, text in enumerate((2, 0)):
        with methods.GradCAM(model, extractor.target_names) as single, torch.no_grad():
            model(input_ids=ids[text : text + 1], pixel_values=x[row : row + 1])
            (alone,) = single(0, relu=False)
        torch.testing.assert_close(cam[row], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("texts", [2, 3])
def test_clip_in_a_method_that_masks_the_image(texts: int) -> None:
    """As many texts as images or not: it is the images that are masked."""
    model = seeded(small_clip)
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 3, 2]])[:texts]
    x = image(32, 32, batch_size=2)
    layer = "vision_model.encoder.layers.1"
    with methods.ScoreCAM(model, layer) as extractor, torch.no_grad():
        model(input_ids=ids, pixel_values=x)
        (cam,) = extractor([1, 0])
    for row, text in enumerate((1, 0)):
        with methods.ScoreCAM(model, layer) as single, torch.no_grad():
            model(input_ids=ids[text : text + 1], pixel_values=x[row : row + 1])
            (alone,) = single(0)
        torch.testing.assert_close(cam[row], alone[0], rtol=1e-4, atol=1e-5)


def test_an_output_class() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    model = seeded(lambda: ViTForImageClassification(ViTConfig(**hf_sizes(image_size=32, patch_size=8), num_labels=5)))
    x = image(32, 32, batch_size=2)
    with methods.GradCAM(model, input_shape=(3, 32, 32)) as extractor, torch.inference_mode():
        output = model(pixel_values=x)
        found = extractor([1, 4], output, relu=False, retain_graph=True)
        assert found[0].shape == (2, 4, 4)
        maps_equal(extractor([1, 4], output.logits, relu=False, retain_graph=True), found)
        maps_equal(extractor(targets=[ClassLogit(1), lambda out: out.logits[4]], relu=False), found)
        as_tuple = model(pixel_values=x, return_dict=False)
        assert isinstance(as_tuple, tuple)
        maps_equal(extractor([1, 4], as_tuple, relu=False), found)


# Several inputs


class TwoImages(nn.Module):
    """Compares two images; the second one is scaled by a number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)
        shuffled(self)

    def forward(self, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
        right = self.right(right).relu() * scale.reshape(-1, 1, 1, 1)
        return self.fc(self.left(left).relu().mean((2, 3)) * right.mean((2, 3)))


class DictBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TwoImages()

    def forward(self, batch: dict[str, Any]) -> tuple[None, Tensor]:
        return None, self.net(batch["left"], batch["right"], batch["scale"])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("as_dict", [False, True])
def test_the_masked_input_is_the_one_named(which: int, as_dict: bool) -> None:
    """Score-CAM by hand: one of two images is masked, all other inputs follow the samples."""
    model = seeded(DictBatch if as_dict else TwoImages)
    net = model.net if as_dict else model
    inputs = [image(8, 12, 2), image(8, 12, 2).flip(-1) + 0.3, torch.tensor([0.5, 2.0])]
    name = ("left", "right")[which]
    prefix = "net." if as_dict else ""
    options = {"input_name": name} if as_dict else {"input_index": which}
    with methods.ScoreCAM(model, prefix + name, batch_size=3, **options) as extractor, torch.no_grad():
        model(dict(zip(("left", "right", "scale"), inputs, strict=True))) if as_dict else model(*inputs)
        (cam,) = extractor([1, 3], normalized=False)
        activation = getattr(net, name)(inputs[which])
        for row, class_idx in enumerate((1, 3)):
            scores = []
            for channel in activation[row]:
                mask = (channel - channel.min()) / (channel.max() - channel.min())
                masked = [value[row : row + 1] for value in inputs]
                masked[which] = masked[which] * mask
                scores.append(net(*masked)[0, class_idx])
            weights = torch.stack(scores).softmax(0)
            expected = torch.einsum("c,chw->hw", weights, activation[row]).relu()
            torch.testing.assert_close(cam[row], expected, rtol=1e-4, atol=1e-5)
            assert expected.any()


def test_a_keyword_names_the_input() -> None:
    model = seeded(TwoImages)
    inputs = {"left": image(8, 12), "right": image(8, 12) + 1, "scale": torch.ones(1)}
    with torch.no_grad():
        with methods.ScoreCAM(model, "right", input_name="right") as extractor:
            model(**inputs)
            named = extractor(1)
        with methods.ScoreCAM(model, "right", input_index=1) as extractor:
            model(*inputs.values())
            maps_equal(named, extractor(1))
        with methods.ScoreCAM(model, "right") as extractor:  # the first that looks like an image: the other one
            model(**inputs)
            with pytest.warns(UserWarning, match="where the input is changed is not where that grid changes"):
                extractor(1)
            assert not torch.allclose(extractor(1, normalized=False)[0], named[0])
        for options, message in (
            ({"input_name": "middle"}, "`input_name` is 'middle', but the model was called with the keywords"),
            ({"input_index": 0}, "`input_index` is 0, but the model was called with 0 positional inputs"),
        ):
            with methods.ScoreCAM(model, "right", **options) as extractor, pytest.raises(ValueError, match=message):
                model(**inputs)
    with pytest.raises(ValueError, match="not both"):
        methods.ScoreCAM(model, "right", input_name="right", input_index=1)
    assert count_hooks(model) == 0


@dataclass
class Output:
    name: str
    logits: Tensor
    features: Tensor


@pytest.mark.parametrize(
    "pack",
    [
        lambda y, f: Output("x", y, f),
        lambda y, f: (y, f),
        lambda y, f: [y, f],
        lambda y, f: {"features": f, "logits": y},
        lambda y, f: (torch.arange(2), y, None),
    ],
)
@pytest.mark.parametrize("name", ["GradCAM", "ScoreCAM", "AblationCAM", "SmoothGradCAMpp"])
def test_outputs_of_all_kinds(pack: Callable[[Tensor, Tensor], Any], name: str) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = split_net()

        def forward(self, x: Tensor) -> Any:
            y = self.net(x)
            return pack(y, y * 2)

    model = Packed()
    x = torch.randn((2, 3, 9, 11), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with getattr(methods, name)(model.net, "second") as extractor, torch.no_grad():
        expected = extractor([1, 3], model.net(x), relu=False)
    with getattr(methods, name)(model, "net.second") as extractor, torch.no_grad():
        maps_equal(extractor([1, 3], model(x), relu=False), expected)
        model(x)
        maps_equal(extractor([1, 3], relu=False), expected)


# Edited activations of tokens


@pytest.mark.parametrize("layer", ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_2.ln_1"])
def test_ablation_of_tokens_is_that_of_full_passes(layer: str) -> None:
    """A channel is zeroed in the tokens of the patches, not in the class token."""
    model = tiny_vit()
    x = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with methods.AblationCAM(model, layer, batch_size=3) as extractor, torch.no_grad():
        model(x)
        (cam,) = extractor([1, 3], normalized=False, relu=False)
        activation = extractor.hook_a[0]
    drops = []
    with torch.no_grad():
        scores = model(x)[torch.arange(2), torch.tensor([1, 3])]
        for channel in range(8):

            def without(_m: nn.Module, _a: Any, output: Tensor, channel: int = channel) -> Tensor:
                edited = output.clone()
                edited[:, 1:, channel] = 0
                return edited

            handle = model.get_submodule(layer).register_forward_hook(without)
            drops.append((scores - model(x)[torch.arange(2), torch.tensor([1, 3])]) / scores.abs())
            handle.remove()
    expected = torch.einsum("cn,nchw->nhw", torch.stack(drops), activation)
    torch.testing.assert_close(cam, expected)
    assert expected.any()


# Wrapped models, and how they are run


class Checkpointed(nn.Module):
    """Throws its activations away and computes them again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = split_net()
        self.saves = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.saves:
            return self.net(x)
        x = checkpoint(self.net.first, x, use_reentrant=False)
        x = checkpoint(self.net.second, x, use_reentrant=False)
        return checkpoint(self.net.head, x, "second", use_reentrant=False)


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "SmoothGradCAMpp", "ShapleyCAM"])
@pytest.mark.parametrize("layer", ["net.first", "net.second", "net.first.0"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_activation_checkpointing(name: str, layer: str, mode: Callable[[], Any]) -> None:
    model = Checkpointed()
    x = torch.randn((2, 3, 9, 11), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if name == "ShapleyCAM" and layer == "net.first.0":
        pytest.skip("a second derivative does not reach what was computed inside a checkpoint")
    maps = []
    for model.saves in (False, True):
        with getattr(methods, name)(model, layer) as extractor, mode():
            scores = model(x)
            maps.append(extractor([1, 3], scores, relu=False, retain_graph=True))
            maps_equal(extractor([1, 3], scores, relu=False), maps[-1])
    maps_equal(*maps)


def test_data_parallel() -> None:
    model = resnet()
    wrapper = nn.DataParallel(model)
    x = image(64, 96, 2)
    with methods.GradCAM(model, "layer4") as extractor, torch.no_grad():
        expected = extractor([1, 3], model(x), relu=False)
        maps_equal(extractor([1, 3], wrapper(x), relu=False), expected)
    assert candidates(wrapper, x).choice == "module.layer4"
    for layer in (None, "module.layer4", model.layer4):
        with methods.GradCAM(wrapper, layer, (3, 64, 96)) as extractor, torch.no_grad():
            assert extractor.target_names == ["module.layer4"]
            maps_equal(extractor([1, 3], wrapper(x), relu=False), expected)


def test_compiled_models() -> None:
    """Compiled code runs no hooks: the original module does, and an error says so."""
    model = split_net(dtype=torch.float32)
    x = torch.randn((2, 3, 9, 11), generator=torch.Generator().manual_seed(0))
    with methods.GradCAM(model, "second") as extractor:
        expected = extractor(1, model(x), relu=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says of itself
        compiled = torch.compile(model, backend="eager")
        for first in (model, compiled):
            with methods.GradCAM(first, "second") as extractor, torch.no_grad():
                assert extractor.model is model
                scores = compiled(x)
                with pytest.raises(
                    AssertionError, match=r"compiled code, .* call the original module, `extractor.model`"
                ):
                    extractor(1, scores)
                maps_equal(extractor(1, model(x), relu=False), expected)
            assert count_hooks(model) == 0
        assert torch.allclose(compiled(x), model(x))
        found = candidates(compiled, x)
        assert [c.name for c in found] == [f"_orig_mod.{c.name}" for c in candidates(model, x)]
        with methods.ScoreCAM(compiled, input_shape=(3, 9, 11)) as extractor, torch.no_grad():
            extractor.model(x)
            assert extractor(0)[0].shape == (2, 5, 6)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM", "SmoothGradCAMpp", "AugmentedCAM"])
def test_replays_run_under_the_autocast_of_the_pass(name: str) -> None:
    model = split_net(dtype=torch.float32)
    x = torch.randn((2, 3, 9, 11), generator=torch.Generator().manual_seed(0))
    types: list[torch.dtype] = []
    model.fc.register_forward_hook(lambda _m, _a, output: types.append(output.dtype))
    with getattr(methods, name)(model, "second") as extractor, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert types == [torch.bfloat16]
        mixed = extractor(1)
        assert set(types) == {torch.bfloat16}
        assert not torch.is_autocast_enabled("cpu")
        types.clear()
        model(x)
        with torch.autocast("cpu", torch.bfloat16):
            full = extractor(1)
        assert set(types) == {torch.float32}
    assert len(types) > 1
    for cam, expected in zip(mixed, full, strict=True):
        assert cam.dtype == torch.float32
        torch.testing.assert_close(cam, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_maps_are_summed_in_full_precision(name: str) -> None:
    """Also where the extractor is called under autocast."""
    model, x = make_model(name, torch.device("cpu")), make_input(torch.device("cpu"))
    with METHODS[name](model) as extractor, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(x)
        for cam in extractor([0, 2]):
            assert cam.dtype == torch.float32
            assert cam.isfinite().all()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "HiResCAM", "ScoreCAM", "AblationCAM", "EigenCAM"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_few_bits(name: str, dtype: torch.dtype) -> None:
    x = torch.randn((2, 3, 9, 11), generator=torch.Generator().manual_seed(0))
    maps = []
    for model in (split_net(dtype=torch.float32), split_net(dtype=torch.float32).to(dtype)):
        with getattr(methods, name)(model, "second") as extractor, torch.no_grad():
            model(x.to(next(model.parameters()).dtype))
            maps.append(extractor(1))
    for cam, expected in zip(maps[1], maps[0], strict=True):
        assert cam.dtype == torch.float32
        assert cam.flatten(1).amax(1).tolist() == [1, 1]
        torch.testing.assert_close(cam, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM", "EigenCAM", "MeanActivation"])
def test_a_quantised_classifier(name: str) -> None:
    """Methods that need no gradient explain a model with 8-bit layers, nearly as the model it was made from."""
    cpu = torch.device("cpu")
    model = make_model(name, cpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch speaks of its plans for this function, once a process
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    maps = []
    for explained in (model, quantised):
        with METHODS[name](explained) as extractor:
            explained(make_input(cpu))
            maps.append(extractor([0, 2]))
    for cam, expected in zip(maps[1], maps[0], strict=True):
        assert cam.flatten(1).amax(1).tolist() == [1, 1]
        torch.testing.assert_close(cam, expected, rtol=0, atol=1e-2)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """The wrapper's map is the model's, with a named layer and with the default one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        cpu = torch.device("cpu")
        model = make_model("GradCAM", cpu)
        wrapped = nn.parallel.DistributedDataParallel(model)
        default = candidates(model, make_input(cpu)).choice
        for inner, outer in (("block2", "module.block2"), (default, None)):
            with methods.GradCAM(model, inner) as extractor:
                expected = extractor([0, 2], model(make_input(cpu)))[0]
            with methods.GradCAM(wrapped, outer, input_shape=(3, 12, 12)) as extractor:
                cam = extractor([0, 2], wrapped(make_input(cpu)))[0]
            assert extractor.target_names == [f"module.{inner}"]
            torch.testing.assert_close(cam, expected)
    finally:
        torch.distributed.destroy_process_group()
