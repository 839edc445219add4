"""Explain pictures in the browser.

Open an app in the browser: drop a picture or a folder, or use the camera;
choose classes by name, a layer and methods; see the maps side by side, whether
to believe them, and the code that makes them. Without a model it starts with
the one that ships with the package. Only this computer is served, nothing is
sent anywhere, and what is uploaded is gone when the app ends. Needs Gradio:
`pip install -e ".[app]"` in a clone.

Examples:
  torchcam app
      the model and the pictures that ship with the package; needs no network
  torchcam app --timm resnet18.a1_in1k --open
      a model of timm, in a new tab of the browser
  torchcam app --model-factory mine.models:load --port 8000
      your own model, which the function `load` of `mine/models.py` returns
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from . import _options
from ._messages import UserError, library_errors, print_line
from ._models import RANDOM_WEIGHTS, load_model


def add_options(app: Any) -> None:
    """Add the options of the command to its parser."""
    _options.add_model(app, default="a model that ships with the package")
    server = app.add_argument_group("the server")
    server.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="the address to serve; 0.0.0.0 lets everyone in the network use the app (default: %(default)s)",
    )
    _options.add_count(server, "--port", "the port (default: the first that is free from 7860 on)")
    server.add_argument("--open", action="store_true", help="open the app in the browser")


def run(arguments: Any) -> None:
    """Run the app until it is stopped."""
    from torchcam.app import build

    name = "the demo model"
    given: dict[str, Any] = {}
    if any(getattr(arguments, way) is not None for way in ("arch", "timm", "hf", "model_factory")):
        classifier = load_model(arguments)
        name = classifier.name
        given = {
            "model": classifier.model,
            "transform": classifier.preprocess,
            "class_names": classifier.categories,
            "title": f"torchcam: {name}",
            "setup": classifier.code,
        }
        if classifier.is_random:
            print(RANDOM_WEIGHTS)
    elif arguments.weights is not None:
        raise UserError("--weights is for a model that is named: give --arch, --timm or --model-factory as well")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the uploads are removed then, too
    with library_errors():
        window = build(**given)
    options = {"server_name": arguments.host, "server_port": arguments.port, "inbrowser": arguments.open}
    try:
        window.launch(quiet=True, prevent_thread_lock=True, **options)
        print_line(f"{name}: {window.local_url}")
        print("Ctrl-C ends the app and removes what was uploaded.", flush=True)
        threading.Event().wait()
    except OSError as error:
        raise UserError(f"--host '{arguments.host}' cannot be served: {error}") from error
    except KeyboardInterrupt:
        print("The app has ended.")
    finally:
        window.close(verbose=False)
