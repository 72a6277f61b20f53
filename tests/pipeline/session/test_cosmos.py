"""Edits of Cosmos Predict and of Anima: against maps that are written out, in float64."""

import warnings

import diffusers
import pytest
import torch
from PIL import Image

if not hasattr(diffusers, "Cosmos2TextToImagePipeline"):
    pytest.skip("this diffusers has no pictures of Cosmos", allow_module_level=True)

from fpe_pipeline import (
    FreePromptEdit,
    Product,
    PromptToPromptEdit,
    SelfAttentionEdit,
    editing,
)
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.prompts.alignment import align_refine, tokenize
from tests.support.cross_models import EXACT, CrossModel, papers
from tests.support.dense_rows import OTHER_RULES, farthest, of_source
from tests.support.tiny_cosmos import (
    PROMPTS,
    TEXTS,
    dense_cosmos,
    draw_cosmos,
    tiny_anima,
    tiny_cosmos,
    tiny_cosmos25_pipeline,
    tiny_cosmos_pipeline,
    tiny_cosmos_videos,
)

pytestmark = pytest.mark.usefixtures("in_float64")


MADE = {
    "Cosmos": tiny_cosmos_pipeline,
    "Anima": tiny_anima,
    "videos": tiny_cosmos_videos,
    "Cosmos 2.5": tiny_cosmos25_pipeline,
}


@pytest.fixture(scope="module")
def pipes(pipe):
    class Made(dict):
        def __missing__(self, kind):
            return self.setdefault(kind, MADE[kind](pipe))

    return Made()


def words(pipe, row):
    return tokenize(PROMPTS[row], getattr(pipe, "t5_tokenizer", pipe.tokenizer), TEXTS)


def refined(pipe, prompts, row):
    aligned = align_refine(words(pipe, 0), words(pipe, row))
    return lambda of_source, own: of_source @ aligned.mapper * aligned.kept + own * (1 - aligned.kept)


MODEL = CrossModel(draw_cosmos, dense_cosmos, PROMPTS, words, refined)
CALLS = {
    "Cosmos": ("Cosmos", {}),
    "Cosmos, 3 targets, not square": ("Cosmos", {"size": (4, 12), "prompts": 4}),
    "Cosmos, no guidance": ("Cosmos", {"guidance_scale": 1.0}),
    "a video from a picture": ("videos", {"frames": 3, "size": (4, 8)}),
    "a video, no guidance": ("videos", {"frames": 3, "size": (4, 8), "guidance_scale": 1.0}),
    "Anima": ("Anima", {}),
    "Anima, 3 targets, not square": ("Anima", {"size": (4, 12), "prompts": 4}),
}
ALWAYS = {
    ("Cosmos", "FPE"),
    ("Cosmos, 3 targets, not square", "Prompt-to-Prompt"),
    ("Anima, 3 targets, not square", "Prompt-to-Prompt"),
    ("a video from a picture", "FPE"),
    ("Anima", "MasaCtrl"),
}


@pytest.mark.parametrize(("call", "edit"), papers(CALLS, ALWAYS))
def test_targets_are_the_papers(pipes, call, edit):
    kind, options = CALLS[call]
    MODEL.check_targets(pipes[kind], edit, **options)


@pytest.mark.parametrize("wrong", OTHER_RULES)
def test_other_rules_are_told_apart(pipes, wrong):
    MODEL.check_told_apart(pipes["Cosmos"], OTHER_RULES[wrong])


@pytest.mark.parametrize("kind", ["Cosmos", "Anima"])
class TestWords:
    def test_heat(self, pipes, kind):
        MODEL.check_heat(pipes[kind], [("mountain", 0), ("car", 0), ("mountain", 1)], other="car")

    def test_a_mask_of_a_word(self, pipes, kind):
        MODEL.check_mask_of_a_word(pipes[kind], "mountain", "red")

    def test_a_blend_where_words_are(self, pipes, kind):
        """Of latents with one frame."""
        MODEL.check_blend_where_words_are(pipes[kind], ("car", "dog"), ("photo", "mountain"))


@pytest.mark.parametrize("kind", ["Cosmos", "Anima"])
def test_noise_is_shared_between_the_rows(pipes, kind):
    with editing(pipes[kind], FreePromptEdit(0.5)):
        actual = draw_cosmos(pipes[kind], [PROMPTS[0]] * 2, latents=None, generator=torch.Generator().manual_seed(3))
    assert farthest(actual[0], actual[1]) <= EXACT
    apart = draw_cosmos(pipes[kind], [PROMPTS[0]] * 2, latents=None, generator=torch.Generator().manual_seed(3))
    assert farthest(apart[0], apart[1]) > 1e-2


def test_one_picture_for_all_rows(pipes):
    """Whose encoder draws what it draws for the source."""
    given = {"image": Image.new("RGB", (64, 32), (9, 90, 200)), "latents": None, "frames": 3, "size": (4, 8)}
    with editing(pipes["videos"], FreePromptEdit(0.5)):
        actual = draw_cosmos(pipes["videos"], [PROMPTS[0]] * 2, generator=torch.Generator().manual_seed(3), **given)
    assert farthest(actual[0], actual[1]) <= EXACT
    given["image"] = [given["image"]] * 2
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert farthest(actual, draw_cosmos(pipes["videos"], [PROMPTS[0]] * 2, generator=draws, **given)) <= EXACT


def test_padding_of_long_texts_is_told(pipe):
    """A source stands alone behind less padding than beside a longer target, and is another image there."""
    anima = tiny_anima(pipe)
    anima.text_conditioner.register_to_config(min_sequence_length=6)
    longer = [PROMPTS[0], f"{PROMPTS[0]} and a house"]
    first, second = (len(anima.t5_tokenizer(prompt)["input_ids"]) for prompt in longer)
    told = rf"padded to {second} tokens, .* Anima attends to padding: texts \[0\] have fewer .* of at most 6, to edit"
    with editing(anima, FreePromptEdit(0.5)), pytest.warns(EditWarning, match=told):
        beside = draw_cosmos(anima, longer)
    assert 6 < first < second and farthest(beside[0], draw_cosmos(anima, [PROMPTS[0]] * 2)[0]) > 1e-3
    with warnings.catch_warnings(), editing(anima, FreePromptEdit(0.5)):
        warnings.simplefilter("error", EditWarning)
        draw_cosmos(anima, [PROMPTS[0]] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditWarning)
        draw_cosmos(anima, longer)  # where nothing is edited


def test_videos_of_a_language_model(pipes):
    """Cosmos Predict 2.5, of embeddings."""
    texts = torch.randn(2, 2, 7, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "frames": 2, "size": (4, 8)}
    actual, _ = MODEL.edited(pipes["Cosmos 2.5"], FreePromptEdit(0.5), **given)
    assert farthest(actual, MODEL.reference(pipes["Cosmos 2.5"], {"attn1": of_source}, (0, 1), **given)) <= EXACT
    plain = draw_cosmos(pipes["Cosmos 2.5"], **given)
    assert farthest(actual[0], plain[0]) <= EXACT < farthest(actual[1], plain[1])


class OfText(SelfAttentionEdit):
    """Targets take their source's map of the text."""

    def select(self, sites):
        return tuple(site for site in sites if site.kind == "cross")

    def products(self, site, step, roles):
        return {target: Product(source, (source,), (target,)) for source, target in roles.pairs(conditional=True)}


def test_a_picture_beside_the_text():
    """Of models that transfer: each row asks for its own."""
    model = tiny_cosmos(img_context_dim_in=6, img_context_dim_out=48, img_context_num_tokens=5)
    generator = torch.Generator().manual_seed(0)
    noise, texts, picture = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 4, 2, 4, 6), (2, 5, 32), (2, 5, 6))
    )
    given = {"hidden_states": noise.repeat(2, 1, 1, 1, 1), "timestep": torch.full((2,), 0.5, dtype=torch.float64)}
    given |= {"encoder_hidden_states": (texts, picture), "attention_mask": None}
    alone = type("Alone", (), {"transformer": model, "scheduler": type("At", (), {"step_index": 0})})
    with torch.no_grad():
        with editing(model, OfText(), classifier_free_guidance=False) as session:
            session.step(0, 4)
            actual = model(**given).sample
        with dense_cosmos(alone, {"attn2": of_source}, (0,)):
            expected = model(**given).sample
        assert farthest(actual, expected) <= EXACT
        with (
            editing(model, OfText(), classifier_free_guidance=False) as session,
            pytest.raises(ValueError, match="attn2 receives an attention mask"),
        ):
            session.step(0, 4)
            model(**given | {"encoder_hidden_states": texts, "attention_mask": torch.ones(2, 5, dtype=torch.bool)})


def test_words_of_conversations_are_refused(pipe):
    """Cosmos Predict 2.5 has a language model in the place of T5."""
    asked = tiny_cosmos_pipeline(pipe)
    asked.text_encoder = tiny_anima(pipe).text_encoder
    words = PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer)
    with pytest.raises(ValueError, match="encodes prompts inside a conversation that it does not tell"):
        editing(asked, words)
    compiled = tiny_cosmos_pipeline(pipe)
    compiled.text_encoder = torch.compile(compiled.text_encoder, backend="eager")
    editing(compiled, words)  # whose encoder is T5's as before
