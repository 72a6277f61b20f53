"""SkyReels-V2, whose blocks are Wan's: against maps that are written out, in float64."""

from importlib import import_module
from types import SimpleNamespace

import diffusers
import pytest
import torch

if not hasattr(diffusers, "SkyReelsV2Pipeline"):
    pytest.skip("this diffusers has no SkyReels-V2", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.dense_rows import source_columns, wide
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_t5
from tests.support.tiny_wan import PROMPTS, TEXTS, WAN, dense_wan, draw_wan

EXACT = 1e-8


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    # The pipelines mend texts with a package that they do not ask for.
    module = import_module("diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2")
    monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    with wide():
        yield


@pytest.fixture(scope="module")
def skyreels(pipe):
    torch.manual_seed(0)
    tiny = diffusers.SkyReelsV2Pipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=tiny_t5(pipe.tokenizer).double(),
        transformer=sharpened(diffusers.SkyReelsV2Transformer3DModel(**WAN)).double().eval(),
        vae=None,
        scheduler=ExactEuler(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def first_call(rule, state):
    """A rule in the first of a step's two calls alone."""
    return lambda *given: rule(*given) if state["calls"] % 2 else None


def maps_of_source(row, rows, map_of, value):
    return map_of(0, 0) @ value[row] if row else None


def memory_of_source(row, rows, map_of, value):
    return map_of(row, 0) @ value[0] if row else None


def reference(pipe, rules, steps, both=False):
    followed = {}
    with dense_wan(pipe, followed, steps) as state:
        followed |= {kind: rule if both else first_call(rule, state) for kind, rule in rules.items()}
        return draw_wan(pipe, 3)


def test_targets_are_the_papers(skyreels):
    prompts, plain = PROMPTS[:3], draw_wan(skyreels, 3)
    columns = source_columns(prompts, skyreels.tokenizer, TEXTS, doubled=False)
    words = PromptToPromptEdit(prompts, skyreels.tokenizer, cross_replace_steps=0.6, self_replace_steps=0.25)
    for edit, rules, steps, both in (
        (FreePromptEdit(0.5), {"attn1": maps_of_source}, (0, 1), False),
        (MasaCtrlEdit(1, start_layer=0), {"attn1": memory_of_source}, (1, 2, 3), True),
        (words, {"attn1": maps_of_source, "attn2": columns}, {"attn1": (0,), "attn2": (0, 1, 2)}, False),
    ):
        with editing(skyreels, edit):
            actual = draw_wan(skyreels, 3)
        assert (actual - reference(skyreels, rules, steps, both)).abs().max() <= EXACT, edit
        assert (actual - reference(skyreels, rules, steps, not both)).abs().max() > 1e-5, edit
        assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-4
        assert (actual - plain)[0].abs().max() <= EXACT


def test_frames_at_different_steps_are_refused(skyreels):
    given = {"hidden_states": torch.zeros(1, 16, 3, 8, 8), "timestep": torch.zeros(1, 3), "encoder_hidden_states": None}
    with pytest.raises(ValueError, match="with diffusion forcing the frames of a video are at different steps"):
        adapter_of(skyreels.transformer).read((), {**given, "enable_diffusion_forcing": True})
    assert adapter_of(skyreels.transformer).read((), given).size == (8, 8, 3)
