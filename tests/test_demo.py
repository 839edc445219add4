import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import torchcam.demo
from torchcam.demo import CLASS_NAMES, DemoNet, Scenes, load_model, make_scenes, sample_images
from torchcam.demo import data as demo_data

FOLDER = Path(torchcam.demo.__file__).parent


@pytest.fixture(scope="module")
def model() -> DemoNet:
    return load_model()


@pytest.fixture(scope="module")
def one() -> Scenes:
    return make_scenes(300, num_digits=1, seed=5)


@pytest.fixture(scope="module")
def one_erased() -> Scenes:
    return make_scenes(300, num_digits=1, seed=5, erase=True)


@pytest.fixture(scope="module")
def two() -> Scenes:
    return make_scenes(100, num_digits=2, seed=6)


def predict(model: DemoNet, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in torch.split(images, 100)])


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "labels", "masks", "boxes"))


class TestModel:
    def test_weights_are_small_and_plain(self) -> None:
        path = FOLDER / "weights.pt"
        state = torch.load(path, weights_only=True)
        assert path.stat().st_size <= 500_000
        assert all(isinstance(value, Tensor) for value in state.values())
        assert DemoNet().load_state_dict(state, strict=True).missing_keys == []

    def test_eval_mode_and_fresh_copies(self) -> None:
        first, second = load_model(), load_model()
        assert not any(module.training for module in first.modules())
        assert first.fc.weight.data_ptr() != second.fc.weight.data_ptr()

    def test_logits_are_the_mean_of_the_class_maps(self, model: DemoNet, two: Scenes) -> None:
        x = two.images[:4]
        features = model.layer4(model.layer3(model.layer2(model.layer1(x))))
        assert features.shape == (4, 96, 12, 12)
        maps = torch.einsum("kc,nchw->nkhw", model.fc.weight, features)
        torch.testing.assert_close(maps.mean(dim=(2, 3)) + model.fc.bias, model(x))

    @pytest.mark.parametrize("size", [(64, 64), (80, 120), (97, 33)])
    def test_takes_any_size(self, model: DemoNet, size: tuple[int, int]) -> None:
        assert model(torch.rand(2, 3, *size)).shape == (2, 10)

    def test_sees_no_more_than_43_pixels(self, model: DemoNet) -> None:
        x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
        features = model.layer4(model.layer3(model.layer2(model.layer1(x))))
        (gradient,) = torch.autograd.grad(features[0, :, 6, 6].sum(), x)
        rows = gradient[0].abs().sum(dim=(0, 2)).nonzero()
        assert int(rows.max() - rows.min()) + 1 <= 43

    def test_reads_unseen_handwriting(self, model: DemoNet, one: Scenes) -> None:
        accuracy = (predict(model, one.images).argmax(dim=1) == one.labels[:, 0]).float().mean()
        assert accuracy >= 0.95

    def test_erased_digits_leave_no_evidence(self, model: DemoNet, one: Scenes, one_erased: Scenes) -> None:
        logits = predict(model, one_erased.images)
        accuracy = (logits.argmax(dim=1) == one.labels[:, 0]).float().mean()
        assert accuracy <= 0.17  # 10 % expected; four standard errors above
        assert (logits.sigmoid() > 0.5).any(dim=1).float().mean() < 0.1

    def test_finds_both_of_two_digits(self, model: DemoNet, two: Scenes) -> None:
        found = predict(model, two.images).topk(2).indices.sort(dim=1).values
        assert (found == two.labels[:, :2].sort(dim=1).values).all(dim=1).float().mean() >= 0.9

    def test_class_maps_tell_two_digits_apart(self, model: DemoNet, two: Scenes) -> None:
        with torch.inference_mode():
            features = model.layer4(model.layer3(model.layer2(model.layer1(two.images))))
            maps = torch.einsum("nkc,nchw->nkhw", model.fc.weight[two.labels[:, :2]], features).relu()
            maps = F.interpolate(maps, size=(96, 96), mode="bilinear", align_corners=False)
        energy = torch.einsum("nkhw,nlhw->nkl", maps, two.masks[:, :2].float())
        share = (energy / maps.sum(dim=(2, 3)).clamp_min(1e-12)[..., None]).mean(dim=0)
        assert share.diagonal().min() > 0.35
        assert share.flip(1).diagonal().max() < 0.03


class TestSamples:
    def test_truth_is_consistent(self) -> None:
        samples = sample_images()
        assert len({sample.name for sample in samples}) == len(samples)
        assert {len(sample.labels) for sample in samples} == {1, 2, 3}
        for sample in samples:
            width, height = sample.image.size
            assert sample.image.mode == "RGB"
            assert sample.masks.shape == (len(sample.labels), height, width)
            assert sample.masks.dtype == torch.bool
            assert int(sample.masks.sum(dim=0).max()) == 1
            assert len(set(sample.labels)) == len(sample.labels) == len(sample.boxes)
            assert set(sample.labels) <= set(range(10))
            for mask, (left, top, right, bottom) in zip(sample.masks, sample.boxes, strict=True):
                y, x = mask.nonzero(as_tuple=True)
                assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == (left, top, right, bottom)

    def test_tensor_holds_the_pixels(self) -> None:
        sample = sample_images()[0]
        x = sample.to_tensor()
        assert x.shape == (1, 3, 96, 96)
        assert x.dtype == torch.float32
        assert x[0, :, 7, 11].mul(255).round().int().tolist() == np.array(sample.image)[7, 11].tolist()

    def test_model_finds_every_digit(self, model: DemoNet) -> None:
        for sample in sample_images():
            found = predict(model, sample.to_tensor())[0].topk(len(sample.labels)).indices.tolist()
            assert sorted(found) == sorted(sample.labels), sample.name

    def test_first_sample_holds_two_digits(self) -> None:
        assert len(sample_images()[0].labels) == 2

    def test_every_file_is_listed(self) -> None:
        names = {sample.name for sample in sample_images()}
        expected = {f"{name}{end}" for name in names for end in (".png", "_mask.png")} | {"samples.json"}
        assert {path.name for path in (FOLDER / "samples").iterdir()} == expected

    def test_masks_are_palette_pictures(self) -> None:
        with Image.open(FOLDER / "samples" / "two_digits_mask.png") as mask:
            assert mask.mode == "P"
            assert np.unique(np.array(mask)).tolist() == [0, 1, 2]


class TestScenes:
    def test_shapes_and_ranges(self) -> None:
        scenes = make_scenes(70, num_digits=(0, 3), size=80, seed=1)
        assert len(scenes) == 70
        assert scenes.images.shape == (70, 3, 80, 80)
        assert scenes.labels.shape == (70, 3)
        assert scenes.masks.shape == (70, 3, 80, 80)
        assert scenes.boxes.shape == (70, 3, 4)
        assert scenes.images.min() >= 0
        assert scenes.images.max() <= 1
        levels = scenes.images * 255
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)

    def test_slots(self) -> None:
        scenes = make_scenes(100, num_digits=(0, 3), seed=2)
        used = scenes.labels >= 0
        assert torch.equal(used, scenes.masks.flatten(2).any(dim=2))
        assert torch.equal(used, (scenes.boxes[..., 2] > scenes.boxes[..., 0]))
        assert set(used.sum(dim=1).tolist()) == {0, 1, 2, 3}
        assert torch.equal(scenes.presence.sum(dim=1), used.sum(dim=1).float())  # the classes of a scene differ
        assert scenes.masks.sum(dim=1).max() == 1
        for k in range(3):
            rows = used[:, k]
            assert scenes.presence[rows, scenes.labels[rows, k]].all()

    def test_boxes_bound_the_masks(self) -> None:
        scenes = make_scenes(20, num_digits=3, seed=3)
        for mask, box in zip(scenes.masks.flatten(0, 1), scenes.boxes.flatten(0, 1).tolist(), strict=True):
            y, x = mask.nonzero(as_tuple=True)
            assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == box

    def test_all_classes_are_equally_likely(self, one: Scenes) -> None:
        counts = torch.bincount(one.labels[:, 0], minlength=10)
        assert counts.min() >= 12  # 30 expected
        assert counts.max() <= 50

    @pytest.mark.parametrize("warp", [0.0, 0.1])
    def test_digits_are_inside_their_masks_and_nowhere_else(self, warp: float) -> None:
        scenes = make_scenes(32, num_digits=(1, 3), warp=warp, seed=4)
        erased = make_scenes(32, num_digits=(1, 3), warp=warp, seed=4, erase=True)
        changed = (scenes.images != erased.images).any(dim=1)
        assert not (changed & ~scenes.masks.any(dim=1)).any()
        covered = (scenes.masks & changed[:, None]).sum(dim=(2, 3)) / scenes.masks.sum(dim=(2, 3)).clamp_min(1)
        assert covered[scenes.labels >= 0].min() > 0.4  # the masks are not much wider than the strokes
        for name in ("labels", "masks", "boxes"):
            assert torch.equal(getattr(scenes, name), getattr(erased, name))

    def test_same_seed_same_scenes(self) -> None:
        assert same(make_scenes(70, seed=7, warp=0.05), make_scenes(70, seed=7, warp=0.05))
        assert not torch.equal(make_scenes(3, seed=7).images, make_scenes(3, seed=8).images)

    def test_generator_moves_on(self) -> None:
        rng = np.random.default_rng(7)
        assert same(make_scenes(3, seed=rng), make_scenes(3, seed=7))
        assert not torch.equal(make_scenes(3, seed=rng).images, make_scenes(3, seed=7).images)

    def test_global_random_state_is_left_alone(self) -> None:
        python, numpy, pytorch = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
        make_scenes(3, warp=0.1)
        assert random.getstate() == python
        after = np.random.get_state(legacy=False)  # noqa: NPY002
        assert np.array_equal(after["state"]["key"], numpy["state"]["key"])
        assert after["state"]["pos"] == numpy["state"]["pos"]
        assert torch.equal(torch.get_rng_state(), pytorch)

    def test_splits_share_no_digit(self) -> None:
        train, train_classes = demo_data._load_handwriting("train")
        test, test_classes = demo_data._load_handwriting("test")
        assert (len(train), len(test)) == (len(train_classes), len(test_classes)) == (1415, 382)
        assert {tuple(digit.flatten().tolist()) for digit in train}.isdisjoint(
            {tuple(digit.flatten().tolist()) for digit in test}
        )
        # Every form begins with the digits in order, three times.
        assert test_classes[:30].tolist() == [*range(10)] * 3

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"num_scenes": 0}, "`num_scenes`"),
            ({"num_digits": 4}, "`num_digits`"),
            ({"num_digits": (2, 1)}, "`num_digits`"),
            ({"size": 8}, "`digit_size`"),
            ({"digit_size": (4, 20)}, "`digit_size`"),
            ({"warp": -0.1}, "`warp`"),
            ({"split": "valid"}, "`split`"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, object], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            make_scenes(**{"num_scenes": 1, **arguments})  # type: ignore[arg-type]

    def test_missing_scikit_learn_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        demo_data._load_handwriting.cache_clear()
        for name in ("sklearn", "sklearn.datasets"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r'pip install -e "\.\[demo\]"'):
            make_scenes(1)


def test_class_names() -> None:
    assert CLASS_NAMES == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_import_needs_neither_scikit_learn_nor_matplotlib() -> None:
    code = (
        "import sys; import torchcam.demo as demo; demo.load_model()(demo.sample_images()[0].to_tensor()); "
        "print({'sklearn', 'scipy', 'matplotlib', 'torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_scenes_of_any_size_have_digits_that_fit() -> None:
    """The default of `digit_size` grows with the images, and is 28 to 42 pixels for those of 96."""
    for size in (24, 48, 64, 128):
        scenes = make_scenes(3, size=size, seed=1)
        assert scenes.images.shape == (3, 3, size, size)
        assert scenes.masks.flatten(1).any(1).all()
    assert torch.equal(make_scenes(3, seed=1).images, make_scenes(3, seed=1, digit_size=(28.0, 42.0)).images)
