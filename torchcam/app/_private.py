"""What keeps an app private: a folder for uploads, and a check of who asks."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
VARIABLE = "GRADIO_TEMP_DIR"


@contextmanager
def uploads_in(folder: str | Path) -> Iterator[None]:
    """Let what is made of Gradio inside the block keep its files in a folder."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


class KnownHosts:
    """An ASGI middleware that refuses requests to and from hosts that are not known.

    A page of another site can make a browser ask a server on this computer, by a name of its own that leads here or by
    the right address. Browsers say in ``Host`` what was asked for, and in ``Origin`` whose page asks.

    Args:
        app: the application
        hosts: the names of the hosts that are known, without ports
    """

    def __init__(self, app: Any, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in {"http", "websocket"} and not self._knows(scope["headers"]):
            from starlette.responses import PlainTextResponse

            refusal = PlainTextResponse("This host is not served. `launch(hosts=...)` names those that are.\n", 403)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _knows(self, headers: Collection[tuple[bytes, bytes]]) -> bool:
        """Check the one host that was asked for, and where the page is from that asks, if a page does."""
        asked = [f"//{value.decode('latin-1')}" for name, value in headers if name.lower() == b"host"]
        asking = [value.decode("latin-1") for name, value in headers if name.lower() == b"origin"]
        return len(asked) == 1 and all(_host(address) in self.hosts for address in [*asked, *asking])


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
