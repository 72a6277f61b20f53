"""Pipelines around the tiny UNets: a call takes tens of milliseconds."""

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fpe_pipeline.session.processors.unet import EditAttnProcessor
from tests.support.tiny_unets import tiny_unet

PROMPTS = ["a photo of a red car", "a photo of a blue car", "a drawing of a car", "a green car", "a car at night"]


def tiny_pipeline(pipe, *, dtype=torch.float32, scheduler=None, **config):
    """A StableDiffusionPipeline with a tiny SD 1.x UNet; text encoder and autoencoder are those of ``pipe``."""
    unet = tiny_unet("sd1", dtype, **{"cross_attention_dim": 32, **config})
    tiny = StableDiffusionPipeline(
        **{**pipe.components, "unet": unet, "scheduler": scheduler or pipe.scheduler}, requires_safety_checker=False
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_controlnet_pipeline(pipe):
    tiny = tiny_pipeline(pipe)
    controlnet = ControlNetModel.from_unet(tiny.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for parameter in controlnet.parameters():  # zero convolutions would make it do nothing
        torch.nn.init.normal_(parameter, std=0.05)
    controlled = StableDiffusionControlNetPipeline(
        **tiny.components, controlnet=controlnet, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    return controlled


def tiny_sdxl_pipeline(pipe):
    torch.manual_seed(0)
    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "projection_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(pipe.tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": pipe.tokenizer.bos_token_id,
        "eos_token_id": pipe.tokenizer.eos_token_id,
    }
    encoder, encoder_2 = CLIPTextModel(CLIPTextConfig(**size)), CLIPTextModelWithProjection(CLIPTextConfig(**size))
    unet = tiny_unet("sdxl", torch.float32)
    assert isinstance(pipe.vae, AutoencoderKL)
    tiny = StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=encoder.eval(),
        text_encoder_2=encoder_2.eval(),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def shared_noise(prompts, height=8, width=8, images=1, seed=0):
    """Start latents: image i of every prompt starts from the same noise."""
    noise = torch.randn(images, 4, height, width, generator=torch.Generator().manual_seed(seed))
    return noise.repeat(prompts, 1, 1, 1)


def sample(pipe, prompts=2, *, steps=3, guidance_scale=5.0, size=(8, 8), images=1, **kwargs):
    """Latents of ``pipe`` for so many prompts, all from the same noise."""
    return pipe(
        PROMPTS[:prompts],
        latents=shared_noise(prompts, *size, images),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_images_per_prompt=images,
        output_type="latent",
        **kwargs,
    ).images


def unedited(unet):
    """Whether a UNet carries nothing of a session."""
    processors = unet.attn_processors.values()
    hooks = len(unet._forward_pre_hooks) + len(unet._forward_hooks)
    return hooks == 0 and not any(isinstance(processor, EditAttnProcessor) for processor in processors)
