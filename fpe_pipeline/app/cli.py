"""The `fpe` command: a demo, edits of generated images, and what this installation can do.

Paths of results go to standard output, one a line; progress and errors go to standard error.
Exit codes: 0 done, 1 failed while running, 2 the request cannot be served as it stands, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import extras
from ..errors import InputError
from ..runs.settings import Settings
from ..texts import print_text
from .console import Version, quiet_imports, warnings_on_stderr
from .options import EDIT_DESCRIPTION, EDIT_EPILOG, add_common, add_edit

__all__ = ["main"]

# Commands whose module has add_arguments(parser) and run(options).
OTHER_COMMANDS = {
    "evaluate": (
        "fpe_pipeline.quality",
        "score edits where the right answer is known, and every method on generated or real images",
    )
}
# Commands that need more than torch.
NEED_PICTURES = ("demo", "edit", *OTHER_COMMANDS)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that start with the name of the program, whatever the subcommand."""

    def error(self, message: str) -> Any:
        self.exit(2, f"fpe: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments after the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet_imports()
    asks_for_help = not arguments or {"-h", "--help"} & set(arguments)
    if not asks_for_help and arguments[0] in NEED_PICTURES and (absent := extras.missing()):
        print(f"fpe: error: {extras.hint(absent)}", file=sys.stderr)
        return 2
    try:
        parser = _parser(arguments)
        if not arguments:
            parser.print_help()
            return 0
        options = parser.parse_args(arguments)
    except SystemExit as leave:  # argparse has already written its help or its error
        return leave.code if isinstance(leave.code, int) else 2
    try:
        with warnings_on_stderr(_say):
            return options.run(options) or 0
    except KeyboardInterrupt:
        print("fpe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of standard output has gone; Python would report it once more at exit
        return 1
    except Exception as error:
        if getattr(options, "traceback", False):
            traceback.print_exc()
        print_text(f"fpe: error: {_one_line(error)}", sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(
        prog="fpe",
        description="Edit images by editing their prompt, with the attention maps of the source held fixed.",
        epilog="Exit codes: 0 done, 1 failed while running, 2 bad request, 130 interrupted.",
    )
    parser.add_argument("--version", action=Version, help="show the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="make a few edits with the embedded model",
        description="Make a few edits with the embedded model: no download, no GPU, a minute on one CPU core.",
    )
    demo.add_argument(
        "-o", "--output", type=Path, default=Path("out/demo"), metavar="DIR", help="folder (default: out/demo)"
    )
    demo.add_argument("--steps", type=int, default=25, metavar="N", help="denoising steps of each edit (default: 25)")
    add_common(demo)
    demo.set_defaults(run=_demo)

    edit = commands.add_parser(
        "edit",
        help="make an image of a prompt and edit it into others",
        description=EDIT_DESCRIPTION,
        epilog=EDIT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add_edit(edit)
    edit.set_defaults(run=_edit)

    info = commands.add_parser("info", help="show versions, devices, attention backends and methods")
    info.add_argument("--method", metavar="NAME", help="show the options of a method, with their defaults, alone")
    info.set_defaults(run=_info)

    for name, (module, summary) in OTHER_COMMANDS.items():
        if importlib.util.find_spec(module) is None:
            continue
        command = commands.add_parser(name, help=summary, description=summary)
        if (
            name in arguments[:1] and not extras.missing()
        ):  # its imports are heavy, and only its own run and help need them
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    return parser


def _edit(options: argparse.Namespace) -> int:
    from ..atomic_folder import check_writable
    from ..runs import agreement
    from ..runs import run as runs
    from ..runs.edit_class import check_edit_class

    given = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    if {"inversion", "inversion_guidance"} & given.keys() and not ("image" in given or hasattr(options, "record")):
        raise InputError("--inversion and --inversion-guidance are about a picture; pass it with --image")
    if "targets" in given:
        given["targets"] = tuple(given["targets"])
    if "options" in given:
        given["options"] = dict(given["options"])
    record: dict[str, Any] | None = None
    if hasattr(options, "record"):
        settings, record = runs.read_record(options.record)
        settings = settings.changed(**given)
        if "method" not in given:
            check_edit_class(settings, record)
    else:
        if "image" in given:
            given.setdefault("source", "")
        missing = [f"--{name}" for name, key in (("source", "source"), ("target", "targets")) if key not in given]
        if missing:
            raise InputError(f"expected {' and '.join(missing)}, or --from with the run.json of an earlier run")
        settings = Settings(**given)
    if {"inner_steps", "early_stop"} & given.keys() and (settings.image is None or settings.inversion != "null-text"):
        raise InputError("--inner-steps and --early-stop are null-text inversion's; pass --inversion null-text as well")
    settings.check()
    check_writable(options.output)
    if record is not None and "model" not in given:
        settings = _with_its_model(settings, record)
    same_model = record is not None and not {"model", "dtype", "device"} & given.keys()
    run = runs.execute(
        settings,
        progress=not options.quiet,
        expected_model=record["model"]["identity_sha256"] if record is not None and same_model else None,
        expected_photo=runs.photo_of(record) if record is not None and not {"image", "size"} & given.keys() else None,
    )
    # Measured before the images are written: they may replace those that they are compared with.
    distance = None
    if record is not None and not given:
        distance = agreement.differences(run, record, options.record.parent)
    _print_paths(runs.write(run, options.output))
    if distance is not None:
        _say(distance or "the images are those of the record, bit for bit")
    return 0


def _with_its_model(settings: Settings, record: dict[str, Any]) -> Settings:
    """`runs.with_its_model`, which says so where the record's weights are earlier ones."""
    from ..runs import run as runs

    found = runs.with_its_model(settings, record)
    if found.model != settings.model:
        _say(f"the record was made with an earlier embedded model, {found.model}, which is used again")
    return found


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    given = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    _print_paths(demo.run(options.output, progress=not options.quiet, **given))
    return 0


def _info(options: argparse.Namespace) -> int:
    from . import info

    info.run(options.method)
    return 0


def _print_paths(paths: Sequence[Path]) -> None:
    for path in paths:
        print_text(path)
    sys.stdout.flush()


def _say(text: str) -> None:
    print_text(f"fpe: {text}", sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
