"""What the page's events do beyond the desk: what each is told, and in which order."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from fpe_pipeline.studio.labels import LABELS
from fpe_pipeline.studio.requests import FIELDS
from tests.pipeline.studio.conftest import last

pytest.importorskip("gradio")


@pytest.mark.slow
def test_a_result_is_chosen_by_its_number_whatever_was_made_meanwhile(desk, visitor, values):
    from fpe_pipeline.studio.page import build

    (chosen,) = [each.fn for each in build(desk).fns.values() if each.name == "chosen"]
    for seed in (7, 8, 9):
        last(desk.generate(visitor, True, *values(seed=seed, steps=1, control=False, targets="a blue car")))
    said, _, _, *fields = chosen(visitor, values()[0], SimpleNamespace(number=1))
    assert "the settings of 1: fpe, seed 7" in said and fields[FIELDS.index("seed")]["value"] == 7
    assert "settings of 3: fpe, seed 9" in chosen(visitor, values()[0], SimpleNamespace(number=3))[0]
    assert "does not remember" in chosen(visitor, values()[0], SimpleNamespace(number=4))[0]


def test_a_result_that_is_chosen_shows_what_its_method_has(desk, visitor, values):
    """Not the window, and what is said of it, of the method that stood in the fields."""
    from fpe_pipeline.studio.page import build

    (chosen,) = [each.fn for each in build(desk).fns.values() if each.name == "chosen"]
    for method in ("fpe", "masactrl"):
        last(desk.generate(visitor, True, *values(steps=1, control=False, targets="a blue car", method=method)))
    for number, has_window, about in ((1, True, "in the window"), (2, False, "from step 4 on")):
        *fields, said, words = chosen(visitor, values()[0], SimpleNamespace(number=number))[3:]
        assert fields[FIELDS.index("self_replace")]["visible"] == has_window and about in said
        assert words["visible"] is False  # a model of no words of its own


def test_what_was_a_choice_of_the_model_before_is_refused_by_the_desk(desk, visitor, values):
    """Not in a box of Gradio's: what a page asks while another model comes may be of the one before."""
    import gradio as gr

    from fpe_pipeline.studio.page import build

    blocks = build(desk).blocks.values()
    named = {each.label: each for each in blocks if isinstance(each, gr.Dropdown | gr.CheckboxGroup)}
    method = named[LABELS["method"]].preprocess("consistedit-of-before")
    layers = named[LABELS["layers"]].preprocess(["transformer_blocks.0"])
    assert named[LABELS["inversion"]].preprocess("reference") == "reference"
    assert "the method is one of fpe, " in last(desk.generate(visitor, True, *values(method=method))).status
    assert "transformer_blocks.0" in last(desk.generate(visitor, True, *values(layers=layers))).status
    folder = Path(importlib.import_module("fpe_pipeline.studio.choices").__file__).parent
    assert not list(folder.glob("*.pyi")), "Gradio writes beside the code"


def test_words_to_choose_from_are_those_of_the_model(desk, values):
    import gradio as gr

    from fpe_pipeline.studio.page import build

    page = build(desk)
    (words,) = [each for each in page.blocks.values() if isinstance(each, gr.Accordion) and "Words" in each.label]
    (another,) = [each for each in page.fns.values() if each.name == "another"]
    shown = [another.fn(model, "fpe")[another.outputs.index(words)]["visible"] for model in desk.models.names]
    assert words.visible is False and shown == [False, True], "the second is the embedded model"


@pytest.mark.slow
def test_pictures_that_are_chosen_to_be_compared_stay(desk, visitor, values):
    from fpe_pipeline.studio.page import build

    fns = {each.name: each.fn for each in build(desk).fns.values() if "_compare_tab" in each.fn.__qualname__}
    shown = []
    for chosen in (("1 source: a red car", "1 edited: a blue car"), ("gone", "1 edited: a blue car")):
        last(desk.generate(visitor, True, *values(steps=1, control=False, source="a red car", targets="a blue car")))
        shown.append([field["value"] for field in fns["opened"](visitor)[:2]])
        fns["picked"](visitor, *chosen)
        shown.append([field["value"] for field in fns["opened"](visitor)[:2]])
    first, second = (["1 source: a red car", "1 edited: a blue car"], ["2 source: a red car", "2 edited: a blue car"])
    assert shown == [first, first, first, second]  # the latest, until others are chosen, and where they are gone


def test_a_seed_that_is_none_is_named(desk, visitor, values):
    """By the desk: the field's own checks name no field, and round."""
    import gradio as gr

    from fpe_pipeline.studio.page import build

    blocks = build(desk).blocks.values()
    (field,) = [each for each in blocks if isinstance(each, gr.Number) and each.label == "Seed"]
    for typed, said in ((-5, "seed must be at least 0, got -5"), (1.5, "seed must be a whole number, got 1.5")):
        assert said in last(desk.generate(visitor, True, *values(seed=field.preprocess(typed)))).status
