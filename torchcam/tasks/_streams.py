"""What the decoder of a vision-language model gets of the pictures, and the relevance of that for scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchcam._tensors import map_tensors, tensors_in, to_float
from torchcam.methods._balanced import balanced_grad


class _Placement(TorchFunctionMode):
    """Notes where features are scattered into embeddings (B, T, D)."""

    mask: Tensor | None = None  # (B, T)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        if func in {Tensor.masked_scatter, Tensor.masked_scatter_, torch.masked_scatter} and args[0].ndim == 3:
            mask = args[1].expand_as(args[0])[..., 0]
            self.mask = mask if self.mask is None else self.mask | mask
        return func(*args, **(kwargs or {}))


@dataclass
class _Segment:
    """A part of the decoder that is differentiated by itself.

    Attributes:
        start: what the part before it returned, cut off from the graph
        given: what the segment's layer got, with the graph of what is between the start and the layer
        layer: computes the layer again
        arguments: its other arguments
    """

    start: Tensor
    given: Tensor
    layer: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


class VisualStreams:
    """The tensors by which pictures enter a decoder, and the scores' relevance of each visual token.

    They are the embeddings that the decoder gets, features that are added to later layers, and the states that
    cross-attention layers read. Nothing before them gets a graph.

    Args:
        model: a replica of the model
        positions: which positions of the input hold visual tokens, (B, T); by default those that features are scattered
            into
        checkpointing: whether each layer of the decoder is computed again when its gradient is: this needs the memory
            of one layer, and the time of one more forward pass

    Attributes:
        unbalanced: the names of operations that have no rule for balanced gradients
        mask: which positions hold visual tokens: of the input, or of the states that cross-attention reads
    """

    def __init__(self, model: nn.Module, positions: Tensor | None = None, checkpointing: bool = False) -> None:
        self.unbalanced: set[str] = set()
        self.mask = positions
        self._model = model
        self._given = positions
        self._checkpointing = checkpointing
        self._leaves: list[Tensor] = []
        self._entered: dict[int, tuple[Tensor, int]] = {}  # what a decoder got for each leaf, by identity
        self._segments: list[_Segment] = []
        self._last: Tensor | None = None
        self._output: Tensor | None = None
        self._handles: list[Any] = []

    def run(self, inputs: dict[str, Any]) -> Tensor:
        """Run the model.

        Args:
            inputs: its arguments, ``input_ids`` (B, T) among them

        Returns:
            the logits, with a graph down to the streams

        Raises:
            ValueError: if no place of visual tokens is found
        """
        placement = _Placement()
        with torch.no_grad(), self._watched(placement, inputs["input_ids"].shape), placement:
            logits: Tensor = self._model(**inputs).logits
        if not self._leaves:
            raise ValueError(
                f"{type(self._model).__name__} scatters no features of `images` into the embeddings of its prompt, and "
                "has no cross-attention to them: pass `positions=`, which positions of the prompt hold visual tokens, "
                "and `cells=`, where these are on the pictures"
            )
        self._output = logits
        return logits

    def relevance(self, scores: Tensor) -> Tensor:
        """Return the relevance of each visual token for scores of the last pass: gradient × activation, balanced.

        Args:
            scores: (K,)

        Returns:
            (K, V), the visual tokens of all samples one after the other, summed over streams
        """
        ends: list[Tensor] = self._leaves if self._last is None else [self._last, *self._leaves]
        start = torch.ones_like(scores[0])
        found = [self._differentiate(self._output, score, ends, start) for score in scores.unbind()]
        if self._last is None:
            gradients = found
        else:
            upper = [one[0] for one in found]
            gradients = [one[1:] for one in found]
            for segment in reversed(self._segments):
                upper = self._through(segment, upper, gradients)
        if all(gradient is None for one in gradients for gradient in one):
            raise RuntimeError(
                "the explained score does not depend on the visual tokens: `images` do not reach the decoder of "
                f"{type(self._model).__name__}"
            )
        return torch.stack([self._read(one) for one in gradients])

    def _differentiate(self, output: Any, score: Tensor, ends: Sequence[Tensor], start: Tensor) -> list[Tensor | None]:
        """Return balanced gradients, and keep the graph for further scores."""
        if not score.requires_grad:
            return [None] * len(ends)
        found = balanced_grad(output, self.unbalanced, score, ends, start, True, together=True, allow_unused=True)
        return list(found)

    def _read(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return gradient × activation of each visual token, (V,)."""
        assert self.mask is not None  # noqa: S101 - for the type checker: the decoder has set it
        total: Any = 0
        for leaf, gradient in zip(self._leaves, gradients, strict=True):
            if gradient is not None:
                product = (to_float(gradient) * to_float(leaf.detach())).sum(-1)
                total = total + (product if product.ndim == 1 else product.reshape(self.mask.shape)[self.mask])
        return total if isinstance(total, Tensor) else to_float(self._leaves[0]).new_zeros(int(self.mask.sum()))

    # Where the streams begin.

    @contextmanager
    def _watched(self, placement: _Placement, shape: torch.Size) -> Iterator[None]:
        """Let the decoder of the model begin the streams inside the block."""
        enter = partial(self._enter, placement, shape)
        stacks = [m for m in self._model.modules() if any(isinstance(child, nn.ModuleList) for child in m.children())]
        self._handles = [stack.register_forward_pre_hook(enter, with_kwargs=True) for stack in stacks]
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def _enter(
        self, placement: _Placement, shape: torch.Size, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Begin the streams if this is the call of the decoder."""
        embeddings, states = kwargs.get("inputs_embeds"), kwargs.get("cross_attention_states")
        if self._leaves:
            return None
        if isinstance(states, Tensor):
            batch, width = shape[0], states.shape[-1]
            self.mask = torch.ones(batch, states.numel() // width // batch, dtype=torch.bool, device=states.device)
            kwargs = {**kwargs, "cross_attention_states": self._leaf(states)}
        elif isinstance(embeddings, Tensor) and embeddings.shape[:2] == shape:
            self.mask = placement.mask if self._given is None else self._given
            if self.mask is None:
                return None
            mask = self.mask = self.mask.to(embeddings.device)
            width = embeddings.shape[-1]

            def begin(value: Tensor) -> Tensor:
                if not value.is_floating_point() or value.shape[-1] != width:
                    return value
                is_packed = value.ndim == 2 and len(value) == int(mask.sum())
                return self._leaf(value) if is_packed or value.shape == (*shape, width) else value

            embeddings = self._leaf(embeddings)
            others = {name: value for name, value in kwargs.items() if name != "inputs_embeds"}
            kwargs = {**map_tensors(begin, others), "inputs_embeds": embeddings}
        else:
            return None
        if self._checkpointing:
            self._cut(module)
        torch.set_grad_enabled(True)
        return args, kwargs

    def _leaf(self, value: Tensor) -> Tensor:
        """Cut a tensor off from what it was computed from, and return a copy that the decoder may write to."""
        leaf = value.detach().requires_grad_()
        with torch.enable_grad():
            entered = leaf.clone()
        self._entered[id(entered)] = entered, len(self._leaves)
        self._leaves.append(leaf)
        return entered

    # One layer after the other.

    def _cut(self, decoder: nn.Module) -> None:
        """Let each layer of a decoder run without a graph, and note what it gets."""
        for layer in max((m for m in decoder.modules() if isinstance(m, nn.ModuleList)), key=len):
            self._handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._after))

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(f"`checkpointing` is on, but {type(layer).__name__} does not get its input as an argument")
        start = args[0] if self._last is None else self._last
        self._segments.append(_Segment(start, args[0], layer, (args[1:], kwargs)))
        torch.set_grad_enabled(False)

    def _after(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        torch.set_grad_enabled(True)
        returned = next(tensors_in(output))
        self._last = returned.detach().requires_grad_()
        return map_tensors(lambda tensor: self._last if tensor is returned else tensor, output)

    def _through(
        self, segment: _Segment, upper: list[Tensor | None], gradients: list[list[Tensor | None]]
    ) -> list[Tensor | None]:
        """Take gradients from what a layer returned to what the layer before it did; add those of streams."""
        fresh = {number: tensor.detach().requires_grad_() for tensor, number in self._entered.values()}

        def substitute(value: Tensor) -> Tensor:
            known = self._entered.get(id(value))
            return value if known is None else fresh[known[1]]

        given = segment.given.detach().requires_grad_()
        args, kwargs = map_tensors(substitute, segment.arguments)
        with torch.enable_grad():
            output = next(tensors_in(segment.layer(given, *args, **kwargs)))
        lower: list[Tensor | None] = []
        is_first = segment is self._segments[0]
        for one, gradient in zip(gradients, upper, strict=True):
            if gradient is None:
                lower.append(None)
                continue
            ends = [given, *fresh.values()]
            own, *of_streams = self._differentiate(output, output, ends, gradient)
            _add(one, of_streams)
            if own is not None and segment.given.requires_grad:  # what is between the layers
                below = self._leaves if is_first else [segment.start, *self._leaves]
                found = self._differentiate(segment.given, segment.given, below, own)
                own = None if is_first else found[0]
                _add(one, found if is_first else found[1:])
            lower.append(own)
        return lower


def _add(total: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    """Add gradients to others in their places."""
    for place, gradient in enumerate(more):
        if gradient is not None:
            before = total[place]
            total[place] = gradient if before is None else before + gradient
