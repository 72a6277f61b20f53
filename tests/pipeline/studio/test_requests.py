"""What a page asks for as settings: the whole way there and back, and what a page may not ask for."""

import pytest

from fpe_pipeline.edits.registry import METHODS
from fpe_pipeline.errors import InputError
from fpe_pipeline.runs.settings import DEFAULTS, Settings
from fpe_pipeline.studio.requests import (
    FIELDS,
    MOST_OPTIONS,
    Limits,
    defaults,
    fields_of,
    fields_read,
    new_seed,
    options_of,
    settings_of,
    within,
)

PROMPTS = ("a photo of a red car", "a photo of a blue car", "a photo of a red boat")


def fields(**changed):
    return defaults(PROMPTS) | changed


def settings(**changed):
    return settings_of(fields(**changed), "embedded")


def test_nothing_changed_is_the_defaults():
    assert settings() == DEFAULTS.with_values(source=PROMPTS[0], targets=PROMPTS[1:])


@pytest.mark.parametrize(
    "asked",
    [
        Settings(PROMPTS[0], PROMPTS[1:], seed=7, steps=12, guidance=3.5, size=(128, 64), negative="boats"),
        Settings(PROMPTS[0], PROMPTS[1:], method="fpe-soft", options={"strength": 0.25}, self_replace=(0.1, 0.6)),
        Settings(PROMPTS[0], PROMPTS[1:2], method="p2p-blend", options={"words": ["red", "blue"], "start": 0.2}),
        Settings(PROMPTS[0], PROMPTS[1:2], method="fpe-regional", options={"word": "car", "threshold": None}),
        Settings(PROMPTS[0], PROMPTS[1:2], levels=(0, 1), control=False),
        Settings(PROMPTS[0], PROMPTS[1:2], layers=("down_blocks.1", "mid_block")),
    ],
    ids=lambda asked: asked.method,
)
def test_there_and_back(asked):
    assert settings_of(fields_of(asked), asked.model) == asked


def test_values_in_the_order_of_the_page():
    given = fields(method="fpe-soft")
    typed = ["0.5", *[""] * (MOST_OPTIONS - 1)]
    model, read = fields_read(["embedded", *(given[name] for name in FIELDS), *typed])
    assert model == "embedded" and settings_of(read, model).options == {"strength": 0.5}


def test_every_method_has_fields_enough():
    assert all(len(options_of(name)) <= MOST_OPTIONS for name in METHODS)


def test_a_window_is_of_the_methods_that_have_one():
    assert settings(method="masactrl", self_replace=[0.1, 0.5]).self_replace == DEFAULTS.self_replace


@pytest.mark.parametrize("method", ["os:system", "tests.support.planted:Edit", "fp"])
def test_no_method_but_those_of_the_table(method):
    """A class by name would import a file of the server's."""
    with pytest.raises(InputError, match="the method is one of fpe"):
        settings(method=method)
    with pytest.raises(InputError, match="the page knows"):
        fields_of(Settings(*PROMPTS[:1], PROMPTS[1:], method=method))


def test_no_option_that_names_a_file():
    assert "mask" not in {option.name for option in options_of("fpe")}
    with pytest.raises(InputError, match="no option mask"):
        settings(options={"mask": "/etc/passwd"})
    with pytest.raises(InputError, match="names a file of the server's"):
        within(Settings(PROMPTS[0], PROMPTS[1:], options={"mask": "/etc/passwd"}), Limits())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 201}, "at most 200 steps, got 201"),
        ({"targets": "x\n" * 9}, "at most 8 targets"),
        ({"negative": "x" * 2001}, "letters in a prompt"),
        ({"size": "4096x4096"}, "pixels"),
    ],
)
def test_limits(changed, said):
    with pytest.raises(InputError, match=said):
        within(settings(**changed), Limits())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layers": ["level 1", "mid_block"]}, "levels or blocks, not both"),
        ({"size": "512"}, "a size such as 512 x 768"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"method": "p2p-blend"}, "needs words"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"options": {"nothing": "1"}}, "no option nothing"),
    ],
)
def test_refusals(changed, said):
    with pytest.raises(InputError, match=said):
        settings(**changed)


def test_the_dice():
    assert len({new_seed() for _ in range(8)}) > 1 and all(0 <= new_seed() < 2**31 for _ in range(8))


def test_a_limit_of_tokens_has_no_field():
    with pytest.raises(InputError, match="no field for max_tokens"):
        fields_of(DEFAULTS.with_values(max_tokens=64))
