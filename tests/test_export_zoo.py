"""The script that tries exports: its page, and a few architectures again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

export_zoo = pytest.importorskip("export_zoo")
DOCS = Path(__file__).parent.parent / "docs"
ROWS = json.loads((DOCS / "exported.json").read_text(encoding="utf-8"))


def test_page() -> None:
    """The page says what was measured, in layers that the script knows, and none of it is off."""
    for library in ("timm", "transformers"):
        pytest.importorskip(library)
    models = export_zoo.models()
    assert (DOCS / "exported.md").read_text(encoding="utf-8") == export_zoo.page(ROWS, models)
    tried = {(row["model"], layer) for row in ROWS for layer in row["layer"].split()}
    assert tried <= {(name, layer) for name, model in models.items() for layer in model.layers}
    assert all(0 <= row.get("error", 0) <= 1e-5 for row in ROWS)


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", "mobilenet_v3_large", "convnext_tiny", "swin_t", "vit_b_16", "deeplabv3_mobilenet_v3_large"],
)
def test_architecture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    results = tmp_path / "results.json"
    arguments = ["--only", name, "--methods", "LayerCAM", "--layers", "middle", "--results", str(results)]
    assert export_zoo.main(arguments) == 0
    (row,) = json.loads(results.read_text(encoding="utf-8"))
    assert 0 <= row["error"] <= 1e-5
    assert [row["layer"]] == [export_zoo.models()[name].layers[1]]
