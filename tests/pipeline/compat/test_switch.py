"""``set_compat``: the originals' behaviour for code whose imports alone have changed."""

import inspect

import pytest

from fpe_pipeline import compat as tools
from fpe_pipeline.compat import set_compat
from fpe_pipeline.compat.daam import trace
from fpe_pipeline.compat.free_prompt_editing import SelfAttentionControlEdit, register_attention_control_new
from fpe_pipeline.compat.masactrl import MutualSelfAttentionControl, regiter_attention_editor_diffusers
from fpe_pipeline.compat.pnp_diffusers import NOISIEST, register_attention_control_efficient
from fpe_pipeline.compat.prompt_to_prompt import AttentionReplace, LocalBlend
from fpe_pipeline.compat.style_aligned import Handler
from fpe_pipeline.compat.switch import chosen_compat
from tests.support.tiny_pipelines import tiny_pipeline

PROMPTS = ["a red car", "a blue car"]


def test_a_block_ends_as_it_began():
    assert chosen_compat() is None
    with set_compat("original"):
        assert chosen_compat() == "original"
        with set_compat(None):
            assert chosen_compat() is None
            assert chosen_compat("original") == "original"
        assert chosen_compat() == "original"
    assert chosen_compat() is None


def test_from_here_on_and_after_an_error():
    switch = set_compat("original")
    assert chosen_compat() == "original"
    with pytest.raises(RuntimeError), switch:
        raise RuntimeError
    assert chosen_compat() is None


def test_one_that_is_kept_serves_several_blocks():
    switch = set_compat("original")
    for _ in range(2):
        with switch:
            assert chosen_compat() == "original"
        assert chosen_compat() is None


def test_bad_input():
    with pytest.raises(ValueError, match="None or \"original\", got 'old'"):
        set_compat("old")
    assert chosen_compat() is None


def test_every_tool_asks_it(pipe):
    """What is registered or made in the block is as with the keyword, and outside it as without."""
    tiny = tiny_pipeline(pipe)
    asked = {
        "Prompt-to-Prompt": lambda: AttentionReplace(PROMPTS, 2, 0.5, 0.5).compat == "original",
        "LocalBlend": lambda: LocalBlend(PROMPTS, ["car", "car"]).compat == "original",
        "DAAM": lambda: trace(tiny)._original,
        "StyleAligned": lambda: Handler(tiny)._compat == "original",
        "pnp-diffusers": lambda: registered_at_the_noisiest(tiny),
        "Free-Prompt-Editing": lambda: taken_for_halves(
            register_attention_control_new(tiny, SelfAttentionControlEdit(PROMPTS, 2, 0.5))
        ),
        "MasaCtrl": lambda: taken_for_halves(
            regiter_attention_editor_diffusers(tiny, MutualSelfAttentionControl(0, 0))
        ),
    }
    with set_compat("original"):
        assert {name: asks() for name, asks in asked.items()} == dict.fromkeys(asked, True)
    assert {name: asks() for name, asks in asked.items()} == dict.fromkeys(asked, False)


def registered_at_the_noisiest(pipe):
    with register_attention_control_efficient(pipe, [1]) as registered:
        return NOISIEST in registered._edit.attention


def taken_for_halves(layers):
    with layers:
        return layers.guided is True


def test_it_is_documented_where_it_is_found():
    assert "set_compat" in tools.__all__
    assert "original" in inspect.getdoc(set_compat)
