"""`explain` with texts: models with an image and a text tower as classifiers of texts."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18

from tests.snapshots import attributes, check_unchanged, hook_counts
from torchcam import cli, methods
from torchcam.explain import explain as _explain
from torchcam.targets import ClassProbability, Contrast
from torchcam.tasks._patches import PatchTransform, as_patches, from_patches
from torchcam.tasks.texts import ZeroShotClassifier

explain: Any = _explain  # one result or several: a type checker does not see which
transformers = pytest.importorskip("transformers")

TEXTS = ["a cat", "a dog", "one red car"]
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "one", "red", "cat", "dog", "car"]
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 8, "pad_token_id": 0}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def seeded(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def clip() -> Any:
    config = transformers.CLIPConfig(text_config={**TEXT, **ENDS}, vision_config=VISION, projection_dim=10)
    return transformers.CLIPModel(config)


def chinese_clip() -> Any:
    config = transformers.ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
    return transformers.ChineseCLIPModel(config)


def siglip() -> Any:
    config = transformers.SiglipConfig(text_config={**TEXT, **ENDS, "projection_size": 24}, vision_config=VISION)
    model = transformers.SiglipModel(config)
    nn.init.constant_(model.logit_scale, 2.0)
    nn.init.constant_(model.logit_bias, -3.0)
    return model


def siglip2() -> Any:
    vision = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
    config = transformers.Siglip2Config(text_config={**TEXT, **ENDS, "projection_size": 24}, vision_config=vision)
    return transformers.Siglip2Model(config)


def open_clip(vision: dict[str, Any], bias: float | None = None) -> Any:
    model = pytest.importorskip("open_clip.model", reason="open_clip is not installed")
    text = {"context_length": 8, "vocab_size": len(WORDS), "width": 32, "heads": 2, "layers": 2}
    return model.CLIP(32, vision, text, init_logit_bias=bias)


def open_clip_vit() -> Any:
    return open_clip({"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}, bias=-3.0)


def open_clip_resnet() -> Any:
    return open_clip({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 32})


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def processor(tokenizer: Any) -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.CLIPProcessor(images, tokenizer)


@pytest.fixture(scope="module")
def model() -> Any:
    return seeded(clip)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn((count, 3, size, size), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rows(tokenizer: Any, texts: list[str], length: int = 8) -> Any:
    """Tokens of a text tower without a mask, padded to its length."""
    return tokenizer(texts, return_tensors="pt", padding="max_length", max_length=length)["input_ids"]


class TestScores:
    @pytest.mark.parametrize("make", [clip, chinese_clip, siglip, siglip2])
    def test_of_transformers_are_the_models_own(self, make: Callable[[], nn.Module], tokenizer: Any) -> None:
        model, x = seeded(make), images()
        padding = {"padding": "max_length", "max_length": 8} if "siglip" in make.__name__ else {"padding": True}
        tokens = tokenizer(TEXTS, return_tensors="pt", **padding)
        seen = as_patches(x, 8) if make is siglip2 else {"pixel_values": x}
        with torch.no_grad():
            own = model(**tokens, **seen).logits_per_image
        results = explain(model, x, texts=TEXTS, processor=tokenizer)
        torch.testing.assert_close(torch.cat([one.logits for one in results]), own, rtol=0, atol=1e-9)
        expected = own.sigmoid() if "siglip" in make.__name__ else own.softmax(1)
        torch.testing.assert_close(torch.cat([one.probabilities for one in results]), expected, rtol=0, atol=1e-9)
        assert [one.predicted_class_idx for one in results] == own.argmax(1).tolist()
        assert results[0].class_names == tuple(TEXTS)
        assert results[0].model.endswith(type(model).__qualname__)

    @pytest.mark.parametrize("make", [open_clip_vit, open_clip_resnet])
    def test_of_open_clip_are_the_models_own(self, make: Callable[[], nn.Module], tokenizer: Any) -> None:
        model = seeded(make)
        x = images(size=64 if make is open_clip_resnet else 32)
        with torch.no_grad():
            own = model.get_logits(x, rows(tokenizer, TEXTS))[0]
        results = explain(model, x, texts=TEXTS, processor=lambda texts: rows(tokenizer, texts), top_k=3)
        torch.testing.assert_close(torch.cat([one.logits for one in results]), own, rtol=0, atol=1e-9)
        layer = "visual.layer4" if make is open_clip_resnet else "visual.transformer.resblocks.1.ln_1"
        assert results[0].target_layers == (layer,)
        sure = own.softmax(1) if make is open_clip_resnet else own.sigmoid()  # with a bias, each text by itself
        torch.testing.assert_close(torch.cat([one.probabilities for one in results]), sure, rtol=0, atol=1e-9)
        for row in range(2):
            alone = explain(model, x[row : row + 1], texts=TEXTS, processor=lambda t: rows(tokenizer, t), top_k=3)
            for index, (cam,) in alone.cams.items():
                torch.testing.assert_close(results[row].cams[index][0], cam, rtol=0, atol=1e-6)

    def test_of_texts_in_several_passes(self, model: Any, tokenizer: Any) -> None:
        whole = explain(model, images(), texts=TEXTS, processor=tokenizer)
        parts = explain(model, images(), texts=TEXTS, processor=tokenizer, batch_size=2)
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-9)

    def test_of_an_image_and_a_processor(self, model: Any, processor: Any, picture: Image.Image) -> None:
        result = explain(model, picture, texts=TEXTS, processor=processor)
        inputs = processor(text=TEXTS, images=picture, return_tensors="pt", padding=True)
        with torch.no_grad():
            own = model(**inputs.to(torch.float64)).logits_per_image
        torch.testing.assert_close(result.logits, own, rtol=0, atol=1e-9)
        assert result.image is not None
        assert result.image.size == (32, 32)
        given = {"pixel_values": inputs["pixel_values"].double()}
        assert torch.equal(explain(model, given, texts=TEXTS, processor=processor.tokenizer).logits, result.logits)

    def test_one_text_has_a_score(self, model: Any, tokenizer: Any) -> None:
        result = explain(model, images(1), texts=["a cat"], processor=tokenizer)
        assert result.probabilities is None
        assert result.title.startswith("CLIPModel predicts a cat (0), score ")


def by_hand(model: Any, layer: str, score: Callable[[Tensor], Tensor], tokens: Any, x: Tensor) -> Any:
    """Grad-CAM of a score of the whole model's `logits_per_image`, on a layer with a class token, in [0, 1]."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *call: kept.append(call[2]))
    try:
        logits = model(pixel_values=x, **tokens).logits_per_image
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(score(logits).sum(), kept)
    activation, gradient = (t.detach()[:, 1:].mT.reshape(len(x), -1, 4, 4) for t in (kept[0], gradient))
    cam = (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu()
    cam = cam - cam.amin((1, 2), keepdim=True)
    return cam / cam.amax((1, 2), keepdim=True)


REFUSED = {
    "CAM": "linear classifier",
    "LeGrad": "transformer block",
    "RefineCAM": "two layers or more",
    "SESS": "224",  # the model takes one size alone
    "ShapleyCAM": "no second derivative",
}


class TestMaps:
    @pytest.mark.parametrize("against", [None, "others"])
    def test_are_those_of_the_whole_model(self, against: Any, model: Any, tokenizer: Any) -> None:
        x, tokens = images(), tokenizer(TEXTS, return_tensors="pt", padding=True)
        results = explain(model, x, texts=TEXTS, processor=tokenizer, class_idx=[TEXTS] * 2, against=against)
        layer = "vision_model.encoder.layers.1.layer_norm1"
        for text in range(3):
            others = [other for other in range(3) if other != text]

            def score(logits: Tensor, text: int = text, others: list[int] = others) -> Tensor:
                return logits[:, text] - (logits[:, others].mean(1) if against else 0)

            expected = by_hand(model, layer, score, tokens, x)
            for row, result in enumerate(results):
                assert result.target_layers == (layer,)
                torch.testing.assert_close(result.cams[text][0], expected[row], rtol=0, atol=1e-6, check_dtype=False)

    def test_against_others_leaves_the_answer_alone(self, model: Any, tokenizer: Any) -> None:
        plain = explain(model, images(1), texts=TEXTS, processor=tokenizer, top_k=3)
        contrast = explain(model, images(1), texts=TEXTS, processor=tokenizer, top_k=3, against="others")
        assert torch.equal(plain.logits, contrast.logits)
        assert torch.equal(plain.probabilities, contrast.probabilities)
        assert list(plain.cams) == list(contrast.cams)
        assert not torch.allclose(plain.cams[0][0], contrast.cams[0][0], atol=0.05)

    def test_of_a_batch_are_those_of_single_images(self, model: Any, tokenizer: Any) -> None:
        for method in ("GradCAM", "ScoreCAM", "AblationCAM"):
            both = explain(model, images(), texts=TEXTS[:2], processor=tokenizer, top_k=2, method=method)
            for row, result in enumerate(both):
                alone = explain(
                    model, images()[row : row + 1], texts=TEXTS[:2], processor=tokenizer, top_k=2, method=method
                )
                assert list(alone.cams) == list(result.cams)
                for index, (cam,) in alone.cams.items():
                    torch.testing.assert_close(result.cams[index][0], cam, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", sorted(set(methods.__all__) - {"DeepFeatureFactorization", "OutputTarget"}))
    @pytest.mark.filterwarnings("ignore:.*has activations of both signs")
    def test_every_method_is_right_or_says_why_not(self, name: str, model: Any, tokenizer: Any) -> None:
        def ask() -> Any:
            return explain(
                model, images(1), texts=TEXTS, processor=tokenizer, method=name, class_idx="a dog", relu=False
            )

        if name in REFUSED:
            with pytest.raises((TypeError, ValueError, RuntimeError), match=REFUSED[name]):
                ask()
            return
        result = ask()
        whole = {"": [], "vision_model.encoder.layers.1.layer_norm1": [4, 4]}
        assert set(result.target_layers) <= set(whole)
        (cam,) = result.cams[1]
        assert cam.isfinite().all()
        assert cam.abs().max() == 1
        assert list(cam.shape[-2:]) in ([4, 4], [32, 32])

    def test_a_method_with_layers_of_its_own(self, model: Any, tokenizer: Any) -> None:
        blocks = list(model.vision_model.encoder.layers)
        result = explain(model, images(1), texts=TEXTS, processor=tokenizer, method="RefineCAM", target_layer=blocks)
        assert result.target_layers == ("vision_model.encoder.layers.0", "vision_model.encoder.layers.1")

    def test_targets_see_the_scores_of_the_texts(self, model: Any, tokenizer: Any) -> None:
        options = {"texts": TEXTS, "processor": tokenizer}
        against = explain(model, images(1), class_idx="a dog", against="others", **options)
        result = explain(model, images(1), targets={"dog": Contrast(1, [0, 2], 1), "p": ClassProbability(1)}, **options)
        torch.testing.assert_close(result.cams["dog"][0], against.cams[1][0], rtol=0, atol=1e-6)
        assert result.scores["p"] == pytest.approx(float(against.probabilities[0, 1]))
        assert result.predicted_class_idx == against.predicted_class_idx

    def test_are_saved_with_the_texts(self, model: Any, processor: Any, picture: Image.Image, tmp_path: Path) -> None:
        result = explain(model, picture, texts=TEXTS, processor=processor, class_names=["cat", "dog", "car"], top_k=2)
        folder = result.save(tmp_path / "maps", picture)
        assert "dog" in (folder / "manifest.json").read_text(encoding="utf-8")
        assert {result.name_of(index) for index in result.cams} <= {"cat (0)", "dog (1)", "car (2)"}


class TestTrust:
    @pytest.mark.parametrize("against", [None, "others"])
    def test_tests_the_score_of_a_text(self, against: Any, model: Any, tokenizer: Any) -> None:
        result = explain(model, images(1), texts=TEXTS, processor=tokenizer, against=against)
        index = result.predicted_class_idx
        gc.collect()
        report = result.trust()
        assert report.classes[0].name == TEXTS[index] if hasattr(report, "classes") else TEXTS[index] in str(report)
        assert f"probability {float(result.probabilities[0, index]):.3f}" in str(report)

    def test_needs_the_model(self, tokenizer: Any) -> None:
        model = seeded(clip)
        result = explain(model, images(1), texts=TEXTS, processor=tokenizer)
        del model
        gc.collect()
        with pytest.raises(RuntimeError, match="the model that was explained is gone"):
            result.trust()


class TestModel:
    def test_is_left_as_it_was(self, tokenizer: Any) -> None:
        model = seeded(clip).train()
        model.vision_model.eval()
        calm = explain(seeded(clip), images(1), texts=TEXTS, processor=tokenizer)
        before = {**attributes(model, identity=True), **hook_counts(model)}
        numbers = torch.get_rng_state(), random.getstate()
        result = explain(model, images(1), texts=TEXTS, processor=tokenizer, method=["GradCAM", "ScoreCAM"])
        assert torch.equal(result.logits, calm.logits)
        with pytest.raises(ValueError, match="class_idx"):
            explain(model, images(1), texts=TEXTS, processor=tokenizer, class_idx=3)
        check_unchanged({**attributes(model, identity=True), **hook_counts(model)}, before)
        assert torch.equal(torch.get_rng_state(), numbers[0])
        assert random.getstate() == numbers[1]

    def test_the_text_tower_is_no_part_of_the_classifier(self, model: Any, tokenizer: Any) -> None:
        for layer in ("text_model.encoder.layers.1", model.text_model.encoder.layers[1]):
            with pytest.raises(ValueError, match="not a module of"):
                explain(model, images(1), texts=TEXTS, processor=tokenizer, target_layer=layer)

    def test_texts_are_embedded_once(self, tokenizer: Any) -> None:
        model, passes = seeded(clip), []
        model.text_model.register_forward_hook(lambda *_: passes.append(1))
        explain(model, images(5), texts=TEXTS, processor=tokenizer, batch_size=3, method=["GradCAM", "ScoreCAM"])
        assert passes == [1]

    def test_half_precision(self, tokenizer: Any) -> None:
        model, x = seeded(clip), images(1)
        half = explain(seeded(clip).bfloat16(), x.bfloat16(), texts=TEXTS, processor=tokenizer, top_k=3)
        full = explain(model, x, texts=TEXTS, processor=tokenizer, top_k=3)
        assert half.logits.dtype == torch.float32
        torch.testing.assert_close(half.logits.double(), full.logits, rtol=0, atol=0.2)
        for index, (cam,) in full.cams.items():
            assert np.corrcoef(half.cams[index][0].flatten(), cam.flatten())[0, 1] > 0.9


@pytest.fixture(scope="module")
def images_of() -> Any:
    return transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=24)


class TestPatches:
    """SigLIP 2 takes patches; what is explained is the image that they are of."""

    def test_are_those_of_the_processor(self, images_of: Any, picture: Image.Image) -> None:
        made = images_of(images=[picture], return_tensors="pt")
        image = PatchTransform(images_of, 8)(picture)
        count = int(made["pixel_attention_mask"].sum())
        patches = as_patches(image[None], 8)
        assert torch.equal(patches["pixel_values"], made["pixel_values"][:, :count])
        assert patches["spatial_shapes"].tolist() == made["spatial_shapes"].tolist()
        assert torch.equal(from_patches(made, 8)[0], image)

    def test_an_image_is_scored_as_the_model_scores_it(
        self, images_of: Any, tokenizer: Any, picture: Image.Image
    ) -> None:
        model = seeded(siglip2)
        made = images_of(images=[picture], return_tensors="pt").to(torch.float64)
        tokens = tokenizer(TEXTS, return_tensors="pt", padding="max_length", max_length=8)
        with torch.no_grad():
            own = model(**tokens, **made).logits_per_image
        processor = transformers.Siglip2Processor(images_of, tokenizer)
        functions = {"processor": tokenizer, "transform": images_of}
        for given, options in ((picture, {"processor": processor}), (picture, functions), (made, functions)):
            result = explain(model, given, texts=TEXTS, **options)
            torch.testing.assert_close(result.logits, own, rtol=0, atol=1e-6)
            height, width = (8 * side for side in made["spatial_shapes"][0].tolist())
            assert result.input_shape == (1, 3, height, width)
            assert result.target_layers == ("vision_model.post_layernorm",)
            assert result.cams[result.predicted_class_idx][0].shape == (height // 8, width // 8)
            assert result.image.size == (width, height)

    def test_of_other_shapes(self, images_of: Any, tokenizer: Any, picture: Image.Image) -> None:
        model = seeded(siglip2)
        with pytest.raises(ValueError, match=r"multiples of the patches' 8, got shape \(1, 3, 30, 32\)"):
            explain(model, images(1)[:, :, :30], texts=TEXTS, processor=tokenizer)
        two = images_of(images=[picture, picture.rotate(90, expand=True)], return_tensors="pt")
        with pytest.raises(ValueError, match="must have one shape: explain them one by one"):
            explain(model, two, texts=TEXTS, processor=tokenizer)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"texts": []}, ValueError, "`texts` must name at least one text, .* got none"),
            ({"texts": "a cat"}, TypeError, "`texts` must be a list of strings, .* got 'a cat'"),
            ({"texts": ["a cat", 3]}, TypeError, r"`texts` must be a list of strings, .* got \['a cat', 3\]"),
            ({"texts": ["a cat", " "]}, ValueError, "`texts` must .* not empty, got ' ' at place 1"),
            ({"texts": ["a cat", "a dog", "a cat"]}, ValueError, "`texts` must .* once .* got 'a cat' at place 0"),
            ({"texts": ["a cat"] , "against": "others"}, ValueError, "`against` is 'others', but `texts` has one"),
            ({"against": "all"}, ValueError, "`against` must be 'others' or None, got 'all'"),
            ({"texts": None, "against": "others"}, ValueError, "`against` is 'others', but there are no `texts`"),
            ({"against": "others", "targets": ClassProbability(0)}, ValueError, "`against`.*`targets`"),
            ({"class_idx": 3}, ValueError, "`class_idx` must lie between 0 and 2"),
            ({"class_idx": "a cap"}, ValueError, "no class has that name.*'a cat'"),
            ({"targets": ClassProbability(3)}, ValueError, "`class_idx` must lie between 0 and 2"),
            ({"class_names": ["cat"]}, ValueError, "`class_names` has 1 names"),
            ({"top_k": 4}, ValueError, "`top_k` must lie between 1 and 3"),
            ({"processor": None}, ValueError, "`texts` need a tokenizer: pass `processor="),
            ({"processor": 3}, TypeError, "`processor` must be a processor"),
            ({"processor": lambda texts: [1, 2]}, TypeError, "`processor` must make a tensor of 3 rows"),
            ({"processor": lambda texts: torch.full((3, 4), 99)}, ValueError, "may be that of another model"),
            ({"texts": ["a cat " * 9]}, ValueError, "20 tokens.*: the model reads 8"),
            ({"texts": None}, ValueError, "CLIPModel compares images with texts: pass `texts="),
        ],
    )  # fmt: skip
    def test_argument(
        self, options: dict[str, Any], error: type[Exception], message: str, model: Any, tokenizer: Any
    ) -> None:
        with pytest.raises(error, match=message):
            explain(model, images(1), **{"texts": TEXTS, "processor": tokenizer, **options})

    def test_a_processor_of_images_alone(self, model: Any, processor: Any) -> None:
        with pytest.raises(ValueError, match=r"CLIPImageProcessor.* reads images only"):
            explain(model, images(1), texts=TEXTS, processor=processor.image_processor)

    def test_an_image_and_a_tokenizer_alone(self, model: Any, tokenizer: Any, picture: Image.Image) -> None:
        with pytest.raises(ValueError, match=r"pass .*`processor="):
            explain(model, picture, texts=TEXTS, processor=tokenizer)

    def test_images_of_another_size(self, model: Any, processor: Any, picture: Image.Image) -> None:
        larger = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), processor.tokenizer)
        with pytest.raises(ValueError, match="224"):
            explain(model, picture, texts=TEXTS, processor=larger)

    def test_a_model_without_a_text_tower(self, tokenizer: Any) -> None:
        with pytest.raises(TypeError, match=r"`texts` need a model with an image and a text tower.*ResNet is not"):
            explain(resnet18(), images(1), texts=TEXTS, processor=tokenizer)

    def test_tokens_beside_the_image(self, model: Any, tokenizer: Any) -> None:
        given = {"pixel_values": images(1), "input_ids": rows(tokenizer, TEXTS)}
        with pytest.raises(ValueError, match="`input_tensor` holds tokens of texts beside the image"):
            explain(model, given, texts=TEXTS, processor=tokenizer)


def test_a_classifier_holds_the_modules_under_their_names(model: Any, tokenizer: Any) -> None:
    from torchcam.tasks.texts import as_texts

    compared = as_texts(model, None, TEXTS, None, None, tokenizer, 32)
    assert compared is not None
    classifier = ZeroShotClassifier(model, compared)
    assert [name for name, _ in classifier.named_children()] == ["vision_model", "visual_projection"]
    assert classifier.vision_model is model.vision_model


class TestCommandLine:
    def test_explain(
        self, processor: Any, picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = seeded(clip).float()
        folder, file = str(tmp_path / "clip"), str(tmp_path / "one.png")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        picture.save(file)
        texts = [part for text in TEXTS for part in ("--texts", text)]
        asked = ["explain", file, "--hf", folder, *texts, "--class-idx", "a dog", "--against", "others"]
        capsys.readouterr()
        assert cli.main([*asked, "--output", str(tmp_path), "--save-maps", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["images"][0]
        expected = explain(model, file, texts=TEXTS, processor=processor, class_idx=1, against="others")
        assert told["classes"][0]["class_name"] == "a dog"
        assert told["classes"][0]["probability"] == pytest.approx(float(expected.probabilities[0, 1]), abs=1e-5)
        np.testing.assert_allclose(np.load(told["maps"][0]["file"]), expected.cams[1][0].numpy(), atol=1e-5)

    def test_texts_need_a_model_that_reads_them(
        self, picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        picture.save(tmp_path / "one.png")
        assert cli.main(["explain", str(tmp_path / "one.png"), "--weights", "none", "--texts", "a cat"]) == 2
        told = capsys.readouterr().err
        assert "--texts need a model with an image and a text tower" in told
        assert "which ResNet is not" in told
