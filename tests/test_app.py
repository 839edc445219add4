"""The app: what it answers, driven in a browser, and that it keeps to itself."""

from __future__ import annotations

import base64
import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.transforms import Compose, Resize, ToTensor

from tests.browsers import chromium
from tests.models import shuffled
from torchcam import cli
from torchcam.app import build
from torchcam.demo import CLASS_NAMES, load_model, sample_images
from torchcam.explain import PredictionExplanation, explain
from torchcam.layers import candidates

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
EVIL = "<img src=x onerror=\"document.title='gone'\">{{value}}${1 + 1}"
TRANSFORM = Compose([Resize(96), ToTensor()])
SEGMENTER = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
# Gradio and what it is built on use what their dependencies deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def _gradio() -> None:
    """Skip without Gradio, which takes longer to import than all tests to collect."""
    pytest.importorskip("gradio", reason="gradio is not installed")


@pytest.fixture(scope="module")
def asked() -> Iterator[list[str]]:
    """The hosts that this process looks up or connects to."""
    hosts: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connecting(self: socket.socket, address: Any) -> Any:
        hosts.append(address[0] if isinstance(address, tuple) else "localhost")
        return connect(self, address)

    def looking_up(host: Any, *rest: Any, **options: Any) -> Any:
        hosts.append(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connecting)
        patch.setattr(socket, "getaddrinfo", looking_up)
        yield hosts


@pytest.fixture(scope="module")
def window(asked: list[str]) -> Iterator[Any]:
    app = build()
    app.launch(prevent_thread_lock=True, quiet=True)
    yield app
    app.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.fixture
def opened(browser: Any, window: Any) -> Iterator[Callable[[str], Any]]:
    """Open the app as another person. Every request must stay on this host, succeed, and raise no error in the page."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def check(response: Any) -> None:
        if urlsplit(response.url).hostname not in LOOPBACK or response.status >= 400:
            wrong.append(f"{response.status} {response.url}")

    def open_(address: str) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: wrong.append(request.url) if not is_local(request.url) else None)
        page.on("response", check)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#maps img")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not wrong


def is_local(address: str) -> bool:
    parts = urlsplit(address)
    return (
        parts.hostname in LOOPBACK
        if parts.scheme in {"http", "https", "ws", "wss"}
        else parts.scheme in {"data", "blob"}
    )


def expected(picture: Any, **options: Any) -> PredictionExplanation:
    """What the app must show of a picture, asked of the library."""
    given: dict[str, Any] = {"method": ["GradCAM", "LayerCAM"], "target_layer": "layer4", **options}
    return explain(
        load_model(),
        picture,
        image=picture,
        transform=TRANSFORM,
        class_names=CLASS_NAMES,
        to_probabilities=torch.sigmoid,
        **given,
    )


def pictures_of(html: str) -> list[str]:
    return re.findall(r'<img src="(data:[^"]+)"', html)


def shows(page: Any, result: PredictionExplanation) -> None:
    """Wait until the page shows a result: the same pictures, pixel by pixel."""
    wanted = pictures_of(result._repr_html_())
    assert len(wanted) == 1 + len(result.cams) * len(result.methods)
    script = "wanted => `${[...document.querySelectorAll('#maps img')].map((image) => image.src)}` === `${wanted}`"
    page.wait_for_function(script, arg=wanted)


def drop(page: Any, path: Path) -> None:
    """Drop a file on the picture, as a mouse does."""
    script = """([name, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        transfer.items.add(new File([bytes], name, {type: "image/png"}));
        for (const kind of ["dragenter", "dragover", "drop"])
            document.querySelector("#picture img").dispatchEvent(
                new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(script, [path.name, base64.b64encode(path.read_bytes()).decode()])


def drop_folder(page: Any, path: Path) -> None:
    session = page.context.new_cdp_session(page)
    box = page.locator("#picture").bounding_box()
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})


def choose_class(page: Any, name: str) -> None:
    page.fill("#classes input", name)
    page.keyboard.press("Enter")


def set_layer(page: Any, number: int) -> None:
    page.fill("#layer input[type=number]", str(number))
    page.keyboard.press("Enter")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of another size than those that the app begins with."""
    path = tmp_path / "three.png"
    sample_images()[2].image.resize((240, 160)).save(path)
    return path


class TestInTheBrowser:
    def test_upload_class_layer_methods(self, opened: Any, window: Any, photo: Path, monkeypatch: Any) -> None:
        page = opened(window.local_url)
        shows(page, expected(sample_images()[0].image))
        drop(page, photo)
        shows(page, expected(photo))
        choose_class(page, "3")
        shows(page, expected(photo, class_idx=3))
        layers = [one.name for one in candidates(load_model(), TRANSFORM(Image.open(photo))[None]) if one.is_stage]
        set_layer(page, layers.index("layer3"))
        page.wait_for_selector("#layer-text >> text=layer3")
        shows(page, expected(photo, class_idx=3, target_layer="layer3"))
        page.fill("#methods input", "HiResCAM")
        page.keyboard.press("Enter")
        last = expected(photo, class_idx=3, target_layer="layer3", method=["GradCAM", "LayerCAM", "HiResCAM"])
        shows(page, last)

        monkeypatch.chdir(photo.parent)  # the code, run elsewhere, makes what is shown
        page.wait_for_selector("#code >> text=HiResCAM")
        made: dict[str, Any] = {}
        exec(page.inner_text("#code .cm-content"), made)
        assert pictures_of(made["result"]._repr_html_()) == pictures_of(last._repr_html_())
        for name, result in last.results.items():
            assert torch.equal(made["result"].results[name].fused[3], result.fused[3])
        assert (photo.parent / "maps.html").is_file()

    def test_the_best_classes_are_seen_and_can_be_chosen(self, opened: Any, window: Any) -> None:
        page = opened(window.local_url)
        result = expected(sample_images()[0].image)
        assert result.probabilities is not None
        best = result.probabilities[0].topk(5).indices.tolist()
        assert re.findall(r"^(\d)$", page.inner_text("#top"), re.MULTILINE) == [str(index) for index in best]
        page.click(f"#top >> text=/^{best[1]}$/")
        shows(page, expected(sample_images()[0].image, class_idx=best[1]))

    def test_verdict(self, opened: Any, window: Any) -> None:
        page = opened(window.local_url)
        page.click("#ask")
        report = expected(sample_images()[0].image).trust()
        assert page.inner_text("#verdict .verdict") == report.headline
        reasons = page.inner_text("#verdict table >> nth=0")
        assert all(check.message in reasons for check in report[0].checks)
        page.click("#pictures button >> nth=1")  # the verdict was on another picture
        shows(page, expected(sample_images()[1].image))
        page.wait_for_selector("#verdict .verdict", state="detached")

    def test_two_people_at_once(self, opened: Any, window: Any, tmp_path: Path) -> None:
        paths = [tmp_path / "first.png", tmp_path / "second.png"]
        for path, sample in zip(paths, sample_images()[1:3], strict=True):
            sample.image.resize((120, 120)).save(path)
        pages = [opened(window.local_url), opened(window.local_url)]
        for page, path in zip(pages, paths, strict=True):
            drop(page, path)  # neither waits for the other
        choose_class(pages[1], "2")
        shows(pages[0], expected(paths[0]))
        shows(pages[1], expected(paths[1], class_idx=2))
        assert "first.png" not in pages[1].content()

    @pytest.mark.parametrize("way", ["chosen", "dropped"])
    def test_folder(self, way: str, opened: Any, window: Any, tmp_path: Path) -> None:
        folder = tmp_path / "pictures"
        (folder / "more").mkdir(parents=True)
        for place, sample in zip(("0.png", "more/1.png"), sample_images()[3:5], strict=True):
            sample.image.resize((110, 100)).save(folder / place)
        (folder / "notes.txt").write_text("no picture")
        page = opened(window.local_url)
        if way == "chosen":
            page.set_input_files("#folder input[type=file]", folder)
        else:
            drop_folder(page, folder)
        shows(page, expected(folder / "0.png"))
        assert page.locator("#pictures img").count() == 2
        page.click("#pictures button >> nth=1")
        shows(page, expected(folder / "more" / "1.png"))

    def test_what_is_no_picture_is_said_so(self, opened: Any, window: Any, tmp_path: Path) -> None:
        path = tmp_path / "broken.png"
        path.write_text("no picture")
        page = opened(window.local_url)
        drop(page, path)
        page.wait_for_selector("text='broken.png' is not an image that Pillow can read")
        assert str(window.folder) not in page.inner_text("body")

    def test_names_are_shown_as_they_are(self, opened: Any) -> None:
        names = [*CLASS_NAMES[:6], EVIL, *CLASS_NAMES[7:]]
        app = build(load_model(), transform=TRANSFORM, class_names=names, title=EVIL, setup=f"# {EVIL}\n")
        app.launch(prevent_thread_lock=True, quiet=True)
        try:
            page = opened(app.local_url)
            assert page.inner_text("h1") == EVIL
            assert EVIL in page.inner_text("#maps")
            assert EVIL in page.inner_text("#top")
            assert EVIL in page.inner_text("#code .cm-content")
            assert page.locator("img[src=x]").count() == 0
            assert page.title() != "gone"
        finally:
            app.close(verbose=False)


def status(port: int, path: str = "/", method: str = "GET", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse().status
    connection.close()
    return answer


class TestPrivate:
    def test_only_this_computer_is_served(self, window: Any) -> None:
        port = window.server_port
        assert window.server_name == "127.0.0.1"
        known = [f"127.0.0.1:{port}", "127.0.0.1", f"localhost:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"]
        assert [status(port, Host=host) for host in known] == [200] * len(known)
        unknown = ["evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.", "", "[", "0.0.0.0"]
        for host in unknown:
            assert status(port, Host=host) == 403, host
            assert status(port, "/gradio_api/upload", "POST", Host=host) == 403, host

    def test_pages_of_others_are_refused(self, window: Any) -> None:
        port = window.server_port
        assert status(port, Origin=f"http://127.0.0.1:{port}") == 200
        for origin in ("http://evil.example", "https://evil.example:7860", "null", "http://127.0.0.1.evil.example"):
            assert status(port, Origin=origin) == 403, origin
            assert status(port, "/gradio_api/queue/join", "POST", Origin=origin) == 403, origin

    def test_hosts_can_be_named(self) -> None:
        app = build()
        app.launch(hosts=["demo.example"], prevent_thread_lock=True, quiet=True)
        try:
            answers = [status(app.server_port, Host=host) for host in ("demo.example", "127.0.0.1", "evil.example")]
        finally:
            app.close(verbose=False)
        assert answers == [200, 200, 403]

    def test_nothing_is_sent_anywhere(self, window: Any, asked: list[str], opened: Any) -> None:
        page = opened(window.local_url)
        shows(page, expected(sample_images()[0].image))
        assert asked  # the server asks itself whether it is there
        assert set(asked) <= LOOPBACK
        assert window.analytics_enabled is False
        assert window.share is False
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:  # which sends nothing
            one.connect(("192.0.2.1", 9))
        assert asked.pop() == "192.0.2.1"  # others would have been noticed

    def test_uploads_are_private_and_gone_afterwards(self, opened: Any, photo: Path) -> None:
        before = os.environ.get("GRADIO_TEMP_DIR")
        app = build()
        app.launch(prevent_thread_lock=True, quiet=True)
        page = opened(app.local_url)
        drop(page, photo)
        shows(page, expected(photo))
        assert stat.S_IMODE(app.folder.stat().st_mode) == 0o700
        assert [path.read_bytes() == photo.read_bytes() for path in app.folder.rglob("three.png")] == [True]
        assert os.environ.get("GRADIO_TEMP_DIR") == before
        page.close()
        app.close(verbose=False)
        assert not app.folder.exists()

    def test_two_apps_have_two_folders(self) -> None:
        first, second = build(), build()
        assert first.folder != second.folder
        first.close()
        assert not first.folder.exists()
        assert second.folder.exists()
        second.close()


class TestBuild:
    def test_any_classifier(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        model.train()
        app = build(model, transform=ToTensor(), pictures=[sample_images()[0].image])
        assert model.training
        assert [one.name for one in app.layers] == ["0", "1"]
        _, maps, layer, code, _ = app._show(str(app.folder / "begin-0.png"), [2], 0, ["HiResCAM"])
        picture = sample_images()[0].image
        wanted = explain(
            model, picture, image=picture, transform=ToTensor(), class_idx=2, method="HiResCAM", target_layer="0"
        )
        assert pictures_of(maps) == pictures_of(wanted._repr_html_())
        assert "`0` · Conv2d · 94 × 94 positions · 4 channels" in layer
        assert 'target_layer="0"' in code
        app.close()

    def test_a_transformer_begins_with_what_is_recommended(self) -> None:
        torch.manual_seed(0)
        model = shuffled(VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16,
                                           mlp_dim=32, num_classes=4))  # fmt: skip
        picture, transform = sample_images()[0].image, Compose([Resize(32), ToTensor()])
        app = build(model, transform=transform, pictures=[picture])
        (methods,) = [one for one in app.blocks.values() if getattr(one, "elem_id", None) == "methods"]
        assert methods.value == ["HiResCAM, recommended"]
        last = len(app.layers) - 1
        _, maps, _, code, _ = app._show(str(app.folder / "begin-0.png"), [1], last, [*methods.value, "HiResCAM"])
        wanted = explain(
            model,
            picture,
            image=picture,
            transform=transform,
            class_idx=1,
            method={"HiResCAM, recommended": "HiResCAM", "HiResCAM": "HiResCAM"},
            target_layer={"HiResCAM, recommended": "conv_proj", "HiResCAM": app.layers[last].name},
            method_kwargs={"HiResCAM, recommended": {"gradients": "balanced"}},
        )
        assert pictures_of(maps) == pictures_of(wanted._repr_html_())
        assert not torch.equal(*[result.fused[1] for result in wanted.results.values()])
        assert 'method_kwargs={"HiResCAM, recommended": {"gradients": "balanced"}}' in code
        app.close()

    def test_methods_that_find_their_layers_are_not_told(self) -> None:
        app = build()
        question = (str(app.folder / "begin-0.png"), [6], len(app.layers) - 1)
        *_, code, _ = app._show(*question, ["GradCAM", "FullGrad"])
        assert 'target_layer={"GradCAM": "layer4"}' in code
        *_, code, _ = app._show(*question, ["FullGrad"])
        assert "target_layer" not in code
        app.close()

    def test_a_single_score_has_no_probability(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
        app = build(model, transform=TRANSFORM)
        best, *_ = app._show(str(app.folder / "begin-0.png"), [], 0, ["GradCAM"])
        assert re.fullmatch(r"score -?[\d.]+", best)
        app.close()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": 3}, TypeError, r"`model` must be a torch\.nn\.Module, got int"),
            ({"model": nn.Conv2d(3, 1, 1)}, ValueError, "how Conv2d wants an image as a tensor is not known"),
            ({"model": SEGMENTER, "transform": TRANSFORM}, ValueError, "must give class scores"),
            ({"model": load_model(), "transform": TRANSFORM, "class_names": ["a"]}, ValueError, "has 1 names"),
            ({"class_names": ["a"]}, ValueError, "`class_names` is given without a `model`"),
            ({"pictures": []}, ValueError, "`pictures` is empty"),
        ],
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            build(**arguments)

    def test_without_gradio(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.delitem(sys.modules, "torchcam.app._window", raising=False)
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(ImportError, match=r'pip install -e "\.\[app\]"'):
            build()
        assert cli.main(["app"]) == 2
        assert 'pip install -e ".[app]"' in capsys.readouterr().err


class TestCommand:
    def test_until_it_is_stopped(self, tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "TMPDIR": str(tmp_path), "GRADIO_SERVER_NAME": "0.0.0.0"}
        command = [sys.executable, "-m", "torchcam", "app", "--port", str(port)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"the demo model: http://127.0.0.1:{port}/\n"
            assert (status(port), status(port, Host="evil.example")) == (200, 403)
            (folder,) = tmp_path.glob("gradio/torchcam-*")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        assert not list(tmp_path.glob("gradio/torchcam-*"))

    def test_weights_of_no_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["app", "--weights", "none"]) == 2
        assert "--weights is for a model that is named" in capsys.readouterr().err
