"""Every method once more: slow, sample by sample, written from the formulas of the papers.

Nothing here comes from the package under test. A model is given as the two halves around the target layer, `body`
from one input to its activation and `head` from that activation to the model's output; both take a batch of one. The
explained score is a callable from one sample's output to a scalar. Maps are the raw ones; `normalized` scales them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

Half = Callable[[Tensor], Tensor]
Score = Callable[[Tensor], Tensor]


# What the methods share


def normalized(maps: Tensor) -> Tensor:
    """Scale each sample's map to [0, 1]; a constant map becomes zeros."""
    scaled = torch.zeros_like(maps)
    for n in range(len(maps)):
        low, high = maps[n].min().item(), maps[n].max().item()
        if high > low:
            for position in _positions(maps[n]):
                scaled[n][position] = (maps[n][position].item() - low) / (high - low)
    return scaled


def _positions(tensor: Tensor) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(side) for side in tensor.shape))


def upsampled(channel: Tensor, shape: Sequence[int]) -> Tensor:
    """Interpolate one channel linearly, dimension by dimension; the pixels' borders, not their centres, are aligned."""
    for axis, size in enumerate(shape):
        old = channel.shape[axis]
        rows = channel.movedim(axis, 0)
        interpolated = []
        for i in range(size):
            where = min(max((i + 0.5) * old / size - 0.5, 0.0), old - 1.0)
            lower = min(math.floor(where), old - 1)
            upper = min(lower + 1, old - 1)
            interpolated.append((1 - (where - lower)) * rows[lower] + (where - lower) * rows[upper])
        channel = torch.stack(interpolated).movedim(0, axis)
    return channel


def gradient(head: Half, activation: Tensor, score: Score) -> Tensor:
    """The gradient of a sample's score for its activation (1, C, *S), by automatic differentiation of the head."""
    leaf = activation.detach().clone().requires_grad_()
    with torch.enable_grad():
        (result,) = torch.autograd.grad(score(head(leaf)[0]), leaf)
    return result


def finite_differences(head: Half, activation: Tensor, score: Score, step: float = 1e-5) -> Tensor:
    """The same by central differences, one entry at a time."""
    result = torch.zeros_like(activation)
    with torch.no_grad():
        for position in _positions(activation):
            values = []
            for sign in (1, -1):
                moved = activation.clone()
                moved[position] += sign * step
                values.append(score(head(moved)[0]).item())
            result[position] = (values[0] - values[1]) / (2 * step)
    return result


def _weighted_sum(weights: Sequence[Tensor], activation: Tensor) -> Tensor:
    total = torch.zeros_like(activation[0, 0])
    for k, weight in enumerate(weights):
        total = total + weight * activation[0, k]
    return total


def _positive(tensor: Tensor) -> Tensor:
    return torch.where(tensor > 0, tensor, torch.zeros_like(tensor))


def _softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]


# Without gradients


@torch.no_grad()
def cam(images: Tensor, body: Half, weight: Tensor, classes: Sequence[int]) -> Tensor:
    maps = []
    for n, c in enumerate(classes):
        activation = body(images[n : n + 1])
        maps.append(_weighted_sum([weight[c, k] for k in range(activation.shape[1])], activation))
    return torch.stack(maps)


@torch.no_grad()
def score_cam(
    images: Tensor,
    body: Half,
    head: Half,
    scores: Sequence[Score],
    variants: Callable[[Tensor, Tensor], list[Tensor]] = lambda x, mask: [x * mask],
) -> Tensor:
    """Score-CAM and its relatives, which differ in the `variants` of the masked input that are averaged."""
    maps = []
    for n, score in enumerate(scores):
        x = images[n : n + 1]
        activation = body(x)
        means = []
        for k in range(activation.shape[1]):
            mask = normalized(upsampled(activation[0, k], x.shape[2:]).unsqueeze(0))[0]
            values = [score(head(body(variant))[0]).item() for variant in variants(x, mask)]
            means.append(sum(values) / len(values))
        weights = [torch.tensor(w, dtype=x.dtype, device=x.device) for w in _softmax(means)]
        maps.append(_positive(_weighted_sum(weights, activation)))
    return torch.stack(maps)


def ss_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score], noise: Tensor) -> Tensor:
    """`noise` (n, *S) is what was added to the masks."""
    return score_cam(images, body, head, scores, lambda x, mask: [x * (mask + delta) for delta in noise])


def is_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score], num_samples: int) -> Tensor:
    def variants(x: Tensor, mask: Tensor) -> list[Tensor]:
        strengths = [sum(j / num_samples for j in range(1, i + 1)) for i in range(1, num_samples + 1)]
        return [strength * x * mask for strength in strengths]

    return score_cam(images, body, head, scores, variants)


# With gradients


def _gradient_maps(
    images: Tensor,
    body: Half,
    head: Half,
    scores: Sequence[Score],
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`weigh` gives the weight of a channel, for all positions or each, from its gradient and activation."""
    maps = []
    for n, score in enumerate(scores):
        with torch.no_grad():
            activation = body(images[n : n + 1])
        g = gradient(head, activation, score)
        weights = [weigh(g[0, k], activation[0, k]) for k in range(activation.shape[1])]
        maps.append(_positive(_weighted_sum(weights, activation)))
    return torch.stack(maps)


def grad_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    return _gradient_maps(images, body, head, scores, lambda g, _a: g.sum() / g.numel())


def x_grad_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    return _gradient_maps(images, body, head, scores, lambda g, a: (g * a).sum() / a.sum())


def layer_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    return _gradient_maps(images, body, head, scores, lambda g, _a: _positive(g))


def _plus_plus_weight(first: Tensor, second: Tensor, third: Tensor, activation: Tensor) -> Tensor:
    weight = torch.zeros((), dtype=first.dtype, device=first.device)
    mass = activation.sum()
    for position in _positions(first):
        denominator = 2 * second[position] + third[position] * mass
        if first[position] > 0 and denominator != 0:
            weight = weight + second[position] / denominator * first[position]
    return weight


def grad_cam_pp(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    return _gradient_maps(images, body, head, scores, lambda g, a: _plus_plus_weight(g, g**2, g**3, a))


def smooth_grad_cam_pp(images: Tensor, body: Half, head: Half, scores: Sequence[Score], noise: Tensor) -> Tensor:
    """`noise` (n, C, *S) is what was added to the inputs."""
    maps = []
    for n, score in enumerate(scores):
        x = images[n : n + 1]
        with torch.no_grad():
            clean = body(x)
            noisy = [body(x + delta) for delta in noise]
        gradients = [gradient(head, activation, score)[0] for activation in noisy]
        first, second, third = (sum(g**p for g in gradients) / len(gradients) for p in (1, 2, 3))
        weights = [_plus_plus_weight(first[k], second[k], third[k], clean[0, k]) for k in range(clean.shape[1])]
        maps.append(_positive(_weighted_sum(weights, clean)))
    return torch.stack(maps)


# On top of other methods


def finer_score(
    logits: Tensor, c: int, gamma: float, num_references: int, references: Sequence[int] = (), weighting: str = "mean"
) -> Score:
    """The contrast that Finer-CAM explains for a sample with these logits."""
    values = logits.tolist()
    if not references:
        others = [d for d in range(len(values)) if d != c]
        references = sorted(others, key=lambda d: abs(values[d] - values[c]))[:num_references]

    def score(y: Tensor) -> Tensor:
        if weighting == "mean":
            return y[c] - gamma * sum(y[d] for d in references) / len(references)
        p = torch.exp(y) / torch.exp(y).sum()
        total: Tensor = sum(p[d] * (y[c] - gamma * y[d]) for d in references) / sum(p[d] for d in references)
        return total

    return score


def refined(maps: Sequence[Tensor]) -> Tensor:
    """RefineCAM's product of the raw maps of several layers, before its normalisation."""
    shape = [max(sides) for sides in zip(*(layer.shape[1:] for layer in maps), strict=True)]
    product = torch.ones_like(maps[0].new_zeros((len(maps[0]), *shape)))
    for layer in maps:
        product = product * torch.stack([upsampled(channel, shape) for channel in normalized(layer)])
    return product


# Attention


def attend(block: nn.Module, tokens: Tensor) -> Tensor:
    """The attention probabilities (heads, queries, keys) of a torchvision encoder block for tokens (1, T, D)."""
    attention = block.self_attention
    z = block.ln_1(tokens)[0]
    width = z.shape[1] // attention.num_heads
    q, k = (
        z @ attention.in_proj_weight[i * z.shape[1] : (i + 1) * z.shape[1]].T
        + attention.in_proj_bias[i * z.shape[1] : (i + 1) * z.shape[1]]
        for i in (0, 1)
    )
    heads = []
    for h in range(attention.num_heads):
        part = slice(h * width, (h + 1) * width)
        heads.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width), -1))
    return torch.stack(heads)


def after_attention(block: nn.Module, tokens: Tensor, probabilities: Tensor) -> Tensor:
    """What the block returns for tokens (1, T, D), given the attention probabilities."""
    attention = block.self_attention
    z = block.ln_1(tokens)[0]
    depth = z.shape[1]
    width = depth // attention.num_heads
    v = z @ attention.in_proj_weight[2 * depth :].T + attention.in_proj_bias[2 * depth :]
    mixed = [p @ v[:, h * width : (h + 1) * width] for h, p in enumerate(probabilities)]
    x = tokens + attention.out_proj(torch.cat(mixed, 1)).unsqueeze(0)
    return x + block.mlp(block.ln_2(x))


def tokens_of(images: Tensor, model: nn.Module) -> list[Tensor]:
    """What torchvision's vision transformer gives to its first block, (1, T, D) for each image."""
    with torch.no_grad():
        return [
            torch.cat([model.class_token, model._process_input(image.unsqueeze(0))], 1) + model.encoder.pos_embedding
            for image in images
        ]


def le_grad(
    images: Tensor,
    model: nn.Module,
    blocks: Sequence[int],
    read_out: Half,
    scores: Sequence[Score],
    grid: tuple[int, int],
) -> Tensor:
    """`read_out` goes from a block's tokens (1, T, D) to class scores (1, K); the first token is no patch."""
    return le_grad_of_tokens(tokens_of(images, model), torchvision_blocks(model), blocks, read_out, scores, grid)


# A block as its two halves: from tokens (1, T, D) to attention probabilities (heads, T, T), and on to tokens.
Blocks = Sequence[tuple[Half, Callable[[Tensor, Tensor], Tensor]]]


def torchvision_blocks(model: nn.Module) -> Blocks:
    return [(partial(attend, block), partial(after_attention, block)) for block in model.encoder.layers]


def le_grad_of_tokens(
    inputs: Sequence[Tensor],
    blocks: Blocks,
    wanted: Sequence[int],
    read_out: Half,
    scores: Sequence[Score],
    grid: tuple[int, int],
) -> Tensor:
    maps = []
    for tokens, score in zip(inputs, scores, strict=True):
        total = torch.zeros(grid, dtype=tokens.dtype, device=tokens.device)
        for index, (attend_, after) in enumerate(blocks):
            with torch.no_grad():
                probabilities = attend_(tokens)
            if index in wanted:
                leaf = probabilities.clone().requires_grad_()
                with torch.enable_grad():
                    y = score(read_out(after(tokens, leaf))[0])
                    (g,) = torch.autograd.grad(y, leaf)
                num_heads, num_queries, _ = g.shape
                by_key = _positive(g).sum((0, 1))
                total = total + (by_key / (num_heads * num_queries))[1:].reshape(grid)
            with torch.no_grad():
                tokens = after(tokens, probabilities)
        maps.append(total / len(wanted))
    return torch.stack(maps)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of two square matrices, from its definition."""
    return (a[:, :, None] * b[None, :, :]).sum(1)


def rollout_row(attentions: Sequence[Tensor], head_fusion: str = "mean") -> Tensor:
    """The class token's row of the product over blocks of half the fused heads (heads, T, T) and half the identity."""
    identity = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)
    product = identity
    for attention in attentions:
        fused = {"mean": attention.mean(0), "max": attention.max(0)[0], "min": attention.min(0)[0]}[head_fusion]
        step = 0.5 * fused + 0.5 * identity
        product = _times(torch.stack([row / row.sum() for row in step]), product)
    return product[0]


def attention_rollout(
    inputs: Sequence[Tensor],
    blocks: Blocks,
    wanted: Sequence[int],
    grid: tuple[int, int],
    head_fusion: str = "mean",
) -> Tensor:
    maps = []
    for tokens in inputs:
        attentions = []
        for attend_, after in blocks:
            attentions.append(attend_(tokens))
            tokens = after(tokens, attentions[-1])
        maps.append(rollout_row([attentions[index] for index in wanted], head_fusion)[1:].reshape(grid))
    return torch.stack(maps)


def attribution_row(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The class token's row of the relevance that grows, block by block, by the positive gradient x attention."""
    relevance = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)
    for attention, gradient_ in zip(attentions, gradients, strict=True):
        mean = sum(_positive(g * a) for g, a in zip(gradient_, attention, strict=True)) / len(attention)
        relevance = relevance + _times(mean, relevance)
    return relevance[0]


def transformer_attribution(
    inputs: Sequence[Tensor],
    blocks: Blocks,
    wanted: Sequence[int],
    head: Half,
    scores: Sequence[Score],
    grid: tuple[int, int],
) -> Tensor:
    """`head` goes from the last block's tokens (1, T, D) to class scores (1, K)."""
    maps = []
    for first, score in zip(inputs, scores, strict=True):
        attentions, gradients = [], []
        for index in wanted:
            tokens = first
            with torch.no_grad():
                for attend_, after in blocks[:index]:
                    tokens = after(tokens, attend_(tokens))
                leaf = blocks[index][0](tokens).clone().requires_grad_()
            with torch.enable_grad():
                tokens = blocks[index][1](tokens, leaf)
                for attend_, after in blocks[index + 1 :]:
                    tokens = after(tokens, attend_(tokens))
                gradients.append(torch.autograd.grad(score(head(tokens)[0]), leaf)[0])
            attentions.append(leaf.detach())
        maps.append(attribution_row(attentions, gradients)[1:].reshape(grid))
    return torch.stack(maps)


# Factorisations


def _signed(map_: Tensor, reference: Tensor) -> Tensor:
    """The sign with which a map correlates positively with a reference."""
    covariance = ((map_ - map_.mean()) * (reference - reference.mean())).sum()
    return -map_ if covariance < 0 else map_


def projected(features: Tensor) -> Tensor:
    """One sample's features (C, *S) on their first principal component, by a singular value decomposition."""
    matrix = features.flatten(1).T.cpu().numpy()  # (positions, C)
    matrix = matrix - matrix.mean(0)
    _, _, components = np.linalg.svd(matrix)
    return torch.from_numpy(matrix @ components[0]).to(features).reshape(features.shape[1:])


@torch.no_grad()
def eigen_cam(images: Tensor, body: Half, project: Callable[[Tensor], Tensor] = projected) -> Tensor:
    activations = [body(images[n : n + 1])[0] for n in range(len(images))]
    return torch.stack([_positive(_signed(project(a), a.mean(0))) for a in activations])


def kernel_projected(features: Tensor, kernel: str, gamma: float) -> Tensor:
    """One sample's features (C, *S) on their first component of kernel PCA, entry by entry."""
    points = features.flatten(1).T
    points = points - points.mean(0)
    count = len(points)
    matrix = np.zeros((count, count))
    for i, j in itertools.product(range(count), repeat=2):
        if kernel == "sigmoid":
            matrix[i, j] = math.tanh(gamma * (points[i] * points[j]).sum().item() + 1)
        else:
            matrix[i, j] = math.exp(-gamma * ((points[i] - points[j]) ** 2).sum().item())
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centring @ matrix @ centring)
    return torch.from_numpy(math.sqrt(values[-1]) * vectors[:, -1]).to(features).reshape(features.shape[1:])


def eigen_grad_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    maps = []
    for n, score in enumerate(scores):
        with torch.no_grad():
            activation = body(images[n : n + 1])
        product = (gradient(head, activation, score) * activation)[0]
        maps.append(_positive(_signed(projected(product), product.sum(0))))
    return torch.stack(maps)


def seg_eigen_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    maps = []
    for n, score in enumerate(scores):
        with torch.no_grad():
            activation = body(images[n : n + 1])
        map_ = projected((gradient(head, activation, score).abs() * activation)[0])
        maps.append(_positive(map_ if map_.max() >= map_.min().abs() else -map_))
    return torch.stack(maps)


def eigen_smoothed_grad_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    maps = []
    for n, score in enumerate(scores):
        with torch.no_grad():
            activation = body(images[n : n + 1])
        g = gradient(head, activation, score)[0]
        weighted = torch.stack([g[k].mean() * activation[0, k] for k in range(len(g))])
        maps.append(_positive(_signed(projected(weighted), weighted.sum(0))))
    return torch.stack(maps)


# Many inputs for one map

Maps = Callable[[Tensor, Sequence[Score]], Tensor]


def augmented(images: Tensor, scores: Sequence[Score], base: Maps) -> Tensor:
    """The mean over two mirrorings and three intensities of the normalised maps of `base`."""
    total = torch.zeros_like(base(images, scores))
    for factor in (0.9, 1.0, 1.1):
        total = total + normalized(base(factor * images, scores))
        total = total + normalized(base(factor * images.flip(-1), scores)).flip(-1)
    return total / 6


def blurred(map_: Tensor, size: int, sigma: float) -> Tensor:
    """One map, position by position; what lies outside is mirrored at the outermost positions' centres."""
    half = size // 2
    offsets = list(itertools.product(range(-half, half + 1), repeat=map_.ndim))
    weights = [math.exp(-sum(o * o for o in offset) / (2 * sigma**2)) for offset in offsets]
    result = torch.zeros_like(map_)
    for position in _positions(map_):
        for offset, weight in zip(offsets, weights, strict=True):
            source = []
            for p, o, side in zip(position, offset, map_.shape, strict=True):
                q = p + o
                while not 0 <= q < side:
                    q = -q if q < 0 else 2 * (side - 1) - q
                source.append(q)
            result[position] += weight / sum(weights) * map_[tuple(source)]
    return result


def sess(
    images: Tensor,
    net: Half,
    base: Maps,
    classes: Sequence[int],
    window: int,
    scales: int,
    theta: float,
    dropped: float,
    pool: str,
) -> Tensor:
    """SESS without its final smoothing; `dropped` is the share of the windows that are left out."""
    maps = []
    for n, c in enumerate(classes):
        shape = images.shape[2:]
        windows, probabilities, places = [], [], []
        for scale in range(scales):
            size = [round(round(window * (1 + 2 * scale / 7)) * side / min(shape)) for side in shape]
            large = torch.stack([upsampled(channel, size) for channel in images[n]])
            rows = []
            for side in size:
                starts = list(range(0, side, window))
                starts[-1] = side - window
                rows.append(starts)
            for corner in itertools.product(*rows):
                part = tuple(slice(start, start + window) for start in corner)
                windows.append(large[(slice(None), *part)].unsqueeze(0))
                with torch.no_grad():
                    probabilities.append(_softmax(net(windows[-1])[0].tolist())[c])
                places.append((part, size))
        order = sorted(range(len(windows)), key=lambda i: probabilities[i], reverse=True)
        order = order[: len(order) - int(dropped * len(order))]
        pasted = []
        for i in order:
            part, size = places[i]
            cam = normalized(base(windows[i], [lambda y, c=c: y[c]]))[0]
            canvas = torch.zeros(size, dtype=images.dtype, device=images.device)
            canvas[part] = upsampled(cam, [window] * len(size)) * probabilities[i] / max(probabilities)
            pasted.append(upsampled(canvas, shape))
        result = torch.zeros_like(images[n, 0])
        for position in _positions(result):
            values = [map_[position].item() for map_ in pasted]
            above = [value for value in values if value > theta]
            result[position] = max(values) if pool == "max" else sum(above) / max(len(above), 1)
        maps.append(result)
    return torch.stack(maps)


# At the input's resolution

Layers = Sequence[Callable[[Tensor], Tensor]]


def _through(layers: Layers, x: Tensor) -> list[Tensor]:
    """The input and what each layer makes of it."""
    with torch.no_grad():
        outputs = [x]
        for layer in layers:
            outputs.append(layer(outputs[-1]))
    return outputs


def _back(layer: Half, z: Tensor, g: Tensor) -> Tensor:
    """The gradient for a layer's input from that for its output."""
    leaf = z.clone().requires_grad_()
    with torch.enable_grad():
        (result,) = torch.autograd.grad(layer(leaf), leaf, g)
    return result


def guided_backprop(images: Tensor, layers: Layers, rectifiers: set[int], scores: Sequence[Score]) -> Tensor:
    """A net is given as its layers; `rectifiers` are the numbers of those that are activation functions."""
    maps = []
    for n, score in enumerate(scores):
        outputs = _through(layers, images[n : n + 1])
        g = gradient(lambda y: y, outputs[-1], score)
        for i in reversed(range(len(layers))):
            g = _positive(g) if i in rectifiers else g
            g = _back(layers[i], outputs[i], g)
            g = _positive(g) if i in rectifiers else g
        maps.append(g[0])
    return torch.stack(maps)


def full_grad_terms(
    image: Tensor, layers: Layers, biases: dict[int, Sequence[float]], score: Score
) -> list[tuple[int, Tensor]]:
    """The input's share of the score and that of each bias, with its layer's number; -1 for the input."""
    outputs = _through(layers, image)
    g = gradient(lambda y: y, outputs[-1], score)
    terms = []
    for i in reversed(range(len(layers))):
        if i in biases:
            terms.append((i, torch.stack([b * g[0, k] for k, b in enumerate(biases[i])])))
        g = _back(layers[i], outputs[i], g)
    return [*terms, (-1, image[0] * g[0])]


def full_grad(images: Tensor, layers: Layers, biases: dict[int, Sequence[float]], scores: Sequence[Score]) -> Tensor:
    maps = []
    for n, score in enumerate(scores):
        total = torch.zeros_like(images[n, 0])
        for _, term in full_grad_terms(images[n : n + 1], layers, biases, score):
            if term.ndim == images.ndim - 1:
                for channel in normalized(term.abs().unsqueeze(0))[0]:
                    total = total + upsampled(channel, images.shape[2:])
        maps.append(total)
    return torch.stack(maps)


# More methods without gradients


@torch.no_grad()
def ablation_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score], baseline: float = 0.0) -> Tensor:
    maps = []
    for n, score in enumerate(scores):
        activation = body(images[n : n + 1])
        whole = score(head(activation)[0]).item()
        weights = []
        for k in range(activation.shape[1]):
            without = activation.clone()
            without[0, k] = baseline
            weights.append((whole - score(head(without)[0])) / abs(whole))
        maps.append(_positive(_weighted_sum(weights, activation)))
    return torch.stack(maps)


@torch.no_grad()
def recipro_cam(
    images: Tensor, body: Half, head: Half, scores: Sequence[Score], profile: Sequence[float] = (0.25, 0.5, 0.25)
) -> Tensor:
    """`profile` is the window along one dimension, its centre in the middle."""
    centre = len(profile) // 2
    maps = []
    for n, score in enumerate(scores):
        activation = body(images[n : n + 1])
        cam = torch.zeros_like(activation[0, 0])
        for position in _positions(cam):
            kept = torch.zeros_like(activation)
            for other in _positions(cam):
                offsets = [centre + there - here for there, here in zip(other, position, strict=True)]
                if all(0 <= offset < len(profile) for offset in offsets):
                    strength = math.prod(profile[offset] for offset in offsets)
                    kept[(0, slice(None), *other)] = strength * activation[(0, slice(None), *other)]
            cam[position] = score(head(kept)[0])
        maps.append(_positive(cam))
    return torch.stack(maps)


def mirrored_blur(image: Tensor, size: int, sigma: float) -> Tensor:
    """Blur (1, C, *S) along one dimension after the other; beyond a border, the image goes back the way it came."""
    offsets = range(-(size // 2), size // 2 + 1)
    kernel = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in offsets]
    for axis in range(2, image.ndim):
        slices = image.movedim(axis, 0)
        blurred = []
        for i in range(len(slices)):
            total = torch.zeros_like(slices[0])
            for offset, strength in zip(offsets, kernel, strict=True):
                j = i + offset
                while not 0 <= j < len(slices):
                    j = -j if j < 0 else 2 * (len(slices) - 1) - j
                total = total + strength / sum(kernel) * slices[j]
            blurred.append(total)
        image = torch.stack(blurred).movedim(0, axis)
    return image


def group_cam(
    images: Tensor, body: Half, head: Half, scores: Sequence[Score], groups: int = 2, percentile: float = 70
) -> Tensor:
    maps = []
    for n, score in enumerate(scores):
        x = images[n : n + 1]
        with torch.no_grad():
            activation = body(x)
        g = gradient(head, activation, score)
        num_channels = activation.shape[1]
        with torch.no_grad():
            blurred = mirrored_blur(x, 51, 50)
            cam = torch.zeros_like(activation[0, 0])
            for r in range(groups):
                members = [k for k in range(num_channels) if k * groups // num_channels == r]
                summed = _positive(sum(g[0, k].mean() * activation[0, k] for k in members))
                threshold = float(np.percentile(summed.cpu().numpy(), percentile))
                kept = torch.where(summed > threshold, summed, torch.zeros_like(summed))
                mask = normalized(kept.unsqueeze(0))[0]
                large = upsampled(mask, x.shape[2:])
                gain = score(head(body(x * large + blurred * (1 - large)))[0]) - score(head(body(blurred))[0])
                cam = cam + gain * mask
        maps.append(_positive(cam))
    return torch.stack(maps)


@torch.no_grad()
def fem(images: Tensor, body: Half, _head: Half, scores: Sequence[Score], n_sigma: float = 2) -> Tensor:
    maps = []
    for n in range(len(scores)):
        activation = body(images[n : n + 1])
        cam = torch.zeros_like(activation[0, 0])
        for channel in activation[0]:
            mean = channel.sum() / channel.numel()
            deviation = ((channel - mean) ** 2).sum().div(channel.numel()).sqrt()
            for position in _positions(cam):
                if channel[position] > mean + n_sigma * deviation:
                    cam[position] += mean
        maps.append(_positive(cam))
    return torch.stack(maps)


@torch.no_grad()
def combined(
    images: Tensor, body: Half, _head: Half, scores: Sequence[Score], weights: Callable[[int], Sequence[Tensor]]
) -> Tensor:
    """The activation with weights that depend on the number of channels alone."""
    maps = []
    for n in range(len(scores)):
        activation = body(images[n : n + 1])
        maps.append(_positive(_weighted_sum(weights(activation.shape[1]), activation)))
    return torch.stack(maps)


# More methods with gradients


def hi_res_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    return _gradient_maps(images, body, head, scores, lambda g, _a: g)


def grad_cam_element_wise(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    maps = []
    for n, score in enumerate(scores):
        with torch.no_grad():
            activation = body(images[n : n + 1])
        products = gradient(head, activation, score)[0] * activation[0]
        maps.append(sum(_positive(product) for product in products))
    return torch.stack(maps)


def shapley_cam(images: Tensor, body: Half, head: Half, scores: Sequence[Score]) -> Tensor:
    """With the Hessian written out."""
    maps = []
    for n, score in enumerate(scores):
        with torch.no_grad():
            activation = body(images[n : n + 1])
        leaf = activation.clone().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(score(head(leaf)[0]), leaf, create_graph=True)
            each = torch.eye(g.numel(), dtype=g.dtype, device=g.device).reshape(-1, *g.shape)
            (hessian,) = torch.autograd.grad(g, leaf, each, is_grads_batched=True)
        product = (hessian.flatten(1) @ activation.flatten()).reshape(activation.shape)
        slopes = (g.detach() - product / 2)[0]
        maps.append(_positive(_weighted_sum([slope.sum() / slope.numel() for slope in slopes], activation)))
    return torch.stack(maps)


def faded(base: Image.Image, values: Any, colormap: str = "viridis", alpha: float = 0.25, signed: bool = False) -> Any:
    """A map over an image, (height, width, 3) in [0, 255]: as opaque as it is strong, all of it from 2/3 on."""
    strength = np.asarray(Image.fromarray(np.float32(values)).resize(base.size, Image.Resampling.BICUBIC))
    strength = np.clip(strength, -1 if signed else 0, 1)
    colors = colormaps[colormap]((strength + 1) / 2 if signed else strength)[..., :3]
    opacity = (1 - alpha) * np.minimum(1, 1.5 * np.abs(strength))[..., None]
    return (1 - opacity) * np.asarray(base.convert("RGB"), dtype=float) + opacity * 255 * colors


def looks_like(picture: Image.Image, expected: Any) -> bool:
    """Whether no pixel is off by more than what 255 steps of a colormap and 8 bits make of it."""
    return picture.size == expected.shape[1::-1] and bool(np.abs(np.asarray(picture, dtype=float) - expected).max() < 4)
