"""Default layers of models that are odd but plausible: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchcam
from tests.models import shuffled, tiny_vit
from torchcam._planted import seen_at_places
from torchcam.layers import candidates
from torchcam.layout import Layout
from torchcam.methods import GradCAM
from torchcam.metrics import ADCC
from torchcam.trust import trust


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Patches of 4 pixels, what becomes of them on the way, a second stage, and class scores of the mean."""

    def __init__(
        self, between: Callable[[Tensor], Tensor] = lambda t: t, before: Callable[[Tensor], Tensor] = lambda t: t
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(16, 4)
        self.between = between
        self.before = before
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.between(self.stem(self.before(x)))).mean((2, 3)))


def jigsaw(t: Tensor) -> Tensor:
    order = torch.randperm(t[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    return t.flatten(2)[..., order].view_as(t)


def enlarged_centre(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    centre = x[..., height // 4 : -height // 4, width // 4 : -width // 4]
    return nn.functional.interpolate(centre, (height, width))


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "axes swapped": lambda t: t.mT,
    "mirrored": lambda t: t.flip(3),
    "turned by 180 degrees": lambda t: t.flip(2, 3),
    "rolled by half": lambda t: t.roll((4, 4), (2, 3)),
    "jigsaw": jigsaw,
    "spectrum": lambda t: torch.fft.fft2(t).abs(),
    "spectrum, complex in between": lambda t: torch.view_as_real(torch.fft.fft2(t))[..., 0],
}


@pytest.mark.parametrize("name", BETWEEN)
def test_positions_that_lie_elsewhere_are_passed_over(name: str) -> None:
    model = Net(BETWEEN[name]).eval()
    found = candidates(model, noise(1, 3, 32, 32))
    assert found.choice == "stem"
    assert {one.name: one.is_proven for one in found}["body"] is False
    assert candidates(Net().eval(), noise(1, 3, 32, 32)).choice == "body"


@pytest.mark.parametrize("before", [lambda x: x.flip(3), lambda x: x.mT, enlarged_centre])
def test_a_model_without_positions_of_the_input_is_refused(before: Callable[[Tensor], Tensor]) -> None:
    model = Net(before=before).eval()
    with pytest.raises(ValueError, match=r"no layer of Net has positions .* name a `target_layer`"):
        GradCAM(model, input_shape=(3, 32, 32))


class Windows(nn.Module):
    """Tokens of 4 x 4 windows of the picture, one window after the other: as many as a grid has, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x).unflatten(3, (-1, 4)).unflatten(2, (-1, 4))  # (N, C, rows, 4, columns, 4)
        return self.fc(self.norm(maps.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)).tanh().mean(1))


class Pruned(nn.Module):
    """Of 64 tokens the 16 of the largest norm are kept: a number that makes a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        kept = tokens.norm(dim=2).topk(16, 1).indices.sort(1).values
        return self.fc(self.norm(tokens.gather(1, kept.unsqueeze(2).expand(-1, -1, 16))).tanh().mean(1))


class RegistersLast(nn.Module):
    """64 patches and 17 registers behind them: 9 x 9 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.registers = nn.Parameter(torch.zeros(1, 17, 16))
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.stem(x).flatten(2).mT, self.registers.expand(len(x), -1, -1)], 1)
        return self.fc(self.norm(tokens).tanh().mean(1))


class Crops(nn.Module):
    """Four crops of a picture as four samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 4)
        self.fc = nn.Linear(16, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        crops = torch.cat([part for half in x.chunk(2, 2) for part in half.chunk(2, 3)])
        return self.fc(self.conv(crops).tanh().mean((2, 3))).unflatten(0, (4, -1)).mean(0)


@pytest.mark.parametrize(
    ("make", "choice"), [(Windows, "stem"), (RegistersLast, "stem"), (Pruned, "stem"), (Crops, None)]
)
def test_rows_of_tokens_that_are_no_grid(make: Any, choice: str | None) -> None:
    assert candidates(make().eval(), noise(1, 3, 64, 64)).choice == choice


class Towers(nn.Module):
    """A tower of the picture and one of its enlarged centre, whose grid lies elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh())
        self.centre = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh())
        self.fc = nn.Linear(16, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        towers = [self.whole(x), self.centre(enlarged_centre(x))]
        return self.fc(torch.cat([one.mean((2, 3)) for one in towers], 1))


def test_a_tower_of_a_crop_is_passed_over() -> None:
    """Its positions are in the order of the input's, and an experiment with strips finds nothing wrong."""
    assert candidates(Towers().eval(), noise(1, 3, 64, 64)).choice == "whole"


def test_what_positions_see() -> None:
    """By hand: patches of 4 pixels, read as they are and otherwise."""
    signal = noise(1, 1, 16, 16).requires_grad_()
    output = nn.functional.unfold(signal, 4, stride=4)  # (1, 16 pixels, 16 patches)
    layout = Layout((4, 4), 0, 1, (2,), axes=(2, 3))
    seen = seen_at_places(layout, output, signal)
    assert seen is not None
    assert seen.is_clear
    assert seen.least > 1e6
    turned = seen_at_places(Layout((4, 4), 0, 1, (2,), fold=(1, 0), axes=(2, 3)), output, signal)
    assert turned is not None
    assert turned.is_against
    assert turned.mean == 0
    assert seen_at_places(layout, output.mean(2, keepdim=True).expand(-1, -1, 16), signal) == pytest.approx((1, 1))
    assert seen_at_places(layout, noise(1, 16, 16).requires_grad_(), signal) is None


# Dense outputs.


class Detector(nn.Module):
    """A box at each position of two levels, the scores of 3 classes before the sides of the boxes: (N, 7, boxes)."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh())
        self.coarse = nn.Sequential(nn.Conv2d(8, 8, 2, 2), nn.Tanh())
        self.heads = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh(), nn.Conv2d(8, 7, 1)) for _ in range(2))
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        levels = [fine, self.coarse(fine)]
        return torch.cat([head(level).flatten(2) for head, level in zip(self.heads, levels, strict=True)], 2)


def best_of_class_1(output: Tensor) -> Tensor:
    return output[1].max()


def test_a_layer_that_all_boxes_depend_on() -> None:
    """The heads are later, but each sees the boxes of one level alone; by hand, 1/4 and 3/4 of the diagonal."""
    found = {one.name: one for one in candidates(Detector().eval(), noise(1, 3, 32, 32))}
    assert candidates(Detector().eval(), noise(1, 3, 32, 32)).choice == "fine"
    # Of the boxes 0, 26, 53 and 79, the first three are among the 64 of the fine level.
    assert {name: found[name].reach for name in ("fine", "coarse", "heads.0", "heads.1")} == {
        "fine": 1.0,
        "coarse": 0.25,
        "heads.0": 0.75,
        "heads.1": 0.25,
    }
    with GradCAM(Detector().eval(), input_shape=(3, 32, 32)) as extractor:
        extractor.model(noise(1, 3, 32, 32))
        assert extractor(targets=best_of_class_1)[0].shape == (1, 8, 8)


class TwoHeads(nn.Module):
    """Class scores of a late layer, and an embedding of an early one."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh())
        self.late = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
        self.fc = nn.Linear(8, 4)
        shuffled(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.early(x)
        return self.fc(self.late(early).mean((2, 3))), early.mean((2, 3))


def embedding(output: Any) -> Any:
    return output[1].square().sum()


def score(output: Any) -> Any:
    return output[0][2]


def test_explanations_look_at_a_layer_that_counts_for_their_targets() -> None:
    model, x = TwoHeads().eval(), noise(1, 3, 32, 32)
    late = torchcam.explain(model, x, class_idx=2)
    assert late.target_layers == ("late",)
    assert torchcam.explain(model, x, targets={"score": score}).target_layers == ("late",)
    early = torchcam.explain(model, x, targets={"embedding": embedding}, method=["GradCAM", "LayerCAM", "AblationCAM"])
    assert {result.target_layers for result in early.results.values()} == {("early",)}
    both = torchcam.explain(model, x, targets={"embedding": embedding, "score": score})
    assert both.target_layers == ("early",)
    with GradCAM(model, "early") as extractor:
        model(x)
        torch.testing.assert_close(early.cams["embedding"][0], extractor(targets=embedding)[0][0])
    report = trust(model, x, targets=embedding, methods=["GradCAM"])
    assert "target_layer=['early']" in report.method


def test_the_targets_of_a_batch_have_a_default_layer() -> None:
    model, x = Net().eval(), noise(3, 3, 32, 32)
    asked = {"first": lambda output: output[0], "last": lambda output: output[-1]}
    found = torchcam.explain(model, x, targets=[asked] * 3)
    for number, one in enumerate(found):
        alone = torchcam.explain(model, x[number : number + 1], targets=asked, target_layer="body")
        assert one.target_layers == alone.target_layers == ("body",)
        for name in asked:
            torch.testing.assert_close(one.cams[name], alone.cams[name])


def test_a_default_layer_without_a_path_to_the_score_is_an_error_that_names_one_with() -> None:
    model = TwoHeads().eval()
    with GradCAM(model, input_shape=(3, 32, 32)) as extractor:
        model(noise(1, 3, 32, 32))
        with pytest.raises(
            ValueError, match="does not depend on the positions of the default layer 'late', but on those of 'early'"
        ):
            extractor(targets=embedding)


# Tokens before the positions of one side.


class Channels(nn.Module):
    """Patches of each channel of a series (N, T, C) by themselves, with a class token: (N, C, 1 + patches, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 3)
        shuffled(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.mT.unflatten(2, (-1, 4)))  # (N, C, patches, D)
        tokens = torch.cat([self.cls_token.expand(len(x), x.shape[2], -1, -1), tokens], 2)
        return self.fc(self.norm(tokens).tanh().mean((1, 2)))


def test_a_class_token_of_each_channel_is_no_position() -> None:
    model, x = Channels().eval(), noise(1, 32, 5)
    layout = Layout((8, 5), 0, 3, (2, 1), prefix=1)
    with GradCAM(model) as extractor:
        model(x)
        assert extractor(0)[0].shape == (1, 8, 5)
        assert extractor.target_names == ["norm"]
        tokens = model.norm(
            torch.cat([model.cls_token.expand(1, 5, -1, -1), model.embed(x.mT.unflatten(2, (-1, 4)))], 2)
        )
        torch.testing.assert_close(extractor.hook_a[0], tokens[:, :, 1:].permute(0, 3, 2, 1))
    function = eval(layout.source)
    assert torch.equal(function(tokens), layout.to_grid(tokens))
    assert torch.equal(layout.from_grid(layout.to_grid(tokens), tokens), tokens)
    assert str(layout) == "(N, 5, 1 + 8, C)"
    assert layout.is_like(Layout((9, 4), 0, 3, (2, 1), prefix=1))
    assert not layout.is_like(Layout((8, 5), 0, 3, (2, 1), prefix=1, before=1))


def test_scores_that_no_gradient_leads_from_are_refused_with_the_way_out() -> None:
    model = Net(between=torch.detach)
    model.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), Cut())
    with pytest.raises(ValueError, match=r"no gradient leads from the scores .* without gradients, such as ReciproCAM"):
        GradCAM(model.eval(), input_shape=(3, 32, 32))


class Cut(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return t.mean((2, 3), keepdim=True).detach()


def test_a_layer_that_a_pass_on_a_replica_has_decided_stays() -> None:
    model, x = tiny_vit(torch.float32), torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    with GradCAM(model) as extractor:  # there is no probe of (3, 224, 224) for such a model
        maps = [cam for (cam,) in extractor.stream([x, x], 1)]
        metric = ADCC(extractor)
        metric.update(x, 1)
        scores = model(x)
        (own,) = extractor(1, scores)
        (name,) = extractor.target_names
    with GradCAM(model, name) as extractor:
        (expected,) = extractor(1, model(x))
    assert all(torch.equal(cam, expected) for cam in (*maps, own))
    assert int(metric.total) == 2
