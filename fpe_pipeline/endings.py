"""An end that somebody asks for, by Ctrl-C or by a signal: what is half made is taken away, and one line says so.

Python makes an exception of Ctrl-C alone. Other signals end the process where it stands, so that what a command was
writing stays behind, and processes that it started go on.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .texts import print_text

__all__ = ["Ended", "orderly", "put_off", "tell"]

#: What job queues, containers and closed terminals send; Windows has no SIGHUP.
_SENT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Ended(KeyboardInterrupt):
    """A signal other than Ctrl-C's came; whatever answers an interruption answers this.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise :class:`Ended` in the block, as Ctrl-C raises `KeyboardInterrupt`.

    A second one ends the process at once. What the caller ignores, as ``nohup`` has it, or answers itself is left to
    it; so are all outside of the main thread, where signals cannot be answered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in _SENT if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: Any) -> None:
        _leave_to_system(taken)
        raise Ended(number)

    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        _leave_to_system(taken)


@contextlib.contextmanager
def put_off() -> Iterator[Callable[[], bool]]:
    """Have Ctrl-C, and a signal that :func:`orderly` answers, wait until the block ends, and then do what they do.

    A second one of a kind does it at once.

    Yields:
        Whether one has come, for the block to end early: between two steps rather than within one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    answers = {number: answer for number in (signal.SIGINT, *_SENT) if callable(answer := signal.getsignal(number))}

    def wait(number: int, frame: Any) -> None:
        signal.signal(number, answers[number])
        came.append(number)

    try:
        for number in answers:
            signal.signal(number, wait)
        yield lambda: bool(came)
    finally:
        for number, answer in answers.items():
            if signal.getsignal(number) is wait:
                signal.signal(number, answer)
    if came:
        answers[came[0]](came[0], None)


def _leave_to_system(numbers: list[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)


def tell(interruption: KeyboardInterrupt, by: str, more: str = "") -> int:
    """Say a line on standard error, and give the exit code that shells have for it.

    Args:
        interruption: what was caught.
        by: whose line it is.
        more: of the line, behind what happened.
    """
    # Another Ctrl-C while Python takes itself down ends it there: it would be a traceback of whatever is taken down.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    number = interruption.number if isinstance(interruption, Ended) else int(signal.SIGINT)
    what = f"ended by {signal.Signals(number).name}" if isinstance(interruption, Ended) else "interrupted"
    print_text(f"{by}: {what}{more}", sys.stderr)
    return 128 + number
