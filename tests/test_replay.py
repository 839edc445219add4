"""Running a model again: on masked inputs, and with the output of a layer edited."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import BatchSizeOfInput, CalledTwice, ReturnIgnored, UNet, resnet
from torch import Tensor, nn

from torchcam._passes import Call
from torchcam.methods._replay import Replay
from torchcam.targets import Selector


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the convolutions of CUDA devices from rounding their inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def images(device: torch.device, count: int = 2, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((count, 3, side, side), generator=generator).to(device)


def replay_of(
    model: nn.Module, x: Tensor, batch_size: int = 4, class_idx: Any = (1, 2, 3), targets: Any = None
) -> Replay:
    classes = None if targets is not None else list(class_idx[: len(x)])
    select = Selector(classes, targets, len(x))
    return Replay(model, Call((x,), {}), select, batch_size, progress=False, description="")


@contextlib.contextmanager
def output_replaced(layer: nn.Module, change: Callable[[Tensor], Tensor], last_call: int = 1) -> Iterator[None]:
    """Let the given call of a layer return something else."""
    calls = 0

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        return change(output) if calls == last_call else None

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def without_channels(output: Tensor, variants: Tensor) -> Tensor:
    """Variant k lacks channel k."""
    copies = output.clone()
    copies[torch.arange(len(variants), device=variants.device), variants] = 0
    return copies


def by_full_passes(
    model: nn.Module, layer: nn.Module, x: Tensor, score: Callable[[Tensor, int], Tensor], num_variants: int, calls: int
) -> tuple[Tensor, Tensor]:
    unedited, edited = [], []
    with torch.no_grad():
        for n in range(len(x)):
            unedited.append(score(model(x[n : n + 1])[0], n))
            for k in range(num_variants):
                with output_replaced(layer, lambda output, k=k: without_channels(output, torch.tensor([k])), calls):
                    edited.append(score(model(x[n : n + 1])[0], n))
    return torch.stack(unedited), torch.stack(edited).reshape(len(x), num_variants)


@contextlib.contextmanager
def rows_counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the rows that the modules with parameters compute, in the model as in replicas of it."""
    rows: Counter[str] = Counter()
    names = {id(weight): name for name, module in model.named_modules() for weight in module._parameters.values()}
    classes = {type(module) for module in model.modules() if any(w is not None for w in module._parameters.values())}
    originals = {cls: cls.forward for cls in classes}

    def counted(cls: type[nn.Module]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = next((names[id(w)] for w in self._parameters.values() if id(w) in names), None)
            if name is not None:
                rows[name] += len(args[0])
            return originals[cls](self, *args, **kwargs)

        return forward

    try:
        for cls in classes:
            cls.forward = counted(cls)  # type: ignore[method-assign]
        yield rows
    finally:
        for cls, original in originals.items():
            cls.forward = original  # type: ignore[method-assign]


def assert_unpatched(model: nn.Module) -> None:
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


def densenet() -> nn.Module:
    from torchvision.models import densenet121

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return densenet121(num_classes=10).eval()


# name: model, layer, calls of the layer, whether what follows runs alone ("record": with recorded outputs before it)
NETS: dict[str, tuple[Callable[[], nn.Module], str, int, bool | str]] = {
    "resnet18-layer4": (resnet, "layer4", 1, True),
    "resnet18-layer4.0.conv1": (resnet, "layer4.0.conv1", 1, "record"),
    "resnet18-layer3": (resnet, "layer3", 1, True),
    "resnet18-layer2": (resnet, "layer2", 1, True),
    "unet-add": (lambda: UNet("add"), "middle", 1, "record"),
    "unet-cat": (lambda: UNet("cat"), "middle", 1, "record"),
    "batch-size-of-input": (BatchSizeOfInput, "features", 1, True),
    "called-twice": (CalledTwice, "block", 2, False),
    "called-thrice": (CalledTwice, "shared", 3, False),
    "return-ignored": (ReturnIgnored, "middle", 1, False),
    "densenet121": (densenet, "features.denseblock4.denselayer1", 1, "record"),
    "densenet121-transition": (densenet, "features.transition3", 1, True),
}


# Edited activations


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("net", NETS)
def test_edited_agrees_with_full_passes(net: str, batch_size: int, device: torch.device) -> None:
    make, name, calls, _ = NETS[net]
    if batch_size != 4 and net.startswith("densenet"):
        batch_size = 7
    model = make().to(device).double()
    layer, x = model.get_submodule(name), images(device, 3).double()
    replay = replay_of(model, x, batch_size)
    unedited, edited = replay.edited(name, without_channels, 4)
    expected = by_full_passes(model, layer, x, lambda y, n: y[n + 1], 4, calls)
    assert not edited.is_inference()
    assert (expected[1] - expected[0].unsqueeze(1)).abs().amax() > 1e-7, "the edits make no difference"
    torch.testing.assert_close(unedited, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(edited, expected[1], rtol=1e-10, atol=1e-10)
    assert_unpatched(model)


@pytest.mark.parametrize("net", ["resnet18-layer4", "unet-cat", "unet-add", "batch-size-of-input", "called-twice"])
def test_edited_agrees_with_full_passes_in_float32_and_for_targets(net: str, device: torch.device) -> None:
    make, name, calls, _ = NETS[net]
    model = make().to(device)
    layer, x = model.get_submodule(name), images(device)
    replay = replay_of(model, x, targets=lambda y: y[1] - y[3].square())
    unedited, edited = replay.edited(name, without_channels, 4)
    expected = by_full_passes(model, layer, x, lambda y, _n: y[1] - y[3].square(), 4, calls)
    torch.testing.assert_close(unedited, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(edited, expected[1], rtol=1e-4, atol=1e-5)


class MixedRows(nn.Module):
    """Takes the batch size from the input, such that more rows behind the features go unnoticed."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        features = self.fc(self.features(x).relu().mean((2, 3)))
        if self.mix == "mean":
            return features.reshape(x.shape[0], -1, 5).mean(1)
        return features[: x.shape[0]] if self.mix == "first" else features[-x.shape[0] :]


@pytest.mark.parametrize("mix", ["mean", "first", "last"])
@pytest.mark.parametrize("target", [torch.sum, torch.max], ids=["sum", "max"])
def test_edited_notices_rows_that_were_mixed(
    mix: str, target: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    """A target that takes an output of any shape must not hide that there is one row where there should be several."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixedRows(mix).to(device).double()
    x = images(device, 2, 8).double()
    unedited, edited = replay_of(model, x, targets=target).edited("features", without_channels, 4)
    expected = by_full_passes(model, model.features, x, lambda y, _n: target(y), 4, 1)
    torch.testing.assert_close(unedited, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(edited, expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("net", NETS)
def test_edited_falls_back_only_where_it_must(net: str, device: torch.device) -> None:
    make, name, _calls, head_only = NETS[net]
    model = make().to(device).double()
    with rows_counted(model) as rows:
        replay_of(model, images(device, 1).double(), 4).edited(name, without_channels, 4)
    first = rows[next(iter(rows))]  # the module with parameters that runs first
    assert first == 1 if head_only is True else first == 2 if head_only == "record" else first > 4


@pytest.mark.parametrize(("name", "passes"), [("layer4", 1), ("layer3", 1), ("layer4.0.conv1", 2)])
def test_edited_computes_what_comes_before_the_layer_once_per_sample(
    name: str, passes: int, device: torch.device
) -> None:
    model = resnet().to(device).double()
    x = images(device).double()
    with rows_counted(model) as rows:
        replay_of(model, x, batch_size=4).edited(name, without_channels, 10)
    inside = [n for n in rows if n == name or n.startswith(f"{name}.")]
    before = list(rows)[: list(rows).index(inside[0])]
    assert {"conv1", "bn1", "layer1.0.conv1", "layer2.1.bn2"} <= set(before)
    assert {n: rows[n] for n in [*before, *inside]} == dict.fromkeys([*before, *inside], 2 * passes)
    assert rows["fc"] <= passes * (2 + 1 + 3 + 2) + 2 * 10  # recorded, tried alone and among others, proved; variants


def test_edited_leaves_hooks_and_extractors_alone(device: torch.device) -> None:
    from torchcam.methods import GradCAM

    model, x = resnet().to(device), images(device)
    with GradCAM(model, "layer4") as extractor:
        scores = model(x)
        expected = extractor(1, scores, retain_graph=True)
        replay_of(model, x).edited("layer4", without_channels, 4)
        replay_of(model, x).masked(lambda chunk: x[chunk], torch.arange(2, device=device))
        torch.testing.assert_close(extractor(1, scores)[0], expected[0])


def test_edited_restores_a_forward_of_the_users_own(device: torch.device) -> None:
    model, x = resnet().to(device), images(device, 1)
    own = model.layer1.forward
    model.layer1.forward = own
    replay_of(model, x).edited("layer4", without_channels, 4)
    assert vars(model.layer1)["forward"] is own
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["layer1"]


class Stop(Exception):  # noqa: N818 - it is no error
    """Raised on purpose."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["edit", "before", "layer", "behind", "target"])
def test_edited_leaves_the_model_as_it_was_on_error(where: str, training: bool, device: torch.device) -> None:
    model, x = resnet().to(device).train(training), images(device)
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    armed = {"passes": 0}

    def fail(_module: nn.Module, _args: Any) -> None:
        armed["passes"] += 1
        if where == "before" or armed["passes"] > 2:
            raise Stop

    def edit(output: Tensor, variants: Tensor) -> Tensor:
        if where == "edit":
            raise Stop
        return without_channels(output, variants)

    def target(y: Tensor) -> Tensor:
        if where == "target":
            raise Stop
        return y[0]

    module = {"before": model.layer1, "layer": model.layer3, "behind": model.fc}.get(where)
    handle = None if module is None else module.register_forward_pre_hook(fail)
    with pytest.raises(Stop), torch.enable_grad():
        replay_of(model, x, targets=target).edited("layer3", edit, 4)
    if handle is not None:
        handle.remove()
    assert_unpatched(model)
    assert [module.training for module in model.modules()] == modes
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_edited_raises_for_a_layer_that_is_not_reached(device: torch.device) -> None:
    model = resnet().to(device)
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(RuntimeError, match="not reached"):
        replay_of(model, images(device, 1)).edited("spare", without_channels, 4)
    assert_unpatched(model)


def test_edited_takes_layers_that_return_tuples(device: torch.device) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.gru = nn.GRU(4, 6, batch_first=True)
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            states, _last = self.gru(self.stem(x))
            return self.fc(states.square().mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recurrent().to(device).eval()
    x = torch.randn((2, 7, 3), generator=torch.Generator().manual_seed(0)).to(device)
    unedited, edited = replay_of(model, x).edited("gru", without_channels, 7)
    with torch.no_grad():
        states = model.gru(model.stem(x))[0]
        for n in range(2):
            torch.testing.assert_close(unedited[n], model(x)[n, n + 1])
            for k in range(7):
                changed = states[n].clone()
                changed[k] = 0
                torch.testing.assert_close(edited[n, k], model.fc(changed.square().mean(0))[n + 1])


@pytest.mark.parametrize("batch_size", [2, 8])
def test_edited_takes_sparse_tensors_before_the_layer(batch_size: int, device: torch.device) -> None:
    class Sparse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5].to_sparse()

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse = Sparse()
            self.features = nn.Conv2d(3, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            beside = self.sparse(x).to_dense()
            return self.features(x).square().mean((2, 3)) * beside

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Beside().to(device).double().eval()
    x = images(device, 3, 6).double()
    found = replay_of(model, x, batch_size).edited("features", without_channels, 5)
    expected = by_full_passes(model, model.features, x, lambda y, n: y[n + 1], 5, 1)
    torch.testing.assert_close(found, expected)


# Chunks and memory


class Log(list[Any]):
    """A list that replicas share."""


class Limited(nn.Module):
    """Runs out of memory above a number of rows."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.limit = limit
        self.seen = Log()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x).tanh().mean((2, 3))
        self.seen.append(len(features))
        if len(features) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory, or so")
        return self.fc(features)


def masked_case(device: torch.device, num_variants: int = 23) -> tuple[Tensor, Tensor, Callable[[slice], Tensor]]:
    x = images(device, 3, 6)
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand((num_variants, 1, 6, 6), generator=generator).to(device)
    samples = torch.randint(0, 3, (num_variants,), generator=generator).to(device)
    return x, samples, lambda chunk: masks[chunk] * x[samples[chunk]]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 23, 100])
def test_masked_scores_each_variant_whatever_the_chunks(batch_size: int, device: torch.device) -> None:
    model = Limited(100).to(device)
    x, samples, variants = masked_case(device)
    scores = replay_of(model, x, batch_size).masked(variants, samples)
    assert max(model.seen) == min(batch_size, 23)
    assert sum(model.seen) == 23
    assert not scores.requires_grad
    assert not scores.is_inference()
    everything = variants(slice(0, 23))
    for v, n in enumerate(samples.tolist()):
        torch.testing.assert_close(scores[v], model(everything[v : v + 1])[0, n + 1].detach())


@pytest.mark.parametrize(("batch_size", "seen"), [(23, [23, 11, 5, 5, 5, 5, 3]), (8, [8, 4, 4, 4, 4, 4, 3])])
def test_masked_halves_chunks_that_run_out_of_memory(batch_size: int, seen: list[int], device: torch.device) -> None:
    x, samples, variants = masked_case(device)
    expected = replay_of(Limited(100).to(device), x, 100).masked(variants, samples)
    model = Limited(5).to(device)
    with pytest.warns(RuntimeWarning, match="batch_size") as caught:
        scores = replay_of(model, x, batch_size).masked(variants, samples)
    assert len(caught) == 1
    assert model.seen[: len(seen)] == seen
    assert sum(rows for rows in model.seen if rows <= 5) == 23
    torch.testing.assert_close(scores, expected)


@pytest.mark.filterwarnings("ignore:out of memory:RuntimeWarning")
def test_masked_gives_up_when_one_variant_is_too_much(device: torch.device) -> None:
    x, samples, variants = masked_case(device)
    with pytest.raises(torch.OutOfMemoryError):
        replay_of(Limited(0).to(device), x).masked(variants, samples)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_edited_halves_chunks_that_run_out_of_memory(limit: int, device: torch.device) -> None:
    x = images(device, 2, 6)
    whole = Limited(100).to(device)
    expected = replay_of(whole, x, 6).edited("features", without_channels, 6)
    model = Limited(limit).to(device)
    with pytest.warns(RuntimeWarning, match="batch_size"):
        found = replay_of(model, x, 6).edited("features", without_channels, 6)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("net", ["resnet18-layer4", "unet-cat", "called-twice"])
def test_edited_keeps_to_the_batch_size(net: str, batch_size: int, device: torch.device) -> None:
    make, name, _, _ = NETS[net]
    model = make().to(device)
    rows = []

    def watch(_module: nn.Module, args: Any) -> None:
        rows.append(len(args[0]))

    for module in model.modules():
        module.register_forward_pre_hook(watch)
    replay_of(model, images(device), batch_size).edited(name, without_channels, 4)
    assert max(rows) <= batch_size


def test_edited_builds_no_more_copies_than_a_chunk(device: torch.device) -> None:
    model, seen = resnet().to(device), []

    def edit(output: Tensor, variants: Tensor) -> Tensor:
        assert len(output) == len(variants)
        seen.append(variants.tolist())
        return without_channels(output, variants)

    replay_of(model, images(device, 1), 3).edited("layer4", edit, 7)
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]


def test_progress_is_shown_on_request(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    model = Limited(100).to(device)
    x, samples, variants = masked_case(device)
    replay_of(model, x).masked(variants, samples)
    assert capsys.readouterr().err == ""
    select = Selector(0, None, len(x))
    replay = Replay(model, Call((x,), {}), select, 4, progress=True, description="Variants")
    replay.masked(variants, samples)
    assert "Variants" in capsys.readouterr().err


def test_masked_runs_in_evaluation_mode_and_leaves_the_statistics(device: torch.device) -> None:
    model, x = resnet().to(device).train(), images(device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    scores = replay_of(model, x).masked(lambda chunk: x[chunk], torch.arange(2, device=device))
    assert all(module.training for module in model.modules())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(scores, model(x)[[0, 1], [1, 2]])


# Proofs


class Unsteady(nn.Module):
    """A net whose scores depend on chance, or on the other samples of the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.kind = kind
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "random before":
            x = x + torch.randn_like(x)
        features = self.features(x).tanh().mean((2, 3))
        if self.kind == "random behind":
            features = nn.functional.dropout(features, 0.5, training=True)
        if self.kind == "batch":
            features = (features - features.mean(0)) * 3
        return self.fc(features)


@pytest.mark.parametrize("method", ["ScoreCAM", "GroupCAM", "AblationCAM", "ReciproCAM"])
@pytest.mark.parametrize("kind", ["random before", "random behind", "batch"])
def test_scores_that_do_not_come_again_are_warned_of_once(kind: str, method: str) -> None:
    from torchcam import methods

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with getattr(methods, method)(Unsteady(kind).eval(), "features") as extractor, torch.no_grad():
            extractor.model(images(torch.device("cpu"), 2, 8))
            with pytest.warns(
                UserWarning, match="an input as it is was .* explain one at a time, with `batch_size=1`"
            ) as caught:
                extractor(1)
    assert len(caught) == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["ScoreCAM", "SSCAM", "ISCAM", "GroupCAM", "AblationCAM", "ReciproCAM"])
def test_scores_that_come_again_are_not(method: str, training: bool) -> None:
    """Warnings are errors. In training mode, what was recorded differs from what runs again, and is not compared."""
    from torchcam import methods

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), CalledTwice()).train(training)
    del model[3]
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Dropout(0.5)).append(nn.Linear(6, 3))
    for x in (images(torch.device("cpu"), 2, 8), 1e-3 * images(torch.device("cpu"), 2, 8)):
        with getattr(methods, method)(model, "2", batch_size=4) as extractor, torch.no_grad():
            model(x)
            extractor(1)


@pytest.mark.parametrize(("batch_size", "rows"), [(1, [1] * 7), (4, [4, 3]), (6, [6, 1]), (32, [7])])
def test_a_proof_is_one_row_more(batch_size: int, rows: list[int]) -> None:
    from torchcam.methods import ScoreCAM

    model = Limited(100).eval()
    with ScoreCAM(model, "features", batch_size=batch_size) as extractor, torch.no_grad():
        model(images(torch.device("cpu"), 1, 8))
        model.seen.clear()
        extractor(1)
    assert list(model.seen) == rows
    assert sum(rows) == 6 + 1


class Changing(nn.Module):
    """A model whose scores depend on what it keeps: numbers, tensors, containers, parameters, buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 4)
        self.scale = 1.0
        self.shift = torch.zeros(4)
        self.factors: list[float] = []
        self.powers: dict[str, float] = {}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.conv(x)).relu().mean((2, 3))
        scores: Tensor = self.head(features) * self.scale + self.shift
        for factor in (*self.factors, *self.powers.values()):
            scores = scores * factor
        return scores


def _normed(model: Changing, data: Tensor) -> None:
    with torch.no_grad():
        data.copy_(torch.linspace(-1, 1, 5))


CHANGES: dict[str, Callable[[Changing], Any]] = {
    "nothing": lambda model: None,
    "a number": lambda model: setattr(model, "scale", -2.0),
    "a tensor": lambda model: setattr(model, "shift", torch.arange(4.0)),
    "a tensor, in place": lambda model: model.shift.copy_(torch.arange(4.0)),
    "a list": lambda model: model.factors.append(-3.0),
    "a mapping": lambda model: model.powers.update(a=-3.0),
    "a buffer, in place": lambda model: _normed(model, model.norm.running_mean),
    "a buffer, unseen by its version": lambda model: _normed(model, model.norm.running_mean.data),
    "a parameter": lambda model: setattr(model.head, "weight", nn.Parameter(-model.head.weight.detach())),
    "a parameter, in place": lambda model: model.head.weight.data.neg_(),
    "a module": lambda model: setattr(model, "norm", nn.Identity()),
    "a hook": lambda model: model.head.register_forward_hook(lambda _m, _a, output: -output),
    "a forward": lambda model: setattr(model.head, "forward", lambda x: nn.Linear.forward(model.head, x).neg()),
}


@pytest.mark.parametrize("method", ["ScoreCAM", "AblationCAM"])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_replica_that_is_kept_is_as_the_model_is(change: str, method: str) -> None:
    """What runs in a later call is the model as it is then, whatever has changed since the last one."""
    from torchcam import methods

    model, x = Changing(), images(torch.device("cpu"), 1, 8)

    def cams(extractor: Any) -> Tensor:
        model(x)
        return extractor(1, normalized=False)[0]

    with torch.no_grad(), getattr(methods, method)(model, "conv") as extractor:
        first, again = cams(extractor), cams(extractor)
        CHANGES[change](model)
        changed = cams(extractor)
        with getattr(methods, method)(model, "conv") as fresh:
            expected = cams(fresh)
    assert torch.equal(first, again)
    assert torch.equal(changed, expected)
    assert torch.equal(changed, first) == (change == "nothing")


def test_replicas_are_kept_between_calls_and_no_longer() -> None:
    from torchcam.methods import ScoreCAM

    x, made = images(torch.device("cpu"), 1, 8), []

    class Counted(nn.Flatten):
        def forward(self, x: Tensor) -> Tensor:
            made.append(weakref.ref(self))
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), Counted(), nn.Linear(5, 4)).eval()
    extractor = ScoreCAM(model, "0")
    with torch.no_grad():
        for _ in range(3):
            model(x)
            extractor(1)
    modules = {reference() for reference in made}
    assert len(modules) == 2
    assert model[2] in modules
    modules.clear()
    extractor.remove_hooks()
    assert {reference() for reference in made} == {model[2], None}


def test_inputs_of_a_kept_replica_are_not_held() -> None:
    from torchcam.methods import ScoreCAM

    x, seen = images(torch.device("cpu"), 1, 8), []

    class First(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(weakref.ref(x))
            return super().forward(x)

    model = nn.Sequential(First(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    with ScoreCAM(model, "0") as extractor, torch.no_grad():
        for _ in range(3):
            model(x)
            extractor(1)
        assert {reference() for reference in seen} == {x, None}


@pytest.mark.parametrize("where", ["attribute", "mapping", "list"])
@pytest.mark.parametrize("method", ["ScoreCAM", "AblationCAM"])
def test_what_a_model_keeps_of_variants_is_not_held(method: str, where: str) -> None:
    from torchcam import methods

    made: list[weakref.ref[Tensor]] = []

    class Keeping(nn.Flatten):
        def __init__(self) -> None:
            super().__init__()
            self.attribute: Tensor | None = None
            self.mapping: dict[str, Tensor] = {}
            self.list: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            kept = super().forward(x).clone()
            made.append(weakref.ref(kept))
            if where == "attribute":
                self.attribute = kept
            elif where == "mapping":
                self.mapping["last"] = kept
            else:
                self.list[:] = [kept]
            return kept + 0

    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Keeping(), nn.Linear(5, 4)).eval()
    with getattr(methods, method)(model, "0") as extractor, torch.no_grad():
        for _ in range(2):
            model(images(torch.device("cpu"), 1, 8))
            extractor(1)
        gc.collect()
        assert [len(kept) for reference in made if (kept := reference()) is not None] == [1]  # the model's own
