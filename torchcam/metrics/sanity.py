"""Sanity checks: the dependence of maps on the parameters of the model and on the explained class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchcam._checks import positive_integer
from torchcam._passes import model_device
from torchcam._tensors import seeded
from torchcam.layers import TargetLayer, layer_names
from torchcam.methods.core import on_replica
from torchcam.targets import class_scores

from ._statistics import cosine, spearman, structural_similarity
from .core import UNIT, CAMMetric, Explained, Extractor, Keys, LogitsFn, check_seed


class SanityCheck(CAMMetric):
    r"""Similarity of maps to those of a randomised model, and of the maps of two classes.

    From "Sanity checks for saliency maps" (Adebayo et al. 2018, arXiv:1810.03292), cascading randomisation: the layers
    are randomised from the top of the model on, one more at each stage and all those before staying so, and the maps of
    each stage, for the class explained at first, are compared with those of the model as it is.

    * ``rank_correlation``: Spearman's correlation of the maps' positions, equals sharing their mean rank; 0 with a
      constant map
    * ``ssim``: the structural similarity of the maps (Wang et al. 2004), Gaussian window of 11 pixels and σ 1.5
    * ``class_overlap``: the cosine between the maps of the classes with the two highest scores, of the model as it is;
      NaN if there is only one class

    ``compute`` gives the means over the samples (and stages), ``by_layer`` the first two for each stage. The first two
    lie in [-1, 1], the third, for maps that are not negative, in [0, 1]. A good map has low values; a class-agnostic
    one has a ``class_overlap`` of 1, and one that ignores the weights a ``rank_correlation`` of 1.

    A parameter is randomised by values drawn from the normal distribution with its own mean and standard deviation, so
    that activations keep about their scale; buffers stay. The draw is the same for every batch. It is a replica of the
    model, with parameters of its own, that is randomised: the model keeps its parameter objects with the same values,
    versions and gradients. Only with an extractor that is not of this library, the parameters of the model itself are
    replaced while the maps are computed, and restored afterwards.

    Samples whose maps or scores are not finite are left out: ``nan_count`` says how many, ``total`` how many are in
    the means.

    Cost: for each batch a forward pass and what the extractor needs, once more for every layer, and twice more for the
    two classes.

    Args:
        cam_extractor: an extractor of this library, or any object with ``model``, ``__call__`` and ``fuse_cams``; a
            model and given maps are not enough, as the model's variants are explained as well
        logits_fn: function from the model's output to the scores (N, classes), such as a softmax; by default the
            scores are the output
        layers: the modules to randomise with all that is in them, or their names, from the top on; by default those
            directly inside the model that have parameters, the last one first; where there is only one, those in it
        seed: the seed of the new parameters
        batch_size: largest number of inputs in one pass, the explained one aside
        kwargs: options of :class:`torchmetrics.Metric`, such as ``process_group``

    Attributes:
        layers: the names of the layers, in the order of the stages
        rank: the sum of the rank correlations so far, for each stage
        similarity: the sum of the structural similarities so far, for each stage
        overlap: the sum of the overlaps so far
        total: the number of samples in these sums
        nan_count: the number of samples left out

    Raises:
        TypeError: if an argument has the wrong type, or there is no extractor
        ValueError: if a layer is not in the model, none has parameters, or ``batch_size`` is not positive

    Example:
        >>> from torchcam.methods import LayerCAM
        >>> from torchvision.models import resnet18
        >>> with LayerCAM(resnet18(), "layer4") as extractor:
        ...     metric = SanityCheck(extractor, layers=["fc", "layer4"])
        ...     metric.update(torch.rand(2, 3, 64, 64))
        >>> sorted(metric.summary())
        ['class_overlap', 'rank_correlation', 'ssim']
    """

    _keys: ClassVar[Keys] = {
        "rank_correlation": ("rank", False, (-1.0, 1.0)),
        "ssim": ("similarity", False, (-1.0, 1.0)),
        "class_overlap": ("overlap", False, UNIT),
    }
    _more_sums = ("single",)
    _explains_again = True
    _masks_with_maps = True

    def __init__(
        self,
        cam_extractor: Extractor,
        logits_fn: LogitsFn | None = None,
        *,
        layers: TargetLayer | Sequence[TargetLayer] | None = None,
        seed: int = 0,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        model = getattr(cam_extractor, "model", None)
        self.layers = _layers_from_the_top(model, layers) if isinstance(model, nn.Module) else ()
        super().__init__(cam_extractor, logits_fn, **kwargs)
        for name in ("rank", "similarity"):
            self.add_state(name, torch.zeros(len(self.layers), dtype=torch.float64), dist_reduce_fx="sum")
        self.seed = check_seed(seed)
        self.batch_size = positive_integer("batch_size", batch_size)

    def compute(self) -> dict[str, Tensor]:
        """Return ``rank_correlation``, ``ssim`` and ``class_overlap`` of the samples so far."""
        means = super().compute()
        means["class_overlap"] = torch.where(self.single > 0, torch.nan, means["class_overlap"])
        return means

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Return ``rank_correlation`` and ``ssim`` of each stage, by the layer that was randomised last."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            stages = (torch.stack([self.rank, self.similarity], 1) / self.total).tolist()
        return {
            layer: dict(zip(("rank_correlation", "ssim"), stage, strict=True))
            for layer, stage in zip(self.layers, stages, strict=True)
        }

    def _measure(self, explained: Explained) -> dict[str, Tensor]:
        def alike(again: Tensor, samples: Tensor, _variants: Tensor) -> Tensor:
            cam = explained.cam[samples]
            return torch.stack([spearman(again, cam), structural_similarity(again, cam)], 1)

        def same(samples: Tensor, _variants: Tensor) -> Tensor:
            return explained.image[samples]

        overlap, single = self._overlap(explained, same)
        stages = []
        with on_replica(explained.extractor) as own, _parameters_replaced(own.model) as replace:
            generator = seeded(self.seed, model_device(own.model))
            for layer in self.layers:
                replace(own.model.get_submodule(layer), generator)
                stages.append(explained.explain_again(same, alike, 1, self.batch_size, extractor=own))
        rank, similarity = torch.cat(stages, 1).unbind(2)  # (N, stages) each
        return {"rank": rank, "similarity": similarity, "overlap": overlap, "single": single}

    def _overlap(self, explained: Explained, same: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return each sample's overlap of the maps of two classes, and whether there is only one."""
        try:
            scores = class_scores(explained.output)
        except TypeError:  # the output of a detector holds no class scores
            scores = explained.score.unsqueeze(1)
        if scores.shape[1] < 2 or len(scores) != len(explained.image):
            nothing = torch.zeros_like(explained.score)
            return nothing, nothing + 1
        best = scores.topk(2, dim=1).indices

        def keep(again: Tensor, _samples: Tensor, _variants: Tensor) -> Tensor:
            return again

        maps = [
            explained.explain_again(same, keep, 1, self.batch_size, classes=best[:, rank, None]).squeeze(1)
            for rank in range(2)
        ]
        return cosine(*maps), torch.zeros_like(explained.score)


def _layers_from_the_top(model: nn.Module, layers: Any) -> tuple[str, ...]:
    """Return the names of the layers to randomise, the last one first.

    Raises:
        ValueError: if there are none, or one has no parameters
    """
    if layers is None:
        prefix, found = "", [""]
        while len(found) == 1 and (children := _with_parameters(model.get_submodule(prefix), prefix)):
            found = children
            prefix = found[0]
        layers = found[::-1]
        if not _has_parameters(model):
            raise ValueError(f"{type(model).__name__} has no parameters that could be randomised")
        return tuple(layers)
    try:
        names = tuple(layer_names(model, layers))
    except ValueError as error:
        raise ValueError(str(error).replace("`target_layer`", "`layers`")) from None
    bare = [name for name in names if not _has_parameters(model.get_submodule(name))]
    if bare:
        raise ValueError(f"`layers` must be modules with parameters, got {bare}")
    return names


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _with_parameters(module: nn.Module, prefix: str) -> list[str]:
    return [f"{prefix}.{name}".lstrip(".") for name, child in module.named_children() if _has_parameters(child)]


@contextmanager
def _parameters_replaced(model: nn.Module) -> Iterator[Callable[[nn.Module, torch.Generator], None]]:
    """Return a function that replaces the parameters of a part of ``model`` with random ones, until the block ends."""
    own = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    attributes = [item for module in model.modules() for item in vars(module).items()]
    caches = [(value, dict(value)) for name, value in attributes if type(value) is dict and not name.startswith("_")]
    drawn: dict[nn.Parameter, nn.Parameter] = {}

    def replace(part: nn.Module, generator: torch.Generator) -> None:
        inside = set(part.modules())
        for parameter in {parameter: None for module, _, parameter in own if module in inside}:
            if parameter not in drawn:
                drawn[parameter] = _random_like(parameter, generator)
        for module, name, parameter in own:  # a parameter that two modules share stays shared
            if parameter in drawn:
                setattr(module, name, drawn[parameter])
        for cache, items in caches:  # computed from the model's own parameters
            for key in [key for key, item in items.items() if isinstance(item, Tensor)]:
                cache.pop(key, None)

    try:
        yield replace
    finally:
        for module, name, parameter in own:
            if module._parameters[name] is not parameter:
                setattr(module, name, parameter)
        for cache, items in caches:
            cache.update(items)


def _random_like(parameter: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    """Draw a parameter from the normal distribution with the mean and the standard deviation of another."""
    values = parameter.detach()
    if not (values.is_floating_point() and values.numel()):
        return parameter
    noise = torch.randn(values.shape, generator=generator, device=generator.device).to(values)
    new = values.mean() + values.std(correction=0) * noise
    return nn.Parameter(new, requires_grad=parameter.requires_grad)
