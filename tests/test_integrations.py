"""The callbacks in the real trainers: what is trained with one is what is trained without."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.test_monitor import Restless, count_hooks, differences, everything, make_net, probes


def make_data(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 3, 10, 10, generator=generator), torch.randint(3, (count,), generator=generator)


def seed_everything() -> None:
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002
    random.seed(3)


def read_column(path: Path, name: str) -> list[int]:
    with path.open(encoding="utf-8", newline="") as file:
        return [int(line[name]) for line in csv.DictReader(file) if line["image"] == "0"]


def without(package: str, module: str) -> str:
    """Import a module in an interpreter in which a package cannot be found; give the error."""
    code = f"import sys; sys.modules.update(dict.fromkeys({package.split(',')!r})); import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    return done.stderr


# What Lightning says of machines with many cores or a GPU.
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:GPU available but not used")
@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
class TestLightning:
    @pytest.fixture
    def package(self, name: str) -> Any:
        return pytest.importorskip(name)

    @pytest.fixture
    def module(self, package: Any) -> Any:
        class Classifier(package.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = make_net()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

            def training_step(self, batch: Any, _index: int) -> Tensor:
                loss = F.cross_entropy(self(batch[0]), batch[1])
                self.log("loss", loss)
                return loss

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        return Classifier()

    @pytest.fixture
    def callback(self, package: Any) -> Callable[..., Any]:
        from torchcam.integrations.lightning import CAMCallback

        return CAMCallback

    def fit(
        self, package: Any, module: Any, folder: Path, callbacks: list[Any], logger: Any = False, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        resume = options.pop("ckpt_path", None)
        trainer = package.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            default_root_dir=folder,
            callbacks=callbacks,
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **{"max_epochs": 2, "log_every_n_steps": 1, **options},
        )
        seed_everything()
        trainer.fit(module, DataLoader(TensorDataset(*make_data()), batch_size=4, shuffle=True), ckpt_path=resume)
        return trainer, everything(module, *trainer.optimizers, trainer.lr_scheduler_configs[0].scheduler)

    def test_bit_for_bit(self, package: Any, module: Any, callback: Callable[..., Any], tmp_path: Path) -> None:
        start = {key: value.clone() for key, value in module.state_dict().items()}
        _, expected = self.fit(package, module, tmp_path, [])
        module.load_state_dict(start)
        watching = callback(
            probes(), [0, 1, 2], every_n_steps=5, target_layer="net.7", masks=torch.ones(3, 10, 10), directory=tmp_path
        )
        trainer, found = self.fit(package, module, tmp_path, [watching])
        assert differences(found, expected) == []
        assert trainer.global_step == 12
        assert [entry["step"] for entry in watching.monitor.history] == [0, 5, 10]
        assert read_column(tmp_path / "scalars.csv", "step") == [0, 5, 10]
        assert count_hooks(module) == 0

    def test_accumulated_gradients_and_epochs(
        self, package: Any, module: Any, callback: Callable[..., Any], tmp_path: Path
    ) -> None:
        start = {key: value.clone() for key, value in module.state_dict().items()}
        _, expected = self.fit(package, module, tmp_path, [], accumulate_grad_batches=2)
        module.load_state_dict(start)
        steps = callback(probes(), 1, every_n_steps=1, submodule="net", target_layer="7", at_start=False, tag="a")
        epochs = callback(probes(), 1, submodule="net", target_layer="7", tag="b")
        _, found = self.fit(package, module, tmp_path, [steps, epochs], accumulate_grad_batches=2)
        assert differences(found, expected) == []
        assert [entry["step"] for entry in steps.monitor.history] == [1, 2, 3, 4, 5, 6]
        assert [entry["epoch"] for entry in epochs.monitor.history] == [0, 1, 2]
        assert (tmp_path / "cam" / "strip.png").is_file()

    def test_loggers(self, package: Any, module: Any, callback: Callable[..., Any], tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        class Pictures(package.loggers.CSVLogger):
            seen: tuple[tuple[str, int, tuple[int, ...]], ...] = ()

            def log_image(self, key: str, images: list[Any], step: int) -> None:
                self.seen += ((key, step, images[0].shape),)

        board, table = package.loggers.TensorBoardLogger(tmp_path), Pictures(tmp_path, version="table")
        watching = callback(probes(), 1, every_n_steps=6, target_layer="net.7")
        self.fit(package, module, tmp_path, [watching], logger=[board, table])
        height, width = np.asarray(watching.monitor.film()[0]).shape[:2]

        events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
        scores = [(event.step, event.value) for event in events.Scalars("cam/score")]
        assert [step for step, _ in scores] == [0, 6, 12]
        expected = [entry["score"] for entry in watching.monitor.history]
        assert [value for _, value in scores] == pytest.approx(expected, rel=1e-6)
        assert [event.step for event in events.Images("cam/maps")] == [0, 6, 12]
        assert [event.step for event in events.Images("cam/strip")] == [12]
        assert [seen[:2] for seen in table.seen] == [("cam/maps", s) for s in (0, 6, 12)] + [("cam/strip", 12)]
        assert table.seen[0][2] == (height, width, 3)
        assert sorted(path.name for path in Path(board.log_dir, "cam").iterdir()) == [
            "film.gif",
            "scalars.csv",
            "strip.png",
        ]

    def test_goes_on_from_a_checkpoint(
        self, package: Any, module: Any, callback: Callable[..., Any], tmp_path: Path
    ) -> None:
        def make() -> Any:
            return callback(probes(), 1, every_n_steps=3, target_layer="net.7", directory=tmp_path / "cam")

        trainer, _ = self.fit(package, module, tmp_path, [make()], max_epochs=1)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        watching = make()
        self.fit(package, module, tmp_path, [watching], ckpt_path=tmp_path / "last.ckpt")
        assert [entry["step"] for entry in watching.monitor.history] == [0, 3, 6, 9, 12]
        assert read_column(tmp_path / "cam" / "scalars.csv", "step") == [0, 3, 6, 9, 12]
        assert len(watching.monitor.film()) == 5

    def test_bad_options_are_refused_at_once(self, callback: Callable[..., Any]) -> None:
        with pytest.raises(TypeError, match=r"\['steps'\] are not options"):
            callback(probes(), 1, steps=3)
        with pytest.raises(ValueError, match="not both"):
            callback(probes(), 1, every_n_steps=3, every_n_epochs=1)


def test_lightning_is_missing() -> None:
    error = without("lightning,lightning.pytorch,pytorch_lightning", "torchcam.integrations.lightning")
    assert 'torchcam.integrations.lightning needs Lightning: pip install -e ".[lightning]" in a clone' in error


class Pixels(Dataset[dict[str, Tensor]]):
    """What the Trainer of transformers is fed with."""

    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.rand(count, 3, 16, 16, generator=generator)
        self.labels = torch.randint(3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class TestTransformers:
    @pytest.fixture
    def model(self) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
            num_labels=3,
            hidden_dropout_prob=0.1,
        )
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
        model.classifier = nn.Sequential(Restless(), model.classifier)
        return model

    def fit(self, model: nn.Module, folder: Path, callbacks: list[Any], **options: Any) -> dict[str, Any]:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir=str(folder),
            **{
                "max_steps": 12,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "cosine",
                "bf16": True,
                "use_cpu": True,
                "save_strategy": "no",
                "logging_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **options,
            },
        )
        trainer = Trainer(model, arguments, train_dataset=Pixels(), callbacks=callbacks)
        seed_everything()
        trainer.train()
        return everything(model, trainer.optimizer, trainer.lr_scheduler)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_bit_for_bit(self, model: nn.Module, accumulate: int, tmp_path: Path) -> None:
        from torchcam.integrations.transformers import CAMTrainerCallback

        start = {key: value.clone() for key, value in model.state_dict().items()}
        expected = self.fit(model, tmp_path, [], gradient_accumulation_steps=accumulate)
        model.load_state_dict(start)
        watching = CAMTrainerCallback(
            probes(side=16), [0, 1, 2], every_n_steps=5, target_layer="vit.layers.0", masks=torch.ones(3, 16, 16)
        )
        found = self.fit(model, tmp_path, [watching], gradient_accumulation_steps=accumulate)
        assert differences(found, expected) == []
        assert watching.monitor is not None
        assert [entry["step"] for entry in watching.monitor.history] == [0, 5, 10]
        assert watching.monitor.history[-1]["nan"] == 0
        assert read_column(tmp_path / "cam" / "scalars.csv", "step") == [0, 5, 10]
        assert count_hooks(model) == 0

    def test_epochs_and_tensorboard(self, model: nn.Module, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        from torchcam.integrations.transformers import CAMTrainerCallback

        watching = CAMTrainerCallback(probes(side=16), 1, target_layer="vit.layers.0", at_start=False)
        self.fit(model, tmp_path, [watching], report_to="tensorboard")
        assert watching.monitor is not None
        assert [entry["epoch"] for entry in watching.monitor.history] == [1, 2]
        events = EventAccumulator(str(tmp_path / "cam"), size_guidance={"images": 0}).Reload()
        assert [event.step for event in events.Images("cam/maps")] == [1, 2]
        assert [event.step for event in events.Images("cam/strip")] == [2]
        expected = [entry["probability"] for entry in watching.monitor.history]
        assert [e.value for e in events.Scalars("cam/probability")] == pytest.approx(expected, rel=1e-6)

    def test_the_active_run_of_weights_and_biases(
        self, model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from torchcam.integrations.transformers import CAMTrainerCallback

        class Run:
            sent: tuple[Any, ...] = ()

            def log(self, data: Any) -> None:
                self.sent += (data,)

        wandb = types.ModuleType("wandb")
        wandb.run = run = Run()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        state = types.SimpleNamespace(is_world_process_zero=True, global_step=0, epoch=0.0)
        watching = CAMTrainerCallback(probes(side=16), 1, target_layer="vit.layers.0")
        arguments = types.SimpleNamespace(output_dir=str(tmp_path), report_to=["wandb"])
        watching.on_train_begin(arguments, state, None, model=model)
        assert [sent["cam/epoch"] for sent in run.sent] == [0]

        state.is_world_process_zero = False
        watching.on_train_begin(arguments, state, None, model=model)
        watching.on_step_end(arguments, state, None)
        assert watching.monitor is None

    def test_a_resumed_run_keeps_the_lines(self, model: nn.Module, tmp_path: Path) -> None:
        from torchcam.integrations.transformers import CAMTrainerCallback

        arguments = types.SimpleNamespace(output_dir=str(tmp_path), report_to=[])
        for start, steps in ((0, range(1, 5)), (3, range(4, 6))):
            state = types.SimpleNamespace(is_world_process_zero=True, global_step=start, epoch=0.0)
            watching = CAMTrainerCallback(probes(side=16), 1, every_n_steps=2, target_layer="vit.layers.0")
            watching.on_train_begin(arguments, state, None, model=model)
            for state.global_step in steps:
                watching.on_step_end(arguments, state, None)
        assert read_column(tmp_path / "cam" / "scalars.csv", "step") == [0, 2, 4]
        assert watching.monitor is not None
        assert [entry["step"] for entry in watching.monitor.history] == [4]


def test_transformers_is_missing() -> None:
    error = without("transformers", "torchcam.integrations.transformers")
    assert "ModuleNotFoundError: torchcam.integrations.transformers needs transformers" in error
    assert 'pip install -e ".[transformers]"' in error
