"""`explain` of models in wrappers, and of outputs that are not the scores of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18

from torchcam.explain import explain as _explain
from torchcam.methods import GradCAM
from torchcam.targets import BoxScores

explain: Any = _explain


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))


def images(count: int = 1) -> Tensor:
    return torch.randn((count, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one.logits, other.logits)
    assert list(one.cams) == list(other.cams)
    for key, (cam,) in one.cams.items():
        torch.testing.assert_close(cam, other.cams[key][0])


def backbone() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())


class Headed(nn.Module):
    """A backbone, and a function from its mean to the output."""

    def __init__(self, outputs: int, read: Any) -> None:
        super().__init__()
        self.backbone = backbone()
        self.head = nn.Linear(8, outputs)
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.head(self.backbone(x).mean((2, 3))))


class TestPipelines:
    @pytest.fixture(scope="class")
    @staticmethod
    def transformers() -> Any:
        return pytest.importorskip("transformers")

    def test_of_image_classification(self, transformers: Any, picture: Image.Image) -> None:
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        labels = {0: "cat", 1: "dog", 2: "car"}
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, id2label=labels)
        model = seeded(lambda: transformers.ViTForImageClassification(config))
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
        pipe = transformers.pipeline("image-classification", model=model, image_processor=processor)
        result = explain(pipe, picture)
        same(result, explain(model, picture, processor=processor))
        (best, *_) = pipe(picture)
        assert result.class_names[result.predicted_class_idx] == best["label"]
        assert float(result.probabilities.max()) == pytest.approx(best["score"], abs=1e-5)
        assert result.model.endswith("ViTForImageClassification")

    def test_of_texts(self, transformers: Any, picture: Image.Image) -> None:
        from tests.test_texts import TEXTS, clip, make_tokenizer

        model, tokenizer = seeded(clip), make_tokenizer()
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        task = "zero-shot-image-classification"
        pipe = transformers.pipeline(task, model=model, image_processor=processor, tokenizer=tokenizer)
        result = explain(pipe, picture, texts=TEXTS)
        same(result, explain(model, picture, texts=TEXTS, transform=processor, processor=tokenizer))
        expected = {one["label"]: one["score"] for one in pipe(picture, TEXTS, hypothesis_template="{}")}
        found = dict(zip(TEXTS, result.probabilities[0].tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-5)

    def test_of_sounds(self, transformers: Any) -> None:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.ASTConfig(
            **sizes, max_length=128, num_mel_bins=64, frequency_stride=16, time_stride=16, num_labels=3
        )
        model = seeded(lambda: transformers.ASTForAudioClassification(config))
        extractor = transformers.ASTFeatureExtractor(max_length=128, num_mel_bins=64)
        pipe = transformers.pipeline("audio-classification", model=model, feature_extractor=extractor)
        sound = np.random.default_rng(0).normal(size=16000).astype(np.float32)
        for method in ("GradCAM", "ScoreCAM"):
            result = explain(pipe, sound, method=method)
            named = extractor(sound, sampling_rate=16000, return_tensors="pt")
            same(result, explain(model, dict(named), method=method))
            assert result.cams[result.predicted_class_idx][0].shape == (8, 4)  # time x frequency
        best, *_ = pipe(sound)
        assert model.config.id2label[result.predicted_class_idx] == best["label"]


class TestWrappers:
    @pytest.mark.filterwarnings("ignore:.*does not have many workers")
    def test_lightning(self) -> None:
        lightning = pytest.importorskip("lightning")

        class Lit(lightning.LightningModule):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.net = Headed(3, lambda scores: scores)

            def forward(self, x: Tensor) -> Any:
                return self.net(x)

            def training_step(self, batch: Any, _index: int) -> Any:
                return self(batch[0]).square().mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.01)

        model = seeded(Lit)
        same(explain(model, images(), top_k=3), explain(model.net, images(), top_k=3))
        options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(fast_dev_run=True, accelerator="cpu", logger=False, **options)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(2)))
        trainer.fit(model.train(), data)
        same(explain(model, images(), top_k=3), explain(model.net, images(), top_k=3))
        assert model.trainer is trainer

    def test_peft(self) -> None:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = seeded(lambda: Headed(3, lambda scores: scores))
        expected = explain(model, images(), top_k=3)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["head", "backbone.2"], r=2)).eval()
        result = explain(wrapped, images(), top_k=3)
        same(result, expected)  # LoRA begins at no change
        assert result.target_layers == tuple(f"base_model.model.{name}" for name in expected.target_layers)

    def test_torchao(self) -> None:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        model = seeded(lambda: Headed(3, lambda scores: scores))
        expected = explain(model, images(), top_k=3)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        result = explain(model, images(), top_k=3)
        assert result.target_layers == expected.target_layers
        torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=0.02)
        for key, (cam,) in expected.cams.items():
            assert np.corrcoef(cam.flatten(), result.cams[key][0].flatten())[0, 1] > 0.99

    @pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
    def test_what_has_no_layers_any_more(self) -> None:
        model = seeded(lambda: Headed(3, lambda scores: scores))
        exported = torch.export.export(model, (images(),))
        for gone in (torch.jit.trace(backbone(), images()), exported, exported.module()):
            with pytest.raises(TypeError, match="pass the model it was made from"):
                explain(gone, images())
        traced = torch.fx.symbolic_trace(model)
        same(explain(traced, images(), target_layer="backbone.2"), explain(model, images(), target_layer="backbone.2"))


class TestOutputs:
    def test_regression(self) -> None:
        model = seeded(lambda: Headed(1, lambda scores: scores.squeeze(1)))
        with torch.no_grad():
            own = model(images(2))
        assert own.shape == (2,)
        for row, result in enumerate(explain(model, images(2))):
            assert torch.equal(result.logits, own[row].reshape(1, 1))
            assert result.probabilities is None
            with GradCAM(model, result.target_layers[0]) as extractor, torch.no_grad():
                model(images(2)[row : row + 1])
                (expected,) = extractor(0)
            torch.testing.assert_close(result.cams[0][0], expected[0])
            torch.testing.assert_close(explain(model, images(2)[row : row + 1]).cams[0][0], expected[0])

    def test_a_dictionary_of_tasks(self) -> None:
        model = seeded(lambda: Headed(3, lambda scores: {"age": scores[:, 0], "sex": scores[:, 1:]}))
        plain = Headed(3, lambda scores: scores)
        plain.load_state_dict(model.state_dict())
        targets = {"age": lambda output: output["age"], "sex": lambda output: output["sex"][1]}
        expected = explain(plain, images(2), class_idx=[[0, 2]] * 2, target_layer="backbone.2")
        results = explain(model, images(2), targets=targets, target_layer="backbone.2")
        for result, one in zip(results, expected, strict=True):
            for name, index in (("age", 0), ("sex", 2)):
                torch.testing.assert_close(result.cams[name][0], one.cams[index][0])
                assert result.scores[name] == pytest.approx(float(one.logits[0, index]))
        with pytest.raises(ValueError, match=r"several outputs, 'age', 'sex': .*`targets=\{'age': lambda output"):
            explain(model, images(2))
        with pytest.raises(ValueError, match="several outputs"):
            explain(model, images(1), class_idx=0)

    def test_a_list_of_images_for_a_detector(self) -> None:
        """A detector of one box: its output has an entry for each image."""

        class Detector(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone = backbone()
                self.head = nn.Linear(8, 1)

            def forward(self, x: Any) -> list[dict[str, Tensor]]:
                scores = self.head(self.backbone(torch.stack(list(x))).mean((2, 3))).squeeze(1)
                box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
                return [{"boxes": box, "labels": torch.ones(1).long(), "scores": score[None]} for score in scores]

        model = seeded(Detector)
        target = BoxScores([1], [[0, 0, 8, 8]])
        results = explain(model, list(images(2)), targets=[target] * 2, target_layer="backbone.2")
        for row, result in enumerate(results):
            with torch.no_grad():
                own = model(images(2)[row : row + 1])[0]["scores"]
            assert result.scores["BoxScores"] == pytest.approx(1 + float(own))
            alone = explain(model, images(2)[row : row + 1], targets=target, target_layer="backbone.2")
            torch.testing.assert_close(result.cams["BoxScores"][0], alone.cams["BoxScores"][0])

    def test_what_is_no_model(self) -> None:
        with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got function"):
            explain(resnet18, images())
