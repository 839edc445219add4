"""`torchcam.export`: what a graph computes in each runtime, what is in its files, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchcam
from tests.models import GapNet, UNet, image, shuffled, split_net
from torchcam import methods
from torchcam._tensors import min_max
from torchcam.demo import load_model, sample_images
from torchcam.export import Exported, _shortcuts, export
from torchcam.export._exported import EXPORTABLE
from torchcam.export._operations import RULES, Rewritten

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

aten = torch.ops.aten
ARGUMENTS: dict[str, dict[str, Any]] = {
    "CAM": {"fc_layer": "fc"},
    "FinerCAM": {"gamma": 0.4, "num_references": 2},
    "EigenSmoothedCAM": {"base_method": methods.LayerCAM},
    "RefineCAM": {"base_method": methods.XGradCAM},
    "GradCAMpp": {"eps": 1e-6},
}
IN_ONNX_RUNTIME = {"CAM", "EigenGradCAM", "FinerCAM", "GradCAM", "GradCAMpp", "RefineCAM", "XGradCAM"}
IMAGES = image(2, 3, dtype=torch.float32)
CLASSES = torch.tensor([4, 0, 2])


def net(dim: int = 2, **options: Any) -> nn.Module:
    return split_net(dim, dtype=torch.float32, **options)


def run(path: Path, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Run a file in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
    scores, cam = session.run(["scores", "map"], feed)
    return torch.from_numpy(scores), torch.from_numpy(cam)


def expected(model: nn.Module, method: str, layer: Any, images: Tensor, classes: Any, **options: Any) -> Tensor:
    """What the extractor makes of the images: the fused map."""
    call = {name: options.pop(name) for name in ("eps", "relu", "normalized") if name in options}
    with getattr(methods, method)(model, layer, **options) as extractor, torch.inference_mode():
        scores = model(images)
        maps = extractor(None if extractor.class_agnostic else classes, scores, **call)
    return maps[0] if len(maps) == 1 else extractor.fuse_cams(maps)


def exported_net(**options: Any) -> Exported:
    return export(net(), "GradCAM", "second", example=IMAGES[:1], **options)


@pytest.fixture(scope="module")
def exported() -> Exported:
    return exported_net(class_names=["a", "b", "c", "d", "é"])


@pytest.fixture(scope="module")
def file(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.save(tmp_path_factory.mktemp("exported") / "new" / "model.onnx")


class TestMaps:
    @pytest.mark.parametrize("method", EXPORTABLE)
    def test_methods(self, method: str, tmp_path: Path) -> None:
        model = net(nonlinear_head=method != "CAM")
        layer = ["first", "second"] if method == "RefineCAM" else "second"
        options = ARGUMENTS.get(method, {})
        exported = export(model, method, layer, example=IMAGES[:2], method_kwargs=options)
        runners = [lambda images, classes: exported(images, None if agnostic else classes)]
        agnostic = getattr(methods, method).class_agnostic
        if method in IN_ONNX_RUNTIME:
            file = exported.save(tmp_path / "model.onnx")
            runners.append(lambda images, classes: run(file, images, *([] if agnostic else [classes])))
        for images, classes in ((IMAGES, CLASSES), (IMAGES[:1], CLASSES[:1])):
            wanted = expected(model, method, layer, images, classes, **options)
            assert wanted.amax() == 1
            for runner in runners:
                scores, cam = runner(images, classes)
                torch.testing.assert_close(scores, model(images).detach(), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(cam, wanted, rtol=0, atol=2e-5)
        assert exported.error <= 1e-5

    @pytest.mark.parametrize("dim", [1, 3])
    def test_signals_and_volumes(self, dim: int, tmp_path: Path) -> None:
        model, images = net(dim), image(dim, 2, dtype=torch.float32)
        file = export(model, "LayerCAM", "first", example=images).save(tmp_path / "model.onnx")
        _, cam = run(file, images, CLASSES[:2])
        torch.testing.assert_close(cam, expected(model, "LayerCAM", "first", images, CLASSES[:2]), rtol=0, atol=2e-5)

    def test_every_way_to_ask(self) -> None:
        model = net()
        exported = export(model, "GradCAM", ["first", "second"], example=IMAGES[:1], relu=False, normalized=False)
        with methods.GradCAM(model, ["first", "second"]) as extractor:
            extractor.model(IMAGES)
            maps = extractor(CLASSES, relu=False, normalized=False)
            fused = extractor.fuse_cams(maps)
        assert fused.amin() < 0
        torch.testing.assert_close(exported(IMAGES, CLASSES)[1], fused, rtol=1e-4, atol=1e-6)
        negative = export(model, "FinerCAM", "first", example=IMAGES[:1], relu="negative")
        wanted = expected(model, "FinerCAM", "first", IMAGES, 3, relu="negative")
        torch.testing.assert_close(negative(IMAGES, 3)[1], wanted, rtol=0, atol=2e-5)

    def test_top_class_inside(self, tmp_path: Path) -> None:
        model = load_model()
        batch = torch.cat([sample.to_tensor() for sample in sample_images()[:3]])
        exported = export(model, "GradCAM", "layer4", example=batch, top_class=True)
        scores, cam = run(exported.save(tmp_path / "model.onnx"), batch)
        assert len(set(scores.argmax(1).tolist())) > 1
        wanted = expected(model, "GradCAM", "layer4", batch, scores.argmax(1))
        torch.testing.assert_close(cam, wanted, rtol=0, atol=2e-5)

    def test_any_size(self, tmp_path: Path) -> None:
        model = load_model()
        batch = torch.cat([sample.to_tensor() for sample in sample_images()[:2]])
        file = export(model, "GradCAM", "layer3", example=batch[:1], dynamic_size=True).save(tmp_path / "model.onnx")
        images = F.interpolate(batch, (83, 130), mode="bilinear")
        wanted = expected(model, "GradCAM", "layer3", images, [6, 2])
        _, cam = run(file, images, torch.tensor([6, 2]))
        assert cam.shape == (2, 11, 17)
        torch.testing.assert_close(cam, wanted, rtol=0, atol=2e-5)

    def test_float16(self, tmp_path: Path) -> None:
        model = load_model()
        batch = torch.cat([sample.to_tensor() for sample in sample_images()[:3]])
        exported = export(load_model().half(), "GradCAMpp", "layer4", example=batch.half())
        file = exported.save(tmp_path / "model.onnx")
        scores, cam = run(file, batch.half(), torch.tensor([6, 2, 3]))
        assert scores.dtype == torch.float16
        assert cam.dtype == torch.float32
        wanted = expected(model, "GradCAMpp", "layer4", batch, [6, 2, 3])
        torch.testing.assert_close(cam, wanted, rtol=0, atol=2e-2)
        assert file.stat().st_size < 300_000  # weights of two bytes

    def test_scores_of_every_position(self) -> None:
        model = shuffled(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 3, padding=1)))
        exported = export(model, "HiResCAM", "1", example=IMAGES[:1])
        scores, cam = exported(IMAGES, CLASSES)
        assert torch.equal(scores, model(IMAGES))
        torch.testing.assert_close(cam, expected(model, "HiResCAM", "1", IMAGES, CLASSES), rtol=0, atol=2e-5)

    def test_sample_that_is_not_finite(self, exported: Exported, file: Path) -> None:
        images = IMAGES.clone()
        images[1, 0, 2, 3] = torch.nan
        images[2, 1, 0, 0] = torch.inf
        wanted = exported(IMAGES, CLASSES)[1][0]
        for scores, cam in (exported(images, CLASSES), run(file, images, CLASSES)):
            torch.testing.assert_close(cam[0], wanted, rtol=0, atol=2e-5)
            assert cam[1:].isnan().all()
            assert scores[1].isnan().all()

    def test_model_that_takes_nan(self) -> None:
        class Imputing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x.nan_to_num(0.0))

        model = Imputing().eval()
        images = IMAGES.clone()
        images[1, 0, 2, 3] = torch.nan
        exported = export(model, "GradCAM", "net.second", example=IMAGES[:1])
        wanted = expected(model, "GradCAM", "net.second", images, CLASSES)
        torch.testing.assert_close(exported(images, CLASSES)[1], wanted, rtol=0, atol=2e-5)

    def test_class_that_does_not_exist(self, exported: Exported, file: Path) -> None:
        _, cam = run(file, IMAGES, torch.tensor([5, 1, -1]))
        assert cam.isnan().flatten(1).all(1).tolist() == [True, False, True]
        with pytest.raises(ValueError, match="between 0 and 4"):
            exported(IMAGES, 5)
        with pytest.raises(ValueError, match="`classes` is missing"):
            exported(IMAGES)

    def test_output_that_a_hook_hands_on(self) -> None:
        """As models of transformers do: their decoders read what hooks have collected, set up in the first call."""
        seen: list[Tensor] = []

        class Collecting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
                self.head = nn.Linear(4, 5)
                self.collects = False

            def forward(self, x: Tensor) -> Tensor:
                if not self.collects:
                    self.first.register_forward_hook(lambda _layer, _args, output: seen.append(output))
                    self.collects = True
                seen.clear()
                deep = self.second(self.first(x).tanh())
                return self.head((deep + seen[0]).square().mean((2, 3)))

        model = shuffled(Collecting())
        exported = export(model, "LayerCAM", "first", example=IMAGES[:1])
        wanted = expected(model, "LayerCAM", "first", IMAGES, CLASSES)
        torch.testing.assert_close(exported(IMAGES, CLASSES)[1], wanted, rtol=0, atol=2e-5)

    def test_users_own_method(self) -> None:
        class SignCAM(methods.gradient._GradientCAM):
            @staticmethod
            def weights(activation: Tensor, gradient: Tensor) -> Tensor:
                return gradient.flatten(2).mean(-1).sign()

        model = net()
        with SignCAM(model, "second") as extractor:
            extractor.model(IMAGES)
            (wanted,) = extractor(CLASSES)
        exported = export(model, SignCAM, "second", example=IMAGES[:1])
        torch.testing.assert_close(exported(IMAGES, CLASSES)[1], wanted, rtol=0, atol=2e-5)

    def test_map_by_hand(self) -> None:
        """The logits are sums of a channel of the activation: the gradient of class k is 1 in channel k."""
        model = GapNet(channels=5)
        with torch.no_grad():
            model.fc.weight.copy_(torch.eye(5))
        exported = export(model, "HiResCAM", "features", example=IMAGES[:1])
        activation = model.features(IMAGES)
        wanted = min_max(torch.stack([activation[0, 4], activation[1, 0], activation[2, 2]]).detach())
        torch.testing.assert_close(exported(IMAGES, CLASSES)[1], wanted, rtol=0, atol=2e-5)


class TestFiles:
    def test_opens_without_torch_and_torchcam(self, exported: Exported, file: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "images.npy", IMAGES.numpy())
        code = f"""
import sys
for name in ("torch", "torchcam", "onnx", "onnxscript"):
    sys.modules[name] = None
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession({str(file)!r}, providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["torchcam"])
images = numpy.load({str(tmp_path / "images.npy")!r})
_, cam = session.run(None, {{"images": images, "classes": numpy.array([4, 0, 2])}})
print(json.dumps([about, cam.tolist(), [value.shape for value in session.get_inputs()]]))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        about, cam, shapes = json.loads(done.stdout)
        torch.testing.assert_close(torch.tensor(cam), exported(IMAGES, CLASSES)[1], rtol=0, atol=2e-5)
        assert about == exported.metadata
        assert about["class_names"] == ["a", "b", "c", "d", "é"]
        assert about["target_layers"] == ["second"]
        assert about["torchcam"] == torchcam.__version__
        assert shapes == [["batch", 3, 9, 11], ["batch"]]

    def test_exporting_twice_gives_the_same_bytes(self, exported: Exported, tmp_path: Path) -> None:
        second = exported_net(class_names=exported.metadata["class_names"])
        for suffix in (".onnx", ".pt2"):
            data = exported.save(tmp_path / "a" / f"model{suffix}").read_bytes()
            assert data == second.save(tmp_path / "b" / f"model{suffix}").read_bytes()
            for place in (str(Path(torchcam.__file__).parent), str(Path(torch.__file__).parent), str(tmp_path)):
                assert place.encode() not in data
            assert b".py" not in data

    def test_program_of_torch(self, exported: Exported, tmp_path: Path) -> None:
        file = exported.save(tmp_path / "model.pt2")
        extra = {"torchcam.json": ""}
        loaded = torch.export.load(file, extra_files=extra)
        assert json.loads(extra["torchcam.json"]) == exported.metadata
        scores, cam = loaded.module()(IMAGES, CLASSES)
        assert torch.equal(cam, exported(IMAGES, CLASSES)[1])
        assert torch.equal(scores, exported(IMAGES, CLASSES)[0])
        assert loaded.example_inputs is None

    def test_weights_beside_the_file(self, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torchcam.export._formats._LARGEST_FILE", 100)
        file = exported.save(tmp_path / "model.onnx")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
        torch.testing.assert_close(run(file, IMAGES, CLASSES)[1], exported(IMAGES, CLASSES)[1], rtol=0, atol=2e-5)

    def test_later_changes_of_the_model_do_not_count(self, tmp_path: Path) -> None:
        model = net()
        exported = export(model, "GradCAM", "second", example=IMAGES[:1])
        wanted = exported(IMAGES, CLASSES)[1]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(exported(IMAGES, CLASSES)[1], wanted)
        _, cam = run(exported.save(tmp_path / "model.onnx"), IMAGES, CLASSES)
        torch.testing.assert_close(cam, wanted, rtol=0, atol=2e-5)


def test_channels_that_are_last_between_convolutions() -> None:
    """What a rule returns is laid out otherwise than what was traced: a view of it takes a copy."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    torch.manual_seed(0)
    model = ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], num_classes=3).eval()
    assert export(model, "GradCAM", "features.1.0", example=torch.rand(2, 3, 32, 32)).error <= 1e-5


def test_what_onnx_has_is_not_written_out(tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3), nn.Hardswish())
    model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)])
    file = export(model.eval(), "GradCAM", "2", example=IMAGES[:1]).save(tmp_path / "model.onnx")
    assert sum(node.op_type == "HardSwish" for node in onnx.load(file).graph.node) == 2


class Deceptive(nn.Module):
    """Computes something else while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * 1.01 if torch.compiler.is_compiling() else x)


class Remembering(nn.Module):
    """Keeps what it has seen, as some models of timm do, in an attribute or in a buffer."""

    def __init__(self, in_buffer: bool) -> None:
        super().__init__()
        self.net = net()
        self.in_buffer = in_buffer
        self.register_buffer("calls", torch.zeros(()))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.in_buffer:
            self.calls += 1
        else:
            self.cache["last"] = x
        return self.net(x)


class Sampling(nn.Module):
    """Resamples its features by a rule that has no translation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        grid = F.affine_grid(torch.eye(2, 3).expand(x.shape[0], 2, 3), list(features.shape), align_corners=False)
        return self.fc(F.grid_sample(features, grid, align_corners=False).square().mean((2, 3)))


class TestPromises:
    @pytest.mark.parametrize("fails", [None, "attribute", "buffer"])
    def test_model_stays_as_it_was(self, fails: str | None) -> None:
        model = (net() if fails is None else Remembering(in_buffer=fails == "buffer")).train()
        before = copy.deepcopy(model.state_dict())
        with torch.random.fork_rng():
            state = torch.get_rng_state()
            if fails is None:
                export(model, "GradCAM", "second", example=IMAGES[:1])
            else:
                problem = {"buffer": "it changes its buffer 'model.calls'", "attribute": r"cache\['last'\]"}[fails]
                with pytest.raises(RuntimeError, match=f"Remembering cannot be traced: .*{problem}"):
                    export(model, "GradCAM", "net.second", example=IMAGES[:1])
                assert model.cache == {}
            assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert all(module.training and not module._forward_hooks for module in model.modules())
        assert torch.is_grad_enabled()
        assert not torch.compiler.is_compiling()

    def test_wrong_graph_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"the graph is not right: its (scores|maps) differ .* by \d\.\de-0\d"):
            export(Deceptive().eval(), "GradCAM", "net.second", example=IMAGES[:1])

    def test_wrong_file_is_not_written(
        self, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = tmp_path / "old.onnx"
        old.write_text("kept")

        def runner(_path: Path) -> Any:
            return lambda images, classes: (exported(images, classes)[0], exported(images, classes)[1] + 1e-3)

        monkeypatch.setattr("torchcam.export._formats.onnx_runner", runner)
        with pytest.raises(ValueError, match="its maps differ"):
            exported.save(old)
        assert [entry.name for entry in tmp_path.iterdir()] == ["old.onnx"]
        assert old.read_text() == "kept"

    def test_interrupt_leaves_no_file(
        self, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr("torchcam.export._formats.onnx_runner", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exported.save(tmp_path / "folder" / "model.onnx")
        assert not list(tmp_path.iterdir())


class TestRefusals:
    @pytest.mark.parametrize(
        "method", sorted(set(methods.__all__) - {*EXPORTABLE, "DeepFeatureFactorization", "OutputTarget"})
    )
    def test_methods(self, method: str) -> None:
        with pytest.raises(NotImplementedError, match=f"{method} cannot be exported.*GradCAM, GradCAMElementWise"):
            export(net(), method, "second", example=IMAGES[:1])

    def test_base_of_a_method(self) -> None:
        with pytest.raises(NotImplementedError, match="ScoreCAM cannot be exported"):
            export(net(), "FinerCAM", "second", example=IMAGES[:1], method_kwargs={"base_method": methods.ScoreCAM})

    def test_balanced_gradients(self) -> None:
        with pytest.raises(NotImplementedError, match="`gradients='balanced'` cannot be exported"):
            exported_net(method_kwargs={"gradients": "balanced"})

    def test_operation_without_translation(self) -> None:
        model = shuffled(Sampling())
        with pytest.raises(RuntimeError, match=r"holds aten\.grid_sampler_2d_backward.*`target_layer`"):
            export(model, "GradCAM", "features", example=IMAGES[:1])

    def test_maps_that_show_nothing(self) -> None:
        model = net()
        nn.init.zeros_(model.fc.weight)
        with pytest.raises(ValueError, match="the maps of `example` are zero everywhere"):
            export(model, "LayerCAM", "second", example=IMAGES[:1])

    def test_model_that_cannot_be_traced(self) -> None:
        class Branching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x if float(x.sum()) > 0 else -x)

        with pytest.raises(RuntimeError, match="Branching cannot be traced: "):
            export(Branching().eval(), "GradCAM", "net.second", example=IMAGES[:1])

    def test_sizes_that_the_model_fixes(self) -> None:
        class Flat(nn.Module):
            def __init__(self, batch: int | None = None) -> None:
                super().__init__()
                self.batch = batch
                self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())
                self.fc = nn.Linear(4 * 99, 5)

            def forward(self, x: Tensor) -> Tensor:
                features = self.features(x)
                rows = len(x) if self.batch is None else x.shape[0]
                return self.fc(features.reshape(rows, -1))

        with pytest.raises(ValueError, match=r"`dynamic_size`: Flat does not take images of \[41, 75\]"):
            export(shuffled(Flat(1)), "GradCAM", "features", example=IMAGES[:1], dynamic_size=True)
        model = shuffled(Flat())
        with pytest.raises(ValueError, match="`dynamic_batch=False`"):
            export(model, "GradCAM", "features", example=IMAGES[:1])
        fixed = export(model, "GradCAM", "features", example=IMAGES, dynamic_batch=False)
        wanted = expected(model, "GradCAM", "features", IMAGES, CLASSES)
        torch.testing.assert_close(fixed(IMAGES, CLASSES)[1], wanted, rtol=0, atol=2e-5)

    def test_arguments(self, exported: Exported, tmp_path: Path) -> None:
        model = net()
        with pytest.raises(TypeError, match="`example` must be a tensor"):
            export(model, example=[1])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`example` must be images"):
            export(model, example=torch.zeros(3, 4))
        with pytest.raises(TypeError, match="`model`"):
            export("resnet18", example=IMAGES)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'layer9' is not a module"):
            export(model, "GradCAM", "layer9", example=IMAGES)
        with pytest.raises(ValueError, match=r"must end with one of \.onnx, \.aoti\.pt2, \.pt2"):
            exported.save(tmp_path / "model.pb")

    def test_extra_and_version(self, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
        with pytest.raises(ImportError, match=r'onnxscript not installed: pip install -e "\.\[export\]" in a clone'):
            exported.save(tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
        with pytest.raises(RuntimeError, match=r"needs torch 2\.13 or newer, this is 2\.6\.0\+cpu"):
            exported_net()


def resized(mode: str, **options: Any) -> Any:
    return lambda x: F.interpolate(x, mode=mode, **options)


class TestOperations:
    """Each rule, beside what autograd computes, in float64."""

    @pytest.mark.parametrize(
        ("function", "shape"),
        [
            (lambda x: F.conv2d(x, WEIGHT, stride=2, padding=1), (2, 4, 9, 8)),
            (lambda x: F.conv2d(x, WEIGHT, stride=(3, 2), padding=(0, 2), dilation=2), (2, 4, 11, 12)),
            (lambda x: F.conv2d(x, WEIGHT[:, :2], stride=2, groups=2), (2, 4, 8, 8)),
            (lambda x: F.conv1d(x, WEIGHT[..., 0], stride=3), (2, 4, 12)),
            (lambda x: F.conv_transpose2d(x, WEIGHT, None, 2, 1, 1), (2, 4, 5, 6)),
            (lambda x: F.max_pool2d(x, 3, 2, 1), (2, 3, 9, 8)),
            (lambda x: F.max_pool2d(x, (2, 3), 1, ceil_mode=True), (2, 3, 6, 7)),
            (lambda x: F.max_pool1d(x, 3, 2), (2, 3, 9)),
            (lambda x: F.max_pool3d(x, 2), (2, 3, 4, 6, 4)),
            (lambda x: F.avg_pool2d(x, 3, 2, 1), (2, 3, 9, 8)),
            (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (2, 3, 9, 8)),
            (lambda x: F.avg_pool2d(x, (3, 2), (2, 3), ceil_mode=True), (2, 3, 8, 9)),
            (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (2, 3, 8, 8)),
            (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (2, 3, 6, 6)),
            (lambda x: F.avg_pool3d(x, 2), (2, 3, 4, 6, 4)),
            (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), (2, 3, 7, 9)),
            (lambda x: F.adaptive_avg_pool2d(x, 5), (2, 3, 3, 4)),
            (lambda x: F.adaptive_avg_pool3d(x, (2, 3, 2)), (2, 3, 5, 4, 3)),
            (resized("bilinear", size=(9, 5)), (2, 3, 4, 7)),
            (resized("bilinear", size=(9, 1), align_corners=True), (2, 3, 4, 7)),
            (resized("bilinear", scale_factor=1.7), (2, 3, 4, 7)),
            (resized("bilinear", scale_factor=1.7, recompute_scale_factor=True), (2, 3, 4, 7)),
            (resized("linear", scale_factor=0.4), (2, 3, 17)),
            (resized("trilinear", size=(3, 9, 5)), (2, 3, 4, 4, 4)),
            (resized("nearest", size=(9, 5)), (2, 3, 4, 7)),
            (resized("nearest", scale_factor=2), (2, 3, 4, 7)),
            (resized("nearest-exact", size=(9, 5)), (2, 3, 4, 7)),
            (lambda x: x.gather(1, torch.tensor([[0, 0, 2], [1, 1, 1]])), (2, 3)),
            (lambda x: x[:, [[0, -1], [2, 2]], :, [[1], [0]]], (2, 3, 4, 2)),
            (lambda x: x[:, [0, -1, 2, 2]], (2, 3, 4)),
        ],
    )
    def test_backward(self, function: Any, shape: tuple[int, ...]) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        gradient = torch.randn(function(x).shape, generator=generator, dtype=torch.float64)

        def backward(x: Tensor, gradient: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(function(x), x, gradient)[0]

        with Rewritten():
            graph = make_fx(backward, decomposition_table=RULES)(x, gradient)
            rewritten = function(x.clone().requires_grad_())
        torch.testing.assert_close(rewritten, function(x), rtol=1e-12, atol=1e-12)
        left = [str(node.target) for node in graph.graph.nodes if "backward" in str(node.target)]
        assert not left
        torch.testing.assert_close(graph(x, gradient), backward(x, gradient), rtol=1e-12, atol=1e-12)

    def test_sizes_that_are_not_known(self, tmp_path: Path) -> None:
        """Strides that skip positions become ranges of sizes that ONNX does not infer: they have no name in common."""

        class Skipping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.features, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.features(x)[..., ::2, ::2].square()[..., ::2, ::2].mean((2, 3)))

        model = shuffled(Skipping())
        file = export(model, "LayerCAM", "features", example=IMAGES[:1]).save(tmp_path / "model.onnx")
        _, cam = run(file, IMAGES, CLASSES)
        torch.testing.assert_close(cam, expected(model, "LayerCAM", "features", IMAGES, CLASSES), rtol=0, atol=2e-5)

    def test_sums_in_float16(self) -> None:
        rule = RULES[aten.scatter_add.default]
        index = torch.tensor([[0, 0, 2]])
        found = rule(torch.zeros(1, 3, dtype=torch.float16), 1, index, torch.ones(1, 3, dtype=torch.float16))
        assert torch.equal(found, torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float16))
        assert rule(torch.zeros(1, 3), 1, index, torch.ones(1, 3)) is NotImplemented

    @pytest.mark.parametrize("inplace", [True, False])
    def test_silu_behind_the_layer(self, inplace: bool, tmp_path: Path) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = self.first(x)
                activated = self.second(F.silu(x, inplace=inplace))
                return self.head(activated.mean((2, 3)) + x.mean((2, 3)))  # in place, `x` is what is activated

        model = shuffled(Gated())
        file = export(model, "LayerCAM", "first", example=IMAGES[:1]).save(tmp_path / "model.onnx")
        scores, cam = run(file, IMAGES, CLASSES)
        torch.testing.assert_close(scores, model(IMAGES).detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cam, expected(model, "LayerCAM", "first", IMAGES, CLASSES), rtol=0, atol=2e-5)

    def test_functions_that_choose_another(self) -> None:
        """A maximum is taken with or without its indices: torch hands the choice to modes, and then what it chose."""
        layers = [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.SELU(), nn.Flatten(), nn.Linear(48, 5)]
        model = shuffled(nn.Sequential(*layers))
        exported = export(model, "GradCAM", "0", example=IMAGES[:1])
        wanted = expected(model, "GradCAM", "0", IMAGES, CLASSES)
        torch.testing.assert_close(exported(IMAGES, CLASSES)[1], wanted, rtol=0, atol=2e-5)

    def test_resized_logits(self, tmp_path: Path) -> None:
        """ONNX Runtime adds on several threads what has the same index: gradients must not be sums of that kind."""
        import onnx

        class Segmenter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.features = nn.Conv2d(3, 4, 3, stride=2, padding=1)
                self.head = nn.Conv2d(4, 5, 1)

            def forward(self, x: Tensor) -> Tensor:
                features = self.features(x)[:, [0, 3, 1, 1]]
                return F.interpolate(self.head(features), size=x.shape[2:], mode="bilinear")

        model = shuffled(Segmenter())
        file = export(model, "LayerCAM", "features", example=IMAGES[:1]).save(tmp_path / "model.onnx")
        _, cam = run(file, IMAGES, CLASSES)
        torch.testing.assert_close(cam, expected(model, "LayerCAM", "features", IMAGES, CLASSES), rtol=0, atol=2e-5)
        assert not [node for node in onnx.load(file).graph.node if node.op_type == "ScatterND"]

    @pytest.mark.parametrize("join", ["cat", "add"])
    def test_connections_around_the_middle(self, join: str, tmp_path: Path) -> None:
        model = shuffled(UNet(join))
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        exported = export(model, "LayerCAM", "encoder", example=images)
        wanted = expected(model, "LayerCAM", "encoder", images, 1)
        torch.testing.assert_close(exported(images, 1)[1], wanted, rtol=0, atol=2e-5)


def position(index: int) -> Any:
    """What a class token goes through: norm, an MLP, attention, a residual; then one token of five is taken."""

    def block(x: Tensor, weight: Tensor) -> Tensor:
        tokens = F.layer_norm(x.transpose(0, 1), (6,)).reshape(-1, 6) @ weight[:18].reshape(6, 3)
        query, key, value = (tokens * scale for scale in (1.0, 0.5, 2.0))
        heads = [one.reshape(5, -1, 3).transpose(0, 1) for one in (query, key, value)]
        mixed = torch.softmax(heads[0] @ heads[1].transpose(1, 2), -1) @ heads[2]
        x = x + F.pad(mixed, (0, 3))
        hidden = F.relu(F.gelu(x.flatten(0, 1) @ weight[:48].reshape(6, 8)) - 0.1).unflatten(0, (-1, 5))
        x = x + (hidden @ weight[48:96].reshape(8, 6)) / x.square().sum(-1, keepdim=True)
        return x[:, index]

    return block


class TestShortcuts:
    """What is left out of a graph, beside what autograd computes, in float64."""

    @pytest.mark.parametrize(
        ("function", "shape"),
        [
            (position(0), (2, 5, 6)),
            (position(-2), (3, 5, 6)),
            (lambda x, _: x.tanh()[..., -1], (2, 3, 7)),
            (
                lambda x, _: (x * x.sum(-2, keepdim=True)).unsqueeze(1).expand(-1, 4, -1, -1)[:, :, 1].square(),
                (2, 3, 7),
            ),
            (lambda x, w: x.reshape(-1, 2, 3).permute(2, 0, 1)[1] @ w[:6].reshape(2, 3), (4, 6)),
            (lambda x, _: torch.stack([x.unbind(1)[1], x.exp()[:, 1] + x[:, 0]]), (2, 3, 4)),
            (lambda x, _: x[:, 0, None].squeeze(1), (2, 1, 4)),
            (lambda x, _: x.sigmoid().mean((2, 3)), (2, 3, 4, 5)),
            (lambda x, _: x.mean((1, 2), keepdim=True), (2, 3, 4, 5)),
            (lambda x, _: x.mean((1, 2)).exp(), (2, 3, 4)),
        ],
    )
    @pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
    def test_backward(self, function: Any, shape: tuple[int, ...], tracing_mode: str) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight = WEIGHT.flatten()
        gradient = torch.randn(function(x, weight).shape, generator=generator, dtype=torch.float64)

        def backward(x: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                found = torch.autograd.grad(function(x, weight), x, gradient)[0]
            return found, found.mean(tuple(range(1, found.ndim)))

        table = {**torch.export.default_decompositions(), **RULES}
        kept = {operation: rule for operation, rule in table.items() if operation not in _shortcuts.KEPT}
        graph = make_fx(backward, decomposition_table=kept, tracing_mode=tracing_mode)(x, gradient, weight)
        _shortcuts.shorten(graph.graph)
        graph.recompile()
        assert not [node for node in graph.graph.nodes if "select_backward" in str(node.target)]
        for found, wanted in zip(graph(x, gradient, weight), backward(x, gradient, weight), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    def test_one_token_of_a_vision_transformer(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode
        from torchvision.models import VisionTransformer

        dim, tokens, side = 8, 10, 12
        model = shuffled(VisionTransformer(side, 4, 2, 2, dim, 4 * dim, num_classes=5)).float()
        images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        exported = export(model, "GradCAM", "encoder.layers.encoder_layer_1.ln_1", example=images)
        forward = export(model, "MeanActivation", "encoder.layers.encoder_layer_1.ln_1", example=images)
        with FlopCounterMode(display=False) as plain:
            forward.program.module()(images)
        with FlopCounterMode(display=False) as explained:
            exported.program.module()(images, CLASSES[:1])
        one_token = 2 * (4 * dim * dim) * 2 + 2 * dim * dim  # the MLP, and what follows attention
        attention = 4 * 2 * tokens * dim + 2 * tokens * 3 * dim * dim
        assert explained.get_total_flops() == plain.get_total_flops() + one_token + attention

    def test_weights_of_a_class_are_read(self) -> None:
        exported = export(GapNet(), "GradCAM", "features", example=IMAGES[:1])
        targets = [node.target for node in exported.program.graph.nodes]
        assert aten.index_select.default in targets
        assert targets.count(aten.mm.default) == 1  # the look at the images


def test_compiled() -> None:
    model = net()
    compiled = torch.compile(exported_net().program.module(), backend="aot_eager", fullgraph=True)
    _, cam = compiled(IMAGES, CLASSES)
    torch.testing.assert_close(cam, expected(model, "GradCAM", "second", IMAGES, CLASSES), rtol=0, atol=2e-5)

    def explained(images: Tensor) -> Tensor:
        with methods.GradCAM(model, "second") as extractor:
            return extractor(0, extractor.model(images))[0]

    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(explained, backend="eager", fullgraph=True)(IMAGES)


WEIGHT = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
