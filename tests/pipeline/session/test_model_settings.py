"""Settings of a pipeline that people turn on, and schedulers: an edit is the same with and without them."""

from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.session.processors.unet import EditAttnProcessor, is_sliced
from tests.support.tiny_models import EVERYWHERE, add_image_prompts, check_edit, check_restored, draw, image_embeds
from tests.support.tiny_pipelines import PROMPTS, shared_noise, tiny_pipeline, unedited

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Each with the number of UNet calls in a run of four steps.
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, 4),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, 4),
    "DPM-Solver++, Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 4),
    "DPM-Solver++, third order": ("DPMSolverMultistepScheduler", {"solver_order": 3}, 4),
    "DPM-Solver++, singlestep": ("DPMSolverSinglestepScheduler", {}, 4),
    "Euler": ("EulerDiscreteScheduler", {}, 4),
    "Euler, trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 4),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 4),
    "UniPC": ("UniPCMultistepScheduler", {}, 4),
    "UniPC, Karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, 4),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 5),
    "LMS": ("LMSDiscreteScheduler", {}, 4),
    "DEIS": ("DEISMultistepScheduler", {}, 4),
    "DDPM": ("DDPMScheduler", {}, 4),
    "LCM": ("LCMScheduler", {"clip_sample": False}, 4),
    "Heun": ("HeunDiscreteScheduler", {}, 7),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, 7),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, 7),
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers' KDPM2 with NumPy 2
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(tiny, monkeypatch, name):
    """Every call of the UNet is given its place in the schedule, calls of one timestep too; the source is as it was."""
    kind, config, calls = SCHEDULERS[name]
    monkeypatch.setattr(tiny, "scheduler", getattr(diffusers, kind)(**BETAS, **config))
    pipe_calls = []
    hook = tiny.unet.register_forward_pre_hook(lambda module, args: pipe_calls.append(args[0].shape))
    try:
        plain = draw(tiny, 2, steps=4)
        with editing(tiny, FreePromptEdit(0.6)) as session:
            edited = draw(tiny, 2, steps=4)
    finally:
        hook.remove()
    assert session.report().total == 4
    assert len(pipe_calls) == 2 * calls
    assert set(map(tuple, session.report().layers.values())) == {tuple(range(int(4 * 0.6)))}
    largest = plain.abs().max()
    assert (edited - plain)[0].abs().max() <= 1e-5 * largest
    assert (edited - plain)[1].abs().max() > 1e-3 * largest


def test_schedules_in_which_a_timestep_stands_twice(tiny, monkeypatch):
    """Karras' noise levels, rounded to the timesteps of training, collide in long runs."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(50)
    (second,) = (scheduler.timesteps.diff() == 0).nonzero().flatten() + 1
    monkeypatch.setattr(tiny, "scheduler", scheduler)
    first = int(second) / 50
    with editing(tiny, FreePromptEdit((first, 1.0))) as session:
        draw(tiny, 2, steps=50, size=(4, 4))
    assert set(map(tuple, session.report().layers.values())) == {tuple(range(int(second), 50))}


def test_attention_slicing_is_refused(pipe):
    """By any session that would compute sliced layers, before it computes one; other layers may be sliced."""
    tiny = tiny_pipeline(pipe)
    expected = check_edit(tiny)
    tiny.enable_attention_slicing("max")
    for session in (editing(tiny, EVERYWHERE), heat_maps(tiny, ["car"])):
        with pytest.raises(ValueError, match=r"pipe\.disable_attention_slicing\(\)"), session:
            draw(tiny)
        assert {type(processor) for processor in tiny.unet.attn_processors.values()} == {SlicedAttnProcessor}
    tiny.disable_attention_slicing()
    torch.testing.assert_close(check_restored(tiny), expected, rtol=0, atol=1e-4)

    edited = [site.path for site in EVERYWHERE.select(editing(tiny, EVERYWHERE).sites)]
    tiny.enable_attention_slicing("max")
    for path in edited:
        tiny.unet.get_submodule(path).set_processor(AttnProcessor2_0())
    torch.testing.assert_close(check_restored(tiny), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("error", "ignore::fpe_pipeline.errors.RequestWarning")  # the tiny tokenizer spells words
def test_attention_slicing_inside_a_session(pipe):
    """Between steps or before the first: the next call that would edit says what to do, and slicing stays on."""
    tiny = tiny_pipeline(pipe)

    def slice_now(*args):
        tiny.enable_attention_slicing()
        return {}

    for options in ({}, {"callback_on_step_end": slice_now}):
        with (
            pytest.raises(ValueError, match=r"attention slicing is on.*pipe\.disable_attention_slicing\(\)"),
            editing(tiny, EVERYWHERE),
        ):
            if not options:
                slice_now()
            draw(tiny, steps=2, **options)
        assert {type(processor) for processor in tiny.unet.attn_processors.values()} == {SlicedAttnProcessor}
        assert unedited(tiny.unet)
        tiny.disable_attention_slicing()
        assert not any(is_sliced(processor) for processor in tiny.unet.attn_processors.values())
    check_edit(tiny)


def test_processors_have_to_be_chosen_before_the_session(pipe):
    """Inside one, they would take the edit's place: that is said, and they stay."""
    tiny = tiny_pipeline(pipe)
    with pytest.warns(RuntimeWarning) as record, editing(tiny, EVERYWHERE):
        tiny.fuse_qkv_projections()
        draw(tiny, steps=1)
    computed, left = (str(warning.message) for warning in record if warning.category is RuntimeWarning)
    assert "computed without their editing processor" in computed
    assert "left as they are" in left
    assert not any(isinstance(processor, EditAttnProcessor) for processor in tiny.unet.attn_processors.values())


def test_fused_projections(pipe):
    """Of self- and of cross-attention, fused and taken apart again."""
    tiny = tiny_pipeline(pipe)
    edit = PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer, self_replace_steps=1.0)
    separate = check_restored(tiny, edit=EVERYWHERE)
    with editing(tiny, edit):
        words = draw(tiny, 2)
    tiny.fuse_qkv_projections(vae=False)
    torch.testing.assert_close(check_restored(tiny, edit=EVERYWHERE), separate, rtol=0, atol=1e-4)
    with editing(tiny, edit):
        torch.testing.assert_close(draw(tiny, 2), words, rtol=0, atol=1e-4)
    assert {type(processor) for processor in tiny.unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    tiny.unfuse_qkv_projections(vae=False)
    torch.testing.assert_close(check_restored(tiny, edit=EVERYWHERE), separate, rtol=0, atol=1e-4)


def test_model_offloading(pipe):
    """diffusers' ``enable_model_cpu_offload`` with the CPU as the accelerator: the same hooks, no second memory."""
    accelerate = pytest.importorskip("accelerate")
    tiny = tiny_pipeline(pipe)
    add_image_prompts(tiny)
    kwargs = {"ip_adapter_image_embeds": image_embeds(1), "steps": 2}
    expected = check_edit(tiny, **kwargs)
    _, hook = accelerate.cpu_offload_with_hook(tiny.unet, "cpu")
    with patch.object(tiny.unet._hf_hook, "pre_forward", wraps=tiny.unet._hf_hook.pre_forward) as moving:
        assert torch.equal(check_restored(tiny, **kwargs), expected)
    assert moving.call_count == 3 * 2  # plain, edited, plain again
    hook.remove()


@pytest.mark.slow
def test_sequential_offloading(pipe):
    """As ``enable_sequential_cpu_offload``: a weight is nowhere but while its own module runs, adapters' too."""
    accelerate = pytest.importorskip("accelerate")
    tiny = tiny_pipeline(pipe)
    add_image_prompts(tiny)
    kwargs = {"ip_adapter_image_embeds": image_embeds(1), "steps": 2}
    edits = [EVERYWHERE, PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer)]

    def edited():
        for edit in edits:
            with editing(tiny, edit):
                yield draw(tiny, 2, **kwargs)

    expected = list(edited())
    accelerate.cpu_offload(tiny.unet, execution_device="cpu", offload_buffers=True)
    try:
        assert {parameter.device.type for parameter in tiny.unet.parameters()} == {"meta"}
        assert all(map(torch.equal, edited(), expected))
        assert {parameter.device.type for parameter in tiny.unet.parameters()} == {"meta"}
    finally:
        accelerate.hooks.remove_hook_from_module(tiny.unet, recurse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_a_gpu(pipe, method):
    tiny = tiny_pipeline(pipe)
    add_image_prompts(tiny)
    kwargs = {"ip_adapter_image_embeds": image_embeds(1), "steps": 2}
    with editing(tiny, EVERYWHERE):
        expected = draw(tiny, **kwargs)
    getattr(tiny, method)()
    try:
        with editing(tiny, EVERYWHERE):
            torch.testing.assert_close(draw(tiny, **kwargs).cpu(), expected, rtol=0, atol=1e-2)
    finally:
        tiny.remove_all_hooks()
        tiny.to("cpu")


def test_autoencoder_in_slices_and_tiles(pipe, tiny):
    """They change how an image is decoded, not what is edited."""

    def pictures():
        noise = shared_noise(2, 8, 16)
        return tiny(PROMPTS[:2], latents=noise, height=64, width=128, num_inference_steps=1, output_type="pt").images

    with editing(tiny, EVERYWHERE):
        whole = pictures()
        tiny.vae.enable_slicing()
        try:
            torch.testing.assert_close(pictures(), whole, rtol=0, atol=1e-4)
        finally:
            tiny.vae.disable_slicing()
        decoded = []
        handle = tiny.vae.decoder.register_forward_hook(lambda module, args, output: decoded.append(args[0].shape))
        sizes = tiny.vae.tile_latent_min_size, tiny.vae.tile_sample_min_size
        tiny.vae.tile_latent_min_size, tiny.vae.tile_sample_min_size = 8, 64
        tiny.vae.enable_tiling()
        try:
            tiled = pictures()
        finally:
            tiny.vae.disable_tiling()
            tiny.vae.tile_latent_min_size, tiny.vae.tile_sample_min_size = sizes
            handle.remove()
    assert len(decoded) > 1 and max(shape[-1] for shape in decoded) == 8
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.1
