"""Tiny pipelines of further model classes, and what every one of them has to show."""

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from fpe_pipeline import FreePromptEdit, editing
from tests.support.dense import DenseEditProcessor, replaced
from tests.support.tiny_pipelines import sample, tiny_pipeline
from tests.support.tiny_unets import tiny_unet

EVERYWHERE = FreePromptEdit(1.0)  # at every step, so that a processor without a step can stand for it
IMAGE_WIDTH = 6


def tiny_sd2_pipeline(pipe):
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    tiny = tiny_pipeline(pipe, scheduler=scheduler)
    tiny.unet = tiny_unet("sd2", torch.float32, cross_attention_dim=32)
    return tiny


def with_channels(pipe, kind, channels):
    """A pipeline of another class around a UNet with so many input channels."""
    parts = {**pipe.components, "unet": tiny_unet("sd1", torch.float32, cross_attention_dim=32, in_channels=channels)}
    tiny = kind(**parts, requires_safety_checker=False)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_inpaint_pipeline(pipe):
    return with_channels(pipe, StableDiffusionInpaintPipeline, 9)


def tiny_instruct_pipeline(pipe):
    return with_channels(pipe, StableDiffusionInstructPix2PixPipeline, 8)


def add_image_prompts(tiny, adapters=1, tokens=3, scale=0.7):
    """IP-Adapters with random weights on a UNet, as ``load_ip_adapter`` leaves them."""
    torch.manual_seed(1)
    unet = tiny.unet
    processors = unet.attn_processors
    for name in processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        if layer.is_cross_attention:
            processors[name] = IPAdapterAttnProcessor2_0(
                layer.inner_dim, layer.cross_attention_dim, num_tokens=(tokens,) * adapters, scale=scale
            ).to(unet.dtype)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(
        [ImageProjection(IMAGE_WIDTH, unet.config.cross_attention_dim, tokens) for _ in range(adapters)]
    ).to(unet.dtype)
    unet.config.encoder_hid_dim_type = "ip_image_proj"


def image_embeds(*images, seed=5):
    """For each adapter the embeddings of so many images, unconditional and conditional: [2, images, width]."""
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(2, count, IMAGE_WIDTH, generator=noise) for count in images]


def draw(pipe, prompts=3, **kwargs):
    """``sample`` with a generator that starts over, for pipelines that draw noise of their own."""
    return sample(pipe, prompts, generator=torch.Generator().manual_seed(1), **kwargs)


def dense_sample(pipe, edit, rule, **kwargs):
    """What ``draw`` gives when the edit's layers compute ``rule`` densely."""
    before = pipe.unet.attn_processors
    for site in edit.select(editing(pipe, edit).sites):
        pipe.unet.get_submodule(site.path).set_processor(DenseEditProcessor(rule))
    try:
        return draw(pipe, **kwargs)
    finally:
        pipe.unet.set_attn_processor(dict(before))


def check_restored(pipe, *, edit=EVERYWHERE, **kwargs):
    """The targets change, the source's image stays as it was, and so does the pipeline; returns the edited latents."""
    processors, weights = pipe.unet.attn_processors, list(pipe.unet.state_dict())
    hooks = len(pipe.unet._forward_pre_hooks), len(pipe.unet._forward_hooks)
    plain = draw(pipe, **kwargs)
    with editing(pipe, edit) as session:
        edited = draw(pipe, **kwargs)
        assert list(pipe.unet.state_dict()) == weights
    change = (edited - plain).abs().amax((1, 2, 3))
    assert change[0] <= 1e-4
    assert change[1:].min() > 1e-3
    assert set(session.report().layers) == {site.path for site in edit.select(session.sites)}
    assert pipe.unet.attn_processors == processors
    assert list(pipe.unet.state_dict()) == weights
    assert (len(pipe.unet._forward_pre_hooks), len(pipe.unet._forward_hooks)) == hooks
    assert torch.equal(draw(pipe, **kwargs), plain)
    return edited


def check_edit(pipe, *, prompts=3, **kwargs):
    """:func:`check_restored`, and the edited latents are those of Free-Prompt-Editing written out densely."""
    edited = check_restored(pipe, prompts=prompts, **kwargs)
    first = prompts if kwargs.get("guidance_scale", 5.0) > 1 else 0

    def rule(row):
        return [replaced(first, row)] if row > first else None

    expected = dense_sample(pipe, EVERYWHERE, rule, prompts=prompts, **kwargs)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-4)
    return edited
