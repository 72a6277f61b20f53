"""Where words act in the pictures of a run, or in one that is nobody's edit: maps, shares, and their files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..atomic_folder import staged
from ..errors import refusals
from ..images.contact_sheet import contact_sheet
from .making import Loaded, denoised, details_of, filled_in, photo_for, start
from .picture_record import PHOTO
from .progress import Progress, show_steps
from .repeatable import Clock
from .result import RECORD_FORMAT
from .run import at_work, execute
from .settings import Settings

if TYPE_CHECKING:
    from ..heatmaps.heat_maps import HeatMaps

__all__ = ["Heat", "WordHeat", "heat_of", "look_into", "write_heat"]


@dataclass(frozen=True)
class WordHeat:
    """Where a word acts in a picture.

    Args:
        picture: its name: source, target-1 …
        word: as it was asked for.
        heat: [height, width], float32: the share of attention that each place pays the word.
        place: (x, y) of the most of it, px of the picture.
    """

    picture: str
    word: str
    heat: np.ndarray
    place: tuple[int, int]

    @property
    def share(self) -> float:
        """Of the attention of the whole picture."""
        return float(self.heat.mean())

    @property
    def most(self) -> float:
        """The largest share that a place pays the word."""
        return float(self.heat.max())

    def as_json(self) -> dict[str, Any]:
        """Without the map itself, whose grid it names."""
        height, width = self.heat.shape
        return {
            "picture": self.picture, "word": self.word, "share": round(self.share, 6), "most": round(self.most, 6),
            "place": list(self.place), "grid": [width, height],
        }  # fmt: skip


@dataclass(frozen=True)
class Heat:
    """What was read of one run.

    Args:
        settings: of the run, filled in.
        pictures: by name, the source's first.
        maps: of them, in their order.
        details: of the record.
        photo: the real image as it was cut for the model, if the source is one.
    """

    settings: Settings
    pictures: dict[str, Image.Image]
    maps: HeatMaps
    details: dict[str, Any]
    photo: Image.Image | None = None

    def words(self) -> Iterator[WordHeat]:
        """Every word that was read, picture by picture."""
        for number, (name, picture) in enumerate(self.pictures.items()):
            for word in self.maps.words_of(number):
                heat = self.maps.word(word, number)
                down, across = np.unravel_index(int(heat.argmax()), heat.shape)
                wide, high = picture.width / heat.shape[1], picture.height / heat.shape[0]
                yield WordHeat(name, word, heat, (int((across + 0.5) * wide), int((down + 0.5) * high)))


def heat_of(settings: Settings, words: Sequence[str], progress: Progress) -> Heat:
    """Make the pictures of some settings and read where words act in them.

    Args:
        settings: with targets, whose edit is then read as it was made; or without, for the source alone.
        words: each of which one of the prompts has to hold.
        progress: is told how far each stage has come.

    Raises:
        InputError: settings that cannot be served, words that are in none of the prompts.
    """
    (settings.check if settings.targets else settings.check_source)()
    clock = Clock()
    with at_work(settings, clock=clock) as loaded, refusals():
        pipe = loaded.pipe
        photo = photo_for(pipe, settings)
        # Inverted before anything is read: the way to the noise is no picture.
        options = start(settings, loaded, photo, progress, clock)
        loaded = replace(loaded, inversion=options.get("inversion"))
        if settings.targets:
            maps, run = look_into(settings, loaded, words, progress)
            pictures = [run.source, *run.edited]
            filled = run.settings
        else:
            from ..heatmaps.heat_maps import heat_maps

            show_steps(pipe, "read", progress)
            with heat_maps(pipe, list(words)) as maps, clock.measure("read"):
                pictures = denoised(settings, pipe, [settings.source], **options).images
            filled = filled_in(settings, pipe, pictures[0].size)
        names = ["source", *(f"target-{number}" for number in range(1, len(pictures)))]
        details = details_of(filled, loaded, clock.seconds)
    return Heat(filled, dict(zip(names, pictures, strict=True)), maps, details, photo)


def look_into(
    settings: Settings, loaded: Loaded, words: Sequence[str], progress: Progress, components: int = 0
) -> tuple[HeatMaps, Any]:
    """A run with its maps read; see :func:`~fpe_pipeline.heatmaps.heat_maps.heat_maps`.

    Args:
        loaded: with the inversion of a real image, which is then not read.
        components: of self-attention, of a UNet.

    Returns:
        The maps and the `Run`.
    """
    from ..heatmaps.heat_maps import heat_maps

    with heat_maps(loaded.pipe, list(words), components=components) as maps:
        run = execute(settings.with_values(control=False), progress=progress, loaded=loaded, name="read")
    return maps, run


def write_heat(heat: Heat, directory: Path) -> list[Path]:
    """Write what was read into a folder, all or nothing.

    ``heat.png`` is a sheet of all; of each picture and word there are ``PICTURE-WORD.png``, laid over the picture, and
    ``PICTURE-WORD.npy``, the map. ``heat.json`` has the settings, the shares and the names of the files.

    Returns:
        The paths, the sheet first and ``heat.json`` last.
    """
    read = list(heat.words())
    labels = list(dict.fromkeys(each.word for each in read))
    laid = {(each.picture, each.word): heat.maps.overlay(each.heat, heat.pictures[each.picture]) for each in read}
    rows = [[picture, *(laid.get((name, word), picture) for word in labels)] for name, picture in heat.pictures.items()]
    pictures = {"heat.png": contact_sheet(rows, ["", *labels], list(heat.pictures), heat.settings.source)}
    pictures |= {f"{name}.png": picture for name, picture in heat.pictures.items()}
    if heat.photo is not None:
        pictures[PHOTO] = heat.photo
    names = _file_names(labels)
    files = {(each.picture, each.word): f"{each.picture}-{names[each.word]}" for each in read}
    pictures |= {f"{file}.png": laid[key] for key, file in files.items()}
    record = {
        "format": RECORD_FORMAT,
        "settings": heat.settings.model_dump(),
        **heat.details,
        "heat": [each.as_json() | {"file": f"{files[each.picture, each.word]}.npy"} for each in read],
    }
    with staged(directory) as stage:
        for name, picture in pictures.items():
            picture.save(stage / name)
        for each in read:
            np.save(stage / f"{files[each.picture, each.word]}.npy", each.heat)
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (stage / "heat.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    maps = [f"{file}.npy" for file in files.values()]
    return [directory / name for name in (*pictures, *maps, "heat.json")]


def _file_names(words: Sequence[str]) -> dict[str, str]:
    """Words and phrases as parts of files' names; those that would come to the same are numbered."""
    named: dict[str, str] = {}
    for word in words:
        plain = "".join(letter if letter.isalnum() else "-" for letter in word)[:60]
        taken = {name.casefold() for name in named.values()}
        numbered = (plain if number == 1 else f"{plain}-{number}" for number in itertools.count(1))
        named[word] = next(name for name in numbered if name.casefold() not in taken)
    return named
