"""Tiny GLM-Image pipelines, and their layers written out densely."""

import diffusers
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tests.support.edited_transformers import Model
from tests.support.tiny_cogvideox import dense_cogvideox
from tests.support.tiny_cogview import DenseCogView4
from tests.support.tiny_transformers import ExactEuler, sharpened

__all__ = ["GLM_IMAGE", "draw_glm_image", "tiny_glm_image_pipeline"]

_LAYOUTS = 50  # tokens that a layout may be made of
_SIZE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "prior_vq_quantizer_codebook_size": _LAYOUTS,
}


def tiny_glm_image_pipeline(pipe=None, dtype=torch.float64):
    """A GLM-Image pipeline without what makes layouts of prompts, and without an autoencoder."""
    torch.manual_seed(0)
    glyphs = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = sharpened(diffusers.GlmImageTransformer2DModel(**_SIZE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f"{part}." in name for part in ("norm1.linear", "to_v", "to_out.0")):  # so that layers say something
                parameter.mul_(4)
    tiny = diffusers.GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=None,
        text_encoder=T5EncoderModel(glyphs).to(dtype).eval(),
        vision_language_encoder=None,
        vae=None,
        transformer=model.to(dtype).eval(),
        scheduler=ExactEuler(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_glm_image(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, **options):
    """Latents [prompts, 4, h, w]; the rows start from the same noise, each from a layout of its own."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 4, *size, generator=generator, dtype=torch.float64)
    layouts = torch.randint(_LAYOUTS, (len(prompts), size[0] * size[1] // 4), generator=generator)
    options.setdefault("latents", noise.to(pipe.transformer.dtype).repeat(len(prompts), 1, 1, 1))
    return pipe(
        [f"{prompt} that says '{prompt[-5:]}'" for prompt in prompts],
        prior_token_ids=layouts,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **options,
    ).images


class _DenseGlmImage(DenseCogView4):
    """The layers of CogView 4, which may be handed what keeps keys and values, and are told to keep none."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states,
        attention_mask=None,
        image_rotary_emb=None,
        kv_cache=None,
    ):
        assert kv_cache is None or kv_cache.mode is None
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class _GlmImage(Model):
    def dense(self, pipe, rule, layers, fault):
        return dense_cogvideox(pipe, rule, layers=layers, fault=fault, calls=2, made=_DenseGlmImage)

    def fits(self, size):
        """Its pipeline makes heights of a multiple of four latents."""
        return size[0] + -size[0] % 4, size[1]


GLM_IMAGE = _GlmImage(tiny_glm_image_pipeline, draw_glm_image, family="cogview4")
