"""The service of the guide: a FastAPI application around an exported file."""

from __future__ import annotations

import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from torchcam.demo import load_model, sample_images
from torchcam.methods import GradCAM

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("python_multipart")
testclient = pytest.importorskip("fastapi.testclient")

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "production.md"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the guide's code defines, with the file that the guide writes."""
    from torchcam.export import export

    folder = tmp_path_factory.mktemp("service")
    export(load_model(), "GradCAM", "layer4", example=sample_images()[0].to_tensor()).save(folder / "digits.onnx")
    (source,) = re.findall(r"```python\n(import io\n.*?FastAPI.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source.replace('"digits.onnx"', repr(str(folder / "digits.onnx"))), str(GUIDE), "exec"), names)
    return names


def png(number: int) -> bytes:
    stream = io.BytesIO()
    sample_images()[number].image.save(stream, "PNG")
    return stream.getvalue()


def ask(client: Any, picture: bytes, class_idx: int) -> Any:
    return client.post("/explain", params={"class_idx": class_idx}, files={"picture": ("digit.png", picture)})


def test_two_requests_at_once(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, together = load_model(), threading.Barrier(2, timeout=60)

    class Together:
        """The session, which answers when two requests have reached it."""

        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, *arguments: Any) -> Any:
            together.wait()
            return self.session.run(*arguments)

    monkeypatch.setitem(service, "session", Together(service["session"]))
    asked = [(0, 6), (0, 2), (1, sample_images()[1].labels[0]), (2, sample_images()[2].labels[0])]
    with testclient.TestClient(service["app"]) as client, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda one: ask(client, png(one[0]), one[1]), asked))
    images = torch.cat([sample_images()[number].to_tensor() for number, _ in asked])
    with GradCAM(model, "layer4") as extractor, torch.inference_mode():
        scores = model(images)
        (maps,) = extractor([class_idx for _, class_idx in asked], scores)
    for number, answer in enumerate(answers):
        assert answer.status_code == 200
        torch.testing.assert_close(torch.tensor(answer.json()["map"]), maps[number], rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(answer.json()["scores"]), scores[number], rtol=1e-4, atol=1e-4)


def test_bad_requests(service: dict[str, Any]) -> None:
    with testclient.TestClient(service["app"]) as client:
        assert ask(client, b"no picture", 6).status_code == 400
        assert ask(client, png(0), 10).status_code == 422
