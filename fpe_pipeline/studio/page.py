"""The page: a column of fields and five tabs, laid out and wired to the desk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from ..models.served_families import FAMILIES, Family
from ..runs.settings import Settings
from . import recipe as recipes
from . import shown
from .choices import AnyOf
from .desk import Desk, Grid, Shown
from .events import LONG, QUICK, Halt
from .inside_tab import inside_tab
from .labels import LABELS
from .models import choices_of
from .recipe import Recipe
from .sweeps import AXES
from .visitors import Inverted, Result, Visitor

__all__ = ["build"]

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
        layers, family = choices_of(loaded.pipe), desk.models.family(name)
    with gr.Blocks(title="fpe studio", analytics_enabled=False, delete_cache=(3600, _LIFE), fill_width=True) as page:
        visitor = gr.State(_Arrival(desk), time_to_live=_LIFE, delete_callback=_leave)
        gr.HTML(_HEAD)
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=4, min_width=320, elem_id="recipe"):
                recipe = recipes.build(desk.models.names, family, layers, desk.limits)
            with gr.Column(scale=7, min_width=320), gr.Tabs(overflow_behavior="wrap"):
                with gr.Tab("Generate", id="generate"):
                    estimated, estimate = _generate_tab(desk, visitor, recipe)
                with gr.Tab("Photo", id="photo"):
                    inversion = _photo_tab(desk, visitor, recipe, family)
                with gr.Tab("Compare", id="compare") as compare:
                    _compare_tab(desk, visitor, recipe, compare)
                with gr.Tab("Look inside", id="inside") as inside:
                    inside_tab(desk, visitor, inside)
                with gr.Tab("History", id="history") as history:
                    _history_tab(desk, visitor, recipe, inversion, history)
        _comings_and_goings(desk, page, visitor)
        page.load(estimated, recipe.inputs, estimate, **QUICK)

        def another(model: str, method: str) -> list[Any]:
            return _of_model(desk, model, method)

        asked = [recipe.model, recipe.fields["method"]]
        chosen = recipe.model.input(another, asked, [inversion, *recipe.of_the_model], **LONG)
        chosen.then(estimated, recipe.inputs, estimate, **QUICK)
    return page


class _Arrival:
    """What a page's state begins as. Gradio copies it for the state, and that copy for a page at its first event: a
    visitor, whichever event it is, for somebody may press a button before the page has said that it is there."""

    def __init__(self, desk: Desk, of_state: bool = False) -> None:
        self._desk, self._of_state = desk, of_state

    def __deepcopy__(self, memo: dict[int, Any]) -> _Arrival | Visitor:
        return self._desk.arrive() if self._of_state else _Arrival(self._desk, of_state=True)


def _comings_and_goings(desk: Desk, page: gr.Blocks, visitor: Any) -> None:
    """Every opened page has a visitor; a closed one ends the run that it waited for."""
    present: dict[str, Visitor] = {}

    def arrive(visitor: Visitor, request: gr.Request) -> None:
        present[str(request.session_hash)] = visitor

    def leave(request: gr.Request) -> None:
        left = present.pop(str(request.session_hash), None)
        if left is not None:
            left.close()

    page.load(arrive, visitor, None, **QUICK)
    page.unload(leave)


def _leave(visitor: Visitor) -> None:
    visitor.close()


def _of_model(desk: Desk, model: str, method: str) -> list[Any]:
    """The ways to invert a photo, and the fields, of another model."""
    with desk.models.use(model) as loaded:
        family, layers = desk.models.family(model), choices_of(loaded.pipe)
    return [gr.update(**_inversions(family)), *recipes.model_changed(model, family, layers, method)]


def _inversions(family: Family, chosen: str = "direct") -> dict[str, Any]:
    known = list(FAMILIES[family].inversions)
    return {"choices": known, "value": chosen if chosen in known else "direct"}


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


def _generate_tab(desk: Desk, visitor: Any, recipe: Recipe) -> tuple[Callable[..., str], Any]:
    """The tab; what makes its estimate from the fields, and where that stands."""
    with gr.Row():
        run = gr.Button("Generate", variant="primary", elem_id="run", scale=3)
        halt = Halt.build("generate")
    estimate = gr.HTML(elem_id="estimate")
    status = gr.HTML(elem_id="status")
    preview = gr.HTML()
    view = _result_view()

    def generate(visitor: Visitor, locked: bool, *values: Any) -> Iterator[list[Any]]:
        yield from told(desk.generate(visitor, locked, *values), values)

    def go_on(visitor: Visitor, *values: Any) -> Iterator[list[Any]]:
        yield from told(desk.go_on(visitor, "generate"), values)

    def told(steps: Iterator[Shown], values: Sequence[Any]) -> Iterator[list[Any]]:
        drawn: Any = None
        for each in steps:
            seed = gr.skip() if each.made is None else each.made.run.settings.seed
            so_far = gr.skip() if each.preview is drawn else shown.preview(each.preview, desk.targets(values))
            drawn = each.preview
            yield [each.status, halt.shows(each), so_far, seed, *_result_values(each.made)]

    def estimated(*values: Any) -> str:
        return shown.note(desk.estimate(*values))

    outputs = [status, halt.go_on, preview, recipe.fields["seed"], *view]
    made = halt.begins(run, "generate", generate, [visitor, recipe.locked, *recipe.inputs], outputs, desk)
    gone_on = halt.go_on.click(go_on, [visitor, *recipe.inputs], outputs, **LONG)
    costly = [recipe.fields[name].change for name in ("steps", "targets", "control", "guidance", "size")]
    gr.on(costly, estimated, recipe.inputs, estimate, **QUICK)
    for end in (made, gone_on):
        end.then(estimated, recipe.inputs, estimate, **QUICK)
    halt.wire(desk, visitor, status)
    return estimated, estimate


def _photo_tab(desk: Desk, visitor: Any, recipe: Recipe, family: Family) -> Any:
    """The tab; the field that says how a photo is inverted."""
    upload = gr.File(
        label="Drop a photo (PNG, JPEG or WebP)", file_types=[".png", ".jpg", ".jpeg", ".webp"], height=120,
        elem_id="photo-upload",
    )  # fmt: skip
    with gr.Row():
        photo = gr.Image(label="Photo", interactive=False, buttons=[], height=220, visible=False, elem_id="photo-cut")
        back = gr.Image(
            label="As it comes back", interactive=False, buttons=[], height=220, visible=False, elem_id="photo-back"
        )
    inversion = AnyOf(**_inversions(family), label=LABELS["inversion"])
    with gr.Row():
        invert = gr.Button("Invert", variant="primary", elem_id="invert")
        edit = gr.Button("Edit", variant="primary", elem_id="edit")
        halt = Halt.build("photo")
    status = gr.HTML(shown.note("the source prompt says what the photo shows"), elem_id="photo-status")
    view = _result_view()

    def receive(visitor: Visitor, path: str | None) -> list[Any]:
        said, picture = desk.receive_photo(visitor, path)
        fresh = gr.update(value=picture, visible=picture is not None)
        return [said, fresh, gr.update(value=None, visible=False), None]

    def inverted(visitor: Visitor, method: str, *values: Any) -> Iterator[list[Any]]:
        yield from told(desk.invert(visitor, method, *values))

    def edited(visitor: Visitor, method: str, *values: Any) -> Iterator[list[Any]]:
        yield from told(desk.edit(visitor, method, *values))

    def go_on(visitor: Visitor) -> Iterator[list[Any]]:
        yield from told(desk.go_on(visitor, "edit" if visitor.standing("edit") else "invert"))

    def told(steps: Iterator[Shown]) -> Iterator[list[Any]]:
        for each in steps:
            found = each.made if isinstance(each.made, Inverted) else None
            result = each.made if isinstance(each.made, Result) else None
            said = each.status if found is None else shown.note(_inverted_in_words(found))
            yield [said, halt.shows(each), *_inverted_values(found), *_result_values(result)]

    upload.upload(receive, [visitor, upload], [status, photo, back, upload], **QUICK)
    outputs = [status, halt.go_on, photo, back, *view]
    halt.begins(invert, "invert", inverted, [visitor, inversion, *recipe.inputs], outputs, desk)
    halt.begins(edit, "edit", edited, [visitor, inversion, *recipe.inputs], outputs, desk)
    halt.go_on.click(go_on, visitor, outputs, **LONG)
    halt.wire(desk, visitor, status)
    return inversion


def _inverted_in_words(made: Inverted) -> str:
    held = shown.size_in_words(made.recorded.recording.nbytes)
    return f"inverted in {made.seconds:.1f} s: {made.recorded.psnr:.1f} dB; {held} recorded for any number of edits"


def _inverted_values(made: Inverted | None) -> list[Any]:
    """The photo as it was cut, and as it comes back."""
    if made is None:
        return [gr.skip()] * 2
    found = made.recorded
    label = f"As it comes back, {found.psnr:.1f} dB"
    return [gr.update(value=found.cut, visible=True), gr.update(value=found.back, label=label, visible=True)]


def _compare_tab(desk: Desk, visitor: Any, recipe: Recipe, tab: Any) -> None:
    with gr.Row():
        left = gr.Dropdown([], label="Left", interactive=True)
        right = gr.Dropdown([], label="Right", interactive=True)
    slider = gr.HTML(shown.note("make a picture first"), elem_id="compare-slider")
    gr.HTML('<p class="fpe-label">A grid of these fields, all from the same noise</p>')
    axis = gr.Radio(list(AXES), value="windows", label="over", elem_id="axis")
    with gr.Row():
        make = gr.Button("Make grid", variant="primary", elem_id="grid", min_width=110)
        halt = Halt.build("grid")
    status = gr.HTML(elem_id="grid-status")
    grid = gr.HTML(elem_id="grid-tiles")

    def opened(visitor: Visitor) -> list[Any]:
        names = [name for name, _ in _pictures(visitor)]
        if not names:
            return [gr.update(choices=[], value=None)] * 2 + [shown.note("make a picture first")]
        latest = [name for name in names if name.startswith(f"{visitor.results[-1].number} ")]
        chosen = latest[0], next((name for name in latest if "edited" in name), latest[-1])
        if visitor.compared is not None and set(visitor.compared) <= set(names):
            chosen = visitor.compared
        return [*(gr.update(choices=names, value=each) for each in chosen), compared(visitor, *chosen)]

    def picked(visitor: Visitor, first: str | None, second: str | None) -> str:
        if first is not None and second is not None:
            visitor.compared = first, second
        return compared(visitor, first, second)

    def compared(visitor: Visitor, first: str | None, second: str | None) -> str:
        pictures = dict(_pictures(visitor))
        if first not in pictures or second not in pictures:
            return shown.note("choose two pictures")
        return shown.before_and_after(pictures[first], pictures[second], (first, second))

    def gridded(visitor: Visitor, axis: str, *values: Any) -> Iterator[list[Any]]:
        yield from told(desk.grid(visitor, axis, *values))

    def go_on(visitor: Visitor) -> Iterator[list[Any]]:
        yield from told(desk.go_on(visitor, "grid"))

    def told(steps: Iterator[Shown]) -> Iterator[list[Any]]:
        for each in steps:
            if not isinstance(each.made, Grid):
                yield [each.status, halt.shows(each), gr.skip()]
                continue
            refused = "".join(map(shown.alert, each.made.refused))
            yield [each.status + refused, halt.shows(each), shown.tiles(each.made.tiles)]

    tab.select(opened, visitor, [left, right, slider], **QUICK)
    gr.on([left.input, right.input], picked, [visitor, left, right], slider, **QUICK)
    halt.begins(make, "grid", gridded, [visitor, axis, *recipe.inputs], [status, halt.go_on, grid], desk)
    halt.go_on.click(go_on, visitor, [status, halt.go_on, grid], **LONG)
    halt.wire(desk, visitor, status)


def _pictures(visitor: Visitor) -> list[tuple[str, Any]]:
    """(name, picture) of every result, the latest first."""
    return [
        (f"{result.number} {role}: {prompt}", image)
        for result in reversed(visitor.results)
        for image, role, prompt in result.run.files().values()
    ]


def _history_tab(desk: Desk, visitor: Any, recipe: Recipe, inversion: Any, tab: Any) -> None:
    upload = gr.File(
        label="Drop a PNG that was made here, or by fpe edit: its settings go into the fields", file_types=[".png"],
        height=120, elem_id="record-upload",
    )  # fmt: skip
    status = gr.HTML(elem_id="history-status")
    gr.HTML('<p class="fpe-label">Results of this page; choose one to have its settings back</p>')
    results = gr.HTML(js_on_load=_CHOOSE, elem_id="history")
    fields = recipe.restored

    def opened(visitor: Visitor) -> Any:
        latest = reversed(visitor.results)
        files = [
            (each.number, each.folder / "comparison.png", each.title, each.run.settings.targets[0]) for each in latest
        ]
        return shown.chosen_tiles(files) or shown.note("nothing was made yet")

    def filled(settings: Settings | None, model: str) -> list[Any]:
        if settings is None:
            return [gr.skip()] * (2 + len(fields))
        held = settings.inversion if settings.image is not None else "direct"
        if settings.model == model:
            way = gr.skip() if settings.image is None else held
            return [gr.skip(), way, *recipe.updates(settings)]
        # What the fields offer is the other model's, and Gradio takes no value that is not offered.
        with desk.models.use(settings.model) as loaded:
            family, layers = desk.models.family(settings.model), choices_of(loaded.pipe)
        return [settings.model, gr.update(**_inversions(family, held)), *recipe.updates(settings, family, layers)]

    def restored(path: str | None, model: str) -> list[Any]:
        said, settings = desk.restore(path)
        return [said, None, *filled(settings, model)]

    def chosen(visitor: Visitor, model: str, event: gr.EventData) -> list[Any]:
        number = int(event.number)
        result = next((each for each in visitor.results if each.number == number), None)
        if result is None:
            return [shown.note("this page does not remember that result any more"), *filled(None, model)]
        settings = result.run.settings.with_values(model=result.model)
        return [shown.note(f"the settings of {result.title} are in the fields"), *filled(settings, model)]

    tab.select(opened, visitor, results, **QUICK)
    taken = LONG if len(desk.models.names) > 1 else QUICK  # another model is loaded for what it offers
    given = [recipe.model, inversion, *fields]
    upload.upload(restored, [upload, recipe.model], [status, upload, *given], **taken)
    results.select(chosen, [visitor, recipe.model], [status, *given], **taken)
