"""The script that tries exports, on a few architectures."""

from __future__ import annotations

import pytest

export_zoo = pytest.importorskip("export_zoo")
pytest.importorskip("onnxruntime")


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_large", "convnext_tiny", "swin_t", "densenet121"])
def test_architecture(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_zoo.main(["--only", name, "--methods", "GradCAM,LayerCAM"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(0 <= float(line.split()[3]) <= 1e-5 for line in lines)
