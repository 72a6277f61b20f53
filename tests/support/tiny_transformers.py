"""Tiny pipelines around transformers: random weights, scaled so that attention is far from uniform."""

import itertools
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

PROMPTS = [
    "a photo of a red car",
    "a photo of a blue car that stands in front of an old house",
    "a drawing",
    "a green car",
]

SHAPES = {
    "sd3": {},
    # Norms of queries and keys, and a second layer, of image tokens alone, in the first two blocks.
    "sd3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "out_channels": 16,
    "pos_embed_max_size": 12,
}
SHARPENED = ("to_q", "to_k", "add_q_proj", "add_k_proj", "norm_q", "norm_k", "norm_added_q", "norm_added_k")


class ExactEuler(FlowMatchEulerDiscreteScheduler):
    """Steps in the dtype of the latents; diffusers' own round to float32."""

    def step(self, model_output, timestep, sample, return_dict=True, **_):
        if self.step_index is None:
            self._init_step_index(timestep)
        now, then = self.sigmas[self.step_index : self.step_index + 2].tolist()
        self._step_index += 1
        return (sample + (then - now) * model_output,)

    def scale_model_input(self, sample, timestep):
        """Bria's pipeline asks schedulers of other classes than diffusers' own for what the model receives."""
        return sample


@contextmanager
def told_of_steps(pipe, callback):
    """A pipeline that tells nobody of a step's end, made to call this with its latents; None for nothing."""
    if callback is None:
        yield
        return
    step, ends = pipe.scheduler.step, itertools.count()

    def stepped(*args, **kwargs):
        (latents,) = step(*args, **kwargs)
        return (callback(pipe, next(ends), None, {"latents": latents}).get("latents", latents),)

    pipe.scheduler.step = stepped
    try:
        yield
    finally:
        del pipe.scheduler.step


FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}


QWEN = {
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
# Of texts of different length, the tokens that are no padding.
TEXT_LENGTHS = (5, 9, 3, 7)


def tiny_sd3(shape="sd3", dtype=torch.float64, **config):
    """An SD3 transformer."""
    torch.manual_seed(0)
    return sharpened(SD3Transformer2DModel(**{**TRANSFORMER, **SHAPES[shape], **config})).to(dtype).eval()


def tiny_flux(dtype=torch.float64, **config):
    """A FLUX transformer."""
    torch.manual_seed(0)
    return sharpened(FluxTransformer2DModel(**{**FLUX, **config})).to(dtype).eval()


def tiny_qwen(dtype=torch.float64, **config):
    """A Qwen-Image transformer."""
    torch.manual_seed(0)
    return sharpened(QwenImageTransformer2DModel(**{**QWEN, **config})).to(dtype).eval()


def sharpened(transformer, names=SHARPENED):
    """With attention that is far from uniform, by the parts of its layers that have these names."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if any(f".{part}." in name for part in names):
                parameter.mul_(2.5)
    return transformer


def tiny_clip(tokenizer, kind):
    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "projection_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return kind(CLIPTextConfig(**size)).eval()


def tiny_t5(tokenizer):
    config = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **config)).eval()


def tiny_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
    ).eval()


def tiny_sd3_pipeline(pipe, shape="sd3", dtype=torch.float64, kind=StableDiffusion3Pipeline, **config):
    """A Stable Diffusion 3 pipeline with all three text encoders; its tokenizers are that of ``pipe``."""
    torch.manual_seed(1)
    first, second = (tiny_clip(pipe.tokenizer, CLIPTextModelWithProjection) for _ in range(2))
    tiny = kind(
        vae=tiny_vae().to(dtype),
        text_encoder=first.to(dtype),
        text_encoder_2=second.to(dtype),
        text_encoder_3=tiny_t5(pipe.tokenizer).to(dtype),
        transformer=tiny_sd3(shape, dtype, **config),
        scheduler=ExactEuler(shift=3.0),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        tokenizer_3=pipe.tokenizer,
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_flux_pipeline(pipe, dtype=torch.float64, kind=FluxPipeline, **config):
    """A FLUX.1 pipeline; its tokenizers are that of ``pipe``."""
    torch.manual_seed(1)
    tiny = kind(
        vae=tiny_vae().to(dtype),
        text_encoder=tiny_clip(pipe.tokenizer, CLIPTextModel).to(dtype),
        text_encoder_2=tiny_t5(pipe.tokenizer).to(dtype),
        transformer=tiny_flux(dtype, **config),
        scheduler=ExactEuler(),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw(pipe, prompts=2, *, steps=4, guidance_scale=4.0, size=(8, 8), images=1, seed=0, latents=None, **kwargs):
    """Latents of ``pipe`` for so many prompts, or these: image i of every prompt starts from the same noise."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    noise = torch.randn(images, 16, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pipe(
        texts,
        latents=noise.repeat(len(texts), 1, 1, 1).to(pipe.transformer.dtype) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_images_per_prompt=images,
        max_sequence_length=12,
        output_type="latent",
        **kwargs,
    ).images


def draw_flux(pipe, prompts=2, *, steps=4, size=(8, 8), images=1, seed=0, latents=None, **kwargs):
    """Packed latents of ``pipe`` for so many prompts, or these: image i of every prompt starts from the same noise."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    tokens = size[0] // 2 * (size[1] // 2)
    noise = torch.randn(images, tokens, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pipe(
        texts,
        latents=noise.repeat(len(texts), 1, 1).to(pipe.transformer.dtype) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        num_images_per_prompt=images,
        max_sequence_length=12,
        output_type="latent",
        **kwargs,
    ).images


def tiny_qwen_pipeline(dtype=torch.float64, **config):
    """A Qwen-Image pipeline without encoder and decoder: it takes embeddings and gives latents."""
    tiny = QwenImagePipeline(
        scheduler=ExactEuler(), vae=None, text_encoder=None, tokenizer=None, transformer=tiny_qwen(dtype, **config)
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_qwen(pipe, prompts=2, *, steps=4, size=(8, 8), seed=0, negative=False, lengths=TEXT_LENGTHS, **kwargs):
    """Packed latents of ``pipe`` for so many texts, each of another length, which start from the same noise."""
    generator, dtype = torch.Generator().manual_seed(seed), pipe.transformer.dtype
    tokens = size[0] // 2 * (size[1] // 2)
    noise = torch.randn(1, tokens, 64, generator=generator, dtype=torch.float64)
    texts = torch.randn(2, len(lengths), max(lengths), 16, generator=generator, dtype=torch.float64)[:, :prompts]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:prompts, None]
    given = {"prompt_embeds": texts[0].to(dtype), "prompt_embeds_mask": mask}
    if negative:
        given |= {"negative_prompt_embeds": texts[1].to(dtype), "negative_prompt_embeds_mask": mask.flip(0)}
    return pipe(
        latents=noise.repeat(prompts, 1, 1).to(dtype),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        true_cfg_scale=3.0 if negative else 1.0,
        output_type="latent",
        **given,
        **kwargs,
    ).images
