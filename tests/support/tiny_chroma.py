"""Tiny Chroma pipelines, with masks of padding as diffusers makes them and with masks of truth values."""

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel

from tests.support.tiny_transformers import PROMPTS, ExactEuler, draw_flux, sharpened, tiny_t5, tiny_vae

__all__ = ["MaskedChromaPipeline", "draw_chroma", "tiny_chroma", "tiny_chroma_pipeline", "tiny_masked_chroma"]

CHROMA = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (2, 2, 4),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 16,
    "approximator_layers": 2,
}


class MaskedChromaPipeline(ChromaPipeline):
    """Its masks are truth values, so that padding takes no attention."""

    def _prepare_attention_mask(self, *args, **kwargs):
        mask = super()._prepare_attention_mask(*args, **kwargs)
        return None if mask is None else mask.bool()


def tiny_chroma(dtype=torch.float64, **config):
    """A Chroma transformer."""
    torch.manual_seed(0)
    return sharpened(ChromaTransformer2DModel(**{**CHROMA, **config})).to(dtype).eval()


def tiny_chroma_pipeline(pipe, dtype=torch.float64, kind=ChromaPipeline, **config):
    """A Chroma pipeline; its tokenizer is that of ``pipe``."""
    torch.manual_seed(1)
    tiny = kind(
        scheduler=ExactEuler(),
        vae=tiny_vae().to(dtype),
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        tokenizer=pipe.tokenizer,
        transformer=tiny_chroma(dtype, **config),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_masked_chroma(pipe, dtype=torch.float64, **config):
    """One whose padding takes no attention."""
    return tiny_chroma_pipeline(pipe, dtype, MaskedChromaPipeline, **config)


def draw_chroma(pipe, prompts=2, *, guidance_scale=1.0, **kwargs):
    """Packed latents of ``pipe`` for so many prompts, or these, as `draw_flux` makes them."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else list(prompts)
    return draw_flux(pipe, texts, guidance_scale=guidance_scale, **kwargs)
