"""Mochi: texts that are padding alone, words of one frame, and processors of layers that have no method for them.

Every edit of it is tested with those of other models.
"""

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline import ConsistEdit, FreePromptEdit, LocalBlend, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.placed_words import placed
from tests.support.slow_cases import few
from tests.support.tiny_mochi import MOCHI, draw_mochi, tiny_mochi_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
PROMPTS = ["a photo of a red car", "a photo of a big dog on a mountain", "a house in winter"]
MODEL = MOCHI["Mochi"]
SIZE, GRID = (8, 12), (4, 6)


@pytest.fixture(scope="module")
def mochi(pipe):
    return tiny_mochi_pipeline(pipe)


def edited(mochi, edit, prompts=PROMPTS, **options):
    with editing(mochi, edit):
        return draw_mochi(mochi, prompts, **options)


def by_hand(mochi, at, prompts=PROMPTS, keep=None, **options):
    """A dense run: ``at(row, source, is_conditional, step)`` gives what a row becomes."""

    def rule(row, rows):
        source = row // len(prompts) * len(prompts)
        return at(row, source, source > 0, state["step"]) if row > source else None

    with MODEL.dense(mochi, rule, "", None) as state:
        if keep is not None:
            for block in mochi.transformer.transformer_blocks:
                block.attn1.processor.keep = keep
        return draw_mochi(mochi, prompts, **options)


def farthest(one, other):
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


@pytest.mark.parametrize("both", few({"prompts": False, "both halves": True}, "both halves"))
def test_texts_that_are_padding_alone(pipe, both):
    """As the pipeline makes them of empty negative prompts where it is told to: no token of theirs is looked at."""
    tiny = tiny_mochi_pipeline(pipe, force_zeros_for_empty_prompt=True)
    options = {"negative": "", "steps": 2}
    actual = edited(tiny, ConsistEdit(0.5) if both else FreePromptEdit(0.5), **options)

    def at(row, source, seen, step):
        taken = [(1.0, {"q_image": source, "k_image": source})]
        return taken if step < 1 and (seen or both) else None

    assert farthest(actual, by_hand(tiny, at, **options)) <= EXACT
    assert farthest(actual, by_hand(tiny, at, **{**options, "negative": "a drawing"})) > 1e-4


def test_a_call(mochi):
    call = {"hidden_states": torch.zeros(2, 4, 3, 8, 12), "encoder_hidden_states": torch.zeros(2, 5, 32), "timestep": 1}
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    read = adapter_of(mochi.transformer).read((), {**call, "encoder_attention_mask": mask})
    assert (read.size, read.text_lengths, read.rows) == ((8, 12, 3), (3, 5), 2)
    assert [site.at(*read.size).tokens for site in adapter_of(mochi).sites] == [72] * 3


@pytest.mark.slow
def test_several_videos_a_prompt(mochi):
    """Of prompts of one length: diffusers repeats masks in another order than texts."""
    noise = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(3)).double().repeat(3, 1, 1, 1, 1)
    prompts = [PROMPTS[0], "a photo of a red dog", "a photo of a red house"]
    actual = edited(mochi, FreePromptEdit(0.5), prompts, latents=noise, num_videos_per_prompt=2)

    def rule(row, rows):
        source = 6 + row % 2
        return [(1.0, {"q_image": source, "k_image": source})] if row > 7 and state["step"] < 2 else None

    with MODEL.dense(mochi, rule, "", None) as state:
        assert farthest(actual, draw_mochi(mochi, prompts, latents=noise, num_videos_per_prompt=2)) <= EXACT


class Kept:
    """Blocks of a dense run's image queries over text keys, of rows that see their prompts, over heads and layers."""

    def __init__(self, mochi, prompts):
        self.mochi, self.prompts, self.sums, self.count = mochi, prompts, {}, 0

    def __call__(self, row, rows, block):
        row -= rows - len(self.prompts)
        if row >= 0:
            self.sums[row] = self.sums.get(row, 0) + block.mean(0)
            self.count += not row

    def heat(self, row, word):
        (prompt,) = placed(MODEL, self.mochi, self.prompts)[row]
        return (self.sums[row] / self.count)[:, list(prompt.find(word))].sum(-1).reshape(GRID)


def nothing(row, source, seen, step):
    return None


class TestOneFrame:
    def test_heat(self, mochi):
        with heat_maps(mochi, ["car", "mountain"]) as maps:
            draw_mochi(mochi, PROMPTS[:2], size=SIZE, frames=1)
        kept = Kept(mochi, PROMPTS[:2])
        by_hand(mochi, nothing, PROMPTS[:2], kept, size=SIZE, frames=1)
        for word, row in (("car", 0), ("mountain", 1)):
            assert farthest(maps.word(word, row), kept.heat(row, word)) <= 1e-6
        assert farthest(maps.word("car", 0), kept.heat(0, "red")) > 1e-5

    @pytest.mark.slow
    def test_a_blend_where_words_are(self, mochi):
        prompts, options = PROMPTS[:2], {"size": SIZE, "frames": 1}
        blend = LocalBlend(prompts, mochi.tokenizer, ["car", "mountain"], 0.97, start=0.25)
        actual = edited(mochi, FreePromptEdit(0.0) + blend, prompts, **options)

        def expected(words):
            kept = Kept(mochi, prompts)

            def blended(pipe, step, timestep, values):
                latents, mask = values["latents"], False
                for row, word in enumerate(words):
                    heat = F.max_pool2d(kept.heat(row, word)[None, None], 3, stride=1, padding=1)
                    heat = F.interpolate(heat, size=SIZE)[0, 0]
                    mask = mask | (heat / heat.amax() > 0.97)
                assert mask.any() and not mask.all()
                both = torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])
                return {"latents": both if step >= 1 else latents}

            return by_hand(mochi, nothing, prompts, kept, callback_on_step_end=blended, **options)

        assert farthest(actual, expected(("car", "mountain"))) <= EXACT < farthest(actual, expected(("red", "dog")))


def test_processors_are_put_back(mochi):
    layers = [block.attn1 for block in mochi.transformer.transformer_blocks]
    before, plain = [layer.processor for layer in layers], draw_mochi(mochi, PROMPTS, steps=2)
    assert not any(hasattr(layer, "set_processor") for layer in layers)
    with pytest.raises(RuntimeError, match="stop"), editing(mochi, FreePromptEdit(1.0)):
        assert farthest(draw_mochi(mochi, PROMPTS, steps=2), plain) > 1e-4
        raise RuntimeError("stop")
    assert [layer.processor for layer in layers] == before
    assert torch.equal(draw_mochi(mochi, PROMPTS, steps=2), plain)
