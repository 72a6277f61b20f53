"""Ovis-Image, LongCat-Image and Bria around the layers of FLUX.1: words, guidance, what is refused.

Every edit of them is held against dense layers with those of other models."""

from contextlib import nullcontext

import diffusers
import pytest
import torch

if not hasattr(diffusers, "LongCatImagePipeline"):
    pytest.skip("this diffusers has no LongCat-Image", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, concept_maps, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.dense_joint import dense
from tests.support.dense_rows import narrow
from tests.support.edited_transformers import SOURCE, STEPS, placed, unedited
from tests.support.slow_cases import few
from tests.support.tiny_flux_kin import KIN, draw_bria, draw_longcat

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
SIZE = (6, 12)
every_model = pytest.mark.parametrize("name", few(KIN.keys(), "Ovis-Image"))


@pytest.fixture(scope="module")
def pipes(pipe):
    return {name: model.make(pipe) for name, model in KIN.items()}


def farthest(one, other):
    return float((one - other).abs().max())


def dense_heat(pipe, model, prompts, word):
    """The share of a row's attention that a word's tokens have in the maps that are written out: (h, w), last row's."""
    kept, last = [], len(prompts) - 1

    def keep(row, rows, block):
        _, number, seen = model.roles(row, rows, state["calls"], len(prompts))
        if seen and number == last:
            kept.append(block.mean(0))

    with dense(pipe, lambda row, rows: None, steps=range(STEPS), keep=keep) as state:
        unedited(pipe, model, prompts, size=SIZE)
    (part,) = placed(model, pipe, prompts)[last]
    return (sum(kept) / len(kept))[:, list(part.find(word))].reshape(3, 6, -1)


@every_model
def test_heat_of_a_word_is_in_its_own_columns(pipes, name):
    pipe, model, prompts = pipes[name], KIN[name], [SOURCE, "a big dog on a house in winter"]
    with heat_maps(pipe, ["dog"]) as maps:
        unedited(pipe, model, prompts, size=SIZE)
    expected = dense_heat(pipe, model, prompts, "dog")
    assert abs(torch.as_tensor(maps.word("dog", 1)) - expected.mean(-1)).max() <= 1e-6
    others = dense_heat(pipe, model, prompts, "house")
    assert abs(torch.as_tensor(maps.word("dog", 1)) - others.mean(-1)).max() > 1e-4


@every_model
def test_without_guidance_and_from_float32(pipe, pipes, name):
    model, prompts = KIN[name], [SOURCE, "a big dog"]
    for tiny, close in ((pipes[name], EXACT), (model.make(pipe, torch.float32), 1e-4)):
        with nullcontext() if close == EXACT else narrow():
            plain = model.run(tiny, prompts, guidance=1.0)
            with editing(tiny, FreePromptEdit(0.5)) as session:
                actual = model.run(tiny, prompts, guidance=1.0)

            def rule(row, rows):
                return [(1.0, {"q_image": 0, "k_image": 0})] if row and state["step"] < 2 else None

            with dense(tiny, rule, steps=range(STEPS)) as state:
                expected = model.run(tiny, prompts, guidance=1.0)
        assert farthest(actual, expected) <= close < farthest(actual[1], plain[1])
        assert farthest(actual[0], plain[0]) <= close
        assert len(session.report().layers) == 5


def test_several_images_of_prompts_that_are_encoded_one_by_one(pipes):
    """Bria's encoder gets each prompt by itself: rows of the batch are told by the prompts, not by its calls."""
    bria, prompts = pipes["Bria"], [SOURCE, "a photo of a red dog on a mountain"]
    edit = PromptToPromptEdit(prompts, bria.tokenizer, cross_replace_steps=0.6, self_replace_steps=0)
    noise = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with editing(bria, edit):
        both = draw_bria(bria, prompts, latents=noise[[0, 1, 0, 1]], num_images_per_prompt=2)
    for image in range(2):
        with editing(bria, edit):
            alone = draw_bria(bria, prompts, latents=noise[[image, image]])
        assert farthest(both[[image, 2 + image]], alone) <= EXACT
    assert farthest(both[0], both[1]) > 1e-2


class TestRefused:
    def test_words_in_quotes_of_longcat(self, pipes):
        """It spells out what a prompt quotes, letter by letter, which no tokenizer of a whole prompt gives back."""
        longcat = pipes["LongCat-Image"]
        prompts = ["a drawing 'house in winter'", "a drawing 'a red car'"]
        with (
            pytest.raises(ValueError, match="encodes other tokens than those of the prompt"),
            heat_maps(longcat, ["drawing"]),
        ):
            draw_longcat(longcat, prompts)
        with editing(longcat, FreePromptEdit(0.5)):  # which looks for no word
            assert torch.isfinite(draw_longcat(longcat, prompts)).all()

    def test_words_behind_a_picture(self, pipes):
        shown = type("LongCatImageEditPipeline", (), {"transformer": pipes["LongCat-Image"].transformer})()
        assert "sees a picture before the prompt" in adapter_of(shown).words_refused
        assert not adapter_of(pipes["LongCat-Image"]).words_refused

    @every_model
    def test_what_is_known_of_flux_alone(self, pipes, name):
        with (
            pytest.raises(TypeError, match="concepts go along the stream of text tokens"),
            concept_maps(pipes[name], ["car", "dog"]),
        ):
            pass
