"""Why this box: models of ultralytics, which is AGPL and not in the extra `test`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchcam
from tests.detectors import noise_picture
from torchcam import cli
from torchcam.layout import Cells
from torchcam.methods import HiResCAM
from torchcam.targets import Box

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
os.environ["YOLO_CONFIG_DIR"] = str(Path(tempfile.gettempdir()) / "torchcam-ultralytics")
Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(exist_ok=True)
pytest.importorskip("ultralytics")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DENSE = ["yolov8n", "yolo11n", "yolo11n-seg", "yolo11n-pose"]
FINAL = ["yolo26n", "yolov10n", "yolo26n-seg", "yolo26n-pose"]
ASKED = {"conf": 0.05, "imgsz": 128, "max_det": 6, "verbose": False}


def yolo(name: str) -> Any:
    """Return a wrapper whose scores differ: random weights, with the statistics of noise in its norms."""
    import ultralytics

    ultralytics.settings.update({"sync": False})
    wrapper = (ultralytics.RTDETR if "rtdetr" in name else ultralytics.YOLO)(f"{name}.yaml")
    model = wrapper.model
    torch.manual_seed(0)
    for name_of_module, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "dfl" not in name_of_module:  # which holds the numbers of bins
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    if "rtdetr" in name:
        model.eval()
        for head in model.model[-1].dec_score_head:
            nn.init.normal_(head.weight, std=0.05)
            nn.init.zeros_(head.bias)
        return wrapper
    head = model.model[-1]
    for module in head.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:  # the last ones, of scores and of boxes
            module.weight.data *= 0.2
            nn.init.constant_(module.bias, -1 if module.out_channels == head.nc else 0)
    model.train()
    with torch.no_grad():
        model(torch.rand(4, 3, 128, 128))
    model.eval()
    return wrapper


def heads(output: Any) -> dict[str, Tensor]:
    """Return the raw rows that were decoded."""
    decoded, raw = output
    decoded = decoded[0] if isinstance(decoded, (tuple, list)) else decoded
    if "scores" in raw:
        return raw
    return raw["one2one" if decoded.shape[-1] != raw["one2many"]["scores"].shape[-1] else "one2many"]


@pytest.mark.parametrize("name", [*DENSE, *FINAL])
def test_boxes(name: str) -> None:
    """Each box is the one of the user's prediction; its map is that of the logit's gradient, in float64."""
    wrapper, picture = yolo(name), noise_picture(330, 150)
    before = wrapper.predict(picture, **ASKED)[0]
    count = len(before.boxes)
    assert count >= 2
    wrapper.model.double()
    explanation = torchcam.explain(wrapper, picture, box="all")
    found, request = explanation.detections, explanation._try_out
    torch.testing.assert_close(found.boxes, before.boxes.xyxy, rtol=1e-4, atol=0.05)
    assert found.labels.tolist() == before.boxes.cls.int().tolist()
    torch.testing.assert_close(found.scores, before.boxes.conf)
    assert explanation.image.size == (330, 150)
    assert explanation.name_of("box 0") == f"{before.names[int(before.boxes.cls[0])]}, box 0"
    layer = wrapper.model.get_submodule(explanation.target_layers[0])
    kept = []
    handle = layer.register_forward_hook(lambda _m, _a, output: kept.append(output))
    raw = heads(wrapper.model(request.image))
    handle.remove()
    rows = set()
    for key, target in list(request.targets.items())[:3]:
        number = found.explained[key]
        logit = raw["scores"][0, int(found.labels[number]), target.index]
        rows.add((target.index, target.label))
        assert logit.sigmoid().item() == pytest.approx(float(found.scores[number]), abs=1e-3)
        assert logit.item() == pytest.approx(explanation.scores[key], rel=1e-9)
        (gradient,) = torch.autograd.grad(logit, kept[0], retain_graph=True)
        expected = (gradient * kept[0]).sum(1)[0].relu()
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        torch.testing.assert_close(explanation.cams[key][0], expected.detach(), check_dtype=False)
    assert len(rows) == min(count, 3)


@pytest.mark.parametrize("size", [(330, 150), (90, 200), (64, 64), (517, 301)])
def test_the_map_lies_on_the_original_picture(size: tuple[int, int]) -> None:
    """The cells of the map, against what ultralytics makes of boxes in pixels of the input."""
    from ultralytics.utils import ops

    explanation = torchcam.explain(_shared(), noise_picture(*size), threshold=0.05)
    height, width = explanation.input_shape[2:]
    rows, columns = explanation.cams[next(iter(explanation.cams))][0].shape
    cells = Cells.of_grid((rows, columns), explanation.view).boxes[:, 1:] * torch.tensor([*size[::-1], *size[::-1]])
    for row in range(rows):
        for column in range(columns):
            box = torch.tensor([[column / columns, row / rows, (column + 1) / columns, (row + 1) / rows]])
            box = ops.scale_boxes((height, width), box * torch.tensor([width, height] * 2), size[::-1])[0]
            top, left, bottom, right = cells[row * columns + column].tolist()
            inside = [min(max(left, 0), size[0]), min(max(top, 0), size[1])]
            inside += [min(max(right, 0), size[0]), min(max(bottom, 0), size[1])]
            assert box.tolist() == pytest.approx(inside, abs=1.5)


_MODELS: dict[str, Any] = {}


def _shared(name: str = "yolov8n") -> Any:
    """A wrapper for tests that change nothing."""
    if name not in _MODELS:
        _MODELS[name] = yolo(name)
        _MODELS[name].overrides["imgsz"] = 128
    return _MODELS[name]


def test_no_trace(tmp_path: Path) -> None:
    """The user's next prediction is bit for bit the same; so are the head, the predictor and the threads."""
    wrapper, picture = yolo("yolov8n"), noise_picture(330, 150)
    path = tmp_path / "picture.png"
    picture.save(path)
    called = []
    wrapper.add_callback("on_predict_start", lambda _predictor: called.append(1))
    expected = wrapper.predict(path, **ASKED)[0]
    predictor, head = wrapper.predictor, wrapper.model.model[-1]
    attributes = {name: value for name, value in vars(head).items() if not name.startswith("_")}
    state = {name: value.clone() for name, value in wrapper.model.state_dict().items()}
    modes = [module.training for module in wrapper.model.modules()]
    asked, calls = dict(vars(predictor.args)), len(called)
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    first = torchcam.explain(wrapper, path, box=[0, 1])
    assert len(called) == calls
    assert wrapper.predictor is predictor
    assert vars(predictor.args) == asked
    assert vars(head).keys() >= attributes.keys()
    for name, value in attributes.items():
        assert getattr(head, name) is value
    assert all(torch.equal(value, state[name]) for name, value in wrapper.model.state_dict().items())
    assert [module.training for module in wrapper.model.modules()] == modes
    assert not any(module._forward_hooks for module in wrapper.model.modules())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), drawn)
    again = wrapper.predict(path, **ASKED)[0]
    assert torch.equal(again.boxes.data, expected.boxes.data)
    torch.testing.assert_close(first.detections.boxes, expected.boxes.xyxy)
    fresh = yolo("yolov8n")
    torchcam.explain(fresh, picture, threshold=0.05)
    assert fresh.predictor is None


def test_sides_masks_and_points() -> None:
    """The target of a mask, against ultralytics' own mask; of a point, against its confidence."""
    picture = noise_picture(330, 150)
    explanation = torchcam.explain(
        _shared("yolo11n-seg"), picture, box=[Box(0, "left"), Box(0, "bottom"), Box(0, "mask")], threshold=0.05
    )
    request, found = explanation._try_out, explanation.detections
    (decoded, protos), raw = request.model()(request.image)
    row = request.targets["box 0, mask"].index
    centre, half = decoded[0, :2, row], decoded[0, 2:4, row] / 2
    assert explanation.scores["box 0, left"] == pytest.approx((centre[0] - half[0]).item(), rel=1e-4)
    assert explanation.scores["box 0, bottom"] == pytest.approx((centre[1] + half[1]).item(), rel=1e-4)
    logits = (raw["mask_coefficient"][0, :, row, None, None] * protos[0]).sum(0)
    scale = request.image.shape[3] / protos.shape[3]
    rows, columns = torch.meshgrid(torch.arange(logits.shape[0]), torch.arange(logits.shape[1]), indexing="ij")
    left, top, right, bottom = (side / scale for side in [*(centre - half).tolist(), *(centre + half).tolist()])
    near = (columns + 1 > left) & (columns <= right) & (rows + 1 > top) & (rows <= bottom)
    expected = logits[near & (logits > 0)].sum()
    assert explanation.scores["box 0, mask"] == pytest.approx(expected.item(), rel=1e-4)
    assert found.explained == {"box 0, left": 0, "box 0, bottom": 0, "box 0, mask": 0}

    pose = torchcam.explain(_shared("yolo11n-pose"), picture, box=Box(0, keypoint=5), threshold=0.05)
    result = _shared("yolo11n-pose").predict(picture, **(ASKED | {"max_det": 300}))[0]
    score = torch.tensor(pose.scores["box 0, point 5"]).sigmoid()
    assert float(score) == pytest.approx(float(result.keypoints.conf[0, 5]), abs=1e-3)


def test_rt_detr() -> None:
    wrapper, picture = yolo("rtdetr-resnet50"), noise_picture(128, 64)
    wrapper.overrides["imgsz"] = 128
    explanation = torchcam.explain(wrapper, picture, box=[0, 1], threshold=0.001)
    result = wrapper.predict(picture, **(ASKED | {"conf": 0.001}))[0]
    torch.testing.assert_close(explanation.detections.boxes[:2], result.boxes.xyxy[:2], rtol=1e-4, atol=1e-2)
    for number in (0, 1):
        share = torch.tensor(explanation.scores[f"box {number}"]).sigmoid()
        assert float(share) == pytest.approx(float(result.boxes.conf[number]), rel=1e-3)
    assert explanation.view == (0, 0, 1, 1)
    assert explanation.cams["box 0"][0].max() == 1


def test_trust_and_other_methods() -> None:
    wrapper, picture = _shared(), noise_picture(128, 128)
    explanation = torchcam.explain(
        wrapper, picture, box=0, threshold=0.05, method=["HiResCAM", "LayerCAM", "EigenCAM", "GuidedBackprop"]
    )
    assert set(explanation.methods) == {"HiResCAM", "LayerCAM", "EigenCAM", "GuidedBackprop"}
    single = torchcam.explain(wrapper, picture, box=0, threshold=0.05)
    report = single.trust(methods=["HiResCAM"])
    assert report[0].probability == pytest.approx(single.scores["box 0"], rel=1e-3)
    assert {check.name for check in report[0].checks} >= {"diagnosis", "evidence"}


def test_in_ones_own_loop() -> None:
    wrapper, picture = _shared(), noise_picture(128, 128)
    explanation = torchcam.explain(wrapper, picture, box=0, threshold=0.05)
    target, image = explanation._try_out.targets["box 0"], explanation._try_out.image
    with HiResCAM(wrapper.model, explanation.target_layers[0]) as extractor:
        scores = wrapper.model(image)
        (cam,) = extractor(targets=Box(target.index, label=target.label), scores=scores)
    torch.testing.assert_close(cam[0], explanation.cams["box 0"][0])


def test_bad_input() -> None:
    wrapper, picture = _shared(), noise_picture(128, 128)
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ValueError, "`box` must lie between 0 and ", picture, {"box": 999, "threshold": 0.05}),
        (ValueError, "found no box", picture, {"box": 0, "threshold": 0.9999}),
        (TypeError, "must be an image for `box`", torch.rand(1, 3, 128, 128), {}),
        (ValueError, "`processor` is for transformers", picture, {"processor": lambda images: images}),
        (ValueError, "not both", picture, {"box": 0, "class_idx": 0}),
        (FileNotFoundError, "no file", "nothing.jpg", {}),
    ]
    for error, says, given, options in cases:
        with pytest.raises(error, match=says):
            torchcam.explain(wrapper, given, **options)
    classifier = yolo("yolo11n-cls")
    with pytest.raises(ValueError, match="its task is 'classify'"):
        torchcam.explain(classifier, Image.new("RGB", (64, 64)), box=0)
    with pytest.raises(TypeError, match="`box` asks about the boxes of a detector"):
        torchcam.explain(wrapper.model, picture, box=0)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "streets", raising=False)
    code = "from tests.test_boxes_yolo import yolo\n\n\ndef load():\n    wrapper = yolo('yolov8n')\n"
    (tmp_path / "streets.py").write_text(f"{code}    wrapper.overrides['imgsz'] = 128\n    return wrapper\n")
    noise_picture(128, 64).save("street.png")
    command = ["explain", "street.png", "--model-factory", "streets:load", "--box", "0", "--threshold", "0.05"]
    assert cli.main([*command, "--json"]) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    (box,) = image["classes"]
    (result,) = _shared().predict("street.png", **ASKED)
    assert box["box"] == pytest.approx(result.boxes.xyxy[0].tolist(), abs=0.05)
    assert box["detection_score"] == pytest.approx(float(result.boxes.conf[0]), abs=1e-4)
