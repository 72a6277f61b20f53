"""Heat maps around edits: sessions, and a FreePromptPipeline's own."""

import numpy as np
import pytest
import torch

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, ddim_scheduler, editing, heat_maps
from fpe_pipeline.session.session import session_of
from tests.support.free_prompt_pipelines import OTHER, SOURCE, TARGET, free_prompt_pipeline, noise
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline, unedited

STEPS = 3
RUN = {"num_inference_steps": STEPS, "output_type": "latent"}


@pytest.fixture(scope="module")
def tiny(pipe):
    tiny = free_prompt_pipeline(pipe)
    tiny.scheduler = ddim_scheduler(tiny.scheduler)
    return tiny


@pytest.fixture
def words(tiny):
    return PromptToPromptEdit([SOURCE, TARGET], tiny.tokenizer, cross_replace_steps=1.0)


def assert_edited_maps(heat):
    """While every step's columns are the source's, the new word's heat is that of the word it stands for."""
    np.testing.assert_allclose(heat.word("rubber", 1), heat.word("green", 0), rtol=0, atol=1e-6)


def test_around_an_edit_the_maps_are_the_edited_ones(tiny, words):
    plain = tiny(SOURCE, TARGET, edit=words, latents=noise(), **RUN)
    with heat_maps(tiny, ["green", "rubber", "ducks"], pixels=[(3, 3)]) as heat:
        watched = tiny(SOURCE, TARGET, edit=words, latents=noise(), **RUN)
    torch.testing.assert_close(watched.images, plain.images, rtol=0, atol=1e-4)
    assert watched.report.layers == plain.report.layers
    assert_edited_maps(heat)
    assert heat.word("ducks", 0).shape == (12, 16)
    with heat_maps(tiny, ["green", "rubber"]) as alone:
        tiny(SOURCE, TARGET, self_replace_steps=0.0, latents=noise(), **RUN)
    assert np.abs(alone.word("rubber", 1) - heat.word("rubber", 1)).max() > 1e-4
    assert unedited(tiny.unet)
    assert session_of(tiny) is None


def test_a_session_inside_is_followed_too(pipe):
    tiny = tiny_pipeline(pipe)
    edit = PromptToPromptEdit(PROMPTS[:2], tiny.tokenizer, cross_replace_steps=1.0, self_replace_steps=1.0)
    with editing(tiny, edit):
        plain = sample(tiny)
    with heat_maps(tiny, ["red", "blue"], pixels=[(3, 3)]) as heat:
        unedited_latents = sample(tiny)
        alone = heat.word("blue", 1)
        with editing(tiny, edit) as session:
            assert session_of(tiny) is session
            torch.testing.assert_close(sample(tiny), plain, rtol=0, atol=1e-4)
        np.testing.assert_allclose(heat.word("blue", 1), heat.word("red", 0), rtol=0, atol=1e-6)
        assert np.abs(heat.word("blue", 1) - alone).max() > 1e-4
        torch.testing.assert_close(sample(tiny), unedited_latents, rtol=0, atol=1e-4)
        np.testing.assert_allclose(heat.word("blue", 1), alone, rtol=0, atol=1e-6)
    assert unedited(tiny.unet)


def test_edits_and_plain_calls_by_turns(tiny):
    """Each is a run of its own, whichever session it is read in."""
    with heat_maps(tiny, pixels=[(3, 3)]) as heat:
        tiny(SOURCE, TARGET, latents=noise(), **RUN)
        source = heat.pixel((3, 3), 0)
        tiny(SOURCE, latents=noise(), **RUN)
        np.testing.assert_allclose(heat.pixel((3, 3)), source, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match="0 to 0, got 1"):
            heat.pixel((3, 3), 1)
        tiny(SOURCE, [TARGET, OTHER], latents=noise(), **RUN)
        np.testing.assert_allclose(heat.pixel((3, 3)), source, rtol=0, atol=1e-6)
        assert heat.pixel((3, 3), 2).shape == source.shape


def test_around_an_edit_of_a_real_image(tiny):
    photo = np.random.default_rng(3).random((24, 32, 3))
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=STEPS)
    with heat_maps(tiny, ["rubber"]) as heat:
        out = tiny(inversion=inversion, target_prompt=TARGET, output_type="latent")
    assert out.report.layers
    expected = heat.word("rubber", 1)
    assert (expected > 0).all()
    with heat_maps(tiny, ["rubber"]) as heat:  # the inversion's passes are no part of it
        again = tiny.invert(photo, SOURCE, num_inference_steps=STEPS)
        tiny(inversion=again, target_prompt=TARGET, output_type="latent")
    assert torch.equal(again.latents, inversion.latents)
    np.testing.assert_array_equal(heat.word("rubber", 1), expected)


def test_the_two_blocks_may_end_in_either_order(tiny):
    watching = heat_maps(tiny, pixels=[(3, 3)])
    watching.__enter__()
    inside = editing(tiny, FreePromptEdit(1.0), classifier_free_guidance=True)
    inside.__enter__()
    tiny.scheduler.set_timesteps(2)

    @torch.no_grad()
    def call():
        tiny.unet(torch.zeros(4, 4, 8, 8), tiny.scheduler.timesteps[0], torch.zeros(4, 77, 32))

    call()
    watching.__exit__(None, None, None)
    assert session_of(tiny) is inside
    call()
    inside.__exit__(None, None, None)
    assert unedited(tiny.unet)
    assert session_of(tiny) is None


def test_an_edit_that_fails_leaves_the_maps_in_place(tiny):
    with heat_maps(tiny, ["ducks"]) as heat:
        with pytest.raises(ValueError, match="match none"):
            tiny(SOURCE, TARGET, layers=["nowhere"], latents=noise(), **RUN)
        tiny(SOURCE, TARGET, latents=noise(), **RUN)
    assert (heat.word("ducks", 1) > 0).all()
    assert unedited(tiny.unet)


def test_rows_that_go_in_the_middle(tiny):
    options = {"keep_source": False, "self_replace_steps": 0.4, "latents": noise(), **RUN}
    with heat_maps(tiny, pixels=[(3, 3)]), pytest.raises(ValueError, match="keep all rows to the end"):
        tiny(SOURCE, TARGET, **options)
    with heat_maps(tiny, pixels=[(3, 3)], steps=0.4) as heat:
        tiny(SOURCE, TARGET, **options)
    assert heat.pixel((3, 3), 1).sum() == pytest.approx(1.0, abs=1e-5)


def test_recordings_are_not_watched(tiny):
    recording = tiny.record(SOURCE, latents=noise(), num_inference_steps=STEPS)
    with heat_maps(tiny, ["ducks"]) as heat:
        with pytest.raises(ValueError, match="a recording runs them apart"):
            tiny.edit(recording, TARGET)
        with pytest.raises(ValueError, match="a recording runs them apart"):
            tiny.record(SOURCE, latents=noise(), num_inference_steps=STEPS)
        tiny(SOURCE, TARGET, latents=noise(), **RUN)
    assert (heat.word("ducks", 1) > 0).all()
