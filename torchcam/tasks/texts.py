"""Which part of an image fits a text: models with an image and a text tower, as classifiers of texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcam._inputs import split_processor
from torchcam._passes import model_device
from torchcam._replica import normal_mode, replicated
from torchcam._tensors import map_tensors

from ._patches import PatchTransform, as_patches, from_patches

__all__ = ["Texts", "ZeroShotClassifier", "as_images", "as_texts", "own_scores"]

_TOWERS = (("get_image_features", "get_text_features"), ("encode_image", "encode_text"))  # transformers, open_clip
_OWN = "own_logits"


class ZeroShotClassifier(nn.Module):
    r"""The classifier of texts that a model with two towers is: :math:`s\,\hat e(x)\,\hat t_c + b` for each text c.

    It holds the modules of the model under their own names, without those that only read texts.

    Args:
        model: the model
        texts: the embedded texts
    """

    embeddings: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, model: nn.Module, texts: Texts) -> None:
        super().__init__()
        self.encode = _tower(model)[0]  # a bound method: a replica has that of the model's replica
        self.patch_size = _patch_size(model)
        for name, child in _holder(model).named_children():
            if name not in texts.text_only:
                self.add_module(name, child)
        self.register_buffer("embeddings", texts.embeddings)
        self.register_buffer("scale", texts.scale)
        self.register_buffer("bias", texts.bias)
        self.against_others = texts.against_others

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        """Return the scores of the texts, (N, texts); against others, each less the mean, with the model's own."""
        if self.patch_size is not None:
            args, kwargs = (), as_patches(*args, size=self.patch_size, **kwargs)
        image = F.normalize(_features(self.encode(*args, **kwargs)), dim=-1)  # (N, D)
        own = self.scale * image @ self.embeddings.T + self.bias
        # Less the mean of all: n / (n - 1) times smaller than less that of the others, with the softmax of the model.
        return {"logits": own - own.mean(1, keepdim=True), _OWN: own} if self.against_others else own


def own_scores(output: Any) -> Any:
    """Return the model's own scores, where an output holds others that are explained."""
    return output[_OWN] if isinstance(output, Mapping) and _OWN in output else output


@dataclass(frozen=True)
class Texts:
    """Texts as a model embeds them.

    Attributes:
        names: the texts
        embeddings: their embeddings of length 1, (texts, D)
        scale: the factor of the similarities
        bias: what is added to them
        to_probabilities: the sigmoid for models that judge each text by itself, as those with a bias do; None for a
            softmax
        against_others: whether the score of a text is explained less the mean of the others
        text_only: the names of the model's children that read texts
    """

    names: tuple[str, ...]
    embeddings: Tensor
    scale: Tensor
    bias: Tensor
    to_probabilities: Callable[[Tensor], Tensor] | None
    against_others: bool
    text_only: frozenset[str]

    def classifier(self, model: nn.Module) -> ZeroShotClassifier:
        """Return the model as a classifier of the texts; it shares the model's modules."""
        return ZeroShotClassifier(model, self)


def as_images(model: nn.Module, given: Any, transform: Any, processor: Any) -> tuple[Any, Any]:
    """Return the input of the classifier and the transform of its images, from those of the model.

    A model that takes patches is a classifier of the images that they are of.

    Raises:
        ValueError: if the input holds tokens of texts
    """
    if isinstance(given, Mapping) and "input_ids" in given:
        raise ValueError(
            f"`input_tensor` holds tokens of texts beside the image, {sorted(given)}: leave them out, the texts are "
            "those of `texts`"
        )
    size = _patch_size(model)
    if size is None:
        return given, transform
    if isinstance(given, Mapping):
        given = from_patches(given, size)
    if transform is None and processor is not None:
        transform = split_processor(processor)[0]
    return given, PatchTransform(transform, size) if hasattr(transform, "model_input_names") else transform


def as_texts(
    model: nn.Module,
    given: Any,
    texts: Sequence[str] | None,
    against: Literal["others"] | None,
    targets: Any,
    processor: Any,
    batch_size: int,
) -> Texts | None:
    """Embed the texts that an image is compared with; None without texts.

    Args:
        model: a model with an image and a text tower
        given: its input
        texts: the texts
        against: ``"others"`` to explain the score of a text less the mean of the others
        targets: what is explained in place of texts, if anything
        processor: a processor or tokenizer of transformers, or a function from a list of texts to what the text tower
            takes
        batch_size: the largest number of texts in one pass

    Raises:
        TypeError: if an argument has the wrong type, or the model has no two towers
        ValueError: if there are no texts, one is empty or there twice, ``against`` has nothing to compare with, there
            is no tokenizer, or it is that of another model
    """
    if texts is None:
        if against is not None:
            raise ValueError(f"`against` is {against!r}, but there are no `texts` to compare: pass `texts=[...]`")
        if _tower_names(model) == _TOWERS[0] and _scale(model) is not None and not isinstance(given, Mapping):
            raise ValueError(f"{type(model).__name__} compares images with texts: pass `texts=[...]` and `processor=`")
        return None
    names = _checked(texts)
    if against not in {None, "others"}:
        raise ValueError(f"`against` must be 'others' or None, got {against!r}")
    if against is not None and len(names) < 2:
        raise ValueError("`against` is 'others', but `texts` has one text alone: add texts to compare it with")
    if against is not None and targets is not None:
        raise ValueError("give `against` or `targets`, not both: say torchcam.targets.Contrast as a target")
    scale = _scale(model)
    if _tower_names(model) is None or scale is None:
        raise TypeError(
            "`texts` need a model with an image and a text tower and their scale (CLIP, SigLIP, ChineseCLIP of "
            f"transformers, models of open_clip), which {type(model).__name__} is not: leave `texts` out, or pass "
            "`targets`, say torchcam.targets.Similarity of an embedding"
        )
    tokenizer = None if processor is None else split_processor(processor)[1]
    if tokenizer is None:
        raise ValueError(
            "`texts` need a tokenizer: pass `processor=AutoProcessor.from_pretrained(...)` (transformers), "
            "`processor=open_clip.get_tokenizer(...)`, or a function from a list of texts to what the text tower takes"
            + (f"; {type(processor).__name__} reads images only" if processor is not None else "")
        )
    bias = getattr(model, "logit_bias", None)
    tokens = _tokens(model, tokenizer, names, padded=bias is not None)
    embeddings, text_only = _embedded(model, tokens, len(names), batch_size)
    return Texts(
        names,
        F.normalize(embeddings, dim=-1),
        scale.detach().exp(),
        torch.zeros_like(scale) if bias is None else bias.detach().clone(),
        None if bias is None else torch.sigmoid,
        against is not None,
        text_only,
    )


def _checked(texts: Any) -> tuple[str, ...]:
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`texts` must be a list of strings, such as ['a cat', 'a dog'], got {texts!r}")
    wrong = [text for text in texts if not text.strip() or texts.count(text) > 1]
    if wrong or not texts:
        found = f"{wrong[0]!r} at place {texts.index(wrong[0])}" if wrong else "none"
        raise ValueError(f"`texts` must name at least one text, each of them once and not empty, got {found}")
    return tuple(texts)


def _tower_names(model: nn.Module) -> tuple[str, str] | None:
    return next((names for names in _TOWERS if all(callable(getattr(model, name, None)) for name in names)), None)


def _scale(model: nn.Module) -> Tensor | None:
    """Return the logarithm of the factor of the similarities."""
    scale = getattr(model, "logit_scale", None)
    return scale if isinstance(scale, Tensor) else None


def _tower(model: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the methods that embed images and texts."""
    names = _tower_names(model)
    assert names is not None  # noqa: S101 - for the type checker: `as_texts` has seen to it
    return getattr(model, names[0]), getattr(model, names[1])


def _holder(model: nn.Module) -> nn.Module:
    """Return the module that has the towers: a wrapper, as of PEFT, hands on the methods of what it wraps."""
    holder: nn.Module = getattr(_tower(model)[0], "__self__", model)
    return holder


def _patch_size(model: nn.Module) -> int | None:
    """Return the size of the patches that a model takes in place of an image, None for an image."""
    config: Any = getattr(model, "config", None)
    takes_patches = "spatial_shapes" in inspect.signature(_tower(model)[0]).parameters
    return int(config.vision_config.patch_size) if takes_patches else None


def _features(output: Any) -> Tensor:
    """Return the embeddings (N, D) in what a tower returned."""
    features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(output).__name__
        raise TypeError(f"`texts` need towers that give one embedding for each sample, (N, D), got {found}")
    return features


def _tokens(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, padded: bool) -> Any:
    """Return what the text tower takes: a tensor, or a mapping of its keyword arguments."""
    if not hasattr(tokenizer, "model_input_names"):
        tokens = tokenizer(list(texts))
    else:
        config = getattr(getattr(model, "config", None), "text_config", None)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None:
            for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
                if len(ids) > longest:
                    raise ValueError(f"`texts` holds one of {len(ids)} tokens, {text!r}: the model reads {longest}")
        # SigLIP was trained on texts padded to their full length.
        padding = {"padding": "max_length", "max_length": longest} if padded and longest else {"padding": True}
        tokens = dict(tokenizer(list(texts), return_tensors="pt", **padding))
    ids = tokens.get("input_ids") if isinstance(tokens, Mapping) else tokens
    if not isinstance(ids, Tensor) or len(ids) != len(texts):
        raise TypeError(
            f"`processor` must make a tensor of {len(texts)} rows of `texts`, or a mapping with `input_ids`, got "
            f"{tuple(ids.shape) if isinstance(ids, Tensor) else type(tokens).__name__}"
        )
    return map_tensors(lambda tensor: tensor.to(model_device(model)), tokens)


def _embedded(model: nn.Module, tokens: Any, count: int, batch_size: int) -> tuple[Tensor, frozenset[str]]:
    """Return the embeddings of the texts (texts, D), and the names of the children that have read them."""
    readers: set[str] = set()

    def note(name: str, *_: Any) -> None:
        readers.add(name.partition(".")[0])

    found = []
    with replicated(model) as replica, normal_mode(graph=False):
        for name, module in _holder(replica).named_modules():
            if name:
                module.register_forward_hook(partial(note, name))
        encode = _tower(replica)[1]
        for start in range(0, count, batch_size):
            rows = map_tensors(lambda tensor, s=start: tensor[s : s + batch_size], tokens)  # type: ignore[misc]
            try:
                features = encode(**rows) if isinstance(rows, Mapping) else encode(rows)
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"the text tower of {type(model).__name__} does not take the tokens of `processor`, which may be "
                    f"that of another model: pass the model's own ({type(error).__name__}: {error})"
                ) from error
            found.append(_features(features))
    return torch.cat(found), frozenset(readers)
