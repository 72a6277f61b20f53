"""`fpe app`: the page, served to this machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from .. import extras
from ..errors import InputError
from ..models.sources import EMBEDDED
from .console import report, say
from .options import chosen, flag
from .setting_options import BACKEND, DEVICE, DTYPE, JSON, QUIET, TRACEBACK

__all__ = ["EXAMPLES", "page"]

EXAMPLES = """Examples:

fpe app

fpe app --model ./stable-diffusion-v1-5 --model embedded --port 8080"""

_LOOPBACK = "127.0.0.1"


#: A folder of the page's own: whatever is in it is served, and an output folder may hold other things.
_PAGES = "pages"


def page(
    model: Annotated[
        list[str] | None,
        flag(
            "--model",
            panel="Page",
            text="a model that the page offers: as for fpe edit; repeat for more (default: the embedded model)",
            metavar="PATH",
        ),
    ] = None,
    output: Annotated[
        Path,
        flag(
            "-o", "--output", panel="Page", text="every result goes into DIR/pages (default: out/studio)", metavar="DIR"
        ),
    ] = Path("out/studio"),
    host: Annotated[
        str,
        flag(
            "--host",
            panel="Page",
            text=f"address to listen at (default: {_LOOPBACK}, this machine alone); whoever reaches it may run models",
            metavar="ADDRESS",
        ),
    ] = _LOOPBACK,
    port: Annotated[
        int | None,
        flag(
            "--port", panel="Page", text="port; 0 is any free one (default: the first free one from 7860)", metavar="N"
        ),
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    backend: Annotated[str | None, BACKEND] = None,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
    traceback: Annotated[bool, TRACEBACK] = False,
) -> Callable[[], int]:
    """Serve a page to edit pictures on.

    Generated images, photos, comparisons, what each word and place attends to, and every result with its settings.
    Nothing is sent anywhere, and nothing is fetched but what the models need. Ctrl-C ends it.
    """
    machine = chosen(device=device, dtype=dtype, backend=backend)
    return functools.partial(_serve, tuple(model or (EMBEDDED,)), output, host, port, machine, quiet, as_json)


def _serve(
    models: tuple[str, ...],
    output: Path,
    host: str,
    port: int | None,
    machine: dict[str, str],
    quiet: bool,
    as_json: bool,
) -> int:
    from ..atomic_folder import check_writable

    if absent := extras.missing(extras.APP):
        raise InputError(extras.app_hint(absent))
    check_writable(output)
    from ..studio.desk import Desk
    from ..studio.models import Models
    from ..studio.serve import serve, until_ended

    pages = output.resolve() / _PAGES
    desk = Desk(Models(models, **machine), pages)
    served = serve(desk, host=host, port=port, block=False)
    if as_json:
        report([], True, url=served.local_url)
    else:
        report([served.local_url], False)
    if not quiet:
        say("Ctrl-C ends it")
    until_ended(served, desk)
    return 0
