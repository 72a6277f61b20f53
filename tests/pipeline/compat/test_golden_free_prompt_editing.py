"""Free-Prompt-Editing's own calls give what they gave, both copies', and so do a user's controllers."""

import pytest
import torch

from fpe_pipeline.compat.free_prompt_editing import (
    FreePromptPipeline,
    SelfAttentionControlEdit,
    register_attention_control_new,
)
from tests.support.dropin_cases import compare
from tests.support.golden_cases import load_case, source_image
from tests.support.slow_cases import few

CASES = ["fpe_fake_2p_sr04", "fpe_gradio_res16_lat32", "fpe_real_sr08", "fpe_real_srcprompt_g1"]


class Own(SelfAttentionControlEdit):
    """A user's controller, which sees the maps."""

    def forward(self, attn, is_cross, place_in_unet):
        return super().forward(attn, is_cross, place_in_unet)


@pytest.fixture(scope="module")
def original(pipe):
    made = FreePromptPipeline(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def run(original, case, controller, compat=None):
    """Latents and images of the case's calls, and the inverted latents."""
    settings, options, inverted = case.settings, {}, None
    if "inversion_guidance" in settings:
        image = source_image().permute(2, 0, 1)[None] / 127.5 - 1
        options["latents"], inverted = original.invert(
            image,
            settings["prompts"][0],
            settings["steps"],
            guidance_scale=settings["inversion_guidance"],
            return_intermediates=True,
        )
        options["ref_intermediate_latents"] = inverted
    else:
        options["latents"] = case.tensors["in.start_latents"]
    decoded, real = [], original.latent2image
    original.latent2image = lambda latents, *args, **kwargs: decoded.append(latents) or real(latents, *args, **kwargs)
    try:
        with register_attention_control_new(original, controller, compat, backend="torch"):
            images = original(
                settings["prompts"],
                num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance_scale"],
                **options,
            )
    finally:
        del original.latent2image
    return decoded[0], images, inverted


def controller_of(case, kind=SelfAttentionControlEdit):
    settings = case.settings
    return kind(settings["prompts"], settings["steps"], *settings["controller_extra"], settings["self_replace_steps"])


def check(original, name, kind=SelfAttentionControlEdit, compat=None):
    case = load_case(name)
    latents, images, inverted = run(original, case, controller_of(case, kind), compat)
    compare(case, "latents", latents)
    if inverted is not None:
        compare(case, "inverted_list", torch.stack(inverted))
    if "out.image" in case.tensors:
        expected = case.tensors["out.image"]
        compare(case, "image", images[-len(expected) :])


@pytest.mark.slow
@pytest.mark.parametrize("name", few(CASES, "fpe_fake_2p_sr04"))
def test_both_copies(original, name):
    check(original, name)


@pytest.mark.parametrize(
    ("kind", "compat"), [pytest.param(Own, None, marks=pytest.mark.slow), (SelfAttentionControlEdit, "original")]
)
def test_by_lazy_maps(original, kind, compat):
    check(original, "fpe_gradio_res16_lat32", kind, compat)


class AllLayers(SelfAttentionControlEdit):
    def __init__(self, prompts, steps, res, window):
        super().__init__(prompts, steps, 64, window)


class AllSteps(SelfAttentionControlEdit):
    def __init__(self, prompts, steps, res, window):
        super().__init__(prompts, steps, res, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AllLayers, AllSteps])
def test_a_wrong_variant_is_seen(original, kind):
    with pytest.raises(AssertionError, match="of its tolerance"):
        check(original, "fpe_gradio_res16_lat32", kind)


def test_windows_of_every_kind():
    for window in (1, 1.0, (0, 1), [0.0, 1.0], torch.tensor(1.0).numpy()):
        assert SelfAttentionControlEdit(["a", "b"], 8, window).num_self_replace == (0, 8)
    assert SelfAttentionControlEdit(["a", "b"], 8, 16, 0.8).max_tokens == 16**2
    assert SelfAttentionControlEdit(["a", "b"], 8, self_replace_steps=0.8).max_tokens == 32**2
    with pytest.raises(TypeError, match="self_replace_steps is missing"):
        SelfAttentionControlEdit(["a", "b"], 8)
