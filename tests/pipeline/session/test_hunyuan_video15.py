"""HunyuanVideo 1.5: every edit that looks for no word, against dense layers, to 1e-8 in float64; guiders, refusals."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "HunyuanVideo15Pipeline"):
    pytest.skip("this diffusers has no HunyuanVideo 1.5", allow_module_level=True)

from diffusers.guiders import ClassifierFreeGuidance

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, editing
from fpe_pipeline.models.families import adapter_of
from tests.support.edited_transformers import EDITS, FAULTS, edited, reference, shows, unedited
from tests.support.slow_cases import few
from tests.support.tiny_hunyuan_video15 import HUNYUAN_VIDEO15 as MODEL
from tests.support.tiny_hunyuan_video15 import draw_hunyuan_video15, tiny_hunyuan_video15_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
WITHOUT_WORDS = [name for name in EDITS if "Prompt" not in name and name not in ("ReFlex", "KV-Edit")]
# What a prompt quotes is tokens of their own, before the others.
PROMPTS = ['a photo of a red car, "winter"', "a big dog", 'a drawing of a red house that says "car"']
SIZE = (2, 4)


@pytest.fixture(scope="module")
def video():
    return tiny_hunyuan_video15_pipeline()


GIVEN = {
    "hidden_states": torch.zeros(2, 65, 3, 4, 6),
    "timestep": 1,
    "encoder_hidden_states": None,
    "encoder_attention_mask": torch.tensor([[1.0, 1, 0], [1, 0, 0]]),
    "encoder_attention_mask_2": torch.tensor([[0.0, 0], [1, 1]]),
    "image_embeds": torch.zeros(2, 5, 8),
}


def farthest(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", few(WITHOUT_WORDS, "FPE", "ConsistEdit, a mask"))
def test_targets_are_the_papers(video, name):
    # Cases are written for tokens of 2 × 2 latents, and this model's are of one.
    case = EDITS[name][0](MODEL, video, PROMPTS, (2 * SIZE[0], 2 * SIZE[1]))
    plain = unedited(video, MODEL, PROMPTS, size=SIZE)
    actual = edited(video, MODEL, case, PROMPTS, size=SIZE)
    assert farthest(actual, reference(video, MODEL, case, PROMPTS, size=SIZE)) <= EXACT
    assert farthest(actual[0], plain[0]) <= EXACT
    assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-5
    for fault in FAULTS:
        if shows(fault, MODEL, name):
            assert farthest(actual, reference(video, MODEL, case, PROMPTS, fault, size=SIZE)) > 1e-6, fault


def test_without_guidance(video):
    video.guider, before = ClassifierFreeGuidance(guidance_scale=1.0), video.guider
    try:
        plain = draw_hunyuan_video15(video, PROMPTS[:2], size=SIZE)
        with editing(video, FreePromptEdit(0.5)) as session:
            actual = draw_hunyuan_video15(video, PROMPTS[:2], size=SIZE)

        def rule(row, rows):
            return [(1.0, {"q_image": 0, "k_image": 0})] if row and state["step"] < 2 else None

        with MODEL.dense(video, rule, "", None) as state:
            assert farthest(actual, draw_hunyuan_video15(video, PROMPTS[:2], size=SIZE)) <= EXACT
        assert farthest(actual[1], plain[1]) > 1e-4
        assert set(map(tuple, session.report().layers.values())) == {(0, 1)}
    finally:
        video.guider = before


def test_tokens_of_a_picture_count(video):
    adapter = adapter_of(video.transformer)
    call = adapter.read((), GIVEN)
    assert call.text_lengths == (2, 3) and call.size == (4, 6, 3)
    assert adapter.read((), {**GIVEN, "image_embeds": torch.ones(2, 5, 8)}).text_lengths == (7, 8)


class TestRefused:
    def test_words(self, video):
        edit = PromptToPromptEdit(PROMPTS[:2], video.tokenizer, "refine")
        with pytest.raises(ValueError, match="puts what a prompt quotes before it"), editing(video, edit):
            draw_hunyuan_video15(video, PROMPTS[:2], size=SIZE)

    def test_guiders_that_call_the_model_otherwise(self, video):
        adapter = adapter_of(video)
        leave = adapter.follow()
        refused = "ClassifierFreeGuidance calls the model for 'pred_cond_skip', in a way that an edit does not know"
        try:
            with video.transformer.cache_context("pred_cond_skip"), pytest.raises(ValueError, match=refused):
                adapter.read((), GIVEN)
        finally:
            leave()
