"""Edits of Kandinsky 6, pictures and videos with sound: against maps that are written out, in float64."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

if not hasattr(diffusers, "Kandinsky6TI2VAPipeline"):
    pytest.skip("this diffusers has no Kandinsky 6", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, LocalBlend, MasaCtrlEdit, PromptToPromptEdit, WordMask, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from fpe_pipeline.prompts.alignment import align_refine
from tests.support.dense_rows import OTHER_RULES, farthest, memory_of_source, of_source
from tests.support.placed_words import columns, placed
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
EXACT = 1e-8


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


def of_words(pipe, prompts):
    def rule(row, rows, map_of, value):
        if not row:
            return None
        return columns(Words(), pipe, align_refine, prompts, row)(map_of(0, 0), map_of(row, row)) @ value[row]

    return rule


def edited(pipe, edit, **options):
    with editing(pipe, edit) as session:
        out = draw_kandinsky6(pipe, **options)
    return out, session.report()


def reference(pipe, rules, steps, *, both=False, **options):
    """A guided step's first call sees the prompts."""
    guided, followed = options.get("guidance_scale", 3.0) > 1, {}

    def of_halves(rule):
        return lambda *given: rule(*given) if both or not guided or state["calls"] % 2 else None

    with dense_kandinsky6(pipe, followed, steps) as state:
        followed |= {kind: of_halves(rule) for kind, rule in rules.items()}
        return draw_kandinsky6(pipe, **options)


CALLS = {
    "a picture": ("released", {}),
    "3 targets, not square": ("released", {"size": (4, 12), "prompts": 4}),
    "no guidance": ("released", {"guidance_scale": 1.0}),
    "a video": ("other", {"frames": 2}),
    "a video with sound": ("released", {"frames": 2, "size": (4, 8), "sound": True}),
    "a video with sound, other gates": ("other", {"frames": 2, "size": (4, 8), "sound": True}),
    "a video from a picture": ("released", {"frames": 2, "size": (4, 8), "shown": True}),
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
    ("3 targets, not square", "Prompt-to-Prompt"),
    ("a video with sound", "MasaCtrl"),
    ("a video from a picture", "FPE"),
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
    plain, (actual, report) = draw_kandinsky6(pipe, **options), edited(pipe, given, **options)
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
    monkeypatch.setattr("tests.support.tiny_kandinsky6.turned", lambda part, places: part)
    assert farthest(actual, reference(pictures, {"attn1": of_source}, (0, 1))) > 1e-5


@pytest.mark.slow
def test_several_videos_a_prompt(pictures):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 4, 2, 4, 8, generator=generator, dtype=torch.float64).repeat(2, 1, 1, 1, 1)
    options = {"latents": noise, "num_videos_per_prompt": 2, "frames": 2, "size": (4, 8)}

    def rule(row, rows, map_of, value):
        return map_of(row - 2, row - 2) @ value[row] if row > 1 else None

    actual, _ = edited(pictures, FreePromptEdit(0.5), **options)
    assert farthest(actual, reference(pictures, {"attn1": rule}, (0, 1), **options)) <= EXACT


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
    actual, report = edited(distilled, FreePromptEdit(0.5), **options)
    assert farthest(actual, reference(distilled, {"attn1": of_source}, (0, 1), **options)) <= EXACT
    assert set(map(tuple, report.layers.values())) == {(0, 1)}


class Heat:
    """Where a dense run's rows look for words, averaged over heads, layers and the steps so far."""

    grid, size = (4, 6), (8, 12)

    def __init__(self, pipe):
        self.pipe, self.sums, self.count = pipe, {}, 0

    def __call__(self, row, rows, map_of, value):
        self.sums[row] = self.sums.get(row, 0) + map_of(row, row).mean(0)
        self.count += not row

    def of(self, row, word):
        (words,) = placed(Words(), self.pipe, PROMPTS[:2])[row]
        heat = self.sums[row][:, list(words.find(word))].sum(-1) / self.count
        return heat.reshape(self.grid)


class TestWords:
    def test_heat(self, pictures):
        with heat_maps(pictures, ["mountain", "winter"]) as maps:
            draw_kandinsky6(pictures, size=Heat.size)
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

    @pytest.mark.slow
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
