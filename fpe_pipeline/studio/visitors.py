"""What the server knows of one visitor; nobody else's requests reach it.

A visitor is the server's side of one open page: its results, its photo and the run that it waits for. Files are in a
folder of the visitor's own, whose name nobody can guess.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..runs import run as runs
from .watched import Watched

if TYPE_CHECKING:
    from ..heatmaps.heat_maps import HeatMaps
    from ..runs.recorded import Recorded

__all__ = ["Inverted", "Look", "Result", "Visitor"]

#: Results that a page remembers; the files of earlier ones stay.
MOST_RESULTS = 60


@dataclass(frozen=True)
class Result:
    """A run that was made, of which of the server's models, where its files are, and what it took.

    Args:
        cut: which prompts the model did not read to their end, in words.
    """

    number: int
    run: runs.Run
    model: str
    folder: Path
    seconds: float
    cut: str = ""

    @property
    def notes(self) -> list[str]:
        """What of the request had no effect, in sentences."""
        return [*([self.cut] if self.cut else []), *(self.run.report.idle if self.run.report is not None else [])]

    @property
    def title(self) -> str:
        settings = self.run.settings
        return f"{self.number}: {settings.method}, seed {settings.seed}, {settings.steps} steps"


@dataclass(frozen=True)
class Inverted:
    """A photo that was inverted and recorded.

    Args:
        of: what it holds for: it serves settings that agree in these.
        seconds: that it took.
    """

    of: tuple[object, ...]
    recorded: Recorded
    seconds: float


@dataclass(frozen=True)
class Look:
    """The maps that were read in a run, and its pictures, the source's first."""

    maps: HeatMaps
    words: tuple[str, ...]
    images: tuple[Image.Image, ...]

    @property
    def has_places(self) -> bool:
        """Whether what a place attends to was read: of a UNet."""
        return self.maps.components > 0


@dataclass
class Visitor:
    """One open page.

    Args:
        root: the server's output folder.
        compared: names of the two pictures that were chosen to be compared; None: the latest are.
    """

    root: Path
    folder: Path = field(init=False)
    results: list[Result] = field(default_factory=list)
    photo: Path | None = None
    uploads: list[Path] = field(default_factory=list)
    inverted: Inverted | None = None
    look: Look | None = None
    compared: tuple[str, str] | None = None
    _made: int = 0
    _watched: Watched | None = None
    _what: str = ""
    _waiting: set[str] = field(default_factory=set)
    _taken_back: set[str] = field(default_factory=set)
    _made_before: int = 0

    def __post_init__(self) -> None:
        self.folder = self.root / secrets.token_urlsafe(12)

    def next_upload(self) -> Path:
        """Where the next photo goes: a file of its own, for results and runs of earlier ones go on reading theirs."""
        self.uploads.append(self.folder / f"upload-{1 + len(self.uploads)}.png")
        return self.uploads[-1]

    def ask(self, what: str) -> None:
        """A run of ``what`` was asked for, and waits until those before it are done."""
        self._taken_back.discard(what)
        if self._watched is None or self._watched.is_stopped or self._what != what:  # else the page asks for no second
            self._waiting.add(what)

    def take_back(self) -> bool:
        """Let no run begin that waits; whether there was one."""
        waiting, self._waiting = self._waiting, set()
        self._taken_back |= waiting
        return bool(waiting)

    def may_begin(self, what: str) -> bool:
        """Whether a run of ``what``, whose turn it is, is still wanted."""
        self._waiting.discard(what)
        wanted = what not in self._taken_back
        self._taken_back.discard(what)
        return wanted

    def begin(self, what: str = "") -> Watched:
        """A run of ``what`` begins; one that still goes on for this visitor, or stands still, is ended."""
        self.cancel()
        self._watched, self._what, self._made_before = Watched(), what, self._made
        return self._watched

    def stop(self) -> bool:
        """Let the run that goes on stand still; whether there was one."""
        if self._watched is not None:
            self._watched.stop()
        return self._watched is not None

    def standing(self, what: str) -> Watched | None:
        """The run of ``what`` that was begun last, if it stands still or was ended meanwhile."""
        return self._watched if self._what == what else None

    @property
    def has_kept(self) -> bool:
        """Whether the run that was begun last has kept a result, as a grid does of each of its pictures."""
        return self._made > self._made_before

    def done(self, watched: Watched) -> None:
        """A run has ended by itself."""
        if self._watched is watched:
            self._watched = None

    def cancel(self) -> bool:
        """End the run that goes on, or stands still; whether there was one."""
        watched, self._watched = self._watched, None
        if watched is not None:
            watched.cancel()
        return watched is not None

    def keep(self, run: runs.Run, model: str, seconds: float, cut: str = "") -> Result:
        """Write a run into a folder of its own and remember it."""
        self._made += 1
        folder = self.folder / f"{self._made:03d}"
        runs.write(run, folder)
        result = Result(self._made, run, model, folder, seconds, cut)
        self.results = [*self.results, result][-MOST_RESULTS:]
        return result

    def close(self) -> None:
        """Forget everything; files of results stay in the server's folder."""
        self.take_back()
        self.cancel()
        self.results, self.inverted, self.look = [], None, None
        for upload in self.uploads:
            upload.unlink(missing_ok=True)
        if self.uploads:
            with contextlib.suppress(OSError):  # it is not empty where results are in it
                self.folder.rmdir()
