"""The `fpe` command: a demo, edits of generated images, and what this installation can do.

Paths of results go to standard output, one a line, or with --json one object; progress and errors go to standard error.
Exit codes: 0 done, 1 failed while running, 2 the request cannot be served as it stands, 130 interrupted, 128 and its
number where another signal ended it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Sequence

from .. import endings, extras
from ..errors import InputError
from ..texts import print_text, unheard
from .console import open_streams, quiet_imports, say, warnings_on_stderr

__all__ = ["NEED_PICTURES", "main"]

# Commands that need more than torch and what reads a command line.
NEED_PICTURES = ("app", "batch", "demo", "edit", "evaluate", "heatmap", "invert")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments after the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    quiet_imports()
    asks_for_help = not arguments or {"-h", "--help"} & set(arguments)
    needs = extras.PIPELINE if arguments[:1] and arguments[0] in NEED_PICTURES and not asks_for_help else extras.COMMAND
    if absent := extras.missing(needs):
        print_text(f"fpe: error: {extras.hint(absent)}", sys.stderr)
        return 2
    try:
        with endings.orderly():
            return _done(arguments)
    except KeyboardInterrupt as interruption:  # also while the command line is read, for which packages are imported
        return endings.tell(interruption, "fpe")
    except Exception as error:
        return _failed(error, arguments)


def _done(arguments: Sequence[str]) -> int:
    from .commands import Refusal, parsed  # which needs the extra

    try:
        run = parsed(arguments)
    except Refusal as error:
        return _said(str(error), 2, arguments)
    except SystemExit as leave:  # completions are written
        if isinstance(leave.__context__, BrokenPipeError):  # rich's, of help that nobody reads on
            return 0
        return leave.code if isinstance(leave.code, int) else 2
    with warnings_on_stderr(say):
        code = run() or 0
    with unheard(sys.stdout, BrokenPipeError):
        sys.stdout.flush()
    return code


def _failed(error: Exception, arguments: Sequence[str]) -> int:
    if "--traceback" in arguments:
        traceback.print_exc()
    reason = " ".join(str(error).split()) or type(error).__name__
    return _said(reason, 2 if isinstance(error, InputError) else 1, arguments)


def _said(reason: str, code: int, arguments: Sequence[str]) -> int:
    print_text(f"fpe: error: {reason}", sys.stderr)
    if "--json" in arguments:
        with contextlib.suppress(OSError):  # it may be what went wrong: a full disk
            print_text(json.dumps({"error": reason, "exit_code": code}), flush=True)
    return code
