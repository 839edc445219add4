"""Balanced gradients: each rule against a slow oracle, completeness, and no trace on graphs."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.methods_under_test import BALANCED, LAYERS, METHODS, make_model
from torchcam import methods
from torchcam.methods._balanced import balanced_grad
from torchcam.methods._gradients import share_of_other_sign


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS = seeded(6, seed=1), seeded(6, seed=2)


def balanced(operation: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> tuple[Tensor, set[str]]:
    """The balanced gradient of an operation's output, weighted by fixed numbers, for its input."""
    x = x.clone().requires_grad_()
    y = operation(x * 1)  # an operation in place needs no leaf
    unbalanced: set[str] = set()
    score = (y * seeded(*y.shape, seed=3)).sum()
    (gradient,) = balanced_grad(y, unbalanced, score, [x], torch.ones_like(score), retain_graph=False, **options)
    assert gradient is not None
    return gradient, unbalanced


def frozen(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The plain gradient of an operation whose constants are detached."""
    x = x.clone().requires_grad_()
    y = operation(x)
    (gradient,) = torch.autograd.grad((y * seeded(*y.shape, seed=3)).sum(), x)
    return gradient


def ratio(function: Callable[[float], float], limit: float) -> Callable[[Tensor], Tensor]:
    """Multiply x with the constant f(x) / x, computed number by number."""

    def multiplied(x: Tensor) -> Tensor:
        ratios = [function(value) / value if value else limit for value in x.flatten().tolist()]
        return x * torch.tensor(ratios, dtype=x.dtype).reshape(x.shape)

    return multiplied


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def mish(x: float) -> float:
    return x * math.tanh(math.log1p(math.exp(x)))


def hardswish(x: float) -> float:
    return x * min(max(x + 3, 0), 6) / 6


def elu(x: float, alpha: float = 1.0, scale: float = 1.0) -> float:
    return scale * (x if x > 0 else alpha * math.expm1(x))


def celu(x: float) -> float:
    return x if x > 0 else 0.7 * math.expm1(x / 0.7)


SELU = 1.6732632423543772, 1.0507009873554805
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float], float]] = {
    "gelu": (F.gelu, gelu, 0.5),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh, 0.5),
    "gelu, written out": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))), gelu, 0.5),
    "gelu, tanh, written out": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        gelu_tanh,
        0.5,
    ),
    "silu": (F.silu, silu, 0.5),
    "silu, in place": (lambda x: F.silu(x, inplace=True), silu, 0.5),
    "silu, written out": (lambda x: x * torch.sigmoid(x), silu, 0.5),
    "mish": (F.mish, mish, math.tanh(math.log(2))),
    "mish, in place": (lambda x: F.mish(x, inplace=True), mish, math.tanh(math.log(2))),
    "hardswish": (F.hardswish, hardswish, 0.5),
    "hardswish, written out": (lambda x: x * F.relu6(x + 3) / 6, hardswish, 0.5),
    "elu": (F.elu, elu, 1.0),
    "elu, another alpha": (lambda x: F.elu(x, 0.3), lambda x: elu(x, 0.3), 1.0),
    "selu": (F.selu, lambda x: elu(x, *SELU), SELU[1]),
    "celu": (lambda x: F.celu(x, 0.7), celu, 1.0),
    "softsign": (F.softsign, lambda x: x / (1 + abs(x)), 1.0),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.8), lambda x: min(max(x, -0.5), 0.8), 1.0),
    "clamp": (lambda x: x.clamp(-0.5, 0.8), lambda x: min(max(x, -0.5), 0.8), 1.0),
    "clamp, from below": (lambda x: x.clamp_min(-0.5), lambda x: max(x, -0.5), 1.0),
    "square": (lambda x: x**2, lambda x: x**2, 0.0),
    "cube": (lambda x: x**3, lambda x: x**3, 0.0),
    "product with itself": (lambda x: x * x, lambda x: x * x, 0.0),
}


class TestElementwise:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_the_gradient_times_the_value_by_its_argument(self, name: str) -> None:
        function, of_number, limit = FUNCTIONS[name]
        x = torch.cat([torch.linspace(-9, 9, 91, dtype=torch.float64), torch.tensor([0.0, 1e-9, -1e-9, 40.0, -40.0])])
        x[45] = 0.0
        found, unbalanced = balanced(function, x)
        torch.testing.assert_close(found, frozen(ratio(of_number, limit), x), rtol=1e-12, atol=1e-12)
        assert not unbalanced

    def test_relu6(self) -> None:
        x = torch.tensor([-1.0, 2.0, 6.0, 12.0], dtype=torch.float64)
        weight = seeded(4, seed=3)
        found, unbalanced = balanced(F.relu6, x)
        torch.testing.assert_close(found, weight * torch.tensor([0.0, 1.0, 1.0, 0.5], dtype=torch.float64))
        assert not unbalanced

    def test_square_root(self) -> None:
        x = seeded(8).abs() + 0.1
        found, _ = balanced(torch.sqrt, x)
        torch.testing.assert_close(found, seeded(8, seed=3) / x.sqrt())


def normalised(x: Tensor, axes: tuple[int, ...], *, centred: bool = True, eps: float = 1e-5) -> Tensor:
    """Normalise by a constant standard deviation."""
    centre = x.mean(axes, keepdim=True) if centred else 0
    spread = ((x - centre) ** 2).mean(axes, keepdim=True) + eps
    return (x - centre) / spread.sqrt().detach()


def grouped(x: Tensor) -> Tensor:
    return normalised(x.reshape(len(x), 3, 2, *x.shape[2:]), (2, 3, 4)).reshape(x.shape)


def channels(vector: Tensor) -> Tensor:
    return vector.reshape(-1, 1, 1)


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # Normalisations of (2, 6, 4, 5), and of its last dimension.
    "layer norm": (lambda x: F.layer_norm(x, (5,), WEIGHT[:5], BIAS[:5]), lambda x: normalised(x, (-1,)) * WEIGHT[:5]),
    "layer norm, two dimensions": (lambda x: F.layer_norm(x, (4, 5)), lambda x: normalised(x, (-2, -1))),
    "layer norm, written out": (
        lambda x: (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True, correction=0) + 1e-5),
        lambda x: normalised(x, (1,)),
    ),
    "layer norm, with a division": (
        lambda x: (x - x.mean(1, keepdim=True)) / torch.sqrt((x - x.mean(1, keepdim=True)).pow(2).mean(1, True) + 1e-5),
        lambda x: normalised(x, (1,)),
    ),
    "layer norm, by var_mean": (
        lambda x: (
            (x - torch.var_mean(x, 1, keepdim=True)[1])
            * (torch.var_mean(x, 1, keepdim=True, correction=0)[0] + 1e-5).rsqrt()
        ),
        lambda x: normalised(x, (1,)),
    ),
    "rms norm": (
        lambda x: F.rms_norm(x, (5,), WEIGHT[:5], 1e-5),
        lambda x: normalised(x, (-1,), centred=False) * WEIGHT[:5],
    ),
    "rms norm, written out": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda x: normalised(x, (-1,), centred=False),
    ),
    "rms norm, by a negative power": (
        lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5,
        lambda x: normalised(x, (-1,), centred=False),
    ),
    "group norm": (lambda x: F.group_norm(x, 3, WEIGHT, BIAS), lambda x: grouped(x) * channels(WEIGHT)),
    "group norm without weights": (lambda x: F.group_norm(x, 3), grouped),
    "instance norm": (
        lambda x: F.instance_norm(x, weight=WEIGHT, bias=BIAS),
        lambda x: normalised(x, (2, 3)) * channels(WEIGHT),
    ),
    "batch norm, in training": (
        lambda x: F.batch_norm(x, None, None, WEIGHT, BIAS, training=True),
        lambda x: normalised(x, (0, 2, 3)) * channels(WEIGHT),
    ),
    "batch norm": (
        lambda x: F.batch_norm(x, BIAS, WEIGHT.abs(), WEIGHT, BIAS),
        lambda x: x * channels(WEIGHT / (WEIGHT.abs() + 1e-5).sqrt()),
    ),
    "unit length": (lambda x: F.normalize(x, dim=1), lambda x: x / x.norm(dim=1, keepdim=True).detach()),
    "local response norm": (
        lambda x: F.local_response_norm(x, 3),
        lambda x: x * (F.local_response_norm(x, 3) / x).detach(),
    ),
    "global response norm": (  # ConvNeXt V2
        lambda x: x + x * x.norm(dim=(2, 3), keepdim=True) / (x.norm(dim=(2, 3), keepdim=True).mean(1, True) + 1e-6),
        lambda x: (
            x
            + (x * x.norm(dim=(2, 3), keepdim=True).detach() + x.detach() * x.norm(dim=(2, 3), keepdim=True))
            / (2 * (x.norm(dim=(2, 3), keepdim=True).mean(1, True) + 1e-6).detach())
        ),
    ),
    # Products.
    "gated by a sigmoid": (
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True) * 2 + 1),
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True) * 2 + 1).detach(),
    ),
    "gated by a hard sigmoid": (
        lambda x: F.hardsigmoid(x.mean((2, 3), keepdim=True)) * x,
        lambda x: F.hardsigmoid(x.mean((2, 3), keepdim=True)).detach() * x,
    ),
    "gated linear unit": (lambda x: F.glu(x, 1), lambda x: x[:, :3] * x[:, 3:].sigmoid().detach()),
    "a product of two paths": (
        lambda x: x[:, :3] * (2 * x[:, 3:]),
        lambda x: x[:, :3] * x[:, 3:].detach() + x[:, :3].detach() * x[:, 3:],
    ),
    "SwiGLU": (
        lambda x: F.silu(x[..., :2]) * x[..., 2:4],
        lambda x: (ratio(silu, 0.5)(x[..., :2]) * x[..., 2:4].detach() + F.silu(x[..., :2]).detach() * x[..., 2:4]) / 2,
    ),
    "a matrix product of two paths": (
        lambda x: x @ x.mT,
        lambda x: (x @ x.mT.detach() + x.detach() @ x.mT) / 2,
    ),
    "a product with a number": (lambda x: x * WEIGHT[:5] / 3, lambda x: x * WEIGHT[:5] / 3),
    "addcmul": (
        lambda x: torch.addcmul(x[:, :3], x[:, :3], x[:, 3:], value=2),
        lambda x: x[:, :3] + x[:, :3] * x[:, 3:].detach() + x[:, :3].detach() * x[:, 3:],
    ),
    "addcdiv": (
        lambda x: torch.addcdiv(x[:, :3], x[:, :3], x[:, 3:].exp()),
        lambda x: x[:, :3] + x[:, :3] / x[:, 3:].exp().detach(),
    ),
    "mixed by a softmax": (
        lambda x: torch.einsum("nkhw,nk->nhw", x, x.mean((2, 3)).softmax(1)),
        lambda x: torch.einsum("nkhw,nk->nhw", x, x.mean((2, 3)).softmax(1).detach()),
    ),
    "sampled where the input says": (
        lambda x: F.grid_sample(x, x[:, :2].movedim(1, -1).tanh(), align_corners=False),
        lambda x: F.grid_sample(x, x[:, :2].movedim(1, -1).tanh().detach(), align_corners=False),
    ),
    # Attention: (2, 6, 4, 5) as samples, heads, tokens and channels.
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, 2 * x, x.flip(1)),
        lambda x: (x @ (2 * x.mT) / math.sqrt(5)).softmax(-1).detach() @ x.flip(1),
    ),
    "attention, written out": (
        lambda x: F.dropout((x @ x.mT / 2).softmax(-1), 0.0) @ (3 * x),
        lambda x: (x @ x.mT / 2).softmax(-1).detach() @ (3 * x),
    ),
    "attention with a bias": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(x @ x.mT).tanh()),
        lambda x: (x @ x.mT / math.sqrt(5) + (x @ x.mT).tanh()).softmax(-1).detach() @ x,
    ),
    "talking heads": (
        lambda x: torch.einsum("gh,nhqk->ngqk", WEIGHT[:, None] * BIAS, (x @ x.mT).softmax(-1)) @ x,
        lambda x: torch.einsum("gh,nhqk->ngqk", WEIGHT[:, None] * BIAS, (x @ x.mT).softmax(-1)).detach() @ x,
    ),
    "linear attention": (
        lambda x: x @ (x.mT @ x),
        lambda x: (
            x @ (x.mT @ x).detach() / 2 + x.detach() @ (x.mT.detach() @ x) / 4 + x.detach() @ (x.mT @ x.detach()) / 4
        ),
    ),
    # What obeys without a rule.
    "ReLU": (F.relu, F.relu),
    "leaky ReLU": (F.leaky_relu, F.leaky_relu),
    "max pooling": (lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)),
    "a window that is rolled": (lambda x: x.roll(2, -1).unfold(3, 2, 1), lambda x: x.roll(2, -1).unfold(3, 2, 1)),
    "padding": (lambda x: F.pad(x, (1, 2, 0, 1), "reflect"), lambda x: F.pad(x, (1, 2, 0, 1), "reflect")),
    "enlarged": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),) * 2,
}


class TestOtherRules:
    @pytest.mark.parametrize("name", OTHERS)
    def test_the_plain_gradient_with_its_constants_detached(self, name: str) -> None:
        operation, oracle = OTHERS[name]
        x = seeded(2, 6, 4, 5)
        found, unbalanced = balanced(operation, x)
        torch.testing.assert_close(found, frozen(oracle, x), rtol=1e-9, atol=1e-12)
        assert not unbalanced

    @pytest.mark.parametrize(
        "name", ["group norm", "layer norm", "rms norm", "gated linear unit", "SwiGLU", "attention"]
    )
    def test_several_scores_at_once(self, name: str) -> None:
        operation, oracle = OTHERS[name]
        x = seeded(2, 6, 4, 5).requires_grad_()
        y, reference = operation(x * 1), oracle(x)
        pick = torch.eye(3, dtype=x.dtype)
        scores = y.flatten()[:3], reference.flatten()[:3]
        (found,) = balanced_grad(y, set(), scores[0], [x], pick, retain_graph=True, is_grads_batched=True)
        rows = [torch.autograd.grad(scores[1], x, row, retain_graph=True)[0] for row in pick]
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-9, atol=1e-12)


def unbiased(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, without biases, position embeddings and class tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if re.search(r"bias$|pos_embed|position_embeddings|class_token|cls_token|pos_embedding", name):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model.double().eval()


class SwiGLU(nn.Module):
    """Blocks of an RMS norm and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norms = nn.ModuleList(nn.RMSNorm(8, eps=1e-6) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            gate, value = up(norm(x)).chunk(2, -1)
            x = x + down(F.silu(gate) * value)
        return self.head(self.norms[2](x).mean(1))


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)


def torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 8, [1, 2], [2, 2], [4, 4], num_classes=4)


def torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=4)


def squeezed() -> nn.Module:
    """A stem of EfficientNet's make."""
    from torchvision.ops import SqueezeExcitation

    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(inplace=True), SqueezeExcitation(8, 4)),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(2, 8), nn.Hardswish(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(8, 4)),
    )


def hugging_face(attention: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        options = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "hidden_size": 16, "num_labels": 4}
        options |= {"num_attention_heads": 2, "intermediate_size": 32, "attn_implementation": attention}
        return ViTForImageClassification(ViTConfig(**options))

    return make


# Nets, and layers of theirs that all paths cross.
NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "ViT": (torchvision_vit, ["conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]),
    "Swin": (torchvision_swin, ["features.0", "features.1", "features.3", "norm"]),
    "ConvNeXt": (torchvision_convnext, ["features.0", "features.0.0", "features.1", "features.3"]),
    "SwiGLU": (SwiGLU, ["stem", "norms.2"]),
    "squeeze-and-excitation": (squeezed, ["0", "2", "3", "6"]),
    "Hugging Face, eager": (hugging_face("eager"), ["vit.embeddings.patch_embeddings.projection", "vit.embeddings"]),
    "Hugging Face, SDPA": (hugging_face("sdpa"), ["vit.embeddings.patch_embeddings.projection", "vit.embeddings"]),
}


def shares(extractor: Any) -> list[Tensor]:
    """How much of the score gradient × activation over all that a layer returned sums to, computed anew."""
    found = extractor._recorder.find()
    return [
        (activation * gradient).flatten(1).sum(1) / found.score
        for activation, gradient in zip(found.activations, found.gradients, strict=True)
    ]


class TestCompleteness:
    @pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("name", NETS)
    def test_the_score_is_the_sum_of_gradient_times_activation(self, name: str, grad_mode: Any) -> None:
        make, layers = NETS[name]
        model = unbiased(make())
        x = seeded(2, 3, 32, 32)
        with grad_mode(), methods.HiResCAM(model, layers, gradients="balanced") as extractor:
            model(x)
            extractor([1, 2])
            for share in shares(extractor):
                torch.testing.assert_close(share, torch.ones_like(share), rtol=1e-6, atol=0)
            assert extractor.unbalanced == []

    @pytest.mark.parametrize("name", NETS)
    def test_plain_gradients_do_not_sum_to_it(self, name: str) -> None:
        make, layers = NETS[name]
        model = unbiased(make())
        with torch.no_grad(), methods.HiResCAM(model, layers[:1]) as extractor:
            model(seeded(2, 3, 32, 32))
            extractor([1, 2])
            (share,) = shares(extractor)
        assert ((share - 1).abs() > 0.05).all()


class TestArgument:
    def test_neither_of_the_two(self) -> None:
        with pytest.raises(ValueError, match="`gradients` must be 'plain' or 'balanced', got 'libra'"):
            methods.GradCAM(make_model("GradCAM", torch.device("cpu")), "block2", gradients="libra")

    @pytest.mark.parametrize("name", sorted(METHODS))
    def test_gradient_methods_take_it_and_others_say_which_do(self, name: str) -> None:
        model = make_model(name, torch.device("cpu"))
        kind = getattr(methods, name.split("-")[0])
        options: dict[str, Any] = {"base_method": methods.ScoreCAM} if name.endswith("-ScoreCAM") else {}
        options |= {"fc_layer": "fc"} if name == "CAM" else {}
        pixel = name in {"GuidedBackprop", "FullGrad", "TransformerAttribution"}
        layer = () if pixel else (LAYERS if name == "RefineCAM" else "block2",)
        if name in BALANCED:
            with kind(model, *layer, gradients="balanced", **options) as extractor:
                assert extractor.gradients == "balanced"
                assert "gradients=balanced" in repr(extractor)
            return
        for value in ("balanced", "plain"):
            with pytest.raises(ValueError, match=rf"takes no gradients at a layer.*got '{value}': GradCAM, HiResCAM"):
                kind(model, *layer, gradients=value, **options)
        assert not any(module._forward_hooks for module in model.modules())


def one_layer_of_each(**options: Any) -> Any:
    """Make a small net with attention, norms, gates and smooth functions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallNet(**options).double().eval()


class SmallNet(nn.Module):
    def __init__(self, classes: int = 4, *, written_out: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.qkv = nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
        self.head = nn.Linear(8, classes)
        self.written_out = written_out
        self.checkpoints: Any = None

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        if self.written_out:
            x = x + (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
        else:
            x = x + F.scaled_dot_product_attention(q, k, v)
        gate, value = self.up(self.norm2(x.mT).mT).chunk(2, -1)
        return x + self.down(F.gelu(gate) * value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = self.mix(x) if self.checkpoints is None else self.checkpoints(self.mix, x)
        return self.head(F.silu(x).mean(1))


class TestNoTrace:
    def test_the_users_graph_gives_the_same_gradients_afterwards(self) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        model(x).square().sum().backward()
        expected = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        with methods.GradCAM(model, ["stem", "norm1"], gradients="balanced") as extractor:
            scores = model(x)
            extractor(1, scores, retain_graph=True)
            assert all(parameter.grad is None for parameter in model.parameters())
            extractor([[0, 1], [2, 3]], scores, retain_graph=True)
            scores.square().sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert gradient is not None
            assert torch.equal(parameter.grad, gradient)

    def test_a_call_that_raises_leaves_no_rule(self) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        model(x).sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        with methods.GradCAM(model, "norm1", gradients="balanced") as extractor:
            scores = model(x)
            leave = scores.register_hook(failing)
            with pytest.raises(ZeroDivisionError):
                extractor(1, scores, retain_graph=True)
            leave.remove()
            scores.sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)

    def test_another_thread_differentiates_the_same_graph_meanwhile(self) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        inside, done = threading.Event(), threading.Event()
        found: list[tuple[Tensor, ...]] = []
        with methods.GradCAM(model, "stem", gradients="balanced") as extractor:
            scores = model(x)
            parameters = list(model.parameters())
            expected = torch.autograd.grad(scores.sum(), parameters, retain_graph=True)
            alone = extractor(1, scores, normalized=False, retain_graph=True)

            def pause(_: Tensor) -> None:  # in the backward pass of the call, when its rules are on the graph
                if threading.current_thread() is threading.main_thread():
                    inside.set()
                    assert done.wait(30)

            def differentiate() -> None:
                assert inside.wait(30)
                found.append(torch.autograd.grad(scores.sum(), parameters, retain_graph=True))
                done.set()

            other = threading.Thread(target=differentiate)
            other.start()
            leave = scores.register_hook(pause)
            together = extractor(1, scores, normalized=False, retain_graph=True)
            leave.remove()
            other.join()
        assert all(map(torch.equal, found[0], expected))
        assert torch.equal(together[0], alone[0])


def failing(_: Tensor) -> Tensor:
    raise ZeroDivisionError


class TestCalls:
    def test_several_classes_are_single_ones(self) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        options: dict[str, Any] = {"normalized": False, "relu": False, "retain_graph": True}
        with torch.inference_mode(), methods.HiResCAM(model, "stem", gradients="balanced") as extractor:
            model(x)
            (together,) = extractor([[0, 3], [2, 1]], **options)
            shares = extractor.completeness[0]
            for k, classes in enumerate([[0, 2], [3, 1]]):
                (alone,) = extractor(classes, **options)
                torch.testing.assert_close(together[:, k], alone, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(shares[:, k], extractor.completeness[0], rtol=1e-12, atol=1e-12)

    def test_a_layer_beside_others_has_the_map_that_it_has_alone(self) -> None:
        # Behind `up`, gate and value are a product of two paths; behind the first half of it alone, they are not.
        model, x = GatedNet().double(), seeded(2, 3, 8, 8)
        layers = ["stem", "gate", "value", "mixed"]
        for grad_mode in (torch.enable_grad, torch.inference_mode):
            with grad_mode(), methods.HiResCAM(model, layers, gradients="balanced") as extractor:
                model(x)
                together = extractor(1, normalized=False, relu=False)
            for layer, cam in zip(layers, together, strict=True):
                with grad_mode(), methods.HiResCAM(model, layer, gradients="balanced") as extractor:
                    model(x)
                    (alone,) = extractor(1, normalized=False, relu=False)
                torch.testing.assert_close(cam, alone, rtol=1e-12, atol=1e-12)

    def test_what_makes_the_score_is_not_balanced(self) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        options: dict[str, Any] = {"normalized": False, "relu": False}
        with torch.no_grad(), methods.HiResCAM(model, "stem", gradients="balanced") as extractor:
            scores = model(x)
            (found,) = extractor(targets=lambda logits: logits.softmax(0)[1] * logits[2], **options)
            assert extractor.unbalanced == []
            model(x)
            parts = extractor([[0, 1, 2, 3]] * 2, **options)[0]
        p = scores.softmax(1)
        weights = scores[:, 2:3] * p[:, 1:2] * (torch.eye(4, dtype=x.dtype)[1] - p)
        weights[:, 2] += p[:, 1]
        torch.testing.assert_close(found, torch.einsum("nk,nkhw->nhw", weights, parts), rtol=1e-10, atol=1e-12)

    def test_scores_of_another_shape(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 5, 1), nn.Softmax(1))  # a segmentation
        with methods.HiResCAM(model, "0", gradients="balanced") as extractor:
            model(torch.rand(2, 3, 8, 8))
            extractor(targets=lambda out: out[1].sum())
            assert extractor.unbalanced == []

    @pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # of torch 2.4 itself
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints(self, reentrant: bool) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        with methods.HiResCAM(model, "stem", gradients="balanced") as extractor:
            model(x)
            (expected,) = extractor(1, normalized=False, relu=False)
            model.checkpoints = partial(checkpoint, use_reentrant=reentrant)
            model(x)
            if reentrant:  # torch's own function, whose graph is made in the backward pass
                with pytest.raises(RuntimeError, match=r"use_reentrant=False|\.grad\(\)"):
                    extractor(1)
                return
            (found,) = extractor(1, normalized=False, relu=False)
            assert extractor.unbalanced == []
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_a_graph_that_is_gone(self) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        with methods.GradCAM(model, "stem", gradients="balanced") as extractor:
            model(x)
            extractor(1)
            with pytest.raises(RuntimeError, match="second time") as caught:
                extractor(1)
        assert "retain_graph=True" in caught.value.__notes__[0]

    def test_a_path_through_the_gate_alone(self) -> None:
        x, value = seeded(2, 6, 4, 5), seeded(2, 6, 4, 5, seed=4)
        for operation, names in (
            (lambda x: F.scaled_dot_product_attention(x, value, value), {"ScaledDotProductFlashAttentionForCpu"}),
            (lambda x: x.softmax(-1) @ value.mT, {"Softmax"}),
            (lambda x: value / x.exp(), {"Div", "Exp"}),
        ):
            found, unbalanced = balanced(operation, x)
            assert unbalanced == names
            torch.testing.assert_close(found, frozen(operation, x), rtol=1e-9, atol=1e-12)

    def test_layers_whose_last_operation_has_a_rule_of_its_own(self) -> None:
        for last in (F.relu6, F.softsign, lambda x: x.clamp(x.mean() * 0, x.mean() * 0 + 2), torch.sigmoid, F.silu):
            layer = nn.Conv2d(3, 4, 3).double()
            layer.register_forward_hook(lambda _module, _args, out, last=last: last(out))
            model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False).double())
            for grad_mode in (torch.enable_grad, torch.no_grad):
                with grad_mode(), methods.HiResCAM(model, ["0", "1"], gradients="balanced") as extractor:
                    model(seeded(2, 3, 6, 6))
                    extractor(1)
                    torch.testing.assert_close(shares(extractor), [torch.ones(2, dtype=torch.float64)] * 2)
                with grad_mode(), methods.HiResCAM(model, "0", gradients="balanced") as extractor:
                    model(seeded(2, 3, 6, 6))
                    extractor(1)
                    torch.testing.assert_close(shares(extractor), [torch.ones(2, dtype=torch.float64)])

    def test_names_of_operations_without_a_rule(self) -> None:
        class Own(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 2

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient * 2

        x = seeded(4)
        found, unbalanced = balanced(lambda x: F.softplus(Own.apply(x).sinh()), x)
        assert unbalanced == {"OwnBackward", "Sinh", "Softplus"}
        torch.testing.assert_close(found, frozen(lambda x: F.softplus((2 * x).sinh()), x))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        x = seeded(2, 6, 4, 5)
        for name in ("layer norm", "group norm", "SwiGLU", "attention", "global response norm", "gated linear unit"):
            operation, oracle = OTHERS[name]
            leaf = x.to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype=dtype):
                y = F.conv2d(leaf, torch.ones(6, 1, 1, 1), groups=6)
            if name not in {"layer norm", "group norm"}:
                y = operation(y)
            else:
                weight = WEIGHT.to(dtype), BIAS.to(dtype)
                y = (
                    F.layer_norm(y, (5,), weight[0][:5], weight[1][:5])
                    if "layer" in name
                    else F.group_norm(y, 3, *weight)
                )
            score = (y * seeded(*y.shape, seed=3)).sum()
            (found,) = balanced_grad(y, set(), score, [leaf], torch.ones_like(score), retain_graph=False)
            torch.testing.assert_close(found.double(), frozen(oracle, x), rtol=0.1, atol=0.1)

    @pytest.mark.parametrize("layer", ["stem", "norm1"])
    def test_the_gradient_of_a_map(self, layer: str) -> None:
        """Numbers: a map's sum, a little to either side of a parameter."""
        model, x = one_layer_of_each(written_out=True), seeded(1, 3, 8, 8)

        def total(*, create_graph: bool) -> Tensor:
            with methods.HiResCAM(model, layer, gradients="balanced") as extractor:
                model(x)
                (cam,) = extractor(1, normalized=False, relu=False, create_graph=create_graph)
                return (cam * seeded(*cam.shape, seed=4)).sum()

        total(create_graph=True).backward()
        for name, parameter in model.named_parameters():
            step = torch.zeros_like(parameter)
            step.view(-1)[1] = 1e-5
            with torch.no_grad():
                parameter.add_(step)
                above = total_value(total)
                parameter.sub_(2 * step)
                below = total_value(total)
                parameter.add_(step)
            found = 0.0 if parameter.grad is None else float(parameter.grad.view(-1)[1])
            assert found == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-7), name


def total_value(total: Any) -> float:
    with torch.enable_grad():
        return float(total(create_graph=False))


class GatedNet(nn.Module):
    """A product of what two layers return, and a sum with it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem, self.gate = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
            self.value, self.mixed = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
            self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mixed(F.silu(self.gate(x)) * self.value(x))
        return self.head(x.mean((2, 3)))


class TestAllMethods:
    @pytest.mark.parametrize("name", sorted(BALANCED))
    def test_maps_differ_from_plain_ones_and_agree_between_grad_modes(self, name: str) -> None:
        model, x = one_layer_of_each(written_out=True), seeded(2, 3, 16, 16)
        layer = ["stem", "norm1"] if name == "RefineCAM" else "stem"
        options = {"SESS": {"window_size": 16, "scales": 1}, "GroupCAM": {"groups": 2}}.get(name, {})
        found = {}
        for gradients in ("plain", "balanced"):
            for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                with grad_mode(), getattr(methods, name)(model, layer, gradients=gradients, **options) as extractor:
                    model(x)
                    found[gradients, grad_mode] = extractor([1, 2])[0]
        for gradients in ("plain", "balanced"):
            one, *others = (cam for (kind, _), cam in found.items() if kind == gradients)
            assert one.isfinite().all()
            for other in others:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        assert (found["plain", torch.no_grad] - found["balanced", torch.no_grad]).abs().max() > 1e-3

    def test_shapley_values_of_a_linear_function_are_those_of_grad_cam(self) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        maps = []
        for method in (methods.GradCAM, methods.ShapleyCAM):
            with torch.no_grad(), method(model, "stem", gradients="balanced") as extractor:
                model(x)
                maps.append(extractor(1, normalized=False)[0])
        assert torch.equal(*maps)


class TestSigns:
    @pytest.mark.parametrize("method", [methods.GradCAMpp, methods.XGradCAM, methods.SmoothGradCAMpp])
    def test_one_warning_for_a_layer_with_both_signs(self, method: Any) -> None:
        model, x = one_layer_of_each(), seeded(2, 3, 8, 8)
        with torch.no_grad(), method(model, "stem") as extractor:
            model(x)
            with pytest.warns(UserWarning, match=f"'stem' has activations of both signs.*{method.__name__}.*HiResCAM"):
                extractor(1, retain_graph=True)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                extractor(1, retain_graph=True)
                list(extractor.stream([x, x], 1))

    @pytest.mark.parametrize("method", [methods.GradCAMpp, methods.XGradCAM])
    def test_none_for_one_sign(self, method: Any) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        with torch.no_grad(), method(model, "1") as extractor, warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.rand(2, 3, 8, 8))
            extractor(1)

    def test_the_share_of_the_rarer_sign(self) -> None:
        activation = torch.tensor([[[3.0, -1.0]], [[-3.0, 1.0]], [[0.0, 0.0]], [[1.0, 2.0]], [[2.0, -2.0]]])
        assert share_of_other_sign(activation).tolist() == [0.25, 0.25, 0.0, 0.0, 0.5]
