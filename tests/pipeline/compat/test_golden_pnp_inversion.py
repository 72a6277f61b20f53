"""PnPInversion's own calls give what they gave."""

import pytest
import torch

from fpe_pipeline.compat import pnp_inversion
from fpe_pipeline.compat.pnp_inversion import (
    DirectInversion,
    direct_inversion_p2p_guidance_forward,
    make_controller,
)
from tests.support.dropin_cases import compare, load_dropin
from tests.support.golden_cases import source_image

# An independent computation is at a third of the tolerance.
SHARE = 0.5


@pytest.fixture(scope="module")
def case():
    return load_dropin("pnpinversion_replace_eq")


@pytest.fixture(scope="module")
def inverted(pipe, case):
    steps, scale = case.settings["steps"], case.settings["guidance_scale"]
    image = case.tensors["in.image_nchw"]
    return DirectInversion(pipe, steps).invert(image, case.settings["prompts"], scale)


def edited(pipe, case, inverted, *, add_offset=True, **changed):
    settings = case.settings
    options = {**settings["controller"], "num_ddim_steps": settings["steps"], "compat": "original", **changed}
    controller = make_controller(pipe, settings["prompts"], **options)
    _, _, latents, noise_loss = inverted
    return direct_inversion_p2p_guidance_forward(
        pipe,
        settings["prompts"],
        controller,
        latent=latents[-1],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        noise_loss_list=noise_loss,
        add_offset=add_offset,
    )[0]


def test_direct_inversion(case, inverted):
    _, _, latents, noise_loss = inverted
    compare(case, "latent0", latents[0], SHARE)
    compare(case, "inverted", latents[-1], SHARE)
    compare(case, "noise_loss", torch.stack(noise_loss), SHARE)


def test_the_edit(pipe, case, inverted):
    before = dict(pipe.unet.attn_processors)
    compare(case, "latents", edited(pipe, case, inverted), SHARE)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.slow
def test_the_source_is_the_image(pipe, case, inverted):
    distance = (edited(pipe, case, inverted)[:1] - case.tensors["out.latent0"]).abs().max()
    assert distance <= SHARE * case.settings["suggested_atol"]["latents"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {"add_offset": False},
        {"equilizer_params": None},
        pytest.param({"is_replace_controller": False}, marks=pytest.mark.slow),
        pytest.param({"self_replace_steps": 0.2}, marks=pytest.mark.slow),
        pytest.param({"cross_replace_steps": {"default_": 0.8}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_wrong_variant_is_seen(pipe, case, inverted, wrong):
    with pytest.raises(AssertionError, match="of its tolerance"):
        compare(case, "latents", edited(pipe, case, inverted, **wrong), SHARE)


@pytest.mark.slow
def test_other_self_thresholds_are_seen(pipe, case, inverted, monkeypatch):
    monkeypatch.setattr(pnp_inversion, "SELF_TOKENS", 8**2)
    with pytest.raises(AssertionError, match="of its tolerance"):
        compare(case, "latents", edited(pipe, case, inverted), SHARE)


def test_an_array_is_the_tensor_that_it_holds(pipe, case, inverted):
    array = source_image()[::2, ::2].numpy()
    _, back, latents, _ = DirectInversion(pipe, 2).invert(array, case.settings["prompts"], 7.5)
    torch.testing.assert_close(latents[0], inverted[2][0])
    assert back.shape == array.shape and back.dtype == array.dtype


def test_words_of_their_own_windows_and_blends_work(pipe, case, inverted):
    """What raises in the original, which does not hand its tokenizer on."""
    windows = {"default_": 0.4, "lion": 0.8}
    out = edited(pipe, case, inverted, cross_replace_steps=windows, blend_words=[["squirrel"], ["lion"]])
    assert torch.isfinite(out).all()


def test_refusals(pipe, case, inverted):
    with pytest.raises(TypeError, match="a list of prompts"):
        DirectInversion(pipe, 2).invert(case.tensors["in.image_nchw"], "a lion", 7.5)
    with pytest.raises(ValueError, match="noise_loss_list has 0"):
        direct_inversion_p2p_guidance_forward(pipe, ["a", "b"], None, num_inference_steps=2)
    with pytest.raises(ImportError, match="did you mean DirectInversion"):
        from fpe_pipeline.compat.pnp_inversion import DirectInversio  # noqa: F401
