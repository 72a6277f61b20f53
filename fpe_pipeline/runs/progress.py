"""How far a run has come: bars with the time left on a terminal, lines of text elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..texts import print_text, unheard

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Bars", "Lines", "Progress", "progress_for", "show_steps"]

#: Seconds between two lines of one title.
EVERY = 10.0


class Progress:
    """What is told how far something has come; this one keeps it to itself.

    Used as a context, which takes bars off the screen's hands when it ends.
    """

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, title: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``title`` are made; 0 begins them anew."""


class Bars(Progress):
    """A bar for each title on standard error, with the steps made and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._shown: RichProgress = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, Any] = {}

    def __exit__(self, *_: object) -> None:
        with unheard(sys.stderr, OSError):
            self._shown.stop()

    def tell(self, title: str, done: int, total: int) -> None:
        with unheard(sys.stderr, OSError):  # of a terminal that was closed under a run that goes on
            self._shown.start()
            if done == 0 or title not in self._tasks:
                self._tasks[title] = self._shown.add_task(title, total=total)
            self._shown.update(self._tasks[title], completed=done, total=total, refresh=done == total)


class Lines(Progress):
    """A line on standard error for the first step of a title and its last, and now and then between them."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}
        self._told: dict[str, float] = {}

    def tell(self, title: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0 or title not in self._begun:
            self._begun[title] = now, done
            self._told.pop(title, None)
        begun, first = self._begun[title]
        if done == 0 or (done < total and now - self._told.get(title, -EVERY) < EVERY):
            return
        self._told[title] = now
        spent, made = now - begun, done - first
        if done == total:
            time_said = f" in {_seconds(spent)}"
        else:
            time_said = f", {_seconds(spent / made * (total - done))} left" if made else ""
        print_text(f"fpe: {title} {done}/{total}{time_said}", sys.stderr, flush=True)


def progress_for(*, quiet: bool) -> Progress:
    """What suits standard error."""
    if quiet:
        return Progress()
    return Bars() if sys.stderr is not None and sys.stderr.isatty() else Lines()


def show_steps(pipe: Any, title: str, progress: Progress) -> None:
    """Let a diffusers pipeline tell its denoising steps to ``progress``, in place of its own bars."""

    def progress_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> _Steps:
        items = None if iterable is None else list(iterable)
        return _Steps(progress, title, total or len(items or ()), items)

    pipe.progress_bar = progress_bar


class _Steps:
    """What diffusers takes for a bar."""

    def __init__(self, progress: Progress, title: str, total: int, items: list[Any] | None) -> None:
        self._progress, self._title, self._total, self._items = progress, title, total, items
        self._done = 0
        progress.tell(title, 0, total)

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self._done += n
        self._progress.tell(self._title, self._done, self._total)


def _seconds(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
