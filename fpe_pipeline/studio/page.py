"""The page: a column of fields and five tabs, laid out and wired to the desk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..runs.settings import INVERSIONS, Settings
from . import recipe as recipes
from . import shown
from .desk import Desk, Grid
from .models import choices_of, vocabulary
from .recipe import Recipe
from .sweeps import AXES
from .visitors import Inverted, Look, Result, Visitor

__all__ = ["build"]

#: Of events that answer at once.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
#: Of events that run the model: one at a time, whoever asks.
LONG: dict[str, Any] = {
    "concurrency_limit": 1,
    "concurrency_id": "model",
    "show_progress": "hidden",
    "api_visibility": "private",
}
_HEAD = """<header class="fpe-head"><h1>fpe studio</h1>
<p>Change the words, keep the picture. Everything runs on the machine that serves this page.</p></header>"""
_CHOOSE = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-number]');
  if (button) trigger('select', {number: Number(button.dataset.number)});
});
"""
#: Seconds after which the server forgets a page that nobody uses.
_LIFE = 6 * 3600


def build(desk: Desk) -> gr.Blocks:
    """The page of a desk, whose first model is loaded for its layers."""
    name = desk.models.names[0]
    with desk.models.use(name) as loaded:
        layers = choices_of(loaded.pipe)
    with gr.Blocks(title="fpe studio", analytics_enabled=False, delete_cache=(3600, _LIFE), fill_width=True) as page:
        visitor = gr.State(None, time_to_live=_LIFE, delete_callback=_leave)
        gr.HTML(_HEAD)
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=4, min_width=320, elem_id="recipe"):
                recipe = recipes.build(desk.models.names, layers, vocabulary(name), desk.limits)
            with gr.Column(scale=7, min_width=320), gr.Tabs(overflow_behavior="wrap"):
                with gr.Tab("Generate", id="generate"):
                    _generate_tab(desk, visitor, recipe)
                with gr.Tab("Photo", id="photo"):
                    _photo_tab(desk, visitor, recipe)
                with gr.Tab("Compare", id="compare") as compare:
                    _compare_tab(desk, visitor, recipe, compare)
                with gr.Tab("Look inside", id="inside") as inside:
                    _inside_tab(desk, visitor, inside)
                with gr.Tab("History", id="history") as history:
                    _history_tab(desk, visitor, recipe, history)
        _comings_and_goings(desk, page, visitor)
        recipe.model.input(lambda model: _layers_of(desk, model), recipe.model, recipe.fields["layers"], **LONG)
    return page


def _comings_and_goings(desk: Desk, page: gr.Blocks, visitor: Any) -> None:
    """Every opened page has a visitor; a closed one ends the run that it waited for."""
    present: dict[str, Visitor] = {}

    def arrive(request: gr.Request) -> Visitor:
        present[str(request.session_hash)] = arrived = desk.arrive()
        return arrived

    def leave(request: gr.Request) -> None:
        left = present.pop(str(request.session_hash), None)
        if left is not None:
            left.close()

    page.load(arrive, None, visitor, **QUICK)
    page.unload(leave)


def _leave(visitor: Visitor | None) -> None:
    if visitor is not None:
        visitor.close()


def _layers_of(desk: Desk, model: str) -> Any:
    with desk.models.use(model) as loaded:
        return gr.update(choices=choices_of(loaded.pipe), value=[])


def _result_view() -> list[Any]:
    """Fields for a result: slider, pictures, command, Python; :func:`_result_values` fills them."""
    slider = gr.HTML(elem_classes="fpe-result")
    pictures = gr.HTML()
    with gr.Accordion("Copy as a command or as Python", open=False, visible=False) as copies:
        command = gr.Code(label="Command", language="shell", interactive=False, wrap_lines=True)
        python = gr.Code(label="Python", language="python", interactive=False, wrap_lines=True)
    return [slider, pictures, copies, command, python]


def _result_values(result: Result | None) -> list[Any]:
    if result is None:
        return [gr.skip()] * 5
    run = result.run
    label = "photo" if run.photo is not None else "source"
    files = [(result.folder / name, role, prompt) for name, (_, role, prompt) in run.files().items()]
    return [
        shown.before_and_after(run.photo or run.source, run.edited[0], (label, run.settings.targets[0])),
        shown.tiles(files),
        gr.update(visible=True),
        *Desk.copies(result),
    ]


def _generate_tab(desk: Desk, visitor: Any, recipe: Recipe) -> None:
    with gr.Row():
        run = gr.Button("Generate", variant="primary", elem_id="run", scale=3)
        cancel = gr.Button("Cancel", elem_id="cancel", scale=1, min_width=90)
    estimate = gr.HTML()
    status = gr.HTML(elem_id="status")
    preview = gr.HTML()
    view = _result_view()

    def generate(visitor: Visitor, locked: bool, *values: Any) -> Iterator[list[Any]]:
        for each in desk.generate(visitor, locked, *values):
            seed = gr.skip() if each.made is None else each.made.run.settings.seed
            so_far = shown.preview(each.preview, desk.targets(values))
            yield [each.status, so_far, seed, *_result_values(each.made)]

    outputs = [status, preview, recipe.fields["seed"], *view]
    run.click(generate, [visitor, recipe.locked, *recipe.inputs], outputs, **LONG).then(
        lambda *values: shown.note(desk.estimate(*values)), recipe.inputs, estimate, **QUICK
    )
    timed = [recipe.fields[name].change for name in ("steps", "targets", "control")]
    gr.on(timed, lambda *values: shown.note(desk.estimate(*values)), recipe.inputs, estimate, **QUICK)
    cancel.click(desk.cancel, visitor, status, **QUICK)


def _photo_tab(desk: Desk, visitor: Any, recipe: Recipe) -> None:
    upload = gr.File(
        label="Drop a photo (PNG, JPEG or WebP)", file_types=[".png", ".jpg", ".jpeg", ".webp"], height=120,
        elem_id="photo-upload",
    )  # fmt: skip
    with gr.Row():
        photo = gr.Image(label="Photo", interactive=False, buttons=[], height=220, visible=False)
        back = gr.Image(label="As it comes back", interactive=False, buttons=[], height=220, visible=False)
    inversion = gr.Dropdown(list(INVERSIONS), value="direct", label="How the source is held to the photo")
    with gr.Row():
        invert = gr.Button("Invert", variant="primary", elem_id="invert")
        edit = gr.Button("Edit", variant="primary", elem_id="edit")
        cancel = gr.Button("Cancel", min_width=90)
    status = gr.HTML(shown.note("the source prompt says what the photo shows"), elem_id="photo-status")
    view = _result_view()

    def receive(visitor: Visitor, path: str | None) -> list[Any]:
        said, picture = desk.receive_photo(visitor, path)
        fresh = gr.update(value=picture, visible=picture is not None)
        return [said, fresh, gr.update(value=None, visible=False), None]

    def inverted(visitor: Visitor, method: str, *values: Any) -> Iterator[list[Any]]:
        for each in desk.invert(visitor, method, *values):
            made: Inverted | None = each.made
            if made is None:
                yield [each.status, gr.skip(), gr.skip()]
                continue
            held = shown.size_in_words(made.recording.nbytes)
            text = f"inverted in {made.seconds:.1f} s: {made.psnr:.1f} dB; {held} recorded for any number of edits"
            label = f"As it comes back, {made.psnr:.1f} dB"
            yield [
                shown.note(text),
                gr.update(value=made.cut, visible=True),
                gr.update(value=made.back, label=label, visible=True),
            ]

    def edited(visitor: Visitor, method: str, *values: Any) -> Iterator[list[Any]]:
        for each in desk.edit(visitor, method, *values):
            yield [each.status, *_result_values(each.made)]

    upload.upload(receive, [visitor, upload], [status, photo, back, upload], **QUICK)
    invert.click(inverted, [visitor, inversion, *recipe.inputs], [status, photo, back], **LONG)
    edit.click(edited, [visitor, inversion, *recipe.inputs], [status, *view], **LONG)
    cancel.click(desk.cancel, visitor, status, **QUICK)


def _compare_tab(desk: Desk, visitor: Any, recipe: Recipe, tab: Any) -> None:
    with gr.Row():
        left = gr.Dropdown([], label="Left", interactive=True)
        right = gr.Dropdown([], label="Right", interactive=True)
    slider = gr.HTML(shown.note("make a picture first"), elem_id="compare-slider")
    gr.HTML('<p class="fpe-label">A grid of these fields, all from the same noise</p>')
    axis = gr.Radio(list(AXES), value="windows", label="over", elem_id="axis")
    with gr.Row():
        make = gr.Button("Make grid", variant="primary", elem_id="grid", min_width=110)
        cancel = gr.Button("Cancel", min_width=90)
    status = gr.HTML(elem_id="grid-status")
    grid = gr.HTML(elem_id="grid-tiles")

    def opened(visitor: Visitor) -> list[Any]:
        names = [name for name, _ in _pictures(visitor)]
        if not names:
            return [gr.update(choices=[], value=None)] * 2 + [shown.note("make a picture first")]
        latest = [name for name in names if name.startswith(f"{visitor.results[-1].number} ")]
        chosen = latest[0], next((name for name in latest if "edited" in name), latest[-1])
        return [*(gr.update(choices=names, value=each) for each in chosen), compared(visitor, *chosen)]

    def compared(visitor: Visitor, first: str | None, second: str | None) -> str:
        pictures = dict(_pictures(visitor))
        if first not in pictures or second not in pictures:
            return shown.note("choose two pictures")
        return shown.before_and_after(pictures[first], pictures[second], (first, second))

    def gridded(visitor: Visitor, axis: str, *values: Any) -> Iterator[list[Any]]:
        for each in desk.grid(visitor, axis, *values):
            if not isinstance(each.made, Grid):
                yield [each.status, gr.skip()]
                continue
            refused = "".join(map(shown.alert, each.made.refused))
            yield [each.status + refused, shown.tiles(each.made.tiles)]

    tab.select(opened, visitor, [left, right, slider], **QUICK)
    gr.on([left.input, right.input], compared, [visitor, left, right], slider, **QUICK)
    make.click(gridded, [visitor, axis, *recipe.inputs], [status, grid], **LONG)
    cancel.click(desk.cancel, visitor, status, **QUICK)


def _pictures(visitor: Visitor) -> list[tuple[str, Any]]:
    """(name, picture) of every result, the latest first."""
    return [
        (f"{result.number} {role}: {prompt}", image)
        for result in reversed(visitor.results)
        for image, role, prompt in result.run.files().values()
    ]


def _inside_tab(desk: Desk, visitor: Any, tab: Any) -> None:
    with gr.Row():
        read = gr.Button("Read the maps of the latest picture", variant="primary", elem_id="look", scale=3)
        cancel = gr.Button("Cancel", min_width=90, scale=1)
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
        for each in desk.look(visitor):
            look: Look | None = each.made
            if look is None:
                yield [each.status] + [gr.skip()] * 7
                continue
            names = [("source", 0), *((f"target {number}", number) for number in range(1, len(look.images)))]
            yield [
                each.status,
                gr.update(choices=names, value=0, visible=True),
                gr.update(choices=list(look.words), value=None, visible=True),
                *(shown.enlarged(picture) for picture in (look.images[0], _components(look, 0))),
                *[gr.update(visible=True)] * 3,
            ]

    def heated(visitor: Visitor, image: int, chosen: str | None) -> list[Any]:
        look = _look(visitor)
        picture, said = look.images[image], ""
        if chosen is not None:
            try:
                picture = look.maps.overlay(look.maps.word(chosen, image), picture)
                said = shown.note(f"where {chosen!r} acts")
            except ValueError:
                said = shown.note(f"{chosen!r} is not a word of this picture's prompt")
        return [said, shown.enlarged(picture), shown.enlarged(_components(look, image))]

    def placed(visitor: Visitor, image: int, x: float, y: float) -> list[Any]:
        look = _look(visitor)
        try:
            map_of_it = look.maps.pixel((x, y), image)
        except ValueError as error:
            return [shown.alert(str(error)), gr.skip()]
        said = shown.note(f"what the place {x:.0f}, {y:.0f} attends to")
        return [said, shown.enlarged(look.maps.overlay(map_of_it, look.images[image]))]

    def clicked(visitor: Visitor, image: int, event: gr.SelectData) -> list[Any]:
        picture = _look(visitor).images[image]
        scale = shown.enlarged(picture).width / picture.width
        x, y = (int(place / scale) for place in event.index[:2])
        return [*placed(visitor, image, x, y), x, y]

    tab.select(opened, visitor, [memory, table], **QUICK)
    read.click(looked, visitor, [status, which, word, heat, parts, left, right, by_hand], **LONG)
    gr.on([which.input, word.input], heated, [visitor, which, word], [status, heat, parts], **QUICK)
    heat.select(clicked, [visitor, which], [status, heat, x, y], **QUICK)
    place.click(placed, [visitor, which, x, y], [status, heat], **QUICK)
    cancel.click(desk.cancel, visitor, status, **QUICK)


def _components(look: Look, image: int) -> Any:
    return shown.components_picture(look.maps, image, look.images[image].size)


def _look(visitor: Visitor) -> Look:
    if visitor.look is None:
        raise gr.Error("the maps were not read yet", print_exception=False)
    return visitor.look


def _history_tab(desk: Desk, visitor: Any, recipe: Recipe, tab: Any) -> None:
    upload = gr.File(
        label="Drop a PNG that was made here, or by fpe edit: its settings go into the fields", file_types=[".png"],
        height=120, elem_id="record-upload",
    )  # fmt: skip
    status = gr.HTML(elem_id="history-status")
    gr.HTML('<p class="fpe-label">Results of this page; choose one to have its settings back</p>')
    results = gr.HTML(js_on_load=_CHOOSE, elem_id="history")
    fields = recipe.inputs[1:]

    def opened(visitor: Visitor) -> Any:
        latest = reversed(visitor.results)
        files = [(each.folder / "comparison.png", each.title, each.run.settings.targets[0]) for each in latest]
        return shown.chosen_tiles(files) or shown.note("nothing was made yet")

    def filled(settings: Settings | None) -> list[Any]:
        if settings is None:
            return [gr.skip()] * (1 + len(fields))
        return [settings.model if settings.model in desk.models.names else gr.skip(), *recipe.updates(settings)]

    def restored(path: str | None) -> list[Any]:
        said, settings = desk.restore(path)
        return [said, None, *filled(settings)]

    def chosen(visitor: Visitor, event: gr.EventData) -> list[Any]:
        number = int(event.number)
        if not 0 <= number < len(visitor.results):
            return [shown.note("this page has no such result"), *filled(None)]
        result = visitor.results[-1 - number]
        return [shown.note(f"the settings of {result.title} are in the fields"), *filled(result.run.settings)]

    tab.select(opened, visitor, results, **QUICK)
    upload.upload(restored, upload, [status, upload, recipe.model, *fields], **QUICK)
    results.select(chosen, visitor, [status, recipe.model, *fields], **QUICK)
