"""What a run made: its images, and the record that says how."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..images.distance import pixel_hash
from ..images.side_by_side import Comparison
from .picture_record import PHOTO
from .settings import Settings

if TYPE_CHECKING:
    from ..session.report import EditReport

__all__ = ["RECORD_FORMAT", "Run"]

RECORD_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """What `execute` made: the images by role and prompt order, and the record that `run.json` will hold.

    `photo` is the real image as it was cut for the model, None where the source was generated; `source` is then what
    came back from its inversion. `report` says what the edit did where.
    """

    settings: Settings
    source: Image.Image
    edited: tuple[Image.Image, ...]
    uncontrolled: tuple[Image.Image, ...] | None
    details: dict[str, Any] = field(repr=False)
    photo: Image.Image | None = None
    report: EditReport | None = field(default=None, repr=False)

    @property
    def edit_label(self) -> str:
        """Title of the edited pictures in a comparison."""
        from ..edits.registry import find_method

        return f"target, {find_method(self.settings.method).title}"

    def comparisons(self) -> list[Comparison]:
        """One row a target, for `pictures.side_by_side`."""
        plain = self.uncontrolled or (None,) * len(self.edited)
        return [
            Comparison(
                self.settings.source,
                prompt,
                self.photo or self.source,
                edited,
                without,
                None if self.photo is None else self.source,
            )
            for prompt, edited, without in zip(self.settings.targets, self.edited, plain, strict=True)
        ]

    def files(self) -> dict[str, tuple[Image.Image, str, str]]:
        """File name to (image, role, prompt), in the order in which they are reported."""
        named = {"source.png": (self.source, "source", self.settings.source)}
        if self.photo is not None:
            named = {
                PHOTO: (self.photo, "photo", self.settings.source),
                "source.png": (self.source, "reconstruction", self.settings.source),
            }
        for number, (prompt, image) in enumerate(zip(self.settings.targets, self.edited, strict=True), start=1):
            named[f"target-{number}.png"] = (image, "edited", prompt)
            if self.uncontrolled is not None:
                named[f"target-{number}-no-control.png"] = (self.uncontrolled[number - 1], "no control", prompt)
        return named

    def record(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return {
            "format": RECORD_FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": self.settings.model_dump(),
            **self.details,
            "images": {
                name: {"role": role, "prompt": prompt, "pixels_sha256": pixel_hash(image)}
                for name, (image, role, prompt) in self.files().items()
            },
        }
