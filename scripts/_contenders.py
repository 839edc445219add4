"""What the benchmark measures: models, and the same maps as each package's users would compute them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from _peers import Peer, install, load
from torch import Tensor, nn
from zoo import settle

from torchcam import methods
from torchcam._tensors import min_max, resize

__all__ = ["GRADCAM", "LAYERS", "TORCHCAM", "Contender", "Peers", "Setting", "Trial", "make_model", "make_setting"]

TORCHCAM = Peer(["torchcam==0.5.0"], "torchcam", __file__)
GRADCAM = Peer(["grad-cam==1.5.7", "ttach==0.0.3", "opencv-python-headless>=4.8"], "pytorch_grad_cam", __file__)

SMALL = "small"  # three layers, built here: its forward pass takes less time than what is done beside it
LAYERS = {
    SMALL: "2",
    "resnet18": "layer4",
    "resnet50": "layer4",
    "mobilenet_v3_large": "features",
    "vit_b_16": "encoder.layers.encoder_layer_11.ln_1",
}
PUBLISHED = tuple(name for name in LAYERS if name != SMALL)
SQUARE_TOKENS = {"vit_b_16"}  # the peers have to be told where the positions are


@dataclass(frozen=True)
class Peers:
    """The other packages, each from a folder of its own.

    Attributes:
        folder: holds a folder for each; they are installed where missing
    """

    folder: Path

    def install(self) -> None:
        """Install what is missing."""
        install(TORCHCAM, self.folder / "torchcam")
        install(GRADCAM, self.folder / "gradcam")

    def torchcam(self) -> ModuleType:
        """Return TorchCAM's methods. Its import name is ours as well, so that it goes by another one here."""
        name = "torchcam_peer"
        load(TORCHCAM, self.folder / "torchcam", name)
        return importlib.import_module(f"{name}.methods")

    def gradcam(self) -> ModuleType:
        """Return pytorch-grad-cam, without its progress bars and with as many threads as PyTorch has."""
        package = load(GRADCAM, self.folder / "gradcam", GRADCAM.module)
        for name in ("ablation_cam", "score_cam"):
            vars(importlib.import_module(f"{GRADCAM.module}.{name}"))["tqdm"] = SimpleNamespace(tqdm=iter)
        importlib.import_module("cv2").setNumThreads(torch.get_num_threads())
        return package


@dataclass(frozen=True)
class Setting:
    """A model, an input and what to explain.

    Attributes:
        name: the model's name
        model: the model
        layer: the target layer, or several
        x: the input
        classes: the class to explain of each sample, or several classes of the only one
    """

    name: str
    model: nn.Module
    layer: str | Sequence[str]
    x: Tensor
    classes: Sequence[int]

    @property
    def layers(self) -> list[str]:
        """The names of the target layers."""
        return [self.layer] if isinstance(self.layer, str) else list(self.layer)

    def forward(self) -> Any:
        """Run the model as one does who wants no map."""
        with torch.inference_mode():
            return self.model(self.x)


@dataclass
class Trial:
    """A call that is ready to be measured.

    Attributes:
        run: the call
        comparable: from what it returned to the maps, (M, *spatial), or weights, (N, C), that packages should agree on;
            of packages without an agreement None
    """

    run: Callable[[], Any]
    comparable: Callable[[Any], Tensor] | None = None


Contender = Callable[[Setting], AbstractContextManager[Trial]]


def make_model(name: str, device: str) -> nn.Module:
    """Build a model with random weights, always the same, whose signal neither dies out nor explodes."""
    import torchvision

    torch.manual_seed(0)
    if name == SMALL:
        convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval().to(device)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    settle(model, torch.randn(2, 3, 224, 224))
    return model.to(device)


def make_setting(
    name: str, model: nn.Module, layer: str | Sequence[str], batch: int, side: int = 224, classes: int | None = None
) -> Setting:
    """Make an input for a model; explain the best class of each sample, or the first so many of one."""
    device = next(model.parameters()).device
    x = torch.randn((batch, 3, side, side), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.inference_mode():
        best = model(x).argmax(1).tolist()
    return Setting(name, model, layer, x, best if classes is None else list(range(classes)))


@contextmanager
def ours(
    setting: Setting,
    *,
    method: str = "GradCAM",
    weights: bool = False,
    signed: bool = False,
    many: bool = False,
    graph: bool = False,
    **options: Any,
) -> Iterator[Trial]:
    """Explain within inference mode, whatever the method, or with gradients on.

    Args:
        setting: what to explain
        method: the name of the class
        weights: whether it is the weights that are compared
        signed: whether it is the maps before the ReLU that are compared
        many: whether the classes are those of one sample
        graph: whether the model runs with gradients on
        options: arguments of the class
    """
    classes = [list(setting.classes)] if many else list(setting.classes)
    layers = () if method == "FullGrad" else (setting.layers,)
    with getattr(methods, method)(setting.model, *layers, **options) as extractor:
        kept: list[Tensor] = []

        def run(**how: Any) -> Any:
            with torch.inference_mode(not graph):
                scores = setting.model(setting.x)
                return extractor(classes, scores, **how)

        def comparable(maps: Any) -> Tensor:
            if weights:
                return kept[0]
            cam: Tensor = (run(relu=False, normalized=False) if signed else maps)[0]
            return cam.flatten(0, 1) if many else cam

        if weights:
            keep_results(extractor, "weights", lambda found: kept.__setitem__(slice(None), [found]))
        yield Trial(run, comparable)


@contextmanager
def theirs(
    setting: Setting,
    *,
    peers: Peers,
    method: str = "GradCAM",
    gradients: bool = True,
    many: bool = False,
    **options: Any,
) -> Iterator[Trial]:
    """Explain with TorchCAM as its documentation has it: without gradients where the method needs none."""
    if setting.name in SQUARE_TOKENS:
        options["reshape_transform"] = tokens_to_grid
    with getattr(peers.torchcam(), method)(setting.model, setting.layers, **options) as extractor:

        def run() -> Any:
            with contextlib.nullcontext() if gradients else torch.inference_mode():
                scores = setting.model(setting.x)
                if not many:
                    return extractor(list(setting.classes), *([scores] if gradients else []))
                return [torch.cat([extractor(c, scores, retain_graph=True)[0] for c in setting.classes])]

        yield Trial(run, lambda maps: maps[0])


@contextmanager
def grad_cams(
    setting: Setting,
    *,
    peers: Peers,
    method: str = "GradCAM",
    weights: bool = False,
    many: bool = False,
    **options: Any,
) -> Iterator[Trial]:
    """Explain with pytorch-grad-cam, with gradients on, as its documentation does for all methods."""
    package = peers.gradcam()
    target = importlib.import_module(f"{GRADCAM.module}.utils.model_targets").ClassifierOutputTarget
    if setting.name in SQUARE_TOKENS:
        options["reshape_transform"] = tokens_to_grid
    layers = [] if method == "FullGrad" else [setting.model.get_submodule(layer) for layer in setting.layers]
    kept: list[Tensor] = []
    with contextlib.redirect_stdout(None):
        extractor = getattr(package, method)(setting.model, layers, **options)
    with extractor:
        part = "get_cam_weights" if weights else "aggregate_multi_layers" if method == "FullGrad" else "get_cam_image"
        keep_results(extractor, part, lambda found: kept.append(torch.as_tensor(found)))

        def run() -> Any:
            del kept[:]
            if not many:
                return extractor(setting.x, [target(c) for c in setting.classes])
            return [extractor(setting.x, [target(c)]) for c in setting.classes]

        try:
            yield Trial(run, lambda _: torch.cat(kept) if many else kept[-1])
        finally:
            setting.model.zero_grad()  # it leaves gradients behind


PERCENTILES = (20, 40, 60, 80)


def map_to_score(setting: Setting) -> Tensor:
    """Return the maps, of the input's size, whose faithfulness is measured."""
    with methods.GradCAM(setting.model, setting.layers) as extractor, torch.inference_mode():
        scores = setting.model(setting.x)
        (cams,) = extractor(list(setting.classes), scores)
    return resize(cams.unsqueeze(1), setting.x.shape[2:]).squeeze(1).clone()


@contextmanager
def our_road(setting: Setting) -> Iterator[Trial]:
    """Score maps with our metric."""
    from torchcam.metrics import ROAD

    maps = map_to_score(setting)

    def run() -> Any:
        metric = ROAD(setting.model, percentiles=PERCENTILES)
        metric.update(setting.x, list(setting.classes), maps=maps)
        return metric.summary()["road"]

    yield Trial(run, lambda value: torch.tensor([[value]]))


@contextmanager
def gradcam_road(setting: Setting, *, peers: Peers) -> Iterator[Trial]:
    """Score maps with pytorch-grad-cam's metric."""
    peers.gradcam()
    target = importlib.import_module(f"{GRADCAM.module}.utils.model_targets").ClassifierOutputTarget
    metric = importlib.import_module(f"{GRADCAM.module}.metrics.road").ROADCombined(list(PERCENTILES))
    maps, targets = map_to_score(setting).cpu().numpy(), [target(c) for c in setting.classes]

    def run() -> Any:
        return metric(setting.x, maps, targets, setting.model)

    yield Trial(run, lambda values: torch.as_tensor(values).unsqueeze(1))


def keep_results(owner: Any, name: str, keep: Callable[[Any], Any]) -> None:
    """Look at what a method of one object returns."""
    method = getattr(owner, name)

    def kept(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        keep(result)
        return result

    setattr(owner, name, kept)


def tokens_to_grid(tokens: Tensor) -> Tensor:
    """Return the tokens of a square of patches, (N, 1 + S, C), as a grid (N, C, H, W)."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].mT.reshape(len(tokens), -1, side, side)


@contextmanager
def plain(setting: Setting) -> Iterator[Trial]:
    """Run the model alone."""
    yield Trial(setting.forward)


@contextmanager
def watched(setting: Setting, *, enabled: bool, method: str = "GradCAM") -> Iterator[Trial]:
    """Run the model alone, but with one of our extractors on it."""
    with getattr(methods, method)(setting.model, setting.layers) as extractor:
        if not enabled:
            extractor.disable_hooks()
        yield Trial(setting.forward)


# Agreement


@dataclass(frozen=True)
class Agreement:
    """How far apart two packages are.

    Attributes:
        difference: the largest
        tolerance: what it may be
        reason: why it is larger, "" if it should not be
    """

    difference: float
    tolerance: float
    reason: str

    @property
    def good(self) -> bool:
        """Whether the difference is small, or has a known reason."""
        return self.difference <= self.tolerance or bool(self.reason)


@dataclass(frozen=True)
class Check:
    """How to compare the results of two packages.

    Attributes:
        tolerance: the largest difference
        reason: the known difference between the definitions, "" if there is none
        kind: "maps" are rectified and scaled to [0, 1]; "signed" ones may have the other sign before that; "weights"
            are divided by a sample's largest, and may have the other sign, where the score that they are divided by is
            negative; "values" are compared as they are
    """

    tolerance: float = 1e-4
    reason: str = ""
    kind: Literal["maps", "signed", "weights", "values"] = "maps"

    def compare(self, one: Tensor, other: Tensor) -> Agreement:
        """Compare our result with a peer's.

        Raises:
            ValueError: if they are of different shapes
        """
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        if one.shape != other.shape:
            raise ValueError(f"results of shapes {tuple(one.shape)} and {tuple(other.shape)} cannot be compared")
        scale = {"maps": scaled, "signed": scaled, "weights": relative, "values": Tensor.clone}[self.kind]
        signs = (1, -1) if self.kind in {"signed", "weights"} else (1,)
        differences = [(scale(sign * one) - scale(other)).abs().flatten(1).amax(1) for sign in signs]  # (N,) each
        # A difference that is not a number is none that may be small.
        found = torch.stack(differences).nan_to_num(nan=torch.inf).amin(0).amax()
        return Agreement(float(found), self.tolerance, self.reason)


def scaled(maps: Tensor) -> Tensor:
    """Rectify maps and scale them to [0, 1]."""
    return min_max(maps.relu())


def relative(weights: Tensor) -> Tensor:
    """Divide a sample's weights by the largest."""
    return weights / weights.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


# What is measured


@dataclass(frozen=True)
class Case:
    """A method, and who computes it.

    Attributes:
        name: what the case is called
        models: the models
        batches: the sizes of the batch
        contenders: who takes part, by name; ours first
        layer: the target layer, None for the model's last one
        checks: how a peer's result is compared with ours, by name
        slow: the contenders that take minutes, left out unless asked for
        many: how many classes of one image are explained, None for one of each image
        side: the input's
        note: what a reader has to know
        calls: how many calls in a row are timed at a time; their median counts
    """

    name: str
    models: Sequence[str]
    batches: Sequence[int]
    contenders: Mapping[str, Contender]
    layer: str | None = None
    checks: Mapping[str, Check] = field(default_factory=dict)
    slow: Sequence[str] = ()
    many: int | None = None
    side: int = 224
    note: str = ""
    calls: int = 1

    def setting(self, name: str, model: nn.Module, batch: int) -> Setting:
        """Make the input for one of the models."""
        return make_setting(name, model, self.layer or LAYERS[name], batch, self.side, self.many)


OURS, TC, GC, PLAIN = "torchcam", "TorchCAM 0.5", "grad-cam 1.5", "inference"
IN_INFERENCE_MODE = f"{OURS}, in inference mode"
CHANNELS_CASE = "ScoreCAM, channels"
EPS = "adds 1e-6 to the denominator of alpha"
ALPHA = "never divides alpha"
NOISY = "takes the last noisy activation and gradient"
EARLY = "scales masks before it upsamples them"
NOISE = "other noise"
CORNERS = "upsamples masks with corners aligned"
CHANNELS = "scales every channel by itself"


def cases(peers: Peers, *, every: bool) -> list[Case]:
    """Return all cases; with ``every``, those that take minutes as well."""
    resnets = ("resnet18", "resnet50")

    def mine(method: str, **options: Any) -> Contender:
        return partial(ours, method=method, **options)

    def tc(method: str, **options: Any) -> Contender:
        return partial(theirs, peers=peers, method=method, **options)

    def gc(method: str, **options: Any) -> Contender:
        return partial(grad_cams, peers=peers, method=method, **options)

    return [
        Case(
            "GradCAM",
            PUBLISHED,
            (1, 8),
            {OURS: mine("GradCAM"), TC: tc("GradCAM"), GC: gc("GradCAM")},
            checks={TC: Check(), GC: Check()},
        ),
        Case(
            "GradCAMpp",
            resnets,
            (1, 8),
            {OURS: mine("GradCAMpp"), TC: tc("GradCAMpp"), GC: gc("GradCAMPlusPlus")},
            checks={TC: Check(reason=ALPHA), GC: Check(reason=EPS)},
        ),
        Case(
            "LayerCAM",
            resnets,
            (1, 8),
            {OURS: mine("LayerCAM"), TC: tc("LayerCAM"), GC: gc("LayerCAM")},
            checks={TC: Check(), GC: Check()},
        ),
        Case(
            "SmoothGradCAMpp",
            resnets,
            (1,),
            {OURS: mine("SmoothGradCAMpp", num_samples=4), TC: tc("SmoothGradCAMpp", num_samples=4)},
            checks={TC: Check(reason=NOISY)},
            note="4 samples",
        ),
        *(
            Case(
                name,
                resnets,
                (1, 8),
                {OURS: mine(name, signed=True), GC: gc(other)},
                checks={GC: Check(1e-3, kind="signed")},
            )
            for name, other in (("EigenCAM", "EigenCAM"), ("EigenGradCAM", "EigenGradCAM"), ("KPCACAM", "KPCA_CAM"))
        ),
        Case(
            "FullGrad",
            resnets,
            (1,),
            {OURS: mine("FullGrad"), GC: gc("FullGrad")},
            checks={GC: Check(reason=CHANNELS)},
        ),
        Case(
            "Hooks",
            ("resnet18",),
            (1,),
            {
                "no extractor": plain,
                "enabled": partial(watched, enabled=True),
                "enabled, EigenCAM": partial(watched, enabled=True, method="EigenCAM"),
                "disabled": partial(watched, enabled=False),
            },
            note="a forward with a GradCAM extractor on the model, no map asked for",
        ),
        Case(
            "ROAD",
            ("resnet18",),
            (1,),
            {OURS: our_road, GC: partial(gradcam_road, peers=peers)},
            layer="layer3",
            checks={GC: Check(0.05, NOISE, "values")},
            note="combined, 4 percentiles",
        ),
        *(
            Case(
                "ScoreCAM",
                ("resnet18",),
                (1,),
                {OURS: mine("ScoreCAM"), TC: tc("ScoreCAM", gradients=False), GC: gc("ScoreCAM")},
                layer=layer,
                checks={TC: Check(reason=EARLY), GC: Check(reason=CORNERS)},
                note=f"{channels} channels",
            )
            for layer, channels in (("layer1", 64), *((("layer4", 512),) if every else ()))
        ),
        *(
            Case(
                name,
                ("resnet18",),
                (1,),
                {OURS: mine(name, num_samples=2), TC: tc(name, num_samples=2, gradients=False)},
                layer="layer1",
                checks={TC: Check(reason=reason)},
                note="64 channels, 2 samples",
            )
            for name, reason in (("SSCAM", f"{EARLY}; {NOISE}"), ("ISCAM", EARLY))
        ),
        *(
            Case(
                "100 classes",
                ("resnet18",),
                (1,),
                {
                    OURS: mine("GradCAM", many=True),
                    f"{OURS}, one class": partial(first_class, method="GradCAM"),
                    TC: tc("GradCAM", many=True),
                    GC: gc("GradCAM", many=True),
                },
                layer=layer,
                checks={TC: Check(), GC: Check()},
                many=100,
                note="GradCAM of one image; the peers in the best loop there is",
            )
            for layer in ("layer4", "layer3")
        ),
        *(
            Case(
                "AblationCAM",
                (model,),
                (1,),
                {OURS: mine("AblationCAM", weights=True), GC: gc("AblationCAM", weights=True)},
                layer=layer,
                checks={
                    GC: Check(3e-5, kind="weights")
                },  # what float32 leaves of drops that are small beside the score
                slow=slow,
                note="all channels",
            )
            for model, layer, slow in (
                ("resnet18", "layer4", ()),
                ("resnet18", "layer3", ()),
                ("resnet50", "layer4", (GC,)),
                ("resnet50", "layer3", (GC,)),
            )
        ),
    ]


OVERHEAD = ("GradCAM", "GradCAMpp", "LayerCAM", "ScoreCAM")


def overhead_cases(peers: Peers) -> list[Case]:
    """Return the cases whose host time beside the forward pass is measured, one image each.

    Ours runs as TorchCAM does, with gradients on where the method needs them; and in inference mode.
    """
    found = {case.name: case for case in cases(peers, every=False)}
    alike: dict[str, dict[str, Contender]] = {
        name: {OURS: partial(ours, method=name, graph=True), IN_INFERENCE_MODE: found[name].contenders[OURS]}
        for name in OVERHEAD
        if name != "ScoreCAM"
    }
    both = {
        name: replace(found[name], contenders={**found[name].contenders, **alike.get(name, {})}) for name in OVERHEAD
    }
    small = [
        replace(both[name], models=(SMALL,), batches=(1,), layer=None, side=8, note="", calls=20) for name in OVERHEAD
    ]
    return [*small, replace(both["GradCAM"], models=("resnet18", "vit_b_16"), batches=(1,))]


@contextmanager
def first_class(setting: Setting, **options: Any) -> Iterator[Trial]:
    """Explain one class only."""
    one = Setting(setting.name, setting.model, setting.layer, setting.x, list(setting.classes[:1]))
    with ours(one, **options) as trial:
        yield Trial(trial.run)


def memory_cases(peers: Peers, *, every: bool) -> list[Case]:
    """Return the cases whose peak memory is measured; with ``every``, those that take minutes as well."""

    def mine(method: str, **options: Any) -> Contender:
        return partial(ours, method=method, **options)

    def tc(method: str, **options: Any) -> Contender:
        return partial(theirs, peers=peers, method=method, **options)

    def gc(method: str, **options: Any) -> Contender:
        return partial(grad_cams, peers=peers, method=method, **options)

    few = {f"{OURS}, 8 at a time": mine("ScoreCAM", batch_size=8)}
    found = [
        Case(
            "GradCAM",
            PUBLISHED,
            (1, 8),
            {PLAIN: plain, OURS: mine("GradCAM"), TC: tc("GradCAM"), GC: gc("GradCAM")},
        ),
        Case(
            "SmoothGradCAMpp",
            ("resnet50",),
            (8,),
            {PLAIN: plain, OURS: mine("SmoothGradCAMpp"), TC: tc("SmoothGradCAMpp")},
        ),
        Case("EigenCAM", ("resnet50",), (8,), {PLAIN: plain, OURS: mine("EigenCAM"), GC: gc("EigenCAM")}),
        Case("FullGrad", ("resnet50",), (1,), {PLAIN: plain, OURS: mine("FullGrad"), GC: gc("FullGrad")}),
        Case("AblationCAM", ("resnet18",), (1,), {PLAIN: plain, OURS: mine("AblationCAM"), GC: gc("AblationCAM")}),
        Case(
            "ScoreCAM",
            ("resnet18",),
            (1,),
            {PLAIN: plain, OURS: mine("ScoreCAM"), **few, TC: tc("ScoreCAM", gradients=False), GC: gc("ScoreCAM")},
            layer="layer2",
            note="128 channels",
        ),
        *(
            Case(CHANNELS_CASE, ("resnet50",), (1,), few, layer=layer, side=96, note=f"{channels} channels, 96 x 96")
            for layer, channels in (("layer4.2.bn2", 512), ("layer4", 2048))
        ),
    ]
    if every:
        found += [
            Case("AblationCAM", ("resnet50",), (1,), {PLAIN: plain, OURS: mine("AblationCAM"), GC: gc("AblationCAM")}),
            Case(
                "ScoreCAM",
                ("resnet50",),
                (1,),
                {PLAIN: plain, OURS: mine("ScoreCAM"), **few, TC: tc("ScoreCAM", gradients=False), GC: gc("ScoreCAM")},
                note="2048 channels",
            ),
            Case(
                "SSCAM",
                ("resnet50",),
                (1,),
                {
                    PLAIN: plain,
                    OURS: mine("SSCAM", num_samples=1),
                    TC: tc("SSCAM", num_samples=1, gradients=False),
                },
                note="2048 channels, 1 sample",
            ),
        ]
    return found


# Growth


@dataclass(frozen=True)
class Growth:
    """How the cost of a method grows along one axis.

    Attributes:
        method: the method, as a title
        axis: what grows
        values: its values
        setting: makes the setting for a value
        contenders: who takes part, by name
        most: the largest value for a contender that would take minutes for more
    """

    method: str
    axis: str
    values: Sequence[int]
    setting: Callable[[int], Setting]
    contenders: Mapping[str, Contender]
    most: Mapping[str, int] = field(default_factory=dict)


def widened(trunk: nn.Module, channels: int) -> nn.Module:
    """Return a model that has so many channels before the pooling: a convolution on top of resnet18's."""
    torch.manual_seed(0)
    device = next(trunk.parameters()).device
    stem = [module for name, module in trunk.named_children() if name not in {"avgpool", "fc"}]
    top = [nn.Conv2d(512, channels, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return nn.Sequential(*stem, *top).eval().to(device)


def growths(peers: Peers, device: str) -> list[Growth]:
    """Return what grows."""
    model = make_model("resnet18", device)
    name = "resnet18"
    blocks = [f"layer{stage}.{block}" for stage in (4, 3, 2, 1) for block in (1, 0)]

    def wide(channels: int) -> Setting:
        return make_setting(name, widened(model, channels), "9", 1, 112)  # the ReLU on top

    def tc(method: str = "GradCAM", **options: Any) -> Contender:
        return partial(theirs, peers=peers, method=method, **options)

    def gc(method: str = "GradCAM", **options: Any) -> Contender:
        return partial(grad_cams, peers=peers, method=method, **options)

    three: dict[str, Contender] = {OURS: ours, TC: tc(), GC: gc()}
    score: dict[str, Contender] = {
        OURS: partial(ours, method="ScoreCAM"),
        TC: tc("ScoreCAM", gradients=False),
        GC: gc("ScoreCAM"),
    }
    return [
        Growth(
            "AblationCAM",
            "channels",
            (64, 128, 256, 512, 1024, 2048),
            wide,
            {OURS: partial(ours, method="AblationCAM"), GC: gc("AblationCAM")},
            most={GC: 512},
        ),
        Growth("ScoreCAM", "channels", (16, 32, 64, 128), wide, score),
        Growth(
            "GradCAM", "images in the batch", (1, 2, 4, 8, 16), lambda n: make_setting(name, model, "layer4", n), three
        ),
        Growth(
            "EigenCAM at layer3",
            "side of the image",
            (96, 160, 224, 320, 448),
            lambda side: make_setting(name, model, "layer3", 1, side),
            {OURS: partial(ours, method="EigenCAM"), GC: gc("EigenCAM")},
        ),
        Growth(
            "GradCAM at layer3",
            "classes of one image",
            (1, 3, 10, 30, 100),
            lambda count: make_setting(name, model, "layer3", 1, 224, count),
            {OURS: partial(ours, many=True), TC: tc(many=True), GC: gc(many=True)},
        ),
        Growth(
            "GradCAM",
            "target layers, from the last on",
            (1, 2, 3, 4, 6, 8),
            lambda count: make_setting(name, model, blocks[:count], 1),
            three,
        ),
    ]
