"""Edits of Kandinsky 5, pictures and videos: against maps that are written out, in float64."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

if not hasattr(diffusers, "Kandinsky5T2IPipeline"):
    pytest.skip("this diffusers has no pictures of Kandinsky 5", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, LocalBlend, MasaCtrlEdit, PromptToPromptEdit, WordMask, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from fpe_pipeline.prompts.alignment import align_refine
from tests.support.dense_rows import OTHER_RULES, farthest, memory_of_source, of_source
from tests.support.placed_words import columns, placed
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
EXACT = 1e-8


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


def of_words(pipe, prompts):
    def rule(row, rows, map_of, value):
        if not row:
            return None
        return columns(Words(), pipe, align_refine, prompts, row)(map_of(0, 0), map_of(row, row)) @ value[row]

    return rule


def edited(pipe, edit, **options):
    with editing(pipe, edit) as session:
        out = draw_kandinsky5(pipe, **options)
    return out, session.report()


def reference(pipe, rules, steps, *, both=False, **options):
    """A guided step's first call sees the prompts."""
    guided, followed = options.get("guidance_scale", 3.0) > 1, {}

    def of_halves(rule):
        return lambda *given: rule(*given) if both or not guided or state["calls"] % 2 else None

    with dense_kandinsky5(pipe, followed, steps) as state:
        followed |= {kind: of_halves(rule) for kind, rule in rules.items()}
        return draw_kandinsky5(pipe, **options)


CALLS = {
    "square": ("T2I", {}),
    "not square": ("T2I", {"size": (4, 12)}),
    "3 targets": ("T2I", {"prompts": 4}),
    "no guidance": ("T2I", {"guidance_scale": 1.0}),
    "a video": ("T2V", {"frames": 3}),
    "a video from a picture": ("I2V", {"frames": 3, "size": (4, 8)}),
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
ALWAYS = {("not square", "Prompt-to-Prompt"), ("a video", "MasaCtrl")}


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
    plain, (actual, report) = draw_kandinsky5(pipe, **options), edited(pipe, given, **options)
    assert farthest(actual, reference(pipe, rules, steps, both=both, **options)) <= EXACT
    assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-4
    assert len(report.layers) == 2 * len(rules) and farthest(actual[0], plain[0]) <= EXACT


@pytest.mark.parametrize("wrong", few(OTHER_RULES, "the unconditional call too"))
def test_other_rules_are_told_apart(pictures, wrong):
    both, rules, steps = wrong
    actual, _ = edited(pictures, FreePromptEdit(0.5))
    assert farthest(actual, reference(pictures, rules, steps, both=both)) > 1e-5


@pytest.mark.slow
def test_queries_before_they_are_turned_are_told_apart(pictures, monkeypatch):
    actual, _ = edited(pictures, FreePromptEdit(0.5))
    monkeypatch.setattr("tests.support.tiny_kandinsky5.turned", lambda part, places: part)
    assert farthest(actual, reference(pictures, {"attn1": of_source}, (0, 1))) > 1e-5


@pytest.mark.slow
def test_several_images_a_prompt(pictures):
    noise = torch.randn(2, 1, 8, 8, 4, generator=torch.Generator().manual_seed(3)).double().repeat(2, 1, 1, 1, 1)
    options = {"latents": noise, "num_images_per_prompt": 2}

    def rule(row, rows, map_of, value):
        return map_of(row - 2, row - 2) @ value[row] if row > 1 else None

    actual, _ = edited(pictures, FreePromptEdit(0.5), **options)
    assert farthest(actual, reference(pictures, {"attn1": rule}, (0, 1), **options)) <= EXACT


@pytest.mark.slow
def test_noise_is_shared_between_the_rows(pictures):
    with editing(pictures, FreePromptEdit(0.5)):
        actual = draw_kandinsky5(pictures, latents=None, generator=torch.Generator().manual_seed(3))
    again = {"latents": None, "generator": [torch.Generator().manual_seed(3) for _ in range(2)]}
    assert farthest(actual, reference(pictures, {"attn1": of_source}, (0, 1), **again)) <= EXACT


class Heat:
    """Where a dense run's rows look for words, averaged over heads, layers and the steps so far."""

    grid, size = (4, 6), (8, 12)

    def __init__(self, pipe):
        self.pipe, self.sums, self.count = pipe, {}, 0

    def __call__(self, row, rows, map_of, value):
        self.sums[row] = self.sums.get(row, 0) + map_of(row, row).mean(0)
        self.count += not row

    def of(self, row, word):
        (prompt,) = placed(Words(), self.pipe, PROMPTS[:2])[row]
        heat = (self.sums[row] / self.count)[:, list(prompt.find(word))].sum(-1)
        return heat.reshape(self.grid)


class TestWords:
    def test_heat(self, pictures):
        with heat_maps(pictures, ["mountain", "winter"]) as maps:
            draw_kandinsky5(pictures, size=Heat.size)
        heat = Heat(pictures)
        reference(pictures, {"attn2": heat}, range(4), size=Heat.size)
        for word, row in (("mountain", 0), ("mountain", 1), ("winter", 1)):
            assert farthest(maps.word(word, row), heat.of(row, word)) <= 1e-6
        assert farthest(maps.word("mountain", 0), heat.of(0, "red")) > 1e-4

    @pytest.mark.slow
    def test_a_mask_of_a_word(self, pictures):
        mask = WordMask(PROMPTS[0], "mountain", pictures.tokenizer, threshold=0.9)
        actual, _ = edited(pictures, FreePromptEdit(1.0, mask=mask), size=Heat.size)

        def expected(word):
            heat, shares = Heat(pictures), {0: torch.ones(24, 1).double()}

            def of_self(row, rows, map_of, value):
                step = pictures.scheduler.step_index or 0
                if step not in shares:
                    found = heat.of(0, word)
                    shares[step] = (found / found.amax() >= 0.9).double().reshape(-1, 1)
                share = shares[step]
                return (share * map_of(0, 0) + (1 - share) * map_of(row, row)) @ value[row] if row else None

            out = reference(pictures, {"attn1": of_self, "attn2": heat}, range(4), size=Heat.size)
            assert 0 < shares[3].mean() < 1
            return out

        assert farthest(actual, expected("mountain")) <= EXACT < farthest(actual, expected("red"))

    def test_a_blend_where_words_are(self, pictures):
        """Of latents whose channels are last."""
        blend = LocalBlend(PROMPTS[:2], pictures.tokenizer, ["photo", "mountain"], 0.9, start=0.25)
        actual, _ = edited(pictures, FreePromptEdit(0.0) + blend, size=Heat.size)

        def expected(words):
            heat = Heat(pictures)

            def blended(pipe, step, timestep, values):
                latents, mask = values["latents"], False
                for row, word in enumerate(words):
                    found = F.max_pool2d(heat.of(row, word)[None, None], 3, stride=1, padding=1)
                    found = F.interpolate(found, size=Heat.size)[0, 0]
                    mask = mask | (found / found.amax() > 0.9)[..., None]
                both = torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])
                assert mask.any() and not mask.all()
                return {"latents": both if step >= 1 else latents}

            options = {"size": Heat.size, "callback_on_step_end": blended}
            return reference(pictures, {"attn2": heat}, range(4), **options)

        assert farthest(actual, expected(("photo", "mountain"))) <= EXACT < farthest(actual, expected(("red", "dog")))


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
