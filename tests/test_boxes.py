"""Why this box: targets of rows, and detectors of torchvision and transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchcam
from tests.detectors import bright_picture, bright_retinanet, detr_family, faster_rcnn, noise_picture
from torchcam._views import FULL
from torchcam.methods import AblationCAM, HiResCAM
from torchcam.targets import Box
from torchcam.utils import on_picture

FAMILIES = [
    "Detr",
    "ConditionalDetr",
    "DeformableDetr",
    "DeformableDetr, two stages",
    "RTDetr",
    "RTDetrV2",
    "DFine",
    "Yolos",
]


def drawn(explanation: Any, key: str) -> Any:
    """A map as it lies on the picture, in its pixels."""
    from torchcam.layout import Cells

    values = explanation.results[explanation.method].values(key)
    return on_picture(values, Cells.of_grid(values.shape, explanation.view), explanation.image.size)


def peak(values: Any) -> tuple[int, int]:
    row, column = np.unravel_index(np.nanargmax(values), values.shape)
    return int(column), int(row)


# Box, on outputs written by hand.


FINAL = {
    "boxes": torch.tensor([[0.0, 0, 4, 4], [10, 10, 20, 30], [11, 11, 20, 30]]),
    "labels": torch.tensor([1, 2, 1]),
    "scores": torch.tensor([0.9, 0.8, 0.7]),
    "keypoints_scores": torch.tensor([[1.0, 2], [3, 4], [5, 6]]),
    "masks": torch.tensor([[[[0.25, 0.75]]], [[[1.0, 0.625]]], [[[0.0, 0.0]]]]),
}
DETR = {
    "logits": torch.tensor([[1.0, 5, 2], [7, 3, 4]]),
    "pred_boxes": torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.25, 0.5, 0.5]]),
}


class TestBox:
    def test_of_torchvision(self) -> None:
        assert Box(1)(FINAL) == torch.tensor(0.8)
        assert [float(Box(1, side)(FINAL)) for side in ("left", "top", "right", "bottom")] == [10, 10, 20, 30]
        assert Box(1, keypoint=0)(FINAL) == 3
        assert Box(1, "mask")(FINAL) == 1.625
        assert Box(0, "mask")(FINAL) == 0.75

    def test_near_follows_a_box_of_the_class(self) -> None:
        near = torch.tensor([10.0, 10, 20, 30])
        assert Box(0, label=2, near=near)(FINAL) == torch.tensor(0.8)
        assert Box(0, label=1, near=near)(FINAL) == torch.tensor(0.7)
        far = Box(0, label=2, near=torch.tensor([100.0, 100, 120, 130]))
        assert far(FINAL) == 0
        nothing = {"boxes": torch.zeros(0, 4, requires_grad=True), "labels": torch.zeros(0).long()}
        score = far({**nothing, "scores": torch.zeros(0, requires_grad=True)})
        assert score == 0
        assert score.requires_grad

    def test_of_transformers(self) -> None:
        assert Box(0)(DETR) == 5
        assert Box(1)(DETR) == 7
        assert Box(1, label=2)(DETR) == 4
        sides = [float(Box(0, side)(DETR)) for side in ("left", "top", "right", "bottom")]
        assert sides == [0.25, 0.375, 0.75, 0.625]
        assert Box(0, near=torch.tensor([0.0, 0, 0.5, 0.5]))(DETR) == 7

    def test_of_ultralytics(self) -> None:
        """Two classes, three rows; centres and sizes; the second head was decoded."""
        logits = torch.tensor([[0.0, 1, 2], [3, -1, 0]])
        boxes = torch.tensor([[10.0, 20, 30], [10, 10, 10], [4, 4, 4], [2, 2, 2]])
        decoded = torch.cat([boxes, logits.sigmoid()])
        heads = {"one2many": {"scores": logits + 1}, "one2one": {"scores": logits}}
        assert Box(0)((decoded, heads)) == 3
        assert Box(2, label=1)((decoded, heads)) == 0
        assert [float(Box(1, side)((decoded, heads))) for side in ("left", "bottom")] == [18, 11]
        with pytest.raises(ValueError, match="none of the model's heads"):
            Box(0)((decoded, {"scores": logits + 1}))

    def test_of_ultralytics_after_the_choice(self) -> None:
        logits = torch.tensor([[0.0, 1, 2], [3, -1, 0]])
        ranked = torch.tensor([[1.0, 2, 3, 4, float(torch.tensor(3.0).sigmoid()), 1], [5, 6, 7, 8, 0.5, 0]])
        heads = {"one2many": {"scores": logits + 1}, "one2one": {"scores": logits}}
        assert Box(0)((ranked, heads)) == 3
        assert Box(0, "right")((ranked, heads)) == 3
        assert Box(0, "top", label=0)((ranked, heads)) == 6

    def test_of_rt_detr_of_ultralytics(self) -> None:
        ranked = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.75, 2], [0.25, 0.25, 0.25, 0.25, 0.5, 1]])
        assert Box(0)((ranked, (None,))) == pytest.approx(float(torch.tensor(0.75).logit()))
        near = torch.tensor([0.25, 0.25, 0.75, 0.75])
        assert Box(1, label=1, near=near)((ranked, (None,))) == 0

    @pytest.mark.parametrize(
        ("make", "error", "says"),
        [
            (lambda: Box("0"), TypeError, "`index`"),
            (lambda: Box(-1), ValueError, "`index`"),
            (lambda: Box(0, "up"), ValueError, "`side` must be one of 'left'"),
            (lambda: Box(0, "left", 1), ValueError, "`side`"),
            (lambda: Box(3)(FINAL), ValueError, "`index` must lie between 0 and 2"),
            (lambda: Box(0, label=3)(DETR), ValueError, "`label` must lie between 0 and 2"),
            (lambda: Box(0, "mask")(DETR), ValueError, "makes no masks"),
            (lambda: Box(0, keypoint=0)(DETR), ValueError, "`keypoint`"),
            (lambda: Box(0, keypoint=2)(FINAL), ValueError, "`keypoint` must lie between 0 and 1"),
            (lambda: Box(0)(torch.zeros(3)), TypeError, "no boxes are found"),
        ],
    )
    def test_bad_input(self, make: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=says):
            make()


# Where the map lies: a detector that finds what is white.

PICTURES = {  # the size of a picture, and what is white in it
    "wide": ((200, 60), (136, 16, 156, 36)),
    "tall": ((60, 200), (20, 150, 40, 170)),
    "square": ((90, 90), (8, 60, 28, 80)),
    "large": ((700, 310), (500, 50, 580, 130)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_box_and_map_lie_on_the_object(name: str) -> None:
    size, place = PICTURES[name]
    explanation = torchcam.explain(bright_retinanet(), bright_picture(*size, place))
    (key,) = explanation.cams
    found = explanation.detections
    assert explanation.image.size == size
    assert found.labels[found.explained[key]] == 1
    left, top, right, bottom = place
    boxes = found.boxes[found.explained[key]]
    assert (boxes[0] < right) & (boxes[2] > left) & (boxes[1] < bottom) & (boxes[3] > top)
    values = drawn(explanation, key)
    assert values.shape == size[::-1]
    x, y = peak(values)
    assert left - 4 <= x <= right + 4
    assert top - 4 <= y <= bottom + 4
    inside = np.nan_to_num(values)[top:bottom, left:right].sum()
    assert inside > 0.3 * np.nan_to_num(values).clip(0).sum()


def test_padding_of_torchvision_is_no_part_of_the_picture() -> None:
    """200 × 60 pixels become 256 × 77, padded to 256 × 96: the map covers a quarter more than the picture."""
    explanation = torchcam.explain(bright_retinanet(), bright_picture(200, 60, (136, 16, 156, 36)))
    assert explanation.view == pytest.approx((0, 0, 96 / 76, 1), abs=0.02)
    as_tensor = torch.zeros(1, 3, 60, 200)
    as_tensor[:, :, 16:36, 136:156] = 1
    same = torchcam.explain(bright_retinanet(), as_tensor)
    assert same.view == explanation.view
    torch.testing.assert_close(same.cams["box 0"][0], explanation.cams["box 0"][0])


def test_the_box_is_drawn() -> None:
    explanation = torchcam.explain(bright_retinanet(), bright_picture(300, 300, (96, 200, 160, 264)))
    (key,) = explanation.cams
    left, top, right, _ = explanation.detections.boxes[explanation.detections.explained[key]].round().int().tolist()
    picture = np.asarray(explanation.overlay(alpha=0))
    middle = (left + right) // 2
    strip = picture[max(top - 1, 0) : top + 4, middle]
    assert (strip == 255).all(-1).any()
    assert (strip == 0).all(-1).any()
    assert (np.asarray(explanation.overlay())[:60, :60] == 0).all()


def test_on_the_models_view_the_box_lies_as_well() -> None:
    """Where the model sees the left half of a picture, what is at 25 % of it is at 50 % of the view."""
    from torchcam._detections import Detections

    found = Detections(torch.tensor([[20.0, 20, 40, 60]]), torch.tensor([1]), torch.tensor([0.5]), (160, 80))
    black = Image.new("RGB", (80, 80))
    picture = np.asarray(found.drawn(black, None, (0, 0, 1, 0.5), (0, 0, 1, 1)))
    assert not picture.any()  # no box is explained
    found = Detections(*(vars(found)[name] for name in ("boxes", "labels", "scores", "size")), explained={"box 0": 0})
    picture = np.asarray(found.drawn(black, "box 0", (0, 0, 1, 0.5), (0, 0, 1, 1)))
    rows, columns = np.nonzero(picture.any(-1))
    assert (columns.min(), columns.max()) == (21, 39)  # within a line of black
    assert (rows.min(), rows.max()) == (21, 59)


def test_a_box_as_thin_as_a_line_is_drawn() -> None:
    from torchcam._detections import Detections

    boxes, labels, scores = torch.tensor([[20.0, 20, 20.5, 60]]), torch.tensor([1]), torch.tensor([0.5])
    found = Detections(boxes, labels, scores, (80, 80), explained={"box 0": 0})
    rows, columns = np.nonzero(np.asarray(found.drawn(Image.new("RGB", (80, 80)), "box 0", FULL, FULL)).any(-1))
    assert (rows.min(), rows.max()) == (21, 59)
    assert 20 <= columns.min() <= columns.max() <= 22


def test_all_boxes_in_one_call(tmp_path: Path) -> None:
    picture = bright_picture(200, 100, (24, 40, 40, 56))
    picture.paste("grey", (152, 48, 168, 64))
    picture.paste("#c0c0c0", (88, 8, 104, 24))
    model = bright_retinanet()
    explanation = torchcam.explain(model, picture, box="all", threshold=0.4, class_names=["nothing", "lamp"])
    found = explanation.detections
    assert len(explanation.cams) == len(found) >= 3
    assert (found.scores >= 0.4).all()
    for key, number in found.explained.items():
        left, top, right, bottom = found.boxes[number].tolist()
        x, y = peak(drawn(explanation, key))
        assert left - 8 <= x <= right + 8
        assert top - 8 <= y <= bottom + 8
        single = torchcam.explain(model, picture, box=number, threshold=0.4)
        assert torch.equal(single.cams[key][0], explanation.cams[key][0])
    first = f"box {int(found.scores.argmax())}"
    assert explanation.name_of(first) == f"lamp, {first}"
    assert explanation.value_of(first) == f"{found.scores.max():.1%}"
    explanation.save(tmp_path / "maps")
    manifest = json.loads((tmp_path / "maps" / "manifest.json").read_text())
    entry = manifest["classes"][first]
    assert entry["class_name"] == "lamp"
    assert entry["box"] == pytest.approx(found.boxes[found.explained[first]].tolist(), abs=1e-3)
    assert entry["detection_score"] == pytest.approx(float(found.scores.max()))
    assert explanation.to_html().count(first) > 0
    explanation.plot()


def test_a_box_as_another_class() -> None:
    """The score of the row for the class that is named, beside that of its own."""
    pytest.importorskip("transformers")
    model, processor = detr_family("Detr")
    boxes = [Box(0), Box(0, label=4)]
    explanation = torchcam.explain(model, noise_picture(220, 120), box=boxes, processor=processor, threshold=0.0)
    assert list(explanation.cams) == ["box 0", "box 0, as class 4"]
    with torch.no_grad():
        output = model(explanation._try_out.image)
    row = explanation._try_out.targets["box 0"].index
    assert explanation.scores["box 0, as class 4"] == pytest.approx(output.logits[0, row, 4].item(), rel=1e-5)


def test_a_list_of_pictures() -> None:
    pictures = [bright_picture(*size, place) for size, place in PICTURES.values()]
    several = torchcam.explain(bright_retinanet(), pictures)
    assert [one.image.size for one in several] == [size for size, _ in PICTURES.values()]
    one = torchcam.explain(bright_retinanet(), pictures[1])
    assert torch.equal(several[1].cams["box 0"][0], one.cams["box 0"][0])


def test_trust() -> None:
    explanation = torchcam.explain(bright_retinanet(), bright_picture(96, 96, (24, 40, 48, 64)), box=0)
    report = explanation.trust()
    assert report[0].target is not None
    assert report[0].probability == pytest.approx(explanation.scores["box 0"])
    outcomes = {check.name: check.outcome for check in report[0].checks}
    assert outcomes["evidence"] == "passed"
    assert outcomes["removal"] == "passed"


def test_ablation_on_faster_rcnn_against_ablation_by_hand() -> None:
    model, picture = faster_rcnn(), noise_picture(96, 64)
    explanation = torchcam.explain(model, picture, box=0, method=AblationCAM, target_layer="backbone.body")
    target = explanation._try_out.targets["box 0"]
    tensor = explanation._try_out.image
    layer = model.backbone.body
    with torch.no_grad():
        activation = layer(model.transform(list(tensor))[0].tensors)[0]
        whole = target(model(tensor)[0])
        assert whole == model(tensor)[0]["scores"][0]
        weights = []
        for channel in range(len(activation)):

            def without(_module: nn.Module, _args: Any, output: Tensor, channel: int = channel) -> Tensor:
                output[:, channel] = 0
                return output

            handle = layer.register_forward_hook(without)
            weights.append((whole - target(model(tensor)[0])) / whole.abs())
            handle.remove()
    raw = (torch.stack(weights)[:, None, None] * activation).sum(0).relu()
    expected = (raw - raw.min()) / (raw.max() - raw.min())
    torch.testing.assert_close(explanation.cams["box 0"][0], expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_torchvision_is_that_of_the_final_score() -> None:
    model, picture = faster_rcnn().double(), noise_picture(96, 64)
    explanation = torchcam.explain(model, picture, box=1)
    target_layer = model.get_submodule(explanation.target_layers[0])
    kept = []
    handle = target_layer.register_forward_hook(lambda _m, _a, output: kept.append(output["0"]))
    (found,) = model(explanation._try_out.image)
    handle.remove()
    (gradient,) = torch.autograd.grad(found["scores"][1], kept[0])
    raw = (gradient * kept[0]).sum(1)[0].relu()
    expected = (raw - raw.min()) / (raw.max() - raw.min())
    torch.testing.assert_close(explanation.cams["box 1"][0], expected.detach(), check_dtype=False)


# DETR and its relatives.


@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_of_transformers(name: str) -> None:
    """Each box is found by its values, and its map is that of the gradient of the query's logit, in float64."""
    pytest.importorskip("transformers")
    model, processor = detr_family(name)
    model = model.double()
    picture = noise_picture(220, 120)
    explanation = torchcam.explain(model, picture, box=[0, 1, 2], processor=processor, threshold=0.0)
    found, request = explanation.detections, explanation._try_out
    layer = model.get_submodule(explanation.target_layers[0])
    kept = []
    handle = layer.register_forward_hook(lambda _m, _a, output: kept.append(output))
    output = model(request.image)
    handle.remove()
    inputs = processor(images=[picture], return_tensors="pt")
    torch.testing.assert_close(request.image, inputs["pixel_values"].double())
    (answer,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(120, 220)])
    torch.testing.assert_close(found.boxes, answer["boxes"].detach())
    used = set()
    for number in range(3):
        target = request.targets[f"box {number}"]
        row, label = target.index, int(answer["labels"][number])
        used.add((row, label))
        centre, size = output.pred_boxes[0, row, :2], output.pred_boxes[0, row, 2:]
        box = torch.cat([centre - size / 2, centre + size / 2]) * torch.tensor([220, 120, 220, 120])
        torch.testing.assert_close(box.float(), answer["boxes"][number].float(), rtol=1e-4, atol=1e-3)
        logit = output.logits[0, row, label]
        assert logit.item() == pytest.approx(explanation.scores[f"box {number}"], rel=1e-9)
        (gradient,) = torch.autograd.grad(logit, kept[0], retain_graph=True)
        raw = (gradient * kept[0]).sum(1)[0].relu()
        expected = (raw - raw.min()) / (raw.max() - raw.min())
        torch.testing.assert_close(explanation.cams[f"box {number}"][0], expected.detach(), check_dtype=False)
    assert len(used) == 3


def test_queries_with_the_same_values_are_taken_in_their_order() -> None:
    pytest.importorskip("transformers")
    model, processor = detr_family("Detr")
    model.model.query_position_embeddings.weight.data[3] = model.model.query_position_embeddings.weight.data[1]
    explanation = torchcam.explain(model, noise_picture(220, 120), box="all", processor=processor, threshold=0.0)
    rows = [target.index for target in explanation._try_out.targets.values()]
    assert rows == list(range(7))
    assert torch.equal(explanation.detections.boxes[1], explanation.detections.boxes[3])


SEEN = {
    "wide": ((240, 100), (168, 30, 198, 60), {}),
    "tall": ((100, 240), (20, 180, 50, 210), {}),
    "padded": ((240, 100), (168, 30, 198, 60), {"pad_size": {"height": 640, "width": 704}}),
}


@pytest.mark.parametrize(
    ("kind", "name"), [("Detr", "wide"), ("Detr", "tall"), ("Detr", "padded"), ("RTDetr", "wide"), ("RTDetr", "tall")]
)
def test_maps_of_transformers_lie_on_the_picture(kind: str, name: str) -> None:
    """All convolutions of the backbone are averages, so what is white is where the activation is."""
    pytest.importorskip("transformers")
    size, place, options = SEEN[name]
    if kind == "Detr":
        options = {**options, "size": {"shortest_edge": 320, "longest_edge": 640}}  # a grid of 20 positions
    model, processor = detr_family(kind, do_normalize=False, **options)
    for parameter_name, parameter in model.named_parameters():
        if ("backbone" in parameter_name or "input_proj" in parameter_name) and parameter.ndim > 1:
            nn.init.constant_(parameter, 1 / parameter[0].numel())
    explanation = torchcam.explain(
        model, bright_picture(*size, place), box=0, processor=processor, threshold=0.0, method="MeanActivation"
    )
    values = drawn(explanation, "box 0")
    assert values.shape == size[::-1]
    x, y = peak(values)
    left, top, right, bottom = place
    assert left - 12 <= x <= right + 12
    assert top - 12 <= y <= bottom + 12


# What must not happen.


def test_no_trace() -> None:
    model = faster_rcnn()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    (expected,) = model(x)
    torchcam.explain(model, noise_picture(96, 64), box="all")
    (again,) = model(x)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="`box` must lie"):
        torchcam.explain(model, noise_picture(96, 64), box=99)
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input() -> None:
    model, picture = bright_retinanet(), bright_picture(200, 60, (136, 16, 156, 36))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    cases: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
        (ValueError, "`box` must lie between 0 and ", model, picture, {"box": 99}),
        (ValueError, "`box` must lie between 0 and ", model, picture, {"box": Box(99)}),
        (ValueError, "`box` must lie between 0 and ", model, picture, {"box": -1}),
        (TypeError, "`box` must be the number", model, picture, {"box": "first"}),
        (TypeError, "`box` must be the number", model, picture, {"box": True}),
        (ValueError, "`input_tensor` is an empty list", model, [], {}),
        (ValueError, "`box` is an empty list", model, picture, {"box": []}),
        (ValueError, "found no box", model, Image.new("RGB", (64, 64)), {"box": 0}),
        (ValueError, "lower `threshold`", model, picture, {"threshold": 0.999999}),
        (ValueError, "`threshold` must be a finite", model, picture, {"threshold": float("nan")}),
        (ValueError, "`box` or `class_idx`, not both", model, picture, {"box": 0, "class_idx": 1}),
        (ValueError, "`box` or `targets`, not both", model, picture, {"box": 0, "targets": Box(0)}),
        (ValueError, "`box` or `top_k`, not both", model, picture, {"box": 0, "top_k": 1}),
        (
            TypeError,
            "`box` asks about the boxes of a detector, and Sequential",
            plain,
            torch.rand(1, 3, 8, 8),
            {"box": 0},
        ),
        (ValueError, "`threshold` is 0.5", plain, torch.rand(1, 3, 8, 8), {"threshold": 0.5}),
        (ValueError, "`processor` is for transformers", model, picture, {"processor": lambda images: images}),
        (ValueError, "must be one image", model, torch.rand(2, 3, 8, 8), {"box": 0}),
        (FileNotFoundError, "no file", model, "nothing.png", {"box": 0}),
    ]
    for error, says, explained, given, options in cases:
        with pytest.raises(error, match=says):
            torchcam.explain(explained, given, **options)


def test_processors_of_other_models() -> None:
    transformers = pytest.importorskip("transformers")
    detr, its_own = detr_family("Detr")
    rt_detr, other = detr_family("RTDetr")
    picture = noise_picture(220, 120)
    cases = [
        (detr, None, "`processor` is missing"),
        (detr, transformers.CLIPImageProcessor(), "`processor` is a CLIPImageProcessor, which makes no boxes"),
        (detr, other, "`processor` RTDetrImageProcessor may be that of another model"),
        (rt_detr, its_own, "`processor` DetrImageProcessor does not fit"),
    ]
    for model, processor, says in cases:
        with pytest.raises(ValueError, match=says):
            torchcam.explain(model, picture, box=0, processor=processor, threshold=0.0)
    with pytest.raises(TypeError, match="`input_tensor` must be an image for `box`"):
        torchcam.explain(detr, torch.rand(1, 3, 96, 96), box=0, processor=its_own)


def test_in_ones_own_loop() -> None:
    """`Box` explains a query of the model's own output, without `explain`."""
    pytest.importorskip("transformers")
    model, processor = detr_family("Detr")
    inputs = processor(images=noise_picture(220, 120), return_tensors="pt")
    explained = torchcam.explain(model, noise_picture(220, 120), box="all", processor=processor, threshold=0.0)
    targets = explained._try_out.targets
    key = next(key for key, target in targets.items() if target.index == 2)
    with HiResCAM(model, "model.input_projection") as extractor:
        output = model(pixel_values=inputs["pixel_values"])
        (cam,) = extractor(targets=Box(2, label=targets[key].label), scores=output)
    torch.testing.assert_close(cam[0], explained.cams[key][0])
