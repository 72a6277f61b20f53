"""Serving the page: to this machine unless told otherwise, with nothing from, and nothing to, anybody else."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import InputError
from .uploads import MOST_BYTES

__all__ = ["HEADERS", "serve", "until_ended"]

#: What a browser may load: the page's own files, and pictures that stand in the page itself. Gradio's page has scripts
#: and styles in its text.
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class _Headers:
    """Adds :data:`HEADERS` to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self.app(scope, receive, sent if scope["type"] == "http" else send)


class _OwnNames:
    """Answers who asks for this machine by its own name or a number, where it is served to this machine alone.

    A page elsewhere can have its own name lead here after it was loaded; the browser then takes both for one site, and
    lets that page read this one.
    """

    def __init__(self, app: Any, host: str) -> None:
        self.app, self._host = app, host

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] == "http" and _is_loopback(self._host):
            from starlette.responses import PlainTextResponse

            asked = _named(dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
            if asked not in (self._host, "localhost") and not _is_number(asked):
                said = f"this page is served to this machine alone, as localhost and not as {asked!a}"
                await PlainTextResponse(f"{said}; --host serves it to others", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _named(host: str) -> str:
    """What a Host header names, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_number(host) and ipaddress.ip_address(host).is_loopback)


def serve(desk: Any, *, host: str = "127.0.0.1", port: int | None = None, block: bool = True) -> Any:
    """Serve a desk's page.

    Args:
        desk: a :class:`~fpe_pipeline.studio.desk.Desk`.
        host, port: to listen at; default: this machine alone, at the first free port from 7860 on; 0 is any free one.
        block: whether to stay until interrupted.

    Returns:
        Gradio's blocks, with ``local_url``; ``close()`` ends it.
    """
    port = _checked_port(host, port)  # before a folder is made
    keep_to_itself(desk.root)
    from starlette.middleware import Middleware

    from . import looks
    from .page import build

    page = build(desk)
    page.queue(max_size=32, default_concurrency_limit=4, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        share=False,
        quiet=True,
        inbrowser=False,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[str(desk.root)],
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=looks.theme(),
        css=looks.CSS,
        js=looks.SCRIPT,
        app_kwargs={
            "middleware": [Middleware(_Headers), Middleware(_OwnNames, host=host)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
    )
    # While a browser draws the page: what it asks for first is then known. A process that ends waits for this thread,
    # for seconds: one that Python stops inside of torch aborts the process.
    threading.Thread(target=desk.first_estimate, name="fpe-estimate").start()
    return page


def until_ended(page: Any, desk: Any) -> None:
    """Stay until Ctrl-C or a signal ends the page, and leave nothing of what was uploaded.

    Gradio's own waiting writes a sentence to standard output, where results go, and leaves open pages as they are.

    Args:
        page: of :func:`serve`, which did not block.
        desk: whose page it is.
    """
    try:
        while page.is_running:
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass  # which is how a page is ended
    finally:
        desk.close()
        # Open pages hold their connections, and what was shown is removed when the last is gone: each that is cut off
        # would be an error of the server's, with a traceback.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        page.server.config.timeout_graceful_shutdown = 1  # seconds
        page.close(verbose=False)


def keep_to_itself(root: Path) -> None:
    """Keep Gradio from the network, and its files in the output folder; before it is imported."""
    root.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str((root / "served").resolve())


def _checked_port(host: str, port: int | None) -> int | None:
    """The port, of 0 a free one by its number, which Gradio asks for; raises InputError where nothing can listen there.

    Gradio would look for a port of its own.
    """
    try:
        with socket.create_server((host, port or 0)) as tried:
            return tried.getsockname()[1] if port == 0 else port
    except (OSError, OverflowError) as error:
        place = host if port is None else f"{host}:{port}"
        raise InputError(f"cannot listen at {place}: {error}; pass another --port or --host") from error
