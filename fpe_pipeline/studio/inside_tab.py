"""The tab that looks inside: where words act, what a place attends to, what was replaced, and the memory of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from . import shown
from .desk import Desk, Shown
from .events import LONG, QUICK, Halt
from .visitors import Look, Visitor

__all__ = ["NO_PLACES", "inside_tab"]

NO_PLACES = (
    "places and components are read of self-attention, and this model's layers attend to image and text together: "
    "choose a word"
)


def inside_tab(desk: Desk, visitor: Any, tab: Any) -> None:
    """Lay the tab out and wire it.

    Args:
        desk: that answers.
        visitor: the page's state.
        tab: that it stands in.
    """
    with gr.Row():
        read = gr.Button("Read the maps of the latest picture", variant="primary", elem_id="look", scale=3)
        halt = Halt.build("look")
    status = gr.HTML(elem_id="look-status")
    which = gr.Radio([], label="Picture", visible=False, elem_id="which")
    word = gr.Radio([], label="Where a word acts", visible=False, elem_classes="fpe-words", elem_id="words")
    with gr.Row():
        with gr.Column(min_width=240, visible=False) as left:
            gr.HTML('<p class="fpe-label">Click a place to see what it attends to</p>')
            heat = gr.Image(interactive=False, buttons=[], show_label=False, container=False, elem_id="heat")
        with gr.Column(min_width=240, visible=False) as right:
            gr.HTML('<p class="fpe-label">Principal components of self-attention</p>')
            parts = gr.Image(interactive=False, buttons=[], show_label=False, container=False, elem_id="components")
    with gr.Row(visible=False) as by_hand:
        x = gr.Number(0, label="Place x, px", precision=0, minimum=0, min_width=90)
        y = gr.Number(0, label="Place y, px", precision=0, minimum=0, min_width=90)
        place = gr.Button("Show this place", min_width=120)
    memory = gr.HTML()
    table = gr.HTML(elem_id="report")

    def opened(visitor: Visitor) -> list[Any]:
        report = visitor.results[-1].run.report if visitor.results else None
        return [shown.memory_bar(report), shown.report_table(report) if visitor.results else ""]

    def looked(visitor: Visitor) -> Iterator[list[Any]]:
        yield from told(desk.look(visitor))

    def go_on(visitor: Visitor) -> Iterator[list[Any]]:
        yield from told(desk.go_on(visitor, "look"))

    def told(steps: Iterator[Shown]) -> Iterator[list[Any]]:
        for each in steps:
            look: Look | None = each.made
            if look is None:
                yield [each.status, halt.shows(each)] + [gr.skip()] * 7
                continue
            names = [("source", 0), *((f"target {number}", number) for number in range(1, len(look.images)))]
            yield [
                each.status,
                halt.shows(each),
                gr.update(choices=names, value=0, visible=True),
                gr.update(choices=list(look.words), value=None, visible=True),
                shown.enlarged(look.images[0]),
                _components(look, 0),
                gr.update(visible=True),
                *[gr.update(visible=look.has_places)] * 2,
            ]

    tab.select(opened, visitor, [memory, table], **QUICK)
    outputs = [status, halt.go_on, which, word, heat, parts, left, right, by_hand]
    halt.begins(read, "look", looked, [visitor], outputs, desk)
    halt.go_on.click(go_on, visitor, outputs, **LONG)
    gr.on([which.input, word.input], _heated, [visitor, which, word], [status, heat, parts], **QUICK)
    heat.select(_clicked, [visitor, which], [status, heat, x, y], **QUICK)
    place.click(_placed, [visitor, which, x, y], [status, heat], **QUICK)
    halt.wire(desk, visitor, status)


def _heated(visitor: Visitor, image: int, chosen: str | None) -> list[Any]:
    look = _look(visitor)
    picture, said = look.images[image], ""
    if chosen is not None:
        try:
            picture = look.maps.overlay(look.maps.word(chosen, image), picture)
            said = shown.note(f"where {chosen!r} acts")
        except ValueError:
            said = shown.note(f"{chosen!r} is not a word of this picture's prompt")
    return [said, shown.enlarged(picture), _components(look, image)]


def _placed(visitor: Visitor, image: int, x: float, y: float) -> list[Any]:
    look = _look(visitor)
    if not look.has_places:
        return [shown.alert(NO_PLACES), gr.skip()]
    try:
        map_of_it = look.maps.pixel((x, y), image)
    except ValueError as error:
        return [shown.alert(str(error)), gr.skip()]
    said = shown.note(f"what the place {x:.0f}, {y:.0f} attends to")
    return [said, shown.enlarged(look.maps.overlay(map_of_it, look.images[image]))]


def _clicked(visitor: Visitor, image: int, event: gr.SelectData) -> list[Any]:
    picture = _look(visitor).images[image]
    scale = shown.enlarged(picture).width / picture.width
    x, y = (int(place / scale) for place in event.index[:2])
    return [*_placed(visitor, image, x, y), x, y]


def _components(look: Look, image: int) -> Any:
    if not look.has_places:
        return None
    return shown.enlarged(shown.components_picture(look.maps, image, look.images[image].size))


def _look(visitor: Visitor) -> Look:
    if visitor.look is None:
        raise gr.Error("the maps were not read yet", print_exception=False)
    return visitor.look
