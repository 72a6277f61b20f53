"""What the page shows beside pictures, as HTML: text of visitors and models is escaped here, and nowhere else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
from PIL import Image

from ..session.report import EditReport, ranges, size_in_words
from .watched import Told

if TYPE_CHECKING:
    from ..heatmaps.heat_maps import HeatMaps

__all__ = [
    "alert",
    "before_and_after",
    "chosen_tiles",
    "components_picture",
    "enlarged",
    "memory_bar",
    "note",
    "preview",
    "progress",
    "report_table",
    "stopped",
    "tiles",
]


#: Pixels of the longest side of a picture that is clicked at.
_LARGE = 512


def note(text: str) -> str:
    """A line about what was done."""
    return f'<p class="fpe-note" role="status">{escape(text)}</p>' if text else ""


def alert(text: str) -> str:
    """What cannot be done, and why."""
    return f'<p class="fpe-alert" role="alert">{escape(text)}</p>'


def progress(told: Told) -> str:
    """A bar with the stage, its steps and the time left."""
    return (
        f'<div class="fpe-progress"><progress max="{told.total}" value="{told.done}" aria-label="{escape(told.title)}">'
        f"</progress><span>{escape(str(told))}</span></div>"
    )


def stopped(told: Told) -> str:
    """The bar of a run that stands still."""
    return progress(Told(f"stopped; {told.title}", told.done, told.total))


def before_and_after(before: Image.Image, after: Image.Image, labels: tuple[str, str]) -> str:
    """Two pictures on one another and a slider that divides them: for the pointer, and for arrow keys.

    Args:
        before, after: of any sizes; the second is laid over the first.
        labels: of the two.
    """
    left, right = map(escape, labels)
    width, height = before.size
    return (
        f'<figure class="fpe-slider" style="--cut:50%;--ratio:{width}/{height}">'
        f'<div class="fpe-pair"><img src="{_data(before)}" alt="{left}"><img class="over" src="{_data(after)}" '
        f'alt="{right}"><i></i></div>'
        '<input type="range" min="0" max="100" value="50" '
        f'aria-label="how much of {left} is shown, in percent" '
        "oninput=\"this.parentElement.style.setProperty('--cut', this.value + '%')\">"
        f"<figcaption><span>{left}</span><span>{right}</span></figcaption></figure>"
    )


def tiles(files: Sequence[tuple[Path, str, str]]) -> str:
    """Pictures of the output folder, each a link to its file, which holds its settings.

    Args:
        files: (path, title, text) of each.
    """
    return _listed(
        f'<a href="{_address(path)}" download="{escape(path.name)}" title="download {escape(path.name)}">'
        f"{_figure(_address(path), title, text)}</a>"
        for path, title, text in files
    )


def chosen_tiles(files: Sequence[tuple[int, Path, str, str]]) -> str:
    """The same, each a button that tells its number, which stands first."""
    return _listed(
        f'<button type="button" data-number="{number}">{_figure(_address(path), title, text)}</button>'
        for number, path, title, text in files
    ).replace('class="fpe-tiles"', 'class="fpe-tiles fpe-wide"')


def preview(images: Sequence[Image.Image], titles: Sequence[str]) -> str:
    """Pictures that are not finished."""
    return _listed(_figure(_data(image), title, "so far") for image, title in zip(images, titles, strict=False))


def _listed(each: Iterable[str]) -> str:
    items = "".join(f"<li>{one}</li>" for one in each)
    return f'<ul class="fpe-tiles">{items}</ul>' if items else ""


def _figure(address: str, title: str, text: str) -> str:
    title, text = escape(title), escape(text)
    return f'<figure><img src="{address}" alt="{title}: {text}"><figcaption><b>{title}</b>{text}</figcaption></figure>'


def _address(path: Path) -> str:
    """Where the page finds a file of the output folder: beside itself, also behind a proxy."""
    return f"gradio_api/file={quote(str(path.resolve()))}"


def report_table(report: EditReport | None) -> str:
    """`explain()` as a table: each layer, its steps, what its rows became and what that held in memory."""
    if report is None or not (report.products or report.features):
        return note("nothing was replaced")
    rows = []
    for path, products in report.products.items():
        memory = report.memory[path]
        for what, steps in products.items():
            cells = (path, ranges(steps), what, size_in_words(memory.held), size_in_words(memory.maps))
            rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    for path, steps in report.features.items():
        cells = (path, ranges(steps), "features", "", "")
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    heads = ("layer", "steps", "what its rows became", "held", "as dense maps")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<div class="fpe-table" tabindex="0" role="region" aria-label="what was replaced"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def memory_bar(report: EditReport | None) -> str:
    """What the products held at a time beside what a step's dense maps would have taken."""
    if report is None or not report.memory:
        return ""
    held = max(memory.held for memory in report.memory.values())
    maps = sum(memory.maps for memory in report.memory.values())
    width = f"max(4px, {100 * held / max(held, maps):.3f}%)"
    return (
        f'<div class="fpe-memory"><div class="bar ours" style="width:{width}"></div>'
        f"<span><b>{size_in_words(held)}</b> of queries, keys and values at a time, as here</span>"
        '<div class="bar"></div>'
        f"<span><b>{size_in_words(maps)}</b> for the maps of one step, where they are kept</span></div>"
    )


def components_picture(maps: HeatMaps, image: int, size: tuple[int, int]) -> Image.Image:
    """The first three principal components of self-attention as red, green and blue."""
    scores = maps.principal_components(image)[:3]
    low, high = scores.min(axis=(1, 2), keepdims=True), scores.max(axis=(1, 2), keepdims=True)
    levels = np.round(255 * (scores - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)
    return Image.fromarray(np.moveaxis(levels, 0, -1).copy()).resize(size, Image.Resampling.NEAREST)


def enlarged(image: Image.Image) -> Image.Image:
    """A picture that is large enough to be clicked at: by a whole factor, sides of 512 pixels or more."""
    factor = max(1, -(-_LARGE // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _data(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
