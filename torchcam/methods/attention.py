"""Methods that read attention probabilities."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcam._passes import untouched
from torchcam._tensors import to_float
from torchcam.layers import TargetLayer
from torchcam.layout import patch_grid
from torchcam.targets import ClassIndex, OutputTarget, Selector

from .core import _CAM

__all__ = ["LeGrad"]


class LeGrad(_CAM):
    r"""LeGrad (Bousselham et al. 2024, arXiv:2404.03214): positive gradients of a score for attention probabilities.

    For each target block :math:`l`, with :math:`s_l` the class score read from the tokens it returns and
    :math:`B_l` its attention probabilities, (N, heads, queries, keys):

    .. math::
        M = \frac{1}{L} \sum_l \operatorname{mean}_{h,q} \mathrm{ReLU}\Big(\frac{\partial s_l}{\partial B_l}\Big)

    over the keys that are patches. Blocks are ``torchvision``'s: each returns tokens (N, tokens, channels) and has a
    :class:`torch.nn.MultiheadAttention` named ``self_attention``. Its probabilities are computed explicitly while the
    extractor watches, and its output agrees with the fused form to float rounding. Works with gradients on, under
    ``no_grad`` and under ``inference_mode``.

    Cost: the user's forward pass and, per block, a read-out and a backward pass through that block.

    Args:
        model: the vision transformer
        target_layer: the block(s), as modules or names
        score_projection: function from a block's tokens (N, tokens, channels) to class scores (N, classes); by default
            the model's own final norm and head on the mean token (``torchvision``'s ``VisionTransformer``)
        prefix_tokens: number of tokens before the patches
        grid_shape: the patches' (height, width); by default the grid with the input's aspect ratio
        enable_hooks: whether forward passes are recorded from the start

    Raises:
        TypeError: if an argument has the wrong type
        ValueError: if a block has no such attention, or the model no known read-out

    Example:
        >>> from torchvision.models import vit_b_16
        >>> model = vit_b_16().eval()
        >>> with LeGrad(model, list(model.encoder.layers)[-4:]) as extractor, torch.inference_mode():
        ...     scores = model(torch.rand(1, 3, 224, 224))
        ...     (cam,) = extractor(0, scores)
        >>> cam.shape
        torch.Size([1, 14, 14])
    """

    _uses_gradients = True

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer],
        *,
        score_projection: Callable[[Tensor], Tensor] | None = None,
        prefix_tokens: int = 1,
        grid_shape: tuple[int, int] | None = None,
        enable_hooks: bool = True,
    ) -> None:
        if target_layer is None:
            raise TypeError("`target_layer` must name the transformer block(s) that LeGrad reads, got None")
        if score_projection is not None and not callable(score_projection):
            raise TypeError(f"`score_projection` must be callable, got {score_projection!r}")
        if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int):
            raise TypeError(f"`prefix_tokens` must be an integer, got {prefix_tokens!r}")
        if prefix_tokens < 0:
            raise ValueError(f"`prefix_tokens` must be 0 or more, got {prefix_tokens}")
        if grid_shape is not None and (len(grid_shape) != 2 or min(grid_shape) < 1):
            raise ValueError(f"`grid_shape` must be (height, width), both positive, got {grid_shape!r}")
        if score_projection is None and not (
            hasattr(model, "heads") and hasattr(getattr(model, "encoder", None), "ln")
        ):
            raise ValueError(
                f"{type(model).__name__} is not read out as torchvision's VisionTransformer is: pass "
                "`score_projection`, a function from a block's tokens to class scores"
            )
        self.score_projection = score_projection
        self.prefix_tokens = prefix_tokens
        self.grid_shape = grid_shape
        self._requested: dict[int, tuple[bool, bool]] = {}
        super().__init__(model, target_layer, enable_hooks=enable_hooks)

    def _register_hooks(self) -> None:
        super()._register_hooks()
        for index, name in enumerate(self.target_names):
            attention = getattr(self.submodule_dict[name], "self_attention", None)
            if not isinstance(attention, nn.MultiheadAttention):
                raise ValueError(  # noqa: TRY004 - the argument's type is right, the layer it names is not
                    f"`target_layer` '{name}' has no `self_attention` of type torch.nn.MultiheadAttention: "
                    "LeGrad reads the blocks of torchvision's VisionTransformer"
                )
            self._own_modules.add(attention)
            before, after = (self._weak_hook(m, index) for m in (self._ask_attention, self._take_attention))
            self.hook_handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
            # The extractor that came last asked last, and so has to take first.
            self.hook_handles.append(attention.register_forward_hook(after, prepend=True))

    def _ask_attention(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Let the attention module compute its probabilities explicitly, with a graph."""
        module = self.submodule_dict[self.target_names[index]].self_attention
        arguments = inspect.signature(module.forward).bind(*args, **kwargs)
        arguments.apply_defaults()
        call = arguments.arguments
        self._requested[index] = call["need_weights"], call["average_attn_weights"]
        call |= {"need_weights": True, "average_attn_weights": False}
        query = call["query"]
        for name in ("key", "value", "query"):
            if call[name] is query:
                call[name] = self._with_graph(query) if name == "key" else call["key"]
        return (), dict(call)

    def _take_attention(self, index: int, _args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Keep the probabilities, and give the caller what it had asked for."""
        attended, probabilities = output
        # What is returned is a view of the tensor that the output was computed from: the score depends on the latter.
        self._record.attentions[index] = probabilities if probabilities._base is None else probabilities._base
        wanted, averaged = self._requested.pop(index)
        if not wanted:
            return attended, None
        return attended, probabilities.mean(1) if averaged else probabilities

    def _to_grid(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.ndim != 3:
            raise ValueError(
                f"`target_layer` '{name}' must return tokens (N, tokens, channels), got {tuple(tensor.shape)}"
            )
        return to_float(self._on_grid(tensor.detach().mT))

    def _on_grid(self, tokens: Tensor) -> Tensor:
        """Lay out (..., tokens) as (..., height, width), without the prefix."""
        patches = tokens[..., self.prefix_tokens :]
        count = patches.shape[-1]
        shape = self._record.input_shape
        grid = self.grid_shape or patch_grid(count, (count, count) if shape is None else shape[2:])
        if grid[0] * grid[1] != count:
            raise ValueError(
                f"`grid_shape` {tuple(grid)} has {grid[0] * grid[1]} positions, but there are {count} patches"
            )
        return patches.reshape(*patches.shape[:-1], *grid)

    def _read_out(self, tokens: Tensor) -> Tensor:
        if self.score_projection is not None:
            return self.score_projection(tokens)
        model: Any = self.model
        scores: Tensor = model.heads(model.encoder.ln(tokens.mean(1)))
        return scores

    def _get_weights(
        self,
        class_idx: ClassIndex | None,
        scores: Any,  # noqa: ARG002 - each block has a score of its own
        retain_graph: bool = False,
        targets: OutputTarget | Sequence[OutputTarget] | Selector | None = None,
    ) -> list[Tensor]:
        """Give each block's mean positive gradient by key, (N, tokens)."""
        select = self._selector(class_idx, targets)
        weights = []
        for index, (tokens, attention) in enumerate(
            zip(self._record.activations, self._record.attentions, strict=True)
        ):
            if tokens is None or attention is None or not attention.requires_grad:
                name = self.target_names[index]
                raise RuntimeError(f"the attention of `target_layer` '{name}' was not computed in the recorded pass")
            with untouched(self.model), torch.enable_grad():
                score = select(self._read_out(tokens))
            only = [attention if block == index else None for block in range(len(self.target_names))]
            (gradient,) = self._differentiate(score, only, retain_graph)
            by_head = to_float(gradient).relu().reshape(len(tokens), -1, *gradient.shape[-2:])
            weights.append(by_head.mean((1, 2)))
        return weights

    def _raw_maps(self, class_idx: ClassIndex | None, scores: Any, **kwargs: Any) -> list[Tensor]:
        return [self._on_grid(weight) for weight in self._get_weights(class_idx, scores, **kwargs)]

    def _pool_layers(self, maps: list[Tensor]) -> list[Tensor]:
        return [torch.stack(maps).mean(0)]
