"""What a session refuses, when, and how it says so."""

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from fpe_pipeline import BatchRoles, FreePromptEdit, editing
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline, unedited
from tests.support.tiny_unets import tiny_unet, unet_inputs

FPE = FreePromptEdit(0.8)


class Custom(AttnProcessor2_0):
    """Some other library's processor."""


def test_custom_processors_are_not_dropped_silently(pipe):
    tiny = tiny_pipeline(pipe)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    tiny.unet.get_submodule(path).set_processor(Custom())
    with pytest.raises(ValueError, match=rf"{path}: its processor Custom may do more"), editing(tiny, FPE):
        sample(tiny)
    assert unedited(tiny.unet)
    with editing(tiny, FPE, override_processors=(Custom,)):
        sample(tiny)
    with editing(tiny, FreePromptEdit(layers="up_blocks")):
        sample(tiny)
    assert isinstance(tiny.unet.get_submodule(path).processor, Custom)


def test_batches_that_do_not_fit(tiny):
    with (
        pytest.raises(ValueError, match="images_per_prompt=3 was said of a pipeline call with num_images_per_prompt=1"),
        editing(tiny, FPE, images_per_prompt=3),
    ):
        sample(tiny)
    with (
        pytest.raises(ValueError, match="sources of 3 prompts; the batch holds 2"),
        editing(tiny, FPE, source_of=(0, 0, 0)),
    ):
        sample(tiny)
    with pytest.raises(ValueError, match="holds no target"), editing(tiny, FPE):
        sample(tiny, 1)
    layout = BatchRoles(conditional=(True, True), source_of=(0, 0))
    with pytest.raises(ValueError, match="batch of 2 rows; the model got 4"), editing(tiny, FPE, roles=layout):
        sample(tiny)
    assert unedited(tiny.unet)


def test_another_pipeline_of_the_same_model(pipe):
    """What the session's own pipeline says of guidance is of its latest call, and of prompts and images nothing."""
    tiny = tiny_pipeline(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(tiny)
    other.set_progress_bar_config(disable=True)
    picture = {"image": torch.rand(1, 3, 64, 64), "strength": 0.8, "num_inference_steps": 5, "output_type": "latent"}
    message = "session is of a StableDiffusionPipeline, and a StableDiffusionImg2ImgPipeline calls the model"
    for before, guidance_scale in ((5.0, 1.0), (1.0, 5.0)):
        sample(tiny, guidance_scale=before)
        with pytest.raises(RuntimeError, match=message), editing(tiny, FPE):
            other(PROMPTS[:4], guidance_scale=guidance_scale, **picture)
    with pytest.raises(RuntimeError, match=message), editing(tiny, FPE):
        sample(tiny)
        other(PROMPTS[:2], **picture)
    assert unedited(tiny.unet)
    with editing(other, FPE) as session:
        other(PROMPTS[:2], **picture)
    assert session.report().layers
    twin = type(tiny)(**tiny.components, requires_safety_checker=False)
    message = (
        "of a StableDiffusionPipeline, and another StableDiffusionPipeline calls .* on the pipeline that is called"
    )
    with pytest.raises(RuntimeError, match=message), editing(tiny, FPE):
        sample(twin)


def test_outside_the_window_any_batch_will_do(tiny):
    """Rows may be dropped once nothing is replaced any more."""
    tiny.scheduler.set_timesteps(2)
    (latents, _), _ = unet_inputs(tiny_unet("sd1", torch.float32), 1)
    embeddings = torch.zeros(1, 7, 32)
    with torch.no_grad(), editing(tiny, FPE, images_per_prompt=2, classifier_free_guidance=True):
        tiny.unet(latents, tiny.scheduler.timesteps[1], embeddings)


def test_a_zero_match_is_refused_at_once_or_with_the_first_call(tiny):
    with pytest.raises(ValueError, match=r"layers \['nowhere'\] match none"):
        editing(tiny, FreePromptEdit(layers=["nowhere"]))
    with pytest.raises(ValueError, match="max_tokens=3 match none"), editing(tiny, FreePromptEdit(max_tokens=3)):
        sample(tiny)
    assert unedited(tiny.unet)


def test_a_token_limit_depends_on_the_size(tiny):
    with editing(tiny, FreePromptEdit(max_tokens=16)) as session:
        sample(tiny, size=(8, 8))
        assert len(session.report().layers) == 4
        sample(tiny, size=(12, 12), steps=2)
        assert len(session.report().layers) == 1


def test_arguments_that_make_no_sense(tiny):
    with pytest.raises(TypeError, match="with a unet"):
        editing(object(), FPE)
    with pytest.raises(TypeError, match="expected an Edit"):
        editing(tiny, 0.8)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        editing(tiny, FPE, backend="cuda")
    with pytest.raises(ValueError, match="whole layout"):
        editing(tiny, FPE, roles=BatchRoles((True,), (0,)), images_per_prompt=2)


def test_backends_that_cannot_run_say_why(tiny, monkeypatch):
    import fpe_kernels

    monkeypatch.setattr(fpe_kernels, "backends", lambda: {"triton": "needs a CUDA device", "torch": "available"})
    with pytest.raises(RuntimeError, match="'triton' cannot run here: needs a CUDA device"):
        editing(tiny, FPE, backend="triton")


def test_a_bare_unet_has_to_be_told(tiny):
    (latents, _), _ = unet_inputs(tiny_unet("sd1", torch.float32), 4)
    embeddings = torch.zeros(4, 7, 32)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"session\.step"), editing(tiny.unet, FPE):
            tiny.unet(latents, 1, embeddings)
        with pytest.raises(ValueError, match="classifier_free_guidance="), editing(tiny.unet, FPE) as session:
            session.step(0, 2)
            tiny.unet(latents, 1, embeddings)
        with pytest.raises(ValueError, match="perturbed-attention"), editing(tiny, FPE) as session:
            tiny.__dict__["do_perturbed_attention_guidance"] = True
            try:
                sample(tiny)
            finally:
                del tiny.__dict__["do_perturbed_attention_guidance"]
