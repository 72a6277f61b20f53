"""Tiny FLUX.2 pipelines, which take embeddings: random weights, scaled so that attention is far from uniform."""

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel

from tests.support.tiny_transformers import ExactEuler, sharpened

FLUX2 = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (2, 2, 2, 2),
}
TEXT = 12  # tokens


def tiny_flux2_pipeline(dtype=torch.float64, kind=Flux2Pipeline, **config):
    """FLUX.2 [dev], or another pipeline of its transformer, without an encoder of text."""
    torch.manual_seed(0)
    guidance = {"guidance_embeds": kind is Flux2Pipeline}
    transformer = sharpened(Flux2Transformer2DModel(**{**FLUX2, **guidance, **config}))
    with torch.no_grad():
        for block in transformer.single_transformer_blocks:
            queries_and_keys = 2 * block.attn.inner_dim
            block.attn.to_qkv_mlp_proj.weight[:queries_and_keys].mul_(2.5)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
    )
    parts = {"vae": vae.to(dtype).eval(), "transformer": transformer.to(dtype).eval()}
    tiny = kind(scheduler=ExactEuler(), text_encoder=None, tokenizer=None, **parts)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_klein_pipeline(dtype=torch.float64, **config):
    """FLUX.2 [klein], which guides by a second call."""
    return tiny_flux2_pipeline(dtype, Flux2KleinPipeline, **config)


def embedded(texts, dtype):
    """Embeddings [prompts, tokens, 32] of texts, the same for equal ones."""
    return torch.stack(
        [
            torch.randn(TEXT, 32, generator=torch.Generator().manual_seed(sum(map(ord, text))), dtype=torch.float64)
            for text in texts
        ]
    ).to(dtype)


def draw_flux2(pipe, prompts, *, steps=4, size=(8, 8), seed=0, negative=None, latents=None, **options):
    """Latents of ``pipe`` for prompts, which start from the same noise; packed in [dev]."""
    dtype = pipe.transformer.dtype
    noise = torch.randn(1, 16 * 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if negative is not None:
        options |= {"negative_prompt_embeds": embedded([negative] * len(prompts), dtype), "guidance_scale": 3.0}
    return pipe(
        prompt_embeds=embedded(prompts, dtype),
        latents=noise.repeat(len(prompts), 1, 1, 1) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images
