"""What `explain` takes: files, images, arrays, tensors, mappings, with the transforms of several libraries."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms import v2

from tests.methods_under_test import make_model
from torchcam._inputs import _weights_named, read_picture
from torchcam.explain import Explanations, PredictionExplanation, explain

CPU = torch.device("cpu")
HOPPER = Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seeded(make: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args, **kwargs).eval()


@pytest.fixture(scope="module")
def hopper() -> Image.Image:
    with Image.open(HOPPER) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return seeded(resnet18)


@pytest.fixture
def net() -> nn.Module:
    return make_model("GradCAM", CPU)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 14, 3), dtype=np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)


def logits_of(net: nn.Module, given: Any, **options: Any) -> Tensor:
    return explain(net, given, target_layer="block2", **options).logits


def of_tensor(net: nn.Module, image: Image.Image) -> Tensor:
    return logits_of(net, to_tensor(image)[None])


class TestTorchvision:
    def test_a_file_with_weights(self, resnet: nn.Module, hopper: Image.Image) -> None:
        weights = ResNet18_Weights.DEFAULT
        with torch.inference_mode():
            result = explain(resnet, str(HOPPER), weights=weights, target_layer="layer4", top_k=2)
        expected = explain(resnet, weights.transforms()(hopper)[None], target_layer="layer4", top_k=2)
        assert torch.equal(result.logits, expected.logits)
        assert list(result.cams) == list(expected.cams)
        for index, (cam,) in result.cams.items():
            assert torch.equal(cam, expected.cams[index][0])
            assert not cam.is_inference()
        assert result.class_names == tuple(weights.meta["categories"])
        assert weights.meta["categories"][result.predicted_class_idx] in result.title
        assert expected.class_names is None

    def test_what_is_shown_is_what_the_model_sees(self, resnet: nn.Module, hopper: Image.Image) -> None:
        result = explain(resnet, HOPPER, weights="ResNet18_Weights.IMAGENET1K_V1", target_layer="layer4")
        seen = v2.functional.center_crop(v2.functional.resize(hopper, 256), 224)
        assert np.abs(np.asarray(result.image, dtype=int) - np.asarray(seen)).max() <= 1

    def test_names_that_do_not_fit_the_model(self, picture: Image.Image, net: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"1000 names, .* 3 classes.*pass `transform=weights.transforms\(\)`"):
            explain(net, picture, weights=ResNet18_Weights.DEFAULT, target_layer="block2")

    def test_anything_with_transforms_and_categories_is_weights(self, picture: Image.Image, net: nn.Module) -> None:
        weights = SimpleNamespace(transforms=lambda: to_tensor, meta={"categories": ["a", "b", "c"]})
        result = explain(net, picture, weights=weights, target_layer="block2")
        assert result.class_names == ("a", "b", "c")
        assert torch.equal(result.logits, of_tensor(net, picture))
        assert explain(net, picture, weights=weights, class_names=["x", "y", "z"]).class_names == ("x", "y", "z")


class TestKinds:
    def test_a_file_an_image_and_arrays_are_the_same(
        self, picture: Image.Image, net: nn.Module, tmp_path: Path
    ) -> None:
        picture.save(tmp_path / "picture.png")
        expected = of_tensor(net, picture)
        array = np.asarray(picture)
        for given in (tmp_path / "picture.png", str(tmp_path / "picture.png"), picture, array, array / 255):
            assert torch.equal(logits_of(net, given, transform=to_tensor), expected)

    def test_a_file_is_turned_upright(self, picture: Image.Image, net: nn.Module, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90° clockwise
        picture.save(tmp_path / "turned.png", exif=exif)
        result = explain(net, tmp_path / "turned.png", transform=to_tensor, target_layer="block2")
        assert np.array_equal(np.asarray(result.image), np.asarray(picture.rotate(-90, expand=True)))

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("L", (100, 100, 100)),
            ("RGBA", (10, 20, 30)),
            ("P", (10, 20, 30)),
            ("I;16", (100, 100, 100)),
            ("F", (51,) * 3),
        ],
    )
    def test_modes(self, mode: str, expected: tuple[int, ...], net: nn.Module) -> None:
        image = {
            "L": lambda: Image.new("L", (12, 12), 100),
            "RGBA": lambda: Image.new("RGBA", (12, 12), (10, 20, 30, 128)),
            "P": lambda: Image.new("RGB", (12, 12), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
            "I;16": lambda: Image.fromarray(np.full((12, 12), 25700, dtype=np.uint16)),
            "F": lambda: Image.fromarray(np.full((12, 12), 0.2, dtype=np.float32)),
        }[mode]()
        assert image.mode == mode
        result = explain(net, image, transform=to_tensor, target_layer="block2")
        assert result.image.mode == "RGB"
        assert result.image.getpixel((5, 5)) == expected

    def test_a_model_of_greys_gets_greys(self, picture: Image.Image) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        result = explain(model, picture, transform=to_tensor, target_layer="0")
        assert result.input_shape == (1, 1, 20, 14)
        assert np.array_equal(np.asarray(result.image)[:, :, 0], np.asarray(picture.convert("L")))

    def test_lists_and_batches_of_arrays(self, picture: Image.Image, net: nn.Module) -> None:
        other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        results = explain(net, [picture, np.asarray(other)], transform=to_tensor, target_layer="block2")
        assert isinstance(results, Explanations)
        for result, image in zip(results, (picture, other), strict=True):
            assert torch.allclose(result.logits, of_tensor(net, image), atol=1e-6)
            assert np.array_equal(np.asarray(result.image), np.asarray(image))
        stacked = np.stack([np.asarray(picture), np.asarray(other)])
        again = explain(net, stacked, transform=to_tensor, target_layer="block2")
        assert [torch.equal(a.logits, b.logits) for a, b in zip(results, again, strict=True)] == [True, True]

    def test_a_model_of_another_type_gets_its_type(self, picture: Image.Image, net: nn.Module) -> None:
        result = explain(net.double(), picture, transform=to_tensor, target_layer="block2")
        assert result.logits.dtype == torch.float64

    def test_a_compiled_model_is_taken_for_the_original(self, picture: Image.Image, net: nn.Module) -> None:
        compiled = torch.compile(net, backend="eager")
        assert torch.equal(logits_of(compiled, to_tensor(picture)[None]), of_tensor(net, picture))


class TestShown:
    def shown(self, tensor: Tensor, **options: Any) -> np.ndarray[Any, Any]:
        model = nn.Sequential(nn.Conv2d(tensor.shape[1], 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        return np.asarray(explain(model, tensor, target_layer="0", **options).image)

    def test_a_tensor_in_the_unit_range_is_shown_as_it_is(self, picture: Image.Image) -> None:
        assert np.array_equal(self.shown(to_tensor(picture)[None]), np.asarray(picture))

    @pytest.mark.parametrize(
        "transform",
        [
            v2.Normalize(MEAN, STD),
            v2.Compose([v2.Identity(), v2.Compose([v2.Normalize(MEAN, STD)])]),
            nn.Sequential(v2.Identity(), v2.Normalize(MEAN, STD)),
        ],
    )
    def test_a_known_normalisation_is_undone(self, transform: Any, picture: Image.Image) -> None:
        tensor = transform(to_tensor(picture))[None]
        shown = self.shown(tensor, transform=transform)
        assert np.abs(shown.astype(int) - np.asarray(picture)).max() <= 1

    def test_an_unknown_normalisation_is_stretched(self) -> None:
        tensor = torch.linspace(-3, 5, 3 * 4 * 4).reshape(1, 3, 4, 4)
        expected = (255 * (tensor[0] + 3) / 8).round().permute(1, 2, 0).numpy()
        assert np.abs(self.shown(tensor) - expected).max() <= 1
        wrong = v2.Normalize([9.0, 9.0, 9.0], [1.0, 1.0, 1.0])  # cannot have been this one
        assert np.abs(self.shown(tensor, transform=wrong) - expected).max() <= 1

    def test_other_numbers_of_channels_are_shown_in_grey(self) -> None:
        tensor = torch.rand(1, 5, 4, 4)
        expected = (255 * tensor[0].mean(0)).round()
        assert np.abs(self.shown(tensor) - expected[..., None].numpy()).max() <= 1

    def test_an_image_that_is_given(self, picture: Image.Image, net: nn.Module) -> None:
        x = torch.rand(1, 3, 20, 14)
        result = explain(net, x, target_layer="block2", image=picture)
        assert np.array_equal(np.asarray(result.image), np.asarray(picture))
        assert result.overlay().size == (14 * 26, 20 * 26)  # enlarged, as it is tiny
        both = explain(net, torch.rand(2, 3, 20, 14), target_layer="block2", image=[picture, np.zeros((10, 7, 3))])
        assert [one.image.size for one in both] == [(14, 20), (7, 10)]
        with pytest.raises(ValueError, match="`image` must hold a picture for each of the 2 inputs, got 1"):
            explain(net, torch.rand(2, 3, 12, 12), target_layer="block2", image=picture)

    def test_signals_have_no_picture(self) -> None:
        model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
        assert explain(model, torch.rand(1, 2, 9), target_layer="0").image is None


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "bird"},
        label2id={"cat": 0, "dog": 1, "bird": 2},
    )
    return seeded(ViTForImageClassification, config)


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])


class TestTransformers:
    def test_an_image_processor_is_a_transform(self, vit: nn.Module, processor: Any, hopper: Image.Image) -> None:
        inputs = processor(images=hopper, return_tensors="pt")
        expected = explain(vit, inputs["pixel_values"], method=["GradCAM", "EigenCAM"])
        result = explain(vit, hopper, transform=processor, method=["GradCAM", "EigenCAM"])
        assert torch.equal(result.logits, expected.logits)
        assert result.class_names == ("cat", "dog", "bird")
        index = result.predicted_class_idx
        for name in result.methods:
            assert torch.equal(result.maps[name][index][0], expected.maps[name][index][0])
            assert result.maps[name][index][0].shape == (4, 4)
        undone = inputs["pixel_values"][0] * torch.tensor([0.2, 0.3, 0.4])[:, None, None]
        undone = undone + torch.tensor([0.4, 0.5, 0.6])[:, None, None]
        shown = torch.from_numpy(np.array(result.image)).permute(2, 0, 1) / 255
        assert (shown - undone).abs().max() < 0.01

    def test_the_keywords_of_the_model(self, vit: nn.Module, processor: Any, hopper: Image.Image) -> None:
        inputs = processor(images=[hopper, hopper.rotate(90)], return_tensors="pt")
        results = explain(vit, inputs, top_k=2)
        assert isinstance(results, Explanations)
        expected = explain(vit, inputs["pixel_values"], top_k=2)
        for result, other in zip(results, expected, strict=True):
            assert torch.equal(result.logits, other.logits)
        assert isinstance(explain(vit, {"pixel_values": inputs["pixel_values"][:1]}), PredictionExplanation)

    def test_without_a_processor_it_says_what_to_pass(self, vit: nn.Module, hopper: Image.Image) -> None:
        with pytest.raises(
            ValueError, match=r"how ViTForImageClassification wants an image .*`processor=AutoImageProcessor"
        ):
            explain(vit, hopper)

    def test_labels_that_say_nothing_are_no_names(self) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8
        )
        assert explain(seeded(ViTForImageClassification, config), torch.rand(1, 3, 16, 16)).class_names is None


class TestTimm:
    def test_a_model_knows_its_transform(self, hopper: Image.Image) -> None:
        import timm

        model = seeded(
            timm.create_model,
            "vit_tiny_patch16_224",
            img_size=32,
            depth=2,
            embed_dim=24,
            num_classes=5,
            pretrained_cfg_overlay={"input_size": (3, 32, 32)},
        )
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        result = explain(model, hopper, top_k=2)
        expected = explain(model, transform(hopper)[None], top_k=2)
        assert torch.equal(result.logits, expected.logits)
        assert result.cams[result.predicted_class_idx][0].shape == (2, 2)
        # The normalisation is known for tensors as well.
        assert np.array_equal(np.asarray(result.image), np.asarray(expected.image))
        seen = v2.functional.center_crop(v2.functional.resize(hopper, 35, v2.InterpolationMode.BICUBIC), 32)
        assert np.abs(np.asarray(result.image, dtype=int) - np.asarray(seen)).mean() < 4


class TestErrors:
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ("missing.png", FileNotFoundError, "there is no file 'missing.png'"),
            (3, TypeError, "`input_tensor` must be a tensor, a path, a PIL image, .* got int"),
            ([], ValueError, "`input_tensor` is an empty list"),
            ({"input_ids": torch.zeros(1, 4, dtype=torch.long)}, ValueError, r"mapping with \['input_ids'\], none of"),
            ({}, ValueError, r"mapping with \[\], none of"),
            (np.zeros((3, 8, 9)), ValueError, r"\(height, width\[, channels\]\), got \(3, 8, 9\): pass .*transpose"),
            (np.zeros((8, 9, 2)), ValueError, r"got \(8, 9, 2\)$"),
            (np.zeros((8, 9), dtype=np.int64), TypeError, "must be uint8, or floats .* got int64"),
            (np.full((8, 9), 2.5), ValueError, r"must lie in \[0, 1\], got \[2.5, 2.5\]"),
            (np.full((8, 9), np.nan), ValueError, r"must lie in \[0, 1\], got \[nan, nan\]"),
            (
                [torch.rand(3, 8, 8), torch.rand(3, 8, 9)],
                ValueError,
                r"one shape, these have \[\(3, 8, 8\), \(3, 8, 9\)\]",
            ),
        ],
    )
    def test_input(self, given: Any, error: type[Exception], message: str, net: nn.Module) -> None:
        with pytest.raises(error, match=message):
            explain(net, given, transform=to_tensor, target_layer="block2")

    def test_a_file_that_is_no_image(self, net: nn.Module, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(ValueError, match=r"notes\.txt' is not an image that Pillow can read"):
            explain(net, tmp_path / "notes.txt", transform=to_tensor)

    def test_an_image_without_a_transform(self, picture: Image.Image, net: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"how Net wants an image as a tensor is not known: .* `transform=`"):
            explain(net, picture, target_layer="block2")

    def test_a_transform_that_makes_no_tensor(self, picture: Image.Image, net: nn.Module) -> None:
        with pytest.raises(TypeError, match="`transform` must make a tensor of an image, got ndarray"):
            explain(net, picture, transform=np.asarray, target_layer="block2")


class TestNames:
    NAMES = ("cat", "dog", "Dog")

    @pytest.mark.parametrize(("given", "expected"), [("cat", [0]), ("CAT", [0]), (["dog", 2], [1, 2])])
    def test_classes_by_name(self, given: Any, expected: list[int], net: nn.Module) -> None:
        x = torch.rand(1, 3, 12, 12)
        result = explain(net, x, target_layer="block2", class_idx=given, class_names=self.NAMES)
        assert list(result.cams) == expected

    def test_of_a_batch_and_what_was_expected(self, net: nn.Module) -> None:
        x = torch.rand(2, 3, 12, 12)
        both = explain(
            net, x, target_layer="block2", class_idx=["cat", "dog"], expected_class_idx="Dog", class_names=self.NAMES
        )
        assert [list(one.cams) for one in both] == [[0, 2], [1, 2]]

    @pytest.mark.parametrize(
        ("name", "names", "message"),
        [
            ("cta", NAMES, "`class_idx` is 'cta', and no class has that name; did you mean 'cat'"),
            ("DOG", NAMES, r"which is the name of the classes \[1, 2\]"),
            ("cat", None, "the names of the classes are not known: pass `class_names`"),
        ],
    )
    def test_no_such_name(self, name: str, names: Any, message: str, net: nn.Module) -> None:
        with pytest.raises(ValueError, match=message):
            explain(net, torch.rand(1, 3, 12, 12), target_layer="block2", class_idx=name, class_names=names)


class TestWeights:
    @pytest.mark.parametrize(("arch", "name"), [("resnet18", "DEFAULT"), ("resnet34", "imagenet1k_v1")])
    def test_of_the_models_own_architecture(self, arch: str, name: str) -> None:
        from torchvision.models import get_model, get_model_weights

        found = _weights_named(name, get_model(arch))
        assert found is get_model_weights(arch)["IMAGENET1K_V1"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("ResNet18_Weights.NO", "`weights` 'ResNet18_Weights.NO' are none of torchvision's"),
            ("DEFAULT", "`weights` 'DEFAULT' are of no architecture, and .* pass their whole name"),
        ],
    )
    def test_of_no_architecture(self, name: str, message: str, net: nn.Module) -> None:
        with pytest.raises(ValueError, match=message):
            explain(net, torch.rand(1, 3, 12, 12), weights=name)


class TestWrongTensors:
    def test_bytes(self, net: nn.Module) -> None:
        with pytest.raises(TypeError, match="holds bytes, models take floats"):
            explain(net, torch.zeros(1, 3, 12, 12, dtype=torch.uint8))

    def test_channels(self, net: nn.Module) -> None:
        with pytest.raises(ValueError, match="has 4 channels, the model's first convolution takes 3"):
            explain(net, torch.rand(1, 4, 12, 12), target_layer="block2")


class TestFiles:
    """What is no picture: one error, at once."""

    def test_a_pipe_is_not_read(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match="is no regular file"):
            read_picture(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match="is no regular file"):
            read_picture("/dev/zero")

    @pytest.mark.parametrize("name", ["a\0b.png", "n" * 5000, "there is none.png"])
    def test_names(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match="there is no file") as raised:
            read_picture(name)
        assert len(str(raised.value)) < 300
        assert "\0" not in str(raised.value)

    def test_a_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.new("L", (64, 64)).save(tmp_path / "large.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(ValueError, match="DecompressionBombError"):
            read_picture(tmp_path / "large.png")
