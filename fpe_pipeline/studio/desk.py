"""What happens when something on the page is pressed: from a visitor and values of fields to what is shown.

Handlers of long work are generators: they yield what is shown meanwhile. What a visitor asks wrongly is said in place
of the result; what goes wrong here is in the server's log, and the visitor is told no more than its kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from PIL import Image

from ..errors import InputError
from ..runs import run as runs
from ..runs.picture_record import PHOTO
from ..runs.settings import Settings
from . import shown, work
from .copied import as_command, as_python
from .labels import in_fields
from .models import Models
from .requests import FIELDS, Limits, fields_read, first_fields, new_seed, restorable, settings_of, within
from .sweeps import sweep
from .uploads import admitted_photo, admitted_record
from .visitors import Inverted, Look, Result, Visitor
from .watched import Cancelled, Stopped, Told, Watched, go_on, watch

__all__ = ["Desk"]

logger = logging.getLogger(__name__)


@dataclass
class Desk:
    """The server behind a page.

    Args:
        models: that it may load.
        root: the folder that receives every visitor's files.
        limits: of one request.
    """

    models: Models
    root: Path
    limits: Limits = field(default_factory=Limits)
    # Those that a page still has: by their folders, as visitors are equal to one another by what they hold.
    _visitors: WeakValueDictionary[Path, Visitor] = field(default_factory=WeakValueDictionary, repr=False)

    def arrive(self) -> Visitor:
        """A page is opened."""
        visitor = Visitor(self.root)
        self._visitors[visitor.folder] = visitor
        return visitor

    def close(self) -> None:
        """The server ends, with every page that is open: their uploads are removed as those of a closed page are."""
        for visitor in list(self._visitors.values()):
            visitor.close()

    def settings(self, values: Sequence[Any], image: Path | None = None) -> Settings:
        """What the fields ask for, within the limits.

        Raises:
            InputError: what is wrong with it, in one line.
        """
        model, fields = fields_read(values)
        photo = None if image is None else str(image)
        asked = settings_of(fields, self.models.check(model), image=photo, **self.models.machine)
        return within(asked, self.limits)

    def estimate(self, *values: Any) -> str:
        """What the settings will take in time and memory; "" where they cannot be served."""
        try:
            settings = self.settings(values)
        except (InputError, TypeError, ValueError):
            return ""
        pace = self.models.pace(settings.model)
        estimate = None if pace is None else pace.of(settings)
        return "" if estimate is None else str(estimate)

    def first_estimate(self) -> str:
        """The estimate of a new page, found while nobody waits for it."""
        model = self.models.names[0]
        fields = first_fields(model)
        return self.estimate(model, *(fields[name] for name in FIELDS))

    def targets(self, values: Sequence[Any]) -> list[str]:
        """The target prompts among the fields."""
        return [line.strip() for line in str(fields_read(values)[1]["targets"]).splitlines() if line.strip()]

    def ask(self, visitor: Visitor, what: str) -> str:
        """A run of ``what`` (a method of this desk by name) is asked for: until its turn, Cancel takes it back."""
        visitor.ask(what)
        return shown.note("waiting for the model")

    # Long work: each yields what is shown; last what came of it, or that it stands still.

    def generate(self, visitor: Visitor, locked: bool, *values: Any) -> Iterator[Shown]:
        """The images of the fields; with a seed of its own unless the seed is locked."""

        def begun() -> Callable[[Watched], Result]:
            settings = self.settings(values)
            if not locked:
                settings = settings.with_values(seed=new_seed())
            return lambda watched: work.generate(self.models, visitor, settings, watched)

        yield from self._watched(visitor, "generate", begun)

    def invert(self, visitor: Visitor, inversion: str, *values: Any) -> Iterator[Shown]:
        """The visitor's photo, inverted and recorded."""

        def begun() -> Callable[[Watched], Inverted]:
            settings = self._photo_settings(visitor, inversion, values)
            return lambda watched: work.invert_photo(self.models, visitor, settings, watched)

        yield from self._watched(visitor, "invert", begun)

    def edit(self, visitor: Visitor, inversion: str, *values: Any) -> Iterator[Shown]:
        """Edits of the visitor's photo from its recording."""

        def begun() -> Callable[[Watched], Result]:
            settings = self._photo_settings(visitor, inversion, values)
            return lambda watched: work.edit_photo(self.models, visitor, settings, watched)

        yield from self._watched(visitor, "edit", begun)

    def look(self, visitor: Visitor) -> Iterator[Shown]:
        """The latest result made once more, with its maps read."""

        def begun() -> Callable[[Watched], Look]:
            if not visitor.results:
                raise InputError("there is no picture yet to look into: make one first")
            return lambda watched: work.look_inside(self.models, visitor, visitor.results[-1], watched)

        yield from self._watched(visitor, "look", begun)

    def grid(self, visitor: Visitor, axis: str, *values: Any) -> Iterator[Shown]:
        """One result for each method, strength or window; a method that cannot serve the prompts is left out, named."""

        def begun() -> Callable[[Watched], Grid]:
            runs_of_it = sweep(self.settings(values), axis)
            return lambda watched: self._grid(visitor, runs_of_it, watched)

        yield from self._watched(visitor, "grid", begun)

    def _grid(self, visitor: Visitor, asked: Sequence[tuple[str, Settings]], watched: Watched) -> Grid:
        tiles: list[tuple[Path, str, str]] = []
        refused: list[str] = []
        watched.so_far = lambda: Grid([*tiles], [*refused])
        for label, settings in asked:
            try:
                result = work.generate(self.models, visitor, settings, watched)
            except InputError as error:
                refused.append(f"{label}: {in_fields(str(error))}")
                continue
            if not tiles:
                tiles.append((result.folder / "source.png", "source", settings.source))
            files = result.run.files().items()
            tiles += [(result.folder / name, label, prompt) for name, (_, role, prompt) in files if role == "edited"]
        return Grid(tiles, refused)

    def go_on(self, visitor: Visitor, what: str) -> Iterator[Shown]:
        """The visitor's run of ``what`` (a method of this desk by name), from the step at which it stands still."""
        watched = visitor.standing(what)
        if watched is not None and watched.is_cancelled:
            visitor.done(watched)
            yield Shown(shown.alert("another model has taken the place of this run's: begin it anew"))
        elif watched is None or not watched.is_stopped:
            yield Shown(shown.note("nothing stands still here"))
        else:
            yield from self._followed(visitor, watched, go_on(watched))

    def stop(self, visitor: Visitor | None) -> str:
        """Let the visitor's run stand still after its next step."""
        running = visitor is not None and visitor.stop()
        return shown.note("stopping at the next step" if running else "nothing is running")

    def cancel(self, visitor: Visitor | None) -> str:
        """End the visitor's run at its next step, where it stands still, or before it began."""
        waited = visitor is not None and visitor.take_back()
        running = visitor is not None and visitor.cancel()
        said = "ending at the next step" if running else "cancelled before it began" if waited else "nothing is running"
        return shown.note(said)

    # Short work

    def receive_photo(self, visitor: Visitor, upload: str | None) -> tuple[str, Image.Image | None]:
        """An upload as the visitor's photo: (status, what it will be edited from)."""
        visitor.inverted = visitor.look = None
        visitor.photo = None
        if upload is None:
            return "", None
        try:
            visitor.photo = admitted_photo(Path(upload), visitor.next_upload())
        except InputError as error:
            return shown.alert(str(error)), None
        finally:
            Path(upload).unlink(missing_ok=True)
        with Image.open(visitor.photo) as photo:
            photo.load()
        return shown.note(f"{photo.width} × {photo.height} px; say what it shows, then press Invert"), photo

    def restore(self, upload: str | None) -> tuple[str, Settings | None]:
        """The settings of an uploaded PNG, where this page serves them: (status, settings), which of an edit of a photo
        name :data:`PHOTO`, no file of the server's."""
        if upload is None:
            return "", None
        path = Path(upload)
        try:
            settings, record = runs.read_record(admitted_record(path))
            photo = settings.image is not None
            model = self.models.check(settings.model)
            image = PHOTO if photo else None
            restored = within(settings.with_values(image=image, model=model, **self.models.machine), self.limits)
            restorable(restored, self.models.layers(model))
        except InputError as error:
            return shown.alert(in_fields(str(error)).replace(str(path), "this picture")), None
        finally:
            path.unlink(missing_ok=True)
        loaded = self.models.identity(restored.model)
        notes = ["the settings of the picture are in the fields"]
        if loaded is not None and record.get("model", {}).get("identity_sha256") != loaded:
            notes.append("it was made with other weights or another precision of this model")
        if photo:
            notes.append("it is an edit of a photo: drop the photo into the tab Photo")
        return shown.note("; ".join(notes)), restored

    @staticmethod
    def copies(result: Result) -> tuple[str, str]:
        """The result's settings as a command and as Python."""
        return as_command(result.run.settings), as_python(result.run.settings)

    def _photo_settings(self, visitor: Visitor, inversion: str, values: Sequence[Any]) -> Settings:
        if visitor.photo is None:
            raise InputError("there is no photo yet: drop one first")
        return self.settings(values, visitor.photo).with_values(inversion=inversion)

    def _watched(self, visitor: Visitor, what: str, begun: Callable[[], Callable[[Watched], Any]]) -> Iterator[Shown]:
        if not visitor.may_begin(what):
            yield Shown(shown.note("cancelled before it began"))
            return
        try:
            doing = begun()
        except Exception as error:  # of fields that no browser fills so as well
            yield _failed(error)
            return
        yield Shown(shown.note("waiting for the model"))
        watched = visitor.begin(what)
        yield from self._followed(visitor, watched, watch(doing, watched))

    def _followed(self, visitor: Visitor, watched: Watched, told: Iterator[Any]) -> Iterator[Shown]:
        preview: Sequence[Image.Image] = ()
        try:
            for each in told:
                if isinstance(each, Told):
                    preview = each.preview
                    yield Shown(shown.progress(each), preview)
                elif isinstance(each, Stopped):
                    yield Shown(shown.stopped(each.at), preview, watched.so_far(), stands_still=True)
                else:
                    self._learn(each)
                    without_effect = each.notes if isinstance(each, Result) else []
                    said = shown.note(f"done in {watched.seconds:.1f} s")
                    yield Shown(said + "".join(map(shown.alert, without_effect)), made=each)
        except Cancelled:
            kept = "what was made before is in History" if visitor.has_kept else "nothing was kept"
            yield Shown(shown.note(f"cancelled; {kept}"), made=watched.so_far())
        except Exception as error:
            yield replace(_failed(error), made=watched.so_far())
        finally:
            if not watched.is_stopped:
                visitor.done(watched)

    def _learn(self, made: Any) -> None:
        """How fast the model is, of a run that generated its source."""
        if isinstance(made, Result) and made.run.photo is None:
            pace = self.models.pace(made.model, wait=0.0)
            if pace is not None:
                pace.learn(made.run.settings, made.seconds)


@dataclass(frozen=True)
class Grid:
    """Pictures with labels, and what could not be made, with why."""

    tiles: list[tuple[Path, str, str]]
    refused: list[str]


@dataclass(frozen=True)
class Shown:
    """What long work shows.

    Args:
        status: HTML.
        preview: the targets so far.
        made: what came of it, once; of a grid, also what it has where it stands still, is cancelled or fails.
        stands_still: whether it was stopped and can go on.
    """

    status: str
    preview: Sequence[Image.Image] = ()
    made: Any = None
    stands_still: bool = False


def _failed(error: Exception) -> Shown:
    """What a visitor is told of an error: what was wrong with the request, and of any other its kind alone."""
    if isinstance(error, InputError | TypeError):
        return Shown(shown.alert(in_fields(str(error))))
    logger.error("a request of the page failed", exc_info=error)
    return Shown(shown.alert(f"this failed on the server ({type(error).__name__}); its log says where"))
