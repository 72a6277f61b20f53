"""Edits of Cosmos Predict and of Anima: against maps that are written out, in float64."""

import warnings

import diffusers
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

if not hasattr(diffusers, "Cosmos2TextToImagePipeline"):
    pytest.skip("this diffusers has no pictures of Cosmos", allow_module_level=True)

from fpe_pipeline import (
    FreePromptEdit,
    LocalBlend,
    MasaCtrlEdit,
    Product,
    PromptToPromptEdit,
    SelfAttentionEdit,
    WordMask,
    editing,
    heat_maps,
)
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.prompts.alignment import align_refine, tokenize
from tests.support.dense_rows import OTHER_RULES, farthest, memory_of_source, of_source
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
EXACT = 1e-8


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


def of_words(pipe, prompts):
    tokenizer = getattr(pipe, "t5_tokenizer", pipe.tokenizer)

    def rule(row, rows, map_of, value):
        if not row:
            return None
        aligned = align_refine(*(tokenize(prompts[number], tokenizer, TEXTS) for number in (0, row)))
        return (map_of(0, 0) @ aligned.mapper * aligned.kept + map_of(row, row) * (1 - aligned.kept)) @ value[row]

    return rule


def edited(pipe, edit, **options):
    with editing(pipe, edit) as session:
        out = draw_cosmos(pipe, **options)
    return out, session.report()


def reference(pipe, rules, steps, *, both=False, **options):
    """A guided step's first call sees the prompts."""
    guided, followed = options.get("guidance_scale", 3.0) > 1, {}

    def of_halves(rule):
        return lambda *given: rule(*given) if both or not guided or state["calls"] % 2 else None

    with dense_cosmos(pipe, followed, steps) as state:
        followed |= {kind: of_halves(rule) for kind, rule in rules.items()}
        return draw_cosmos(pipe, **options)


CALLS = {
    "Cosmos": ("Cosmos", {}),
    "Cosmos, 3 targets, not square": ("Cosmos", {"size": (4, 12), "prompts": 4}),
    "Cosmos, no guidance": ("Cosmos", {"guidance_scale": 1.0}),
    "a video from a picture": ("videos", {"frames": 3, "size": (4, 8)}),
    "a video, no guidance": ("videos", {"frames": 3, "size": (4, 8), "guidance_scale": 1.0}),
    "Anima": ("Anima", {}),
    "Anima, 3 targets, not square": ("Anima", {"size": (4, 12), "prompts": 4}),
}
EDITS = {
    "FPE": lambda pipe, prompts: (FreePromptEdit(0.5), {"attn1": of_source}, (0, 1), False),
    "MasaCtrl": lambda pipe, prompts: (MasaCtrlEdit(1, start_layer=0), {"attn1": memory_of_source}, (1, 2, 3), True),
    "Prompt-to-Prompt": lambda pipe, prompts: (
        PromptToPromptEdit(prompts, pipe.tokenizer, "refine", cross_replace_steps=0.6, self_replace_steps=0.25),
        {"attn1": of_source, "attn2": of_words(pipe, prompts)},
        {"attn1": (0,), "attn2": (0, 1, 2)},
        False,
    ),
}
ALWAYS = {
    ("Cosmos", "FPE"),
    ("Cosmos, 3 targets, not square", "Prompt-to-Prompt"),
    ("Anima, 3 targets, not square", "Prompt-to-Prompt"),
    ("a video from a picture", "FPE"),
    ("Anima", "MasaCtrl"),
}


@pytest.mark.parametrize(
    ("call", "edit"),
    [
        pytest.param(call, edit, marks=() if (call, edit) in ALWAYS else pytest.mark.slow)
        for call in CALLS
        for edit in EDITS
    ],
)
def test_targets_are_the_papers(pipes, call, edit):
    kind, options = CALLS[call]
    pipe, prompts = pipes[kind], PROMPTS[: options.get("prompts", 2)]
    given, rules, steps, both = EDITS[edit](pipe, prompts)
    plain, (actual, report) = draw_cosmos(pipe, **options), edited(pipe, given, **options)
    assert farthest(actual, reference(pipe, rules, steps, both=both, **options)) <= EXACT
    assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-4
    assert len(report.layers) == 2 * len(rules) and farthest(actual[0], plain[0]) <= EXACT


@pytest.mark.parametrize("wrong", OTHER_RULES)
def test_other_rules_are_told_apart(pipes, wrong):
    both, rules, steps = OTHER_RULES[wrong]
    actual, _ = edited(pipes["Cosmos"], FreePromptEdit(0.5))
    assert farthest(actual, reference(pipes["Cosmos"], rules, steps, both=both)) > 1e-5


class Heat:
    """Where a dense run's rows look for words, averaged over heads, layers and the steps so far."""

    grid, size = (4, 6), (8, 12)

    def __init__(self, pipe):
        self.tokenizer, self.sums, self.count = getattr(pipe, "t5_tokenizer", pipe.tokenizer), {}, 0

    def __call__(self, row, rows, map_of, value):
        self.sums[row] = self.sums.get(row, 0) + map_of(row, row).mean(0)
        self.count += not row

    def of(self, row, word):
        places = list(tokenize(PROMPTS[row], self.tokenizer, TEXTS).find(word))
        return (self.sums[row] / self.count)[:, places].sum(-1).reshape(self.grid)


@pytest.mark.parametrize("kind", ["Cosmos", "Anima"])
class TestWords:
    def test_heat(self, pipes, kind):
        pipe = pipes[kind]
        with heat_maps(pipe, ["mountain", "car"]) as maps:
            draw_cosmos(pipe, size=Heat.size)
        heat = Heat(pipe)
        reference(pipe, {"attn2": heat}, range(4), size=Heat.size)
        for word in ("mountain", "car"):
            assert farthest(maps.word(word, 0), heat.of(0, word)) <= 1e-6
        assert farthest(maps.word("mountain", 1), heat.of(1, "mountain")) <= 1e-6
        assert farthest(maps.word("mountain", 0), heat.of(0, "car")) > 1e-4

    def test_a_mask_of_a_word(self, pipes, kind):
        pipe = pipes[kind]
        mask = WordMask(PROMPTS[0], "mountain", pipe.tokenizer, threshold=0.9)
        actual, _ = edited(pipe, FreePromptEdit(1.0, mask=mask), size=Heat.size)

        def expected(word):
            heat, shares = Heat(pipe), {0: torch.ones(24, 1).double()}

            def of_self(row, rows, map_of, value):
                step = pipe.scheduler.step_index or 0
                if step not in shares:
                    found = heat.of(0, word)
                    shares[step] = (found / found.amax() >= 0.9).double().reshape(-1, 1)
                share = shares[step]
                return (share * map_of(0, 0) + (1 - share) * map_of(row, row)) @ value[row] if row else None

            out = reference(pipe, {"attn1": of_self, "attn2": heat}, range(4), size=Heat.size)
            assert 0 < shares[3].mean() < 1
            return out

        assert farthest(actual, expected("mountain")) <= EXACT < farthest(actual, expected("red"))

    def test_a_blend_where_words_are(self, pipes, kind):
        """Of latents with one frame."""
        pipe = pipes[kind]
        blend = LocalBlend(PROMPTS[:2], pipe.tokenizer, ["car", "dog"], 0.9, start=0.25)
        actual, _ = edited(pipe, FreePromptEdit(0.0) + blend, size=Heat.size)

        def expected(words):
            heat = Heat(pipe)

            def blended(pipe, step, timestep, values):
                latents, mask = values["latents"], False
                for row, word in enumerate(words):
                    found = F.max_pool2d(heat.of(row, word)[None, None], 3, stride=1, padding=1)
                    found = F.interpolate(found, size=Heat.size)[0, 0]
                    mask = mask | (found / found.amax() > 0.9)
                both = torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])
                assert mask.any() and not mask.all()
                return {"latents": both if step >= 1 else latents}

            options = {"size": Heat.size, "callback_on_step_end": blended}
            return reference(pipe, {"attn2": heat}, range(4), **options)

        assert farthest(actual, expected(("car", "dog"))) <= EXACT < farthest(actual, expected(("photo", "mountain")))


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
    actual, _ = edited(pipes["Cosmos 2.5"], FreePromptEdit(0.5), **given)
    assert farthest(actual, reference(pipes["Cosmos 2.5"], {"attn1": of_source}, (0, 1), **given)) <= EXACT
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
