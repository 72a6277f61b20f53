"""Edits of Kandinsky 5, pictures and videos: against maps that are written out, in float64."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "Kandinsky5T2IPipeline"):
    pytest.skip("this diffusers has no pictures of Kandinsky 5", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, editing
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.cross_models import EXACT, CrossModel, papers, words_in_template
from tests.support.dense_rows import OTHER_RULES, farthest, of_source
from tests.support.slow_cases import few
from tests.support.tiny_kandinsky5 import (
    PROMPTS,
    SAID,
    dense_kandinsky5,
    draw_kandinsky5,
    tiny_kandinsky5,
    tiny_kandinsky5_pipeline,
)

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.fixture(scope="module")
def pipes(pipe):
    """By kind; models of videos are of the sort that is told of a first frame, which is none behind a text alone."""

    class Made(dict):
        def __missing__(self, kind):
            return self.setdefault(kind, tiny_kandinsky5_pipeline(pipe, kind=kind, visual_cond=kind != "T2I"))

    return Made()


@pytest.fixture
def pictures(pipes):
    return pipes["T2I"]


class Words:
    """Where the model's text has words: in the template, from where the pipeline cuts it."""

    family = "kandinsky5"

    def template(self, pipe):
        return *SAID.split("{}"), pipe.prompt_template_encode_start_idx

    def tokenizer(self, pipe):
        return pipe.tokenizer

    def texts(self, longest):
        return longest


MODEL = CrossModel(draw_kandinsky5, dense_kandinsky5, PROMPTS, *words_in_template(Words(), PROMPTS))
CALLS = {
    "square": ("T2I", {}),
    "not square": ("T2I", {"size": (4, 12)}),
    "3 targets": ("T2I", {"prompts": 4}),
    "no guidance": ("T2I", {"guidance_scale": 1.0}),
    "a video": ("T2V", {"frames": 3}),
    "a video from a picture": ("I2V", {"frames": 3, "size": (4, 8)}),
}
ALWAYS = {("not square", "Prompt-to-Prompt"), ("a video", "MasaCtrl")}


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
    monkeypatch.setattr("tests.support.tiny_kandinsky5.turned", lambda part, places: part)
    assert farthest(actual, MODEL.reference(pictures, {"attn1": of_source}, (0, 1))) > 1e-5


@pytest.mark.slow
def test_several_images_a_prompt(pictures):
    noise = torch.randn(2, 1, 8, 8, 4, generator=torch.Generator().manual_seed(3)).double().repeat(2, 1, 1, 1, 1)
    options = {"latents": noise, "num_images_per_prompt": 2}

    def rule(row, rows, map_of, value):
        return map_of(row - 2, row - 2) @ value[row] if row > 1 else None

    actual, _ = MODEL.edited(pictures, FreePromptEdit(0.5), **options)
    assert farthest(actual, MODEL.reference(pictures, {"attn1": rule}, (0, 1), **options)) <= EXACT


@pytest.mark.slow
def test_noise_is_shared_between_the_rows(pictures):
    with editing(pictures, FreePromptEdit(0.5)):
        actual = draw_kandinsky5(pictures, latents=None, generator=torch.Generator().manual_seed(3))
    again = {"latents": None, "generator": [torch.Generator().manual_seed(3) for _ in range(2)]}
    assert farthest(actual, MODEL.reference(pictures, {"attn1": of_source}, (0, 1), **again)) <= EXACT


class TestWords:
    def test_heat(self, pictures):
        MODEL.check_heat(pictures, [("mountain", 0), ("mountain", 1), ("winter", 1)], other="red")

    @pytest.mark.slow
    def test_a_mask_of_a_word(self, pictures):
        MODEL.check_mask_of_a_word(pictures, "mountain", "red")

    def test_a_blend_where_words_are(self, pictures):
        MODEL.check_blend_where_words_are(pictures, ("photo", "mountain"), ("red", "dog"), channels_last=True)


class TestRefusals:
    def test_block_sparse_attention(self, pipe, pipes):
        sparse = tiny_kandinsky5_pipeline(pipe, kind="T2V", attention_type="nabla")
        with pytest.raises(ValueError, match=r'"nabla"\) is on: .*no whole map.*attention_type="regular"'):
            editing(sparse, FreePromptEdit(0.5))
        alone = adapter_of(tiny_kandinsky5(attention_type="nabla"))
        alone.check()  # as a pipeline of pictures calls it, which computes whole maps
        call = {"hidden_states": torch.zeros(1, 1, 8, 8, 4), "encoder_hidden_states": 0, "timestep": 0}
        call |= {"pooled_projections": 0, "visual_rope_pos": 0, "text_rope_pos": 0}
        assert alone.read((), call).size == (8, 8, 1)
        with pytest.raises(ValueError, match=r'"nabla"\) is on'):
            alone.read((), {**call, "sparse_params": {"P": 0.5}})

    def test_embeddings(self, pictures):
        """Beside which negative prompts may be encoded, which are not the prompts."""
        embeds, pooled, ends = pictures.encode_prompt(PROMPTS[:2])
        given = {"prompt_embeds_qwen": embeds, "prompt_embeds_clip": pooled, "prompt_cu_seqlens": ends}
        asked = "got embeddings.* images_per_prompt=1"
        with pytest.raises(ValueError, match=asked), editing(pictures, FreePromptEdit(0.5)):
            draw_kandinsky5(pictures, None, **given)
        words = PromptToPromptEdit(PROMPTS[:2], pictures.tokenizer, "refine")
        none = pytest.raises(ValueError, match="in which no words are looked for")
        with none, editing(pictures, words, images_per_prompt=1):
            draw_kandinsky5(pictures, None, **given)
