"""A run that is watched: how far it is, what the pictures look like so far, and the wish to stop or end it.

A run that is stopped stands still in its thread, at the end of a step, with everything it holds: latents, the
scheduler's memory, heat that an edit has summed. What it shares with other runs it gives out of its hands meanwhile.
Going on is therefore the same run to the bit, whatever its method.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..runs.progress import Progress
from ..sampling.decoding import decoded

__all__ = ["Cancelled", "Stopped", "Told", "Watched", "go_on", "watch"]

#: Share of a run's time that its previews may take.
_SHARE = 0.04
#: Seconds between two looks at how far a run is and whether the visitor is still there: each is drawn, which takes time
#: from the run.
_TURN = 0.3


#: Seconds that a process which ends waits for runs to end: for the step that each is in.
_LAST = 30.0


class Cancelled(Exception):
    """The visitor does not want the rest of a run."""


@dataclass(frozen=True)
class Told:
    """How far a run has come.

    Args:
        title: of the stage.
        done, total: its steps.
        left: seconds until the stage ends, as its steps went so far; None before the second step.
        preview: the targets so far.
    """

    title: str
    done: int
    total: int
    left: float | None = None
    preview: tuple[Image.Image, ...] = ()

    def __str__(self) -> str:
        left = "" if self.left is None else f", {self.left:.0f} s left"
        return f"{self.title}: step {self.done} of {self.total}{left}"


@dataclass(frozen=True)
class Stopped:
    """A run stands still; ``at`` is how far it has come."""

    at: Told


class Watched(Progress):
    """What a run tells its progress to; it stops the run, or ends it, at its next step.

    Args:
        aside: entered while the run stands still, with a call that ends it; gives back what others may use meanwhile,
            and takes it again.
        so_far: what the run has made, where that is worth showing though the run does not come to its end.
    """

    def __init__(self) -> None:
        self.aside: Callable[[Callable[[], None]], AbstractContextManager[object]] = lambda end: nullcontext()
        self.so_far: Callable[[], Any] = lambda: None
        self.told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._wish = threading.Condition()
        self._cancelled = self._to_stop = False
        self._stopped: Stopped | None = None
        self._outcome: list[Any] = []
        self._thread: threading.Thread | None = None
        self._begun, self._previewed, self._stood_still = 0.0, 0.0, 0.0
        self._start = time.monotonic()
        self._preview: tuple[Image.Image, ...] = ()

    @property
    def seconds(self) -> float:
        """Since the run began, without the time that it stood still."""
        return time.monotonic() - self._start - self._stood_still

    @property
    def is_stopped(self) -> bool:
        """Whether the run stands still."""
        return self._stopped is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether the run ends, or has ended, before its time."""
        return self._cancelled

    def wait(self, seconds: float) -> None:
        """Until the run has ended, but no longer than some seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def cancel(self) -> None:
        """End the run at its next step; one that stands still, at once."""
        with self._wish:
            self._cancelled = True
            self._wish.notify_all()

    def stop(self) -> None:
        """Let the run stand still after its next step, until :meth:`go_on`."""
        with self._wish:
            self._to_stop = True

    def go_on(self) -> None:
        """Let a run that stands still go on."""
        with self._wish:
            self._to_stop, self._stopped = False, None
            self._wish.notify_all()

    def begin(self, work: Callable[[Watched], Any]) -> None:
        """Do some work in a thread of its own."""

        def worked() -> None:
            try:
                self._outcome.extend((True, work(self)))
            except Cancelled:
                self._outcome.extend((False, Cancelled()))  # another: the traceback of this one holds the run's tensors
            except BaseException as error:
                self._outcome.extend((False, error))

        self._thread = threading.Thread(target=worked, name="fpe-run", daemon=True)
        _BEGUN.add(self)
        self._thread.start()

    def follow(self) -> Iterator[Told | Stopped | Any]:
        """What the work tells; last what it returns, or that it stands still.

        Where the reader stops reading before, the work is cancelled and waited for: no run goes on
        that nobody looks at.

        Raises:
            Cancelled: it was.
            Exception: whatever the work raised.
        """
        assert self._thread is not None
        stopped = None
        try:
            while self._thread.is_alive() and stopped is None:
                latest = _latest(self.told)
                if latest is not None:
                    yield latest
                self._thread.join(_TURN)
                stopped = self._stopped
        finally:
            if stopped is None:
                self.cancel()
                self._thread.join()
        if stopped is not None:
            yield stopped
            return
        (done, value), self._outcome = self._outcome, []
        if not done:
            raise value
        yield value

    def tell(self, title: str, done: int, total: int) -> None:
        if self._cancelled:
            raise Cancelled
        now = time.monotonic()
        if done == 0:
            self._begun = now
        left = (now - self._begun) / done * (total - done) if done > 1 else None
        told = Told(title, done, total, left, self._preview)
        self.told.put(told)
        if self._to_stop and done:
            self._stand_still(told)

    def _stand_still(self, told: Told) -> None:
        begun = time.monotonic()
        with self.aside(self.cancel), self._wish:
            if self._to_stop:
                self._stopped = Stopped(told)
            self._wish.wait_for(lambda: self._cancelled or not self._to_stop)
            self._stopped = None
        stood = time.monotonic() - begun
        self._stood_still += stood
        self._begun += stood
        if self._cancelled:
            raise Cancelled

    def on_step(
        self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any], size: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """``callback_on_step_end``: decode what there is so far, as long as that takes a small share of the time.

        Args:
            size: (height, width) of the pictures in pixels, where their latents are packed.
        """
        begun = time.monotonic()
        if self._previewed <= _SHARE * self.seconds:
            self._preview = tuple(decoded(pipe, tensors["latents"][1:], size))
            self._previewed += time.monotonic() - begun
        return {}


#: Runs of this process; those that nobody holds any more are gone from it.
_BEGUN: weakref.WeakSet[Watched] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """End the runs that go on when the process ends: a thread that Python stops inside of torch aborts the process."""
    deadline = time.monotonic() + _LAST
    begun = list(_BEGUN)
    for watched in begun:
        watched.cancel()
    for watched in begun:
        watched.wait(max(0.0, deadline - time.monotonic()))


def watch(work: Callable[[Watched], Any], watched: Watched) -> Iterator[Told | Stopped | Any]:
    """Begin some work and follow it; see :meth:`Watched.follow`."""
    watched.begin(work)
    yield from watched.follow()


def go_on(watched: Watched) -> Iterator[Told | Stopped | Any]:
    """Let work that stands still go on, and follow it."""
    watched.go_on()
    yield from watched.follow()


def _latest(told: queue.SimpleQueue[Told]) -> Told | None:
    latest = None
    while not told.empty():
        latest = told.get()
    return latest
