"""Attention is read wherever it is computed, without a trace, and the maps made of it are those of the papers."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tests import oracles
from tests.methods_under_test import make_input, make_model
from tests.models import NUM_CLASSES, shuffled, tiny_vit
from torchcam.methods import AttentionRollout, GradCAM, LeGrad, TransformerAttribution

CLASSES = [0, 3, 2]
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def close(found: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype, device=found.device)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def ask(extractor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with extractor:
        scores = extractor.model(x)
        (found,) = extractor(*args, scores=scores, **kwargs)
    return found


def modes() -> list[TorchFunctionMode]:
    return list(_get_current_function_mode_stack())


class Counter(TorchFunctionMode):
    """Counts the calls of fused attention, and of its explicit computation, that reach torch."""

    fused = 0
    explicit = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func is F.scaled_dot_product_attention
        self.explicit += func is Tensor.softmax
        return func(*args, **(kwargs or {}))


# Models: by hand, of timm, of torchvision, of transformers ------------------------------------------------------------


class SelfAttention(nn.Module):
    """Explicit attention with the heads in the dimension of the batch."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).reshape(3, -1, t, d // 2)
        attention = (qkv[0] @ qkv[1].mT / math.sqrt(d // 2)).softmax(-1)  # (N * heads, T, T)
        mixed = torch.bmm(attention, qkv[2])
        if not torch.is_grad_enabled():
            attention.zero_()  # what was noted is not to change
        return self.proj(mixed.reshape(n, self.num_heads, t, -1).transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, 2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HandMade(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.fc_norm = nn.Identity()
        self.head = nn.Linear(width, NUM_CLASSES)

    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x).flatten(2).mT], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def hand_made(dtype: torch.dtype = torch.float64) -> nn.Module:
    return shuffled(HandMade().to(dtype))


def timm_vit(dtype: torch.dtype = torch.float64, fused: bool = True) -> nn.Module:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        options = {"patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": NUM_CLASSES}
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, **options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return shuffled(model.to(dtype))


def transformers_vit(dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=32,
        num_labels=NUM_CLASSES,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        return shuffled(transformers.ViTForImageClassification(config).to(dtype))


MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "hand made": hand_made,
    "torchvision": tiny_vit,
    "timm fused": timm_vit,
    "timm explicit": partial(timm_vit, fused=False),
    "transformers sdpa": transformers_vit,
    "transformers eager": partial(transformers_vit, attention="eager"),
}
every_model = pytest.mark.parametrize("kind", MODELS)
every_method = pytest.mark.parametrize("method", [LeGrad, AttentionRollout, TransformerAttribution])


def blocks_of(model: nn.Module) -> list[nn.Module]:
    if hasattr(model, "blocks"):
        return list(model.blocks)
    if hasattr(model, "encoder"):
        return list(model.encoder.layers)
    return list(model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer)


def case(kind: str, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    size = 16 if kind == "torchvision" else 32
    x = torch.randn((3, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return MODELS[kind](dtype).to(device), x.to(device)


def attend(block: nn.Module, tokens: Tensor) -> Tensor:
    """The attention probabilities (heads, T, T) of a block of timm's make, one head after the other."""
    z = block.norm1(tokens)[0]
    width = z.shape[1] // block.attn.num_heads
    q, k, _ = block.attn.qkv(z).split(z.shape[1], 1)
    parts = [slice(h * width, (h + 1) * width) for h in range(block.attn.num_heads)]
    return torch.stack([(q[:, part] @ k[:, part].T / width**0.5).softmax(-1) for part in parts])


def after_attention(block: nn.Module, tokens: Tensor, probabilities: Tensor) -> Tensor:
    z = block.norm1(tokens)[0]
    v = block.attn.qkv(z)[:, 2 * z.shape[1] :]
    mixed = [p @ part for p, part in zip(probabilities, v.chunk(len(probabilities), 1), strict=True)]
    x = tokens + block.attn.proj(torch.cat(mixed, 1))
    return x + block.mlp(block.norm2(x))


def taken_apart(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Any, Callable[[Tensor], Tensor], nn.Module]:
    """The tokens of each sample, the blocks in two halves, the head, and the final norm with the classifier."""
    if hasattr(model, "encoder"):
        read_out = nn.Sequential(model.encoder.ln, model.heads)
        return oracles.tokens_of(x, model), oracles.torchvision_blocks(model), lambda z: read_out(z[:, 0]), read_out
    with torch.no_grad():
        tokens = (
            model.tokens(x) if isinstance(model, HandMade) else model.norm_pre(model._pos_embed(model.patch_embed(x)))
        )
    blocks = [(partial(attend, block), partial(after_attention, block)) for block in model.blocks]
    read_out = nn.Sequential(model.norm, model.head)
    return list(tokens.split(1)), blocks, lambda z: read_out(z[:, 0]), read_out


# Against the papers ---------------------------------------------------------------------------------------------------


@cache
def oracles_of(kind: str, wanted: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """The maps that the papers define of the samples of `case`, which no mode changes."""
    model, x = case(kind, device)
    inputs, blocks, head, read_out = taken_apart(model, x)
    with torch.no_grad():  # the oracle's halves are the model
        for tokens, row in zip(inputs, model(x), strict=True):
            for first, second in blocks:
                tokens = second(tokens, first(tokens))
            close(head(tokens)[0], row)
    scores = [lambda y, c=c: y[c] for c in CLASSES]
    rollouts = {
        fusion: oracles.attention_rollout(inputs, blocks, wanted, (4, 4), fusion) for fusion in ("mean", "max", "min")
    }
    return {
        **rollouts,
        "LeGrad": oracles.le_grad_of_tokens(inputs, blocks, wanted, lambda z: read_out(z.mean(1)), scores, (4, 4)),
        "TransformerAttribution": oracles.transformer_attribution(inputs, blocks, wanted, head, scores, (4, 4)),
    }


@pytest.mark.parametrize("kind", ["hand made", "torchvision", "timm fused", "timm explicit"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0, 2)])
def test_all_methods_agree_with_their_oracles(
    kind: str, mode: Any, wanted: tuple[int, ...], device: torch.device
) -> None:
    expected = oracles_of(kind, wanted, device)
    model, x = case(kind, device)
    layers = [blocks_of(model)[index] for index in wanted]

    def found(method: type, layers: Any = layers, **options: Any) -> Tensor:
        with method(model, layers, **options) as extractor, mode():
            (cam,) = extractor(CLASSES, model(x), normalized=False)
        assert not cam.requires_grad
        assert cam.flatten(1).std(1).min() > 1e-5, "a constant map proves little"
        return cam

    close(found(LeGrad), expected["LeGrad"])
    for fusion in ("mean", "max", "min"):
        close(found(AttentionRollout, head_fusion=fusion), expected[fusion])
    close(found(TransformerAttribution), expected["TransformerAttribution"])
    if wanted == (0, 1, 2):
        close(found(TransformerAttribution, None), expected["TransformerAttribution"])
        close(found(AttentionRollout, None), expected["mean"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_all_methods_on_transformers(attention: str, mode: Any, device: torch.device) -> None:
    """Against the attention that the model itself gives; its explicit form computes the softmax in float32."""
    explicit, x = case("transformers eager", device)
    output = explicit(x, output_attentions=True, output_hidden_states=True)
    attentions, classes = output.attentions, torch.tensor(CLASSES, device=device)
    score = output.logits.gather(1, classes[:, None]).sum()
    gradients = torch.autograd.grad(score, attentions, retain_graph=True)
    rollout = [oracles.rollout_row([a[n].detach() for a in attentions])[1:].reshape(4, 4) for n in range(3)]
    attribution = [
        oracles.attribution_row([a[n].detach() for a in attentions], [g[n] for g in gradients])[1:].reshape(4, 4)
        for n in range(3)
    ]
    model = transformers_vit(attention=attention).to(device)
    tokens: dict[int, Tensor] = {}
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out, i=i: tokens.update({i: out if isinstance(out, Tensor) else out[0]})
        )
        for i, block in enumerate(blocks_of(explicit))
    ]
    attentions = explicit(x, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    by_block = []
    for index, attention_ in enumerate(attentions):
        read_out = explicit.classifier(explicit.vit.layernorm(tokens[index].mean(1)))
        (g,) = torch.autograd.grad(read_out.gather(1, classes[:, None]).sum(), attention_, retain_graph=True)
        by_block.append(g.relu().mean((1, 2))[:, 1:].reshape(3, 4, 4))

    def found(method: type, layers: Any) -> Tensor:
        with method(model, layers) as extractor, mode():
            (cam,) = extractor(CLASSES, model(pixel_values=x), normalized=False)
        return cam

    for layers in (None, blocks_of(model)):
        close(found(AttentionRollout, layers), torch.stack(rollout), 1e-6)
        close(found(TransformerAttribution, layers), torch.stack(attribution), 1e-6)
    close(found(LeGrad, blocks_of(model)), torch.stack(by_block).mean(0), 1e-6)


class Fixed(nn.Module):
    """A block whose attention does not depend on its input."""

    def __init__(self, attention: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor([[attention]], dtype=torch.float64).log())

    def forward(self, x: Tensor) -> Tensor:
        return (F.softmax(self.logits.expand(len(x), -1, -1, -1), dim=-1) @ x.unsqueeze(1)).squeeze(1)


def test_rollout_by_hand(device: torch.device) -> None:
    #   ½(A_1 + I) = 5/8 3/8    ½(A_2 + I) = 3/4  1/4     product, A_2 first: 17/32 15/32
    #                1/4 3/4                 1/10 9/10                        23/80 57/80
    model = nn.Sequential(Fixed([[0.25, 0.75], [0.5, 0.5]]), Fixed([[0.5, 0.5], [0.2, 0.8]])).to(device)
    x = torch.ones((1, 2, 3), dtype=torch.float64, device=device)
    options = {"normalized": False}
    for layers in (None, ["0", "1"]):
        close(ask(AttentionRollout(model, layers, grid_shape=(1, 1)), x, **options), [[[15 / 32]]])
        both = ask(AttentionRollout(model, layers, grid_shape=(1, 2), prefix_tokens=0), x, **options)
        close(both, [[[(17 / 32 + 23 / 80) / 2, (15 / 32 + 57 / 80) / 2]]])
    close(ask(AttentionRollout(model, "1", grid_shape=(1, 1)), x, **options), [[[0.25]]])


def test_attribution_by_hand(device: torch.device) -> None:
    # The score is the class token after two blocks, A_2 A_1 v with v = (1, 3): its gradient for A_2 is the outer
    # product of (1, 0) and A_1 v = (2.5, 2), for A_1 that of A_2's first row (0.5, 0.5) and v.
    model = nn.Sequential(Fixed([[0.25, 0.75], [0.5, 0.5]]), Fixed([[0.5, 0.5], [0.2, 0.8]]), nn.Flatten()).to(device)
    x = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64, device=device)
    first = torch.tensor([[0.5 * 0.25, 1.5 * 0.75], [0.5 * 0.5, 1.5 * 0.5]])
    second = torch.tensor([[2.5 * 0.5, 2 * 0.5], [0, 0]])
    expected = ((torch.eye(2) + second) @ (torch.eye(2) + first))[0, 1]
    extractor = TransformerAttribution(model, grid_shape=(1, 1))
    close(ask(extractor, x, 0, normalized=False), [[[expected.item()]]])


# What the model computes ----------------------------------------------------------------------------------------------


@every_model
@every_method
@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_those_without_an_extractor(kind: str, method: type, mode: Any, device: torch.device) -> None:
    model, x = case(kind, device, torch.float32)
    with mode():
        expected = model(x)
        with method(model, blocks_of(model)[1:]):
            found = model(x)
        after = model(x)
    expected, found, after = (getattr(output, "logits", output) for output in (expected, found, after))
    assert torch.equal(found, expected)
    assert torch.equal(after, expected)
    assert found.requires_grad == (mode is torch.enable_grad)


@pytest.mark.parametrize("kind", ["torchvision", "timm fused", "transformers sdpa"])
@every_method
@pytest.mark.parametrize("frozen", [False, True])
def test_attention_is_computed_explicitly_in_target_blocks_only(
    kind: str, method: type, frozen: bool, device: torch.device
) -> None:
    model, x = case(kind, device, torch.float32)
    model.requires_grad_(not frozen)
    counts = []
    for layers in ([], blocks_of(model)[1:2], blocks_of(model)):
        extractor = method(model, layers) if layers else None
        with Counter() as counter:
            model(x)
        counts.append(counter.explicit)
        if extractor is not None:
            extractor.remove_hooks()
    assert counts == [0, 1, 3]
    if kind != "torchvision":  # under a mode, its attention is one call as a whole
        assert counter.fused == 3, "what fused attention returns is handed on in all blocks"


@pytest.mark.parametrize("kind", ["timm", "transformers"])
@every_method
def test_fused_and_explicit_attention_give_the_same_maps(kind: str, method: type, device: torch.device) -> None:
    kinds = ("timm fused", "timm explicit") if kind == "timm" else ("transformers sdpa", "transformers eager")
    maps = []
    for each in kinds:
        model, x = case(each, device)
        maps.append(ask(method(model, blocks_of(model)), x, CLASSES))
    close(maps[0], maps[1], 1e-9 if kind == "timm" else 1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float"}, {"scale": 0.3}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_explicit_attention_is_the_fused_one(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 3, 5, 4), generator=generator).to(device, dtype) for _ in range(3))
    if "attn_mask" in options:
        mask = torch.rand((2, 1, 5, 5), generator=generator) > 0.4
        if torch.__version__ >= "2.5":  # before, the kernels returned NaN for it
            mask[0, 0, 2] = False  # a query that may look nowhere
        options = {"attn_mask": mask.to(device) if options["attn_mask"] == "bool" else mask.to(device, dtype)}

    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, k, v, **options)

    model = Attend()
    expected = model(q)
    with AttentionRollout(model, prefix_tokens=0, grid_shape=(1, 5)):
        found = model(q)
    close(found, expected, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


@pytest.mark.skipif(torch.__version__ < "2.5", reason="`enable_gqa` is of torch 2.5")
def test_grouped_queries(device: torch.device) -> None:
    q, k, v = (torch.randn((2, heads, 5, 4), dtype=torch.float64, device=device) for heads in (4, 2, 2))

    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, k, v, enable_gqa=True)

    model = Attend()
    expected = model(q)
    with AttentionRollout(model, prefix_tokens=0, grid_shape=(1, 5)):
        close(model(q), expected)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
@every_method
def test_callers_get_the_weights_they_ask_for(
    need_weights: bool, average: bool, method: type, device: torch.device
) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            self.given = self.attention(x, x, x, need_weights=need_weights, average_attn_weights=average)
            return self.given[0]

    model = shuffled(nn.Sequential(Outer(), nn.Flatten()))
    x = torch.randn(2, 5, 4)
    model(x)
    expected = model[0].given
    options = {"score_projection": lambda tokens: tokens.mean(1)} if method is LeGrad else {}
    with method(model, "0", grid_shape=(2, 2), **options) as extractor:
        assert extractor(1, model(x))[0].shape == (2, 2, 2)
    close(model[0].given[0], expected[0], 1e-5)
    assert (model[0].given[1] is None) == (not need_weights)
    if need_weights:
        close(model[0].given[1], expected[1], 1e-5)


def test_torch_encoder_layers(device: torch.device) -> None:
    """Whose fast path computes a whole layer in one kernel."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = shuffled(nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten()))
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), AttentionRollout(model, grid_shape=(2, 2)) as extractor:
        expected = AttentionRollout(model, list(model[0].layers), grid_shape=(2, 2))
        model(x)
        close(extractor()[0], expected()[0], 1e-6)
        assert len(extractor.hook_a) == 2


# Many classes, graphs, company ----------------------------------------------------------------------------------------


def test_many_classes_take_one_backward_pass(device: torch.device) -> None:
    model, x = case("timm fused", device)
    classes = [[0, 3], [1, 2], [4, 0]]
    together = ask(TransformerAttribution(model), x, classes, normalized=False)
    for k in range(2):
        close(together[:, k], ask(TransformerAttribution(model), x, [c[k] for c in classes], normalized=False))


@pytest.mark.parametrize("mode", MODES)
def test_backward_passes_are_counted(mode: Any, backward_passes: list[int], device: torch.device) -> None:
    model, x = case("timm fused", device)
    for method, asked, expected in [
        (AttentionRollout, None, 0),
        (LeGrad, CLASSES, 3),
        (TransformerAttribution, CLASSES, 1),
        (TransformerAttribution, [[0, 3], [1, 2], [4, 0]], 1),
    ]:
        backward_passes.clear()
        with mode():
            ask(method(model, blocks_of(model)), x, asked)
        assert len(backward_passes) == expected


def test_a_map_of_attention_can_be_trained(device: torch.device) -> None:
    model, x = case("timm fused", device)
    with TransformerAttribution(model) as extractor:
        (cam,) = extractor(CLASSES, model(x), normalized=False, create_graph=True)
    (g,) = torch.autograd.grad(cam[:, 0, 0].sum(), model.blocks[0].attn.qkv.weight)
    weight = model.blocks[0].attn.qkv.weight
    step, direction = 1e-5, g / g.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(ask(TransformerAttribution(model), x, CLASSES, normalized=False)[:, 0, 0].sum())
        with torch.no_grad():
            weight -= sign * step * direction
    close((values[0] - values[1]) / (2 * step), g.norm().item(), 1e-5)


@every_model
@pytest.mark.parametrize("mode", MODES)
def test_extractors_in_company_find_what_they_find_alone(kind: str, mode: Any, device: torch.device) -> None:
    model, x = case(kind, device)
    makers = [
        lambda: TransformerAttribution(model),
        lambda: LeGrad(model, blocks_of(model)),
        lambda: AttentionRollout(model, blocks_of(model)),
        lambda: GradCAM(model, blocks_of(model)[1]),
    ]

    def maps(order: list[int]) -> dict[int, Tensor]:
        with mode():
            extractors = {index: makers[index]() for index in order}
            scores = model(x)
            options = [{} if index == 2 else {"retain_graph": True} for index in range(4)]
            found = {index: each(CLASSES, scores, **options[index])[0] for index, each in extractors.items()}
        for extractor in extractors.values():
            extractor.remove_hooks()
        return found

    alone = {index: maps([index])[index] for index in range(4)}
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        for index, cam in maps(order).items():
            close(cam, alone[index], 1e-8)
    assert modes() == []


# No trace -------------------------------------------------------------------------------------------------------------


@contextmanager
def raising(module: nn.Module, error: type[BaseException], before: bool) -> Iterator[None]:
    def stumble(*_: Any) -> None:
        raise error

    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(stumble)
    try:
        yield
    finally:
        handle.remove()


@every_method
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("part", ["blocks.1", "blocks.1.attn.proj", "blocks.0.norm1", "head", ""])
def test_no_mode_is_left_after_an_error(method: type, mode: Any, before: bool, part: str, device: torch.device) -> None:
    model, x = case("timm fused", device, torch.float32)
    kept = Counter()
    with kept, method(model, blocks_of(model)) as extractor, mode():
        with raising(model.get_submodule(part), ZeroDivisionError, before), pytest.raises(ZeroDivisionError):
            model(x)
        assert modes() == [kept]
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        model(x)
        assert modes() == [kept]
        assert extractor(0)[0].isfinite().all()
    assert modes() == []


@every_method
def test_an_interrupt_leaves_no_mode(method: type, device: torch.device) -> None:
    model, x = case("timm fused", device, torch.float32)
    extractor = method(model, blocks_of(model))
    interrupted = raising(model.blocks[1].attn.proj, KeyboardInterrupt, True)
    with torch.no_grad(), interrupted, pytest.raises(KeyboardInterrupt):
        model(x)
    assert modes() == []
    q = torch.randn(1, 2, 3, 4)
    with torch.no_grad():
        assert not F.scaled_dot_product_attention(q, q, q).requires_grad
    extractor.remove_hooks()


@every_method
def test_what_changes_during_a_pass_leaves_no_mode(method: type, device: torch.device) -> None:
    model, x = case("timm fused", device, torch.float32)
    extractor = method(model, blocks_of(model))
    handle = model.blocks[1].attn.register_forward_hook(lambda *_: extractor.disable_hooks())
    model(x)
    assert modes() == []
    handle.remove()
    extractor.enable_hooks()
    handle = model.blocks[1].attn.register_forward_hook(lambda *_: extractor.remove_hooks())
    model(x)
    assert modes() == []
    handle.remove()


def test_threads_do_not_meet(device: torch.device) -> None:
    x = torch.randn(1, 3, 32, 32)
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        model = timm_vit(torch.float32)
        for _ in range(5):
            found[index] = ask(TransformerAttribution(model), x, index)
        assert modes() == []

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        close(found[index], ask(TransformerAttribution(timm_vit(torch.float32)), x, index), 1e-5)


@every_method
def test_nothing_is_kept_by_a_dropped_extractor(method: type, device: torch.device) -> None:
    model, x = case("timm fused", device, torch.float32)
    gc.collect()
    gc.disable()
    try:
        extractor = method(model, blocks_of(model))
        model(x)
        alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (3, 3, 17, 17)]
        assert alive
        del alive, extractor
        assert not [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (3, 3, 17, 17)]
    finally:
        gc.enable()


# Arguments ------------------------------------------------------------------------------------------------------------


def test_refusals(device: torch.device) -> None:
    model, x = case("timm fused", device)
    for method, options, error, message in [
        (AttentionRollout, {"head_fusion": "sum"}, ValueError, "`head_fusion` must be 'mean', .* got 'sum'"),
        (AttentionRollout, {"prefix_tokens": -1}, ValueError, "`prefix_tokens` must be 0 or more, got -1"),
        (TransformerAttribution, {"prefix_tokens": True}, TypeError, "`prefix_tokens` must be an integer, got True"),
        (TransformerAttribution, {"grid_shape": (0, 4)}, ValueError, "`grid_shape` must be .* positive"),
        (AttentionRollout, {"target_layer": "head"}, ValueError, "'head', a Linear, computes no attention"),
        (LeGrad, {"target_layer": None}, TypeError, "must name the transformer block"),
    ]:
        with pytest.raises(error, match=message):
            method(model, **options)
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp' computed no attention"):
        ask(AttentionRollout(model, "blocks.0.mlp"), x)
    several = nn.Sequential(model.patch_embed, model.blocks)
    with pytest.raises(ValueError, match=r"'1' computes attention of shapes .* reads blocks with one"):
        ask(LeGrad(several, "1", prefix_tokens=0, score_projection=lambda t: t[:, 0]), x, 0)
    with pytest.raises(ValueError, match=r"`grid_shape` \(3, 5\) has 15 positions, but there are 16 patches"):
        ask(AttentionRollout(model, grid_shape=(3, 5)), x)
    with pytest.raises(ValueError, match=r"15 patches form no grid .* or another `prefix_tokens` than 2"):
        ask(AttentionRollout(model, prefix_tokens=2), x)
    assert modes() == []


def test_attention_within_windows_is_refused(device: torch.device) -> None:
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=NUM_CLASSES).eval()
    with pytest.raises(ValueError, match="follows the same tokens through all blocks"):
        ask(AttentionRollout(model), torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("spoil", ["attn_pool", "head_dist"])
def test_a_read_out_that_is_not_known_is_asked_for(spoil: str, device: torch.device) -> None:
    model, _ = case("timm fused", device)
    setattr(model, spoil, nn.Identity())
    with pytest.raises(ValueError, match=r"VisionTransformer is not read out as .* pass `score_projection`"):
        LeGrad(model, "blocks.0")
    assert repr(LeGrad(model, "blocks.0", score_projection=lambda t: t[:, 0])) == "LeGrad(target_layer=['blocks.0'])"
    assert repr(AttentionRollout(model)) == "AttentionRollout(target_layer=[''], head_fusion=mean)"


def test_a_map_of_legrad_can_be_part_of_a_loss(device: torch.device) -> None:
    """Its gradient for a weight equals the central difference."""
    model = make_model("LeGrad", device).double()
    inputs = make_input(device).double()
    weight = model.block1.self_attention.in_proj_weight

    def peak() -> Tensor:
        with LeGrad(model, ["block1", "block2"]) as extractor:
            (cam,) = extractor([0, 2], model(inputs), normalized=False, create_graph=True)
        return (cam * torch.arange(cam.numel(), device=device).reshape(cam.shape)).sum()

    (gradient,) = torch.autograd.grad(peak(), weight)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
        values.append(peak().item())
        with torch.no_grad():
            weight[0, 0] -= sign * step
    expected = (values[0] - values[1]) / (2 * step)
    assert abs(expected) > 1e-6
    assert gradient[0, 0].item() == pytest.approx(expected, rel=1e-4)
