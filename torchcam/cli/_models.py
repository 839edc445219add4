"""The model of a command: one of torchvision, or the user's own."""

from __future__ import annotations

import io
import pkgutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcam._extras import extra
from torchcam._names import closest

from ._messages import UserError
from ._options import ARCH

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from torchcam._inputs import Inputs

SEED = 0
SEED_CODE = f"import torch\n\ntorch.manual_seed({SEED})\n"
RANDOM = f"random weights (seed {SEED})"
TIMM_NAMES = """\
names = timm.data.ImageNetInfo(timm.data.infer_imagenet_subset(model)).label_descriptions()
class_names = [name.partition(",")[0] for name in names]
"""
RANDOM_WEIGHTS = "The weights are random: these maps say nothing of what is in an image."


@dataclass(frozen=True)
class Classifier:
    """A model, ready to run.

    Attributes:
        model: the model, in evaluation mode
        name: architecture and weights
        preprocess: the transform from a PIL image to an input (C, H, W), or an image processor of transformers
        categories: the names of the classes, if they are known
        is_random: whether the weights are random
        code: the lines of Python that make ``model``, ``transform`` and, if they are known, ``class_names``
        processor: of transformers, what reads texts, or makes boxes of a detector's outputs
    """

    model: nn.Module
    name: str
    preprocess: Any
    categories: Sequence[str] | None = None
    is_random: bool = False
    code: str = ""
    processor: Any = None

    @property
    def file_name(self) -> str:
        """The name as a part of a file's name: the model, and its weights unless they are the usual ones."""
        place, _, weights = self.name.partition(", ")
        usual = not weights or weights in {"weights of timm", "its weights"} or weights.startswith("weights IMAGENET1K")
        told = "" if usual else "-random" if self.is_random else f"-{Path(weights.removeprefix('weights ')).stem}"
        return f"{place if ':' in place else Path(place).name}{told}".replace(":", ".")

    @property
    def blank(self) -> Tensor:
        """An input (C, H, W) made of a black image."""
        from PIL import Image

        return self.read([Image.new("RGB", (256, 256))]).tensor[0]

    @property
    def facts(self) -> dict[str, Any]:
        """The model, as the results for other programs name it."""
        return {"model": self.name, "random_weights": self.is_random}

    def read(self, images: Sequence[Image.Image]) -> Inputs:
        """Make inputs of images, all of one size after the transform, on the model's device."""
        from torchcam._inputs import read_inputs

        return read_inputs(self.model, list(images), self.preprocess)


def load_model(arguments: Any, weights: str = "DEFAULT") -> Classifier:
    """Load the model that the arguments name, on its device, with those weights where they name none."""
    ways = {"--arch": arguments.arch, "--timm": arguments.timm, "--hf": arguments.hf}
    given = [way for way, value in {**ways, "--model-factory": arguments.model_factory}.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"give {' or '.join(given)}, not both: each names a model")
    device = find_device(arguments.device)
    weights = arguments.weights or weights
    if arguments.model_factory is not None:
        classifier = load_own(arguments.model_factory, arguments.weights)
    elif arguments.timm is not None:
        classifier = load_timm(arguments.timm, weights)
    elif arguments.hf is not None:
        classifier = load_hf(arguments.hf, weights, arguments.texts, boxes=bool(arguments.box))
    else:
        classifier = load_classifier(arguments.arch or ARCH, weights)
    classifier.model.to(device)
    return classifier


def find_device(name: str) -> torch.device:
    """Check that a device is there."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def load_own(factory: str, weights: str | None = None) -> Classifier:
    """Call the function that `--model-factory` names."""
    from torch import nn
    from torchvision.transforms._presets import ImageClassification

    made = _find_function(factory)()
    model, preprocess, categories = (*(made if isinstance(made, tuple) else (made,)), None, None)[:3]
    fits = isinstance(model, nn.Module) and (preprocess is None or callable(preprocess))
    if not fits or isinstance(categories, str) or not all(isinstance(name, str) for name in categories or ()):
        kinds = ", ".join(type(one).__name__ for one in (model, preprocess, categories) if one is not None)
        raise UserError(
            f"--model-factory '{factory}' must return a torch.nn.Module, or with it a transform (a function) and the "
            f"class names (a list of strings), got {kinds}"
        )
    name = factory
    if weights is not None:
        _set_state(model, weights, factory)
        name = f"{factory}, weights {Path(weights).name}"
    module, _, function = factory.partition(":")
    result = f"(*{function}(), None, None)[:3]" if isinstance(made, tuple) else f"{function}(), None, None"
    code = f"from {module} import {function.partition('.')[0]}\n\nmodel, transform, class_names = {result}\n"
    if preprocess is None:
        preprocess = ImageClassification(crop_size=224)
        code = f"from torchvision.transforms._presets import ImageClassification\n{code}"
        code += "transform = ImageClassification(crop_size=224)\n"
    code += _state_code(weights) + "model.eval()\n"
    return Classifier(model.eval(), name, preprocess, None if categories is None else list(categories), code=code)


def _find_function(path: str) -> Callable[[], Any]:
    here = str(Path.cwd())
    if here not in sys.path:  # an installed script does not look there by itself
        sys.path.insert(0, here)
    try:
        found: Any = pkgutil.resolve_name(path)
    except (AttributeError, ImportError, ValueError) as error:
        raise UserError(
            f"--model-factory '{path}' cannot be found: {error}; name it as in package.module:function, of a module in "
            "the current directory or installed"
        ) from error
    if not callable(found):
        raise UserError(f"--model-factory '{path}' is not a function: {type(found).__name__}")
    function: Callable[[], Any] = found
    return function


def _library(name: str, option: str, way: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{option} needs {name}: {way}") from error


def load_timm(name: str, weights: str) -> Classifier:
    """Load a classification model of timm."""
    timm = _library("timm", "--timm", "pip install timm")
    arch, _, tag = name.partition(".")
    known = timm.list_models() if not timm.is_model(arch) else timm.list_pretrained(f"{arch}.*") if tag else [name]
    if name not in known:
        examples = known if timm.is_model(arch) else ["resnet50", "vit_base_patch16_224", "and more"]
        raise UserError(f"--timm '{name}' is not a model of timm; {closest(name, known, examples)}")
    is_random, is_pretrained = weights.lower() == "none", weights.upper() == "DEFAULT"
    with _making(f"--timm '{name}'"):
        model = timm.create_model(name, pretrained=is_pretrained)
    told, subset, state_code = "weights of timm", timm.data.infer_imagenet_subset(model), ""
    if is_random:
        told = RANDOM
    elif not is_pretrained:
        _set_state(model, weights, name, ["DEFAULT", "none"])
        told, subset, state_code = f"weights {Path(weights).name}", None, _state_code(weights)
    preprocess = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    names = timm.data.ImageNetInfo(subset).label_descriptions() if subset else []
    categories = [name.partition(",")[0] for name in names] or None
    code = (
        f"import timm\n\n{SEED_CODE if is_random else ''}"
        f"model = timm.create_model({name!r}, pretrained={is_pretrained})\n{state_code}model.eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)\n"
        f"{TIMM_NAMES if categories else ''}"
    )
    return Classifier(model.eval(), f"{name}, {told}", preprocess, categories, is_random, code)


def load_hf(place: str, weights: str, texts: Sequence[str] = (), *, boxes: bool = False) -> Classifier:
    """Load a model of transformers: an image classifier, one with two towers whose classes are texts, or a detector."""
    from torchcam._inputs import split_processor

    library = _library("transformers", "--hf", extra("transformers"))
    kind = "AutoModelForObjectDetection" if boxes else "AutoModelForImageClassification"
    auto, reader = ("AutoModel", "AutoProcessor") if texts else (kind, "AutoImageProcessor")
    if weights.lower() not in {"none", "default"}:
        raise UserError(f"--weights '{weights}': a model of --hf has the weights of its folder, or none")
    is_random = weights.lower() == "none"
    with _making(f"--hf '{place}'"):
        processor = getattr(library, reader).from_pretrained(place)
        if is_random:
            model = getattr(library, auto).from_config(library.AutoConfig.from_pretrained(place))
        else:
            model = getattr(library, auto).from_pretrained(place)
    name = f"{place}, {RANDOM if is_random else 'its weights'}"
    if texts:
        return Classifier(
            model.eval(), name, split_processor(processor)[0], list(texts), is_random, processor=processor
        )
    labels = model.config.id2label
    categories = [str(labels[index]) for index in range(len(labels))]
    loader = f"from_config(AutoConfig.from_pretrained({place!r}))" if is_random else f"from_pretrained({place!r})"
    code = (
        f"from transformers import AutoConfig, AutoImageProcessor, {kind}\n\n"
        f"{SEED_CODE if is_random else ''}model = {kind}.{loader}.eval()\n"
        f"transform = AutoImageProcessor.from_pretrained({place!r})\n"
        "class_names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]\n"
    )
    return Classifier(model.eval(), name, processor, categories, is_random, code, processor if boxes else None)


def load_classifier(arch: str, weights: str) -> Classifier:
    """Load a classification model of torchvision."""
    from torchvision import models

    arch = arch.lower()
    known = models.list_models(module=models)
    if arch not in known:
        examples = ["resnet50", "mobilenet_v3_large", "convnext_tiny", "and more"]
        raise UserError(
            f"--arch '{arch}' is not a classification model of torchvision; {closest(arch, known, examples)}"
        )
    entries: Any = models.get_model_weights(arch)
    named = entries.__members__.get(weights.upper())
    entry = named or entries.DEFAULT
    is_random = weights.lower() == "none"
    if is_random:
        # These two warn that they take long to draw their own kind of random weights, unless told not to.
        options = {"init_weights": False} if arch in {"googlenet", "inception_v3"} else {}
        with _making(f"--arch '{arch}'"):
            model = models.get_model(arch, weights=None, **options)
        told = RANDOM
        code = f"{SEED_CODE}model = models.get_model({arch!r}{', init_weights=False' if options else ''})\n"
    else:
        if named is not None:
            state, told = _downloaded(arch, entry.url), f"weights {entry.name}"
            code = f"model = models.get_model({arch!r}, weights=weights)\n"
        else:
            state, told = _read_state(weights, [*entries.__members__, "none"]), f"weights {Path(weights).name}"
            code = f"model = models.get_model({arch!r})\n{_state_code(weights)}"
        # When torchvision loads weights it renames parameters of some models, and sets others up differently: let it.
        entries.get_state_dict = lambda *_args, **_kwargs: state
        try:
            with _fitting(weights, arch):
                model = models.get_model(arch, weights=entry)
        finally:
            del entries.get_state_dict
    code = (
        f"from torchvision import models\n\nweights = models.get_model_weights({arch!r}).{entry.name}\n"
        f"{code}model.eval()\n"
        'transform, class_names = weights.transforms(), weights.meta["categories"]\n'
    )
    return Classifier(model.eval(), f"{arch}, {told}", entry.transforms(), entry.meta["categories"], is_random, code)


@contextmanager
def _making(what: str) -> Iterator[None]:
    """Draw random weights from the seed, and raise a `UserError` of one line for a model that cannot be made."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise UserError(f"{what} could not be loaded: {reason}; --weights none takes random weights") from error


# Weights.


def _downloaded(arch: str, url: str) -> dict[str, Tensor]:
    """Return the weights that torchvision keeps in a file, after a download if there is none."""
    import torch

    shown = sys.stderr.isatty()
    log = sys.stderr if shown else io.StringIO()
    try:
        with redirect_stdout(log), redirect_stderr(log):
            return torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=shown, check_hash=True, weights_only=True
            )
    except Exception as error:  # unpickling can raise anything
        reason = getattr(error, "reason", error)
        raise UserError(
            f"the weights of {arch} could not be downloaded or read ({reason}): fetch {url} where there is a network "
            "and pass the file with --weights PATH, or try the command with --weights none (random weights)"
        ) from error


def _read_state(path: str, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """Read a state dict; the names are those that ``--weights`` takes besides files."""
    import torch

    if not Path(path).is_file():
        others = "".join(f", nor {name}" for name in names)
        raise UserError(f"--weights '{path}' is not a file{others}")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError("it holds something else")  # noqa: TRY301 - one message for all
    except Exception as error:  # unpickling arbitrary bytes can raise anything
        raise UserError(
            f"--weights '{path}' must hold a state dict, written by torch.save(model.state_dict(), PATH) "
            f"({type(error).__name__})"
        ) from error
    return state


def _set_state(model: nn.Module, weights: str, name: str, names: Iterable[str] = ()) -> None:
    """Load the weights of a file into a model."""
    state = _read_state(weights, names)
    with _fitting(weights, name):
        model.load_state_dict(state)


def _state_code(weights: str | None) -> str:
    if weights is None:
        return ""
    return f"import torch\n\nmodel.load_state_dict(torch.load({weights!r}, map_location='cpu', weights_only=True))\n"


@contextmanager
def _fitting(path: str, model: str) -> Iterator[None]:
    """Raise a `UserError` of one line for a state dict that does not fit."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        problems = str(error).split("\n\t")[1:] or [str(error)]
        shown = "; ".join(textwrap.shorten(problem, 160, placeholder=" ...").rstrip(". ") for problem in problems[:2])
        more = f"; and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise UserError(f"--weights '{path}' does not fit {model}: {shown}{more}") from error
