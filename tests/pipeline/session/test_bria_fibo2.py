"""Bria FIBO 2: its gist tokens and pictures that are edited; every edit is tested with those of other models."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.tiny_bria_fibo2 import FIBO2, draw_bria_fibo2, embedded, tiny_bria_fibo2_pipeline
from tests.support.tiny_language import qwen_tokenizer

pytestmark = pytest.mark.usefixtures("in_float64")
PROMPTS = ["a photo of a red car on a mountain", "a red car"]
ALIKE = ["a photo of a red car on a mountain", "a photo of a big dog on a house"]
SIZE = (6, 12)


@pytest.fixture(scope="module")
def fibo():
    return tiny_bria_fibo2_pipeline()


@pytest.fixture(scope="module")
def pictures():
    """Latents of two pictures of other sizes, the same for each of two rows."""
    noise = torch.Generator().manual_seed(7)
    sizes = ((4, 6), (8, 2))
    return [torch.randn(1, 4, *size, generator=noise, dtype=torch.float64).repeat(2, 1, 1, 1) for size in sizes]


def read(fibo, prompts, **given):
    texts, mask = embedded(prompts, torch.float64)
    call = {"hidden_states": torch.zeros(2, 4, *SIZE), "timestep": torch.ones(2), "encoder_hidden_states": texts}
    return adapter_of(fibo.transformer).read((), {**call, "encoder_attention_mask": mask, **given})


def test_what_a_call_is(fibo, pictures):
    call = read(fibo, PROMPTS, context_latents=pictures)
    assert call.size == SIZE and call.text_lengths == (10, 4) and call.references == 6 + 4
    alike = read(fibo, ALIKE)
    assert alike.text_lengths is None and alike.references == 0
    assert read(fibo, ["a big dog", "a big dog a car"]).text_lengths == (4, 6)
    assert [site.kind for site in adapter_of(fibo).sites] == ["image"] + ["joint"] * 3


@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE])
def test_pictures_that_are_edited_stay_each_rows_own(fibo, pictures, prompts):
    """Behind the image, with gist tokens before it or, where some of them are padding, behind all."""

    def rule(row, rows):
        seen = state["calls"] % 2 == 1
        return [(1.0, {"q_image": 0, "k_image": 0})] if row and seen and state["step"] < 2 else None

    with editing(fibo, FreePromptEdit(0.5)):
        actual = draw_bria_fibo2(fibo, prompts, size=SIZE, pictures=pictures)
    with FIBO2.dense(fibo, rule, "", None) as state:
        expected = draw_bria_fibo2(fibo, prompts, size=SIZE, pictures=pictures)
    assert (actual - expected).abs().max() <= 1e-8
    plain = draw_bria_fibo2(fibo, prompts, size=SIZE, pictures=pictures)
    assert (actual - plain)[1].abs().max() > 1e-3 and (actual - plain)[0].abs().max() <= 1e-8
    without = draw_bria_fibo2(fibo, prompts, size=SIZE)
    assert (plain - without).abs().max() > 1e-3


def test_layers_of_the_image_alone_beside_pictures(fibo, pictures):
    edit = MasaCtrlEdit(0, layers=["noise_refiner"])
    with editing(fibo, edit):
        edited = draw_bria_fibo2(fibo, PROMPTS, size=SIZE)
    assert (edited - draw_bria_fibo2(fibo, PROMPTS, size=SIZE))[1].abs().max() > 1e-4
    with editing(fibo, edit), pytest.raises(ValueError, match=r"10 tokens of pictures that are edited.*layers="):
        draw_bria_fibo2(fibo, PROMPTS, size=SIZE, pictures=pictures)


def test_words_are_refused(fibo):
    with pytest.raises(ValueError, match=r"makes gist tokens of a prompt.*such as FreePromptEdit"):
        editing(fibo, PromptToPromptEdit(PROMPTS, qwen_tokenizer(), align="refine")).__enter__()
