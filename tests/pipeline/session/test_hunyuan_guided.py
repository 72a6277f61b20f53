"""HunyuanVideo 1.5 and HunyuanImage 2.1: every edit against dense layers, to 1e-8 in float64; guiders, quotes."""

import itertools

import diffusers
import pytest
import torch

if not hasattr(diffusers, "HunyuanVideo15Pipeline") or not hasattr(diffusers, "HunyuanImagePipeline"):
    pytest.skip("this diffusers has no HunyuanVideo 1.5 or no HunyuanImage", allow_module_level=True)

from diffusers.guiders import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.edited_transformers import EDITS, FAULTS, LONGER, SOURCE, edited, placed, reference, shows, unedited
from tests.support.slow_cases import few
from tests.support.tiny_hunyuan_guided import HUNYUAN_IMAGE, HUNYUAN_VIDEO15

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
MODELS = {"HunyuanVideo 1.5": HUNYUAN_VIDEO15, "HunyuanImage": HUNYUAN_IMAGE}
# What a prompt quotes is tokens of their own, before the others.
QUOTED = ['a photo of a red car, "winter"', "a big dog", 'a drawing of a red house that says "car"']
SIZE = (2, 4)
NAMES = [name for name in EDITS if name != "KV-Edit"]  # whose reference pastes tokens of 2 × 2 latents
ALWAYS = {
    ("HunyuanVideo 1.5", "Prompt-to-Prompt, refined"),
    ("HunyuanImage", "ReFlex"),
}
CASES = [
    pytest.param(*case, id=" / ".join(case), marks=() if case in ALWAYS else pytest.mark.slow)
    for case in itertools.product(MODELS, NAMES)
]


@pytest.fixture(scope="module")
def pipes():
    return {name: model.make(None) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def video(pipes):
    return pipes["HunyuanVideo 1.5"]


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


@pytest.mark.parametrize(("name", "edit"), CASES)
def test_targets_are_the_papers(pipes, name, edit):
    pipe, model = pipes[name], MODELS[name]
    make, words = EDITS[edit]
    prompts = [SOURCE, *words[:2]] if "Prompt" in edit or edit == "ReFlex" else QUOTED
    case = make(model, pipe, prompts, (2 * SIZE[0], 2 * SIZE[1]))  # cases are written for tokens of 2 × 2 latents
    plain, actual = unedited(pipe, model, prompts, size=SIZE), edited(pipe, model, case, prompts, size=SIZE)
    assert farthest(actual, reference(pipe, model, case, prompts, size=SIZE)) <= EXACT
    assert farthest(actual[0], plain[0]) <= EXACT
    assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-5


MISTAKES = {
    f"{edit} / {fault}": (edit, fault)
    for edit in ("FPE", "ConsistEdit, a mask", "MasaCtrl", "ReFlex")
    for fault in FAULTS
    if shows(fault, HUNYUAN_IMAGE, edit)
}


@pytest.mark.parametrize("mistake", few(MISTAKES, "ConsistEdit, a mask / swapped"))
def test_mistakes_show(pipes, mistake):
    (edit, fault), pipe, model = mistake, pipes["HunyuanImage"], HUNYUAN_IMAGE
    prompts = [SOURCE, LONGER[0]]
    case = EDITS[edit][0](model, pipe, prompts, (2 * SIZE[0], 2 * SIZE[1]))
    actual = edited(pipe, model, case, prompts, size=SIZE)
    assert farthest(actual, reference(pipe, model, case, prompts, fault, size=SIZE)) > 1e-6


@pytest.mark.parametrize("name", few(MODELS.keys(), "HunyuanVideo 1.5"))
def test_without_guidance(pipes, name):
    pipe, model = pipes[name], MODELS[name]
    pipe.guider, before = ClassifierFreeGuidance(guidance_scale=1.0), pipe.guider
    try:
        plain = model.run(pipe, QUOTED[:2], size=SIZE)
        with editing(pipe, FreePromptEdit(0.5)) as session:
            actual = model.run(pipe, QUOTED[:2], size=SIZE)

        def rule(row, rows):
            return [(1.0, {"q_image": 0, "k_image": 0})] if row and state["step"] < 2 else None

        with model.dense(pipe, rule, "", None) as state:
            assert farthest(actual, model.run(pipe, QUOTED[:2], size=SIZE)) <= EXACT
        assert farthest(actual[1], plain[1]) > 1e-4
        assert set(map(tuple, session.report().layers.values())) == {(0, 1)}
    finally:
        pipe.guider = before


@pytest.mark.slow
def test_guided_as_pictures_are(pipes):
    """By what its authors guide by, which calls the model as plain guidance does."""
    pipe, model = pipes["HunyuanImage"], HUNYUAN_IMAGE
    projected = AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=2)
    pipe.guider, before = projected, pipe.guider
    try:
        case = EDITS["FPE"][0](model, pipe, QUOTED, SIZE)
        actual = edited(pipe, model, case, QUOTED, size=SIZE)
        assert farthest(actual, reference(pipe, model, case, QUOTED, size=SIZE)) <= EXACT
        pipe.guider = before
        assert farthest(actual, edited(pipe, model, case, QUOTED, size=SIZE)) > 1e-3
    finally:
        pipe.guider = before


def test_heat_of_a_word_is_in_its_own_columns(pipes):
    pipe, model, prompts = pipes["HunyuanImage"], HUNYUAN_IMAGE, [SOURCE, LONGER[0]]
    with heat_maps(pipe, ["winter", "car"]) as maps:
        unedited(pipe, model, prompts, size=SIZE, steps=1)
    kept = []
    with model.dense(pipe, lambda row, rows: None, "", None) as state:
        for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
            block.attn.processor.keep = lambda row, rows, seen: (
                kept.append(seen) if row and state["calls"] % 2 else None
            )
        unedited(pipe, model, prompts, size=SIZE, steps=1)
    heat = torch.stack([seen.mean(0) for seen in kept]).mean(0)
    ((part,),) = placed(model, pipe, [LONGER[0]])
    for word in ("winter", "car"):
        expected = heat[:, list(part.find(word))].mean(-1).reshape(SIZE)
        assert abs(torch.as_tensor(maps.word(word, 1)) - expected).max() <= 1e-6


def test_tokens_of_a_picture_count(video):
    adapter = adapter_of(video.transformer)
    call = adapter.read((), GIVEN)
    assert call.text_lengths == (2, 3) and call.size == (4, 6, 3)
    assert adapter.read((), {**GIVEN, "image_embeds": torch.ones(2, 5, 8)}).text_lengths == (7, 8)


def test_words_behind_a_picture(video):
    """From a picture, its tokens stand before all others, in every row as many."""
    shown = type("FromAPicture", (), {"image_encoder": None, "transformer": video.transformer})()
    shown.__dict__ |= {name: getattr(video, name) for name in ("tokenizer", "system_message")}
    shown.__dict__ |= {name: getattr(video, name) for name in ("vision_num_semantic_tokens", "tokenizer_2_max_length")}
    shown.prompt_template_encode_start_idx = video.prompt_template_encode_start_idx
    (part,) = adapter_of(shown).text_parts
    (plain,) = adapter_of(video).text_parts
    tokens = torch.arange(40)[None]
    seen, unseen = (each.template(of, {}).received(tokens)[0] for each, of in ((part, shown), (plain, video)))
    picture, first = video.vision_num_semantic_tokens, video.prompt_template_encode_start_idx
    assert len(seen) == len(unseen) and seen[picture] == unseen[0] == first
    assert part.template(shown, {}).dropped == first - picture and plain.template(video, {}).dropped == first


class TestRefused:
    @pytest.mark.parametrize("name", MODELS)
    def test_words_of_prompts_that_quote(self, pipes, name):
        pipe, model = pipes[name], MODELS[name]
        edit = PromptToPromptEdit(QUOTED[:2], pipe.tokenizer, "refine")
        with pytest.raises(ValueError, match="write prompts without quotation marks"), editing(pipe, edit):
            model.run(pipe, QUOTED[:2], size=SIZE)

    def test_guiders_that_call_the_model_otherwise(self, video):
        adapter = adapter_of(video)
        leave = adapter.follow()
        refused = "ClassifierFreeGuidance calls the model for 'pred_cond_skip', in a way that an edit does not know"
        try:
            with video.transformer.cache_context("pred_cond_skip"), pytest.raises(ValueError, match=refused):
                adapter.read((), GIVEN)
        finally:
            leave()

    def test_latents_of_a_video_for_a_model_of_pictures(self, pipes):
        with pytest.raises(ValueError, match="HunyuanImage is edited as its pipelines call it"):
            adapter_of(pipes["HunyuanImage"].transformer).read(
                (), {name: given for name, given in GIVEN.items() if name != "image_embeds"}
            )
