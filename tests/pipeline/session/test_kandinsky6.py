"""Edits of Kandinsky 6, pictures and videos with sound: against maps that are written out, in float64."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "Kandinsky6TI2VAPipeline"):
    pytest.skip("this diffusers has no Kandinsky 6", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, editing
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.cross_models import EXACT, CrossModel, papers, words_in_template
from tests.support.dense_rows import OTHER_RULES, farthest, of_source
from tests.support.slow_cases import few
from tests.support.tiny_kandinsky5 import SAID
from tests.support.tiny_kandinsky6 import (
    PROMPTS,
    TEXTS,
    dense_kandinsky6,
    draw_kandinsky6,
    tiny_kandinsky6_pipeline,
)

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.fixture(scope="module")
def pipes(pipe):
    """As models are released, and of the other sort."""
    other = {"ca_rope": False, "cross_gates": False, "fix_modulation": False, "visual_cond": False}

    class Made(dict):
        def __missing__(self, kind):
            return self.setdefault(kind, tiny_kandinsky6_pipeline(pipe, **other if kind == "other" else {}))

    return Made()


@pytest.fixture
def pictures(pipes):
    return pipes["released"]


class Words:
    """Where the model's text has words: in the template, from where the pipeline cuts it."""

    family = "kandinsky6"

    def template(self, pipe):
        return *SAID.split("{}"), pipe._get_prompt_embeds.__globals__["_QWEN_CROP_START"]

    def tokenizer(self, pipe):
        return pipe.tokenizer

    def texts(self, longest):
        return TEXTS


MODEL = CrossModel(draw_kandinsky6, dense_kandinsky6, PROMPTS, *words_in_template(Words(), PROMPTS))
CALLS = {
    "a picture": ("released", {}),
    "3 targets, not square": ("released", {"size": (4, 12), "prompts": 4}),
    "no guidance": ("released", {"guidance_scale": 1.0}),
    "a video": ("other", {"frames": 2}),
    "a video with sound": ("released", {"frames": 2, "size": (4, 8), "sound": True}),
    "a video with sound, other gates": ("other", {"frames": 2, "size": (4, 8), "sound": True}),
    "a video from a picture": ("released", {"frames": 2, "size": (4, 8), "shown": True}),
}
ALWAYS = {
    ("3 targets, not square", "Prompt-to-Prompt"),
    ("a video with sound", "MasaCtrl"),
    ("a video from a picture", "FPE"),
}


@pytest.mark.parametrize(("call", "edit"), papers(CALLS, ALWAYS))
def test_targets_are_the_papers(pipes, call, edit):
    kind, options = CALLS[call]
    MODEL.check_targets(pipes[kind], edit, **options)


@pytest.mark.parametrize("wrong", few(OTHER_RULES, "the unconditional call too"))
def test_other_rules_are_told_apart(pictures, wrong):
    MODEL.check_told_apart(pictures, wrong)


@pytest.mark.slow
def test_queries_before_they_are_turned_are_told_apart(pictures, monkeypatch):
    actual, _ = MODEL.edited(pictures, FreePromptEdit(0.5))
    monkeypatch.setattr("tests.support.tiny_kandinsky6.turned", lambda part, places: part)
    assert farthest(actual, MODEL.reference(pictures, {"attn1": of_source}, (0, 1))) > 1e-5


@pytest.mark.slow
def test_several_videos_a_prompt(pictures):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 4, 2, 4, 8, generator=generator, dtype=torch.float64).repeat(2, 1, 1, 1, 1)
    options = {"latents": noise, "num_videos_per_prompt": 2, "frames": 2, "size": (4, 8)}

    def rule(row, rows, map_of, value):
        return map_of(row - 2, row - 2) @ value[row] if row > 1 else None

    actual, _ = MODEL.edited(pictures, FreePromptEdit(0.5), **options)
    assert farthest(actual, MODEL.reference(pictures, {"attn1": rule}, (0, 1), **options)) <= EXACT


def test_noise_is_shared_between_the_rows(pictures):
    """Of frames, of sound and of pictures that are encoded."""
    options = {"frames": 2, "size": (4, 8), "sound": True, "shown": True, "prompts": [PROMPTS[0]] * 2, "latents": None}
    with editing(pictures, FreePromptEdit(0.5)):
        actual = draw_kandinsky6(pictures, generator=torch.Generator().manual_seed(3), **options)
    assert farthest(actual[0], actual[1]) <= EXACT
    apart = draw_kandinsky6(pictures, generator=torch.Generator().manual_seed(3), **options)
    assert farthest(apart[0], apart[1]) > 1e-2


@pytest.mark.slow
def test_distilled(pipe):
    """Whose model tells several velocities a step, and whose scheduler has times of its own."""
    distilled = tiny_kandinsky6_pipeline(pipe, out_visual_dim=12, out_audio_dim=9)
    distilled.scheduler = diffusers.PiflowScheduler(n_grid=3)
    options = {"guidance_scale": 1.0, "frames": 2, "size": (4, 8), "sound": True}
    actual, report = MODEL.edited(distilled, FreePromptEdit(0.5), **options)
    assert farthest(actual, MODEL.reference(distilled, {"attn1": of_source}, (0, 1), **options)) <= EXACT
    assert set(map(tuple, report.layers.values())) == {(0, 1)}


class TestWords:
    def test_heat(self, pictures):
        MODEL.check_heat(pictures, [("mountain", 0), ("mountain", 1), ("winter", 1)], other="red")

    @pytest.mark.slow
    def test_a_mask_of_a_word(self, pictures):
        MODEL.check_mask_of_a_word(pictures, "mountain", "red")

    @pytest.mark.slow
    def test_a_blend_where_words_are(self, pictures):
        MODEL.check_blend_where_words_are(pictures, ("photo", "mountain"), ("red", "dog"), channels_last=True)

    def test_the_template_is_the_pipelines(self, pictures):
        kind = type(pictures)
        asked = type("Asked", (), {"transformer": pictures.transformer, "_get_prompt_embeds": kind._get_prompt_embeds})
        (part,) = adapter_of(asked).text_parts
        told = part.template(asked, {})
        assert told.before.startswith("<|im_start|>system\n") and told.after == "<|im_end|>" and told.dropped == 129

    def test_a_template_that_is_not_told(self, pipe, pictures, monkeypatch):
        monkeypatch.setattr(pictures, "_get_prompt_embeds", lambda *given: None)
        with pytest.raises(ValueError, match="inside a template that it does not tell"):
            editing(pictures, PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer, "refine"))
        editing(pictures, FreePromptEdit(0.5))
        assert not adapter_of(pictures.transformer).words_refused  # of a model alone
