"""The app in the browser, on Gradio."""

from __future__ import annotations

import html
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware

from torchcam._explanation import PredictionExplanation
from torchcam._inputs import as_rgb, read_picture
from torchcam._templates import render
from torchcam.demo import sample_images
from torchcam.demo.model import DemoNet

from ._private import LOOPBACK, KnownHosts, uploads_in
from ._subject import Question, Subject, as_code

SHOWN = 5  # classes that are seen at a glance
AT_ONCE = 4  # questions that are answered at the same time
OLD = (600, 24 * 3600)  # every so many seconds, files older than that are removed
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing is fetched
BEGIN = ["GradCAM", "LayerCAM"]


class Window(gr.Blocks):  # type: ignore[misc]
    """The app: see :func:`torchcam.app.build`.

    Args:
        subject: the model and what belongs to it
        pictures: the pictures to begin with
        title: the heading
    """

    def __init__(self, subject: Subject, pictures: Sequence[str | Path | Image.Image] | None, title: str) -> None:
        parent = Path(get_upload_folder())
        parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="torchcam-", dir=parent))  # of this user alone
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.subject = subject
        self._sources: dict[str, tuple[str, str]] = {}  # of the pictures to begin with: the code that names them
        with uploads_in(self.folder):
            super().__init__(analytics_enabled=False, title=title, delete_cache=OLD, fill_width=True)
            begin = self._keep(pictures)
            layers = subject.look_at(begin[0])
            names = _class_labels(subject.answer(Question(begin[0], (), layers.choice, ("GradCAM",))))
            self.layers = list(layers)
            self._labels = {label: index for index, label in enumerate(names)}
            self._lay_out(title, begin, names, layers.choice)

    # Running.

    def launch(self, *, hosts: Collection[str] | None = None, **options: Any) -> Any:
        """Run the app, for this computer alone if nothing else is said.

        Args:
            hosts: the names of the hosts that may be asked for, without ports; by default those of this computer while
                it alone is served, and any otherwise. ``["*"]`` is any.
            options: the arguments of ``gradio.Blocks.launch``
        """
        name = options.get("server_name") or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
        if hosts is None:
            hosts = LOOPBACK if name in LOOPBACK and not options.get("share") else ["*"]
        if "*" not in hosts:
            arguments = dict(options.get("app_kwargs") or {})
            guard = Middleware(KnownHosts, hosts={*hosts, name})
            options["app_kwargs"] = {**arguments, "middleware": [guard, *arguments.get("middleware", ())]}
        quiet = {"share": False, "run_history": False, "enable_monitoring": False, "footer_links": [], "pwa": False}
        with uploads_in(self.folder):
            return super().launch(**{"theme": gr.themes.Default(**SYSTEM_FONTS), **quiet, **options})

    def close(self, verbose: bool = True) -> None:
        """Stop the app, and remove what was uploaded."""
        super().close(verbose=verbose)
        self._remove()

    # The page.

    def _keep(self, pictures: Sequence[str | Path | Image.Image] | None) -> list[str]:
        """Put the pictures to begin with into the private folder."""
        kept = []
        for number, (picture, *source) in enumerate(self._beginning(pictures)):
            path = self.folder / f"begin-{number}.png"
            as_rgb(read_picture(picture)).save(path)
            kept.append(str(path))
            self._sources[str(path)] = (source[0], source[1])
        return kept

    def _beginning(self, pictures: Sequence[Any] | None) -> list[tuple[Any, str, str]]:
        if pictures is not None:
            if not pictures:
                raise ValueError("`pictures` is empty: leave it out for those that ship with the package")
            return [
                (one, as_code(str(one)), "") if isinstance(one, (str, Path)) else (one, "...  # the image", "")
                for one in pictures
            ]
        if isinstance(self.subject.model, DemoNet):
            source = "from torchcam.demo import sample_images\n"
            return [(one.image, f"sample_images()[{n}].image", source) for n, one in enumerate(sample_images())]
        from matplotlib.cbook import get_sample_data

        path = get_sample_data("grace_hopper.jpg", asfileobj=False)
        source = "from matplotlib.cbook import get_sample_data\n"
        return [(path, 'get_sample_data("grace_hopper.jpg", asfileobj=False)', source)]

    def _lay_out(self, title: str, begin: list[str], names: Sequence[str], default: str | None) -> None:
        known = [layer.name for layer in self.layers]
        with self:
            gr.HTML(f"<h1>{_safe(title)}</h1>")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    picture = gr.Image(
                        begin[0], type="filepath", image_mode=None, height=320, label="Picture", elem_id="picture",
                        buttons=["fullscreen"], sources=["upload", "webcam", "clipboard"],
                    )  # fmt: skip
                    picture.preprocess = _path_of  # Gradio's own opens the file, and its errors tell where it lies
                    gallery = gr.Gallery(
                        begin, label="Pictures", columns=5, height=120, allow_preview=False, object_fit="cover",
                        interactive=False, buttons=[], elem_id="pictures",
                    )  # fmt: skip
                    folder = gr.File(label="A folder of pictures", file_count="directory", height=120, elem_id="folder")
                    classes = gr.Dropdown(
                        [(label, index) for index, label in enumerate(names)], value=[], multiselect=True,
                        label="Classes", info="none: the one that the model predicts", elem_id="classes",
                    )  # fmt: skip
                    layer = gr.Slider(
                        0, max(len(known) - 1, 1), known.index(default) if default in known else 0, step=1,
                        label="Layer", info="from the input to the scores", elem_id="layer", visible=len(known) > 1,
                    )  # fmt: skip
                    layer_text = gr.Markdown(elem_id="layer-text")
                    methods = gr.Dropdown(
                        self.subject.methods,
                        value=self.subject.methods[:1] if self.subject.best else BEGIN,
                        multiselect=True,
                        label="Methods",
                        elem_id="methods",
                    )
                with gr.Column(scale=5, min_width=320):
                    top = gr.Label(num_top_classes=SHOWN, label="The model's answer", show_heading=False, elem_id="top")
                    maps = gr.HTML(elem_id="maps", min_height=240)
                    ask = gr.Button("Is the first map to be trusted?", elem_id="ask")
                    verdict = gr.HTML(elem_id="verdict")
                    code = gr.Code(
                        language="python", label="The code of what is shown", interactive=False, elem_id="code"
                    )
            question = [picture, classes, layer, methods]
            private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": AT_ONCE}
            judging = ask.click(self._judge, question, verdict, **private)
            gr.on(
                [self.load, *(one.change for one in question)], self._show, question,
                [top, maps, layer_text, code, verdict], trigger_mode="always_last", show_progress_on=[maps],
                cancels=[judging], **private,
            )  # fmt: skip
            self.load(js=render("app/_folders.js"))
            folder.upload(_pictures_in, folder, [gallery, folder, picture], **private)
            gallery.select(_chosen, gallery, picture, **private)
            top.select(self._add_class, classes, classes, **private)

    # Answers.

    def _question(self, picture: str, classes: Sequence[int], layer: float, methods: Sequence[str]) -> Question:
        chosen = self.layers[int(layer)].name if self.layers else None
        return Question(picture, tuple(classes), chosen, tuple(methods))

    def _answer(self, question: Question) -> PredictionExplanation:
        try:
            return self.subject.answer(question)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            told = " ".join([str(error), *getattr(error, "__notes__", ())])
            told = told.replace(question.picture, Path(question.picture).name)  # where it lies is private
            raise gr.Error(_safe(told), title="No map") from error

    def _show(
        self, picture: str | None, classes: Sequence[int], layer: float, methods: Sequence[str]
    ) -> tuple[Any, str, str, str, str]:
        """Answer a question: the best classes, the maps, the layer, the code, and no verdict yet."""
        if picture is None or not methods:
            missing = "a picture" if picture is None else "a method"
            return None, f"<p>Choose {missing}.</p>", self._layer_text(layer), "", ""
        question = self._question(picture, classes, layer, methods)
        result = self._answer(question)
        source, imports = self._sources.get(picture, (as_code(Path(picture).name), ""))
        code = self.subject.code(question, source, imports)
        return _best(result), _maps(result, picture), self._layer_text(layer), code, ""

    def _judge(self, picture: str | None, classes: Sequence[int], layer: float, methods: Sequence[str]) -> str:
        """Test the first map, and return the report."""
        if picture is None or not methods:
            return "<p>There is no map yet.</p>"
        result = self._answer(self._question(picture, classes, layer, methods))
        try:
            return _plain(str(result.trust()._repr_html_()))
        except (RuntimeError, ValueError) as error:
            raise gr.Error(_safe(str(error)), title="No verdict") from error

    def _layer_text(self, layer: float) -> str:
        if not self.layers:
            return ""
        one = self.layers[int(layer)]
        return f"`{one.name}` · {one.type} · {' × '.join(map(str, one.grid))} positions · {one.channels} channels"

    def _add_class(self, classes: Sequence[int], event: gr.SelectData) -> list[int]:
        """Explain a class that was clicked on, beside the others."""
        return list(dict.fromkeys([*classes, self._labels[event.value]]))


def _class_labels(result: PredictionExplanation) -> list[str]:
    return [result.name_of(index) for index in range(result.logits.shape[1])]


def _best(result: PredictionExplanation) -> dict[str, float] | str:
    """Return the classes with the highest probabilities; where there are none, the score."""
    if result.probabilities is None:
        return result.value_of(0)
    best = result.probabilities[0].topk(min(SHOWN, result.logits.shape[1]))
    return {result.name_of(index): value for value, index in zip(*map(torch.Tensor.tolist, best), strict=True)}


def _maps(result: PredictionExplanation, picture: str) -> str:
    """Return the maps as a notebook shows them."""
    note = ""
    if result.image is not None and result.image.size != read_picture(picture).size:
        note = "<p>Shown is what the model sees of the picture: where this lies on it is not known.</p>"
    return _plain(result._repr_html_() + note)


def _plain(text: str) -> str:
    """Return HTML in which Gradio finds no templates."""
    return text.replace("{{", "&#123;&#123;").replace("${", "&#36;{")


def _safe(text: str) -> str:
    return _plain(html.escape(text))


def _path_of(payload: Any) -> Any:
    return None if payload is None else payload.path


def _pictures_in(files: Sequence[str] | None) -> tuple[Any, Any, Any]:
    """Show the pictures of a folder, and choose the first."""
    kinds = Image.registered_extensions()
    found = [path for path in files or () if Path(path).suffix.lower() in kinds]
    found.sort(key=lambda path: Path(path).name)
    if not found:
        raise gr.Error("There is no picture in this folder.", title="Nothing to show")
    return found, None, found[0]


def _chosen(gallery: Sequence[tuple[str, str | None]], event: gr.SelectData) -> str:
    path: str = gallery[event.index][0]
    return path
