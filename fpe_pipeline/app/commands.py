"""The commands of `fpe` by name, and what a command line asks of one of them.

A command's function makes settings of its options and returns what is to be done with them: help and refusals need no
torch, and what goes wrong later is not about the way in which the options were written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from ..runs.sentences import meant, sentences
from . import batch, doctor, edit, evaluate, heatmap, invert, page
from .console import report
from .options import chosen, flag, prose

__all__ = ["Refusal", "app", "parsed"]

_EXIT_CODES = "Exit codes: 0 done, 1 failed while running, 2 bad request, 130 interrupted."
#: What typer raises where a command line is wrong: the base of the one of them that has a public name.
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    rich_markup_mode="rich", pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


#: The groups of `fpe --help`.
_PICTURES, _NUMBERS, _HERE = "Pictures", "Measurements", "This installation"


class Refusal(Exception):
    """A command line that cannot be read; the message is one line that says what to do."""


def parsed(arguments: Sequence[str]) -> Callable[[], int]:
    """What a command line asks for, ready to be done; help and the version are printed here.

    Raises:
        Refusal: it is not written as the help says.
        InputError: values out of range.
        SystemExit: a shell asked for completions.
    """
    command = _typed()
    try:
        done = command.main(args=list(arguments or ["--help"]), prog_name="fpe", standalone_mode=False)
    except _USAGE_ERROR as error:
        named = arguments[0] if arguments[0] in command.commands else ""
        where = f"fpe {named}".strip() if error.ctx is None else error.ctx.command_path
        raise Refusal(f"{_what_is_wrong(error)} (see {where} --help)") from None
    return done if callable(done) else lambda: int(done or 0)


@functools.cache
def _typed() -> Any:
    """The commands and their options, which typer reads from signatures; once, for whoever parses several lines."""
    return typer.main.get_command(app)


def _what_is_wrong(error: Any) -> str:
    if hasattr(error, "possibilities"):
        known = [name for option in error.ctx.command.params for name in option.opts]
        return f"there is no option {error.option_name}{meant(error.option_name, known)}"
    message = " ".join(error.message.split()).rstrip(".")
    option = getattr(error, "param", None)
    if option is not None and not message:  # of an argument that is not there, whose name in Python is all that is said
        return f"{option.metavar} is missing: {' '.join(option.help.split())}"
    if option is None:
        return message
    if isinstance(error.__cause__, ValidationError):
        return sentences(error.__cause__, (), option.opts[-1])
    return f"{option.opts[-1]}: {message}"


def _version(asked: bool) -> None:
    if asked:
        from fpe_kernels import __version__  # which imports torch

        print(f"fpe {__version__}")
        raise typer.Exit


@app.callback(epilog=_EXIT_CODES)
def _fpe(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, metavar="", help="show the version and leave")
    ] = False,
) -> None:
    """Edit images by editing their prompt, with the attention maps of the source held fixed."""


@app.command(rich_help_panel=_PICTURES, epilog="Examples:\n\nfpe demo\n\nfpe demo --steps 50 -o out/slower")
def demo(
    output: Annotated[
        Path, flag("-o", "--output", panel="Options", text="folder (default: out/demo)", metavar="DIR")
    ] = Path("out/demo"),
    steps: Annotated[
        int, flag("--steps", panel="Options", text="denoising steps of each edit (default: 25)", metavar="N")
    ] = 25,
    device: Annotated[str | None, edit.DEVICE] = None,
    dtype: Annotated[str | None, edit.DTYPE] = None,
    backend: Annotated[str | None, edit.BACKEND] = None,
    as_json: Annotated[bool, edit.JSON] = False,
    quiet: Annotated[bool, edit.QUIET] = False,
    traceback: Annotated[bool, edit.TRACEBACK] = False,
) -> Callable[[], int]:
    """Make a few edits with the embedded model.

    No download, no GPU, a minute on one CPU core.
    """
    given = chosen(steps=steps, device=device, dtype=dtype, backend=backend)
    return functools.partial(_demo, output, quiet, as_json, given)


def _demo(output: Path, quiet: bool, as_json: bool, given: dict[str, Any]) -> int:
    from ..runs.progress import progress_for
    from . import demo

    with progress_for(quiet=quiet) as progress:
        paths = demo.run(output, progress=progress, **given)
    report(paths, as_json)
    return 0


for _name, _command, _examples, _panel in (
    ("edit", edit.edit, edit.EXAMPLES, _PICTURES),
    ("invert", invert.invert, invert.EXAMPLES, _PICTURES),
    ("heatmap", heatmap.heatmap, heatmap.EXAMPLES, _PICTURES),
    ("batch", batch.batch, batch.EXAMPLES, _PICTURES),
    ("app", page.page, page.EXAMPLES, _PICTURES),
    ("evaluate", evaluate.evaluate, evaluate.EXAMPLES, _NUMBERS),
    ("doctor", doctor.doctor, doctor.EXAMPLES, _HERE),
):
    _cls = evaluate.ManyValues if _name == "evaluate" else None
    app.command(_name, cls=_cls, help=prose(_command.__doc__), epilog=_examples, rich_help_panel=_panel)(_command)


@app.command(rich_help_panel=_HERE, epilog="Examples:\n\nfpe info\n\nfpe info --method masactrl")
def info(
    method: Annotated[
        str | None,
        flag(
            "--method",
            panel="Options",
            text="show the options of a method, or of an edit's class as package.module:Class, with their defaults, "
            "alone",
            metavar="NAME",
        ),
    ] = None,
    as_json: Annotated[bool, edit.JSON] = False,
    quiet: Annotated[bool, edit.QUIET] = False,
    traceback: Annotated[bool, edit.TRACEBACK] = False,
) -> Callable[[], int]:
    """Show versions, devices, attention backends, the embedded models, their words and the methods."""
    return functools.partial(_info, method, as_json)


def _info(method: str | None, as_json: bool) -> int:
    from . import info

    info.run(method, as_json=as_json)
    return 0
