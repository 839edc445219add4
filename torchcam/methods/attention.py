"""Methods that read attention probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchcam._checks import callable_object, integer, one_of
from torchcam._replica import normal_mode, replicate
from torchcam._tensors import to_float
from torchcam.layers import TargetLayer
from torchcam.layout import patch_grid

from ._gradients import differentiate
from ._recorder import Pass, Recorder, Row
from ._running import thread
from ._watched import AttentionWatched, BlockStarts, Watch
from .core import _CAM, Request


class _AttentionCAM(_CAM):
    """What the methods share that read the attention probabilities of blocks.

    While a target layer runs, its attention is computed explicitly, and the probabilities are noted: those of
    :class:`torch.nn.MultiheadAttention`, of ``F.scaled_dot_product_attention`` and of a softmax (``torchvision``,
    ``timm``, ``transformers``), found by what is computed and not by the name of a class. Outputs agree with those of
    fused attention to float rounding. All other layers run as they are.
    """

    _keeps_outputs = True
    looks_at_a_layer = False

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        prefix_tokens: int = 1,
        grid_shape: tuple[int, int] | None = None,
        enable_hooks: bool = True,
        input_name: str | None = None,
        input_index: int | None = None,
        gradients: None = None,
    ) -> None:
        if grid_shape is not None and (len(grid_shape) != 2 or min(grid_shape) < 1):
            raise ValueError(f"`grid_shape` must be (height, width), both positive, got {grid_shape!r}")
        self.prefix_tokens = integer("prefix_tokens", prefix_tokens, 0)
        self.grid_shape = grid_shape
        super().__init__(
            model,
            model if target_layer is None else target_layer,
            input_shape,
            enable_hooks,
            input_name=input_name,
            input_index=input_index,
            gradients=gradients,
        )

    def _recording(self, model: nn.Module, names: Sequence[str], **options: Any) -> Recorder:
        for name in names:
            layer = model.get_submodule(name)
            if type(layer).__module__.startswith("torch.nn.") and next(layer.children(), None) is None:
                raise ValueError(
                    f"`target_layer` '{name}', a {type(layer).__name__}, computes no attention: "
                    f"{type(self).__name__} reads the blocks of a vision transformer"
                )
        everywhere = list(names) == [""]
        differentiates = self._differentiates

        def watching(started: Pass, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            started.watch = Watch(started, differentiates, everywhere)
            thread.watches.append(started.watch)
            try:
                with AttentionWatched() if len(thread.watches) == 1 else nullcontext():
                    return run(*args, **kwargs)
            finally:
                thread.watches.remove(started.watch)
                started.watch = None

        recorder = Recorder(
            model,
            names,
            differentiates=differentiates,
            reads_attention=True,
            keeps_outputs=self._keeps_outputs,
            around=watching,
            ended=self._keep_attentions,
            **options,
        )
        for index, layer in enumerate([] if everywhere else recorder.layers):
            recorder.handles.append(layer.register_forward_pre_hook(BlockStarts(recorder, index, True)))
            recorder.handles.append(layer.register_forward_hook(BlockStarts(recorder, index, False), prepend=True))
        return recorder

    @staticmethod
    def _keep_attentions(ended: Pass) -> None:
        """Take what methods look at from the noted attention, when the model has returned."""

    def _activations(self, request: Request) -> list[Tensor]:
        self._check_attention(request.recorded)
        return super()._activations(request)

    def _check_attention(self, recorded: Pass) -> None:
        """Check that each block computed attention, and none to other tokens than its own."""
        for name, noted in zip(self.target_names, recorded.attentions, strict=True):
            crossed = [tuple(one.shape) for one in noted or () if one.is_meta]
            if crossed:
                raise ValueError(
                    f"`target_layer` '{name}' computes cross-attention, of shapes {crossed}, (..., queries, keys): "
                    f"{type(self).__name__} reads attention among the tokens of a block, so name blocks without it"
                )
            if noted == []:
                raise ValueError(
                    f"`target_layer` '{name}' computed no attention between all tokens that can be read, by a softmax "
                    "or by F.scaled_dot_product_attention"
                )

    def _batch_dimension(self, recorded: Pass, tensor: Tensor, name: str) -> int:
        return 0

    def _on_grid(self, recorded: Pass, tokens: Tensor) -> Tensor:
        """Lay out (..., tokens) as (..., height, width), without the prefix."""
        patches = tokens[..., self.prefix_tokens :]
        count = patches.shape[-1]
        shape = recorded.input_shape
        try:
            grid = self.grid_shape or patch_grid(count, (count, count) if shape is None else shape[2:])
        except ValueError as error:
            raise ValueError(
                f"{error}: pass `grid_shape`, or another `prefix_tokens` than {self.prefix_tokens}"
            ) from error
        if grid[0] * grid[1] != count:
            raise ValueError(
                f"`grid_shape` {tuple(grid)} has {grid[0] * grid[1]} positions, but there are {count} patches"
            )
        return patches.reshape(*patches.shape[:-1], *grid)


class LeGrad(_AttentionCAM):
    r"""LeGrad (Bousselham et al. 2024, arXiv:2404.03214): positive gradients of a score for attention probabilities.

    For each target block :math:`l`, with :math:`s_l` the class score read from the tokens it returns and
    :math:`B_l` its attention probabilities, (N, heads, queries, keys):

    .. math::
        M = \frac{1}{L} \sum_l \operatorname{mean}_{h,q} \mathrm{ReLU}\Big(\frac{\partial s_l}{\partial B_l}\Big)

    over the keys that are patches. Blocks are those of ``torchvision``, ``timm``, ``transformers`` and whatever else
    returns tokens (N, tokens, channels) and computes one attention among them. The probabilities are computed beside
    fused attention, whose output stays as it is. Works with gradients on, under ``no_grad`` and under
    ``inference_mode``.

    Cost: the user's forward pass and, per block, a read-out and a backward pass through that block.

    Args:
        model: the vision transformer
        target_layer: the block(s), as modules or names
        score_projection: function from a block's tokens (N, tokens, channels) to class scores (N, classes); by default
            the model's own final norm and head on the mean token, as the authors do (the ``VisionTransformer`` of
            ``torchvision`` and of ``timm``, ``...ForImageClassification`` of ``transformers``)
        prefix_tokens: number of tokens before the patches
        grid_shape: the patches' (height, width); by default the grid with the input's aspect ratio
        enable_hooks: whether forward passes are recorded from the start
        gradients: None; there so that the error for methods without a choice says what exists

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if a block has no attention, or the model no known read-out

    Example:
        >>> from torchvision.models import vit_b_16
        >>> model = vit_b_16().eval()
        >>> with LeGrad(model, list(model.encoder.layers)[-4:]) as extractor, torch.inference_mode():
        ...     scores = model(torch.rand(1, 3, 224, 224))
        ...     (cam,) = extractor(0, scores)
        >>> cam.shape
        torch.Size([1, 14, 14])
    """

    _differentiates = True

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer],
        *,
        score_projection: Callable[[Tensor], Tensor] | None = None,
        prefix_tokens: int = 1,
        grid_shape: tuple[int, int] | None = None,
        enable_hooks: bool = True,
        gradients: None = None,
    ) -> None:
        if target_layer is None:
            raise TypeError("`target_layer` must name the transformer block(s) that LeGrad reads, got None")
        self.score_projection = callable_object("score_projection", score_projection, optional=True)
        if score_projection is None:
            _read_out(model)
        super().__init__(
            model,
            target_layer,
            prefix_tokens=prefix_tokens,
            grid_shape=grid_shape,
            enable_hooks=enable_hooks,
            gradients=gradients,
        )

    @staticmethod
    def map(activation: Tensor, gradient: Tensor, to_grid: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean positive gradient for the attention (N, heads, queries, keys) by key, (N, *spatial).

        ``to_grid`` lays out keys (N, keys) on the grid.
        """
        return to_grid(gradient.relu().mean((1, 2)))

    def _to_grid(self, recorded: Pass, tensor: Tensor, name: str) -> Tensor:
        if tensor.ndim != 3:
            raise ValueError(
                f"`target_layer` '{name}' must return tokens (N, tokens, channels), got {tuple(tensor.shape)}"
            )
        return to_float(self._on_grid(recorded, tensor.mT))

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        recorded, select = request.recorded, self._selector(request)
        found = zip(
            self._activations(request), recorded.activations, recorded.attentions, self.target_names, strict=True
        )
        evidence = []
        for grid, tokens, noted, name in found:
            if tokens is None or noted is None:
                raise RuntimeError(f"the attention of `target_layer` '{name}' was not computed in the recorded pass")
            if len(noted) > 1 or len(noted[0]) != len(tokens):
                raise ValueError(
                    f"`target_layer` '{name}' computes attention of shapes {[tuple(a.shape) for a in noted]}, where "
                    f"LeGrad reads blocks with one, between all tokens of {len(tokens)} samples"
                )
            with normal_mode():
                score = select(self._scores_of(tokens))
                wanted = [Row(name, name, noted[0], noted[0])]
                (gradient,) = differentiate(score, wanted, request.retain_graph, request.create_graph)
            evidence.append((grid, to_float(gradient), partial(self._on_grid, recorded)))
        return evidence

    def _check_scores(self, request: Request) -> None:
        request.check_recorded()  # each block has a score of its own

    def _scores_of(self, tokens: Tensor) -> Tensor:
        if self.score_projection is not None:
            return self.score_projection(tokens)
        scores = tokens.mean(1)
        for module in _read_out(self.model):
            scores = replicate(module)(scores)
        return scores

    def _pool_layers(self, maps: list[Tensor], request: Request) -> list[Tensor]:
        return [torch.stack(maps).mean(0)]


def _read_out(model: Any) -> list[nn.Module]:
    """Find the norm and the head that make class scores of a token, among the attributes of a vision transformer.

    Raises:
        ValueError: if the model is read out otherwise
    """
    norm, head = getattr(getattr(model, "encoder", None), "ln", None), getattr(model, "heads", None)
    if norm is not None and head is not None:  # torchvision
        return [norm, head]
    if all(isinstance(getattr(model, name, None), nn.Module) for name in ("norm", "fc_norm", "head")) and not any(
        getattr(model, name, None) is not None for name in ("attn_pool", "head_dist")
    ):  # timm: one of the norms comes before the pooling, the other after it, and either is an identity
        return [model.norm, model.fc_norm, model.head]
    norm = getattr(getattr(model, str(getattr(model, "base_model_prefix", None)), None), "layernorm", None)
    head = getattr(model, "classifier", None)
    if isinstance(norm, nn.LayerNorm) and isinstance(head, nn.Linear) and norm.normalized_shape == (head.in_features,):
        return [norm, head]  # transformers
    raise ValueError(
        f"{type(model).__name__} is not read out as the vision transformers of torchvision, timm and transformers are: "
        "pass `score_projection`, a function from a block's tokens to class scores"
    )


class _RolledOut(_AttentionCAM):
    """What the methods share that multiply the attention of all blocks. ``hook_a`` is the class token's attention."""

    _keeps_outputs = False
    step: Callable[..., Tensor]

    @staticmethod
    def _keep_attentions(ended: Pass) -> None:
        for index, noted in enumerate(ended.attentions):
            if noted is not None:
                what = "" if ended.target_names[index] else "attention"
                ended.layers[index] = {f"{what}[{number}]": (one, one) for number, one in enumerate(noted)}

    def _to_grid(self, recorded: Pass, tensor: Tensor, name: str) -> Tensor:
        return to_float(self._on_grid(recorded, tensor[..., 0, :] if self.prefix_tokens else tensor.mean(-2)))

    def _activations(self, request: Request) -> list[Tensor]:
        recorded = request.recorded
        self._check_attention(recorded)
        shapes = [tuple(attention.shape) for attention in recorded.activations if attention is not None]
        batch_sizes = {shape[0] for shape in (*shapes, recorded.input_shape) if shape is not None}
        if len({shape[2:] for shape in shapes}) > 1 or (shapes and len(batch_sizes) > 1):
            raise ValueError(
                f"{type(self).__name__} follows the same tokens through all blocks, but the attention of "
                f"{self.target_names} for an input of shape {recorded.input_shape} has shapes {shapes}"
            )
        return super()._activations(request)

    def _attentions(self, request: Request) -> list[Tensor]:
        """Return the probabilities of all blocks, from the first to the last: (N, heads, tokens, tokens) each."""
        self._activations(request)  # checks them
        found = [attention for attention in request.recorded.activations if attention is not None]
        return [to_float(a if request.create_graph else a.detach()) for a in found]

    def _raw_maps(self, request: Request, **options: Any) -> list[Tensor]:
        steps = [self.step(*of_block, **options) for of_block in self._evidence(request)]
        return [self._on_grid(request.recorded, self.rolled_out(steps))]

    def rolled_out(self, steps: Sequence[Tensor]) -> Tensor:
        """Multiply the blocks' matrices (..., tokens, tokens), the last one first, and return the class token's row.

        Without a class token, the mean over all rows: (..., tokens).
        """
        count = steps[0].shape[-1]
        row = torch.full((1, count), 1 / count, dtype=steps[0].dtype, device=steps[0].device)
        if self.prefix_tokens:
            row = torch.eye(count, dtype=steps[0].dtype, device=steps[0].device)[:1]
        for step in reversed(steps):
            row = row @ step
        return row.squeeze(-2)


class AttentionRollout(_RolledOut):
    r"""Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928): attention as it flows through all blocks.

    .. math::
        M = \big(\hat A_L \cdots \hat A_2 \hat A_1\big)_\text{class token}, \qquad
        \hat A_l = \tfrac{1}{2}\big(\operatorname{mean}_h A_l + I\big)

    with :math:`A_l` the attention probabilities of block :math:`l`, (heads, queries, keys), over the keys that are
    patches. One map in all, the same for every class: one that is given is ignored. Rows of a block's matrix are scaled
    to a sum of one, which changes nothing where heads are averaged.

    Cost: the user's forward pass, with the attention of the target layers computed a second time.

    Args:
        model: the vision transformer
        target_layer: the block(s), as modules or names, in the order in which they run; by default, all attention
            between tokens that the model computes, in its order
        input_shape: not used
        head_fusion: how the heads become one: ``"mean"``, ``"max"`` or ``"min"``
        prefix_tokens: number of tokens before the patches, of which the first is the class token; with none, the mean
            over all rows is taken in place of the class token's
        grid_shape: the patches' (height, width); by default the grid with the input's aspect ratio
        kwargs: ``enable_hooks``, ``input_name`` and ``input_index`` of the base class

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if ``head_fusion`` is none of the three; when maps are asked for, if no attention was found, or
            that of the blocks is not between the same tokens

    Example:
        >>> from torchvision.models import vit_b_16
        >>> model = vit_b_16().eval()
        >>> with AttentionRollout(model) as extractor, torch.inference_mode():
        ...     scores = model(torch.rand(1, 3, 224, 224))
        ...     (cam,) = extractor()
        >>> cam.shape
        torch.Size([1, 14, 14])
    """

    class_agnostic = True
    _options = ("target_layer", "head_fusion")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        head_fusion: Literal["mean", "max", "min"] = "mean",
        **kwargs: Any,
    ) -> None:
        self.head_fusion = one_of("head_fusion", head_fusion, ("mean", "max", "min"))
        super().__init__(model, target_layer, input_shape, **kwargs)

    def step(self, attention: Tensor) -> Tensor:
        """Return how information flows through a block with this attention, (N, tokens, tokens)."""
        fuse: Any = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[self.head_fusion]
        fused: Tensor = fuse(attention, 1)
        step = (fused + torch.eye(attention.shape[-1]).to(attention)) / 2
        return step / step.sum(-1, keepdim=True)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        return [(attention,) for attention in self._attentions(request)]


class TransformerAttribution(_RolledOut):
    r"""Transformer attribution (Chefer et al. 2021, arXiv:2103.15679): attention that raises the score, rolled out.

    .. math::
        R \leftarrow R + \bar A_l R, \qquad
        \bar A_l = \operatorname{mean}_h \mathrm{ReLU}\Big(\frac{\partial Y}{\partial A_l} \odot A_l\Big)

    from :math:`R = I` through the blocks :math:`l`, with :math:`A_l` their attention probabilities, (heads, queries,
    keys); the map is the class token's row of :math:`R` over the keys that are patches. One map in all. Works with
    gradients on, under ``no_grad`` and under ``inference_mode``.

    Cost: the user's forward pass, with the attention of the target layers computed a second time, and a backward pass
    to the first target layer.

    Args:
        model: the vision transformer
        target_layer: the block(s), as modules or names, in the order in which they run; by default, all attention
            between tokens that the model computes, in its order
        input_shape: not used
        kwargs: as of :class:`AttentionRollout`: ``prefix_tokens``, ``grid_shape`` and those of the base class

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: when maps are asked for, if no attention was found, or that of the blocks is not between the same
            tokens

    Example:
        >>> from torchvision.models import vit_b_16
        >>> model = vit_b_16().eval()
        >>> with TransformerAttribution(model) as extractor, torch.inference_mode():
        ...     scores = model(torch.rand(1, 3, 224, 224))
        ...     (cam,) = extractor(0, scores)
        >>> cam.shape
        torch.Size([1, 14, 14])
    """

    _differentiates = True
    _explains_many = True

    @staticmethod
    def step(attention: Tensor, gradient: Tensor) -> Tensor:
        """Return the relevance that flows through a block, (N * K, tokens, tokens) for K scores of each sample."""
        relevance = (gradient * attention).relu().mean(-3)
        if relevance.ndim > 3:
            relevance = relevance.transpose(0, 1).flatten(0, 1)
        return relevance + torch.eye(attention.shape[-1]).to(attention)

    def _evidence(self, request: Request) -> list[tuple[Any, ...]]:
        attentions = self._attentions(request)
        self._gradients(request)
        found = zip(attentions, request.recorded.gradients, strict=True)
        return [(attention, to_float(gradient)) for attention, gradient in found if gradient is not None]
