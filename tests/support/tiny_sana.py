"""Tiny Sana, Sana-Sprint and Sana-Video pipelines, and their attention to the text written out densely."""

import diffusers
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from tests.support.dense_rows import DenseRows, dense_rows
from tests.support.tiny_language import gemma_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened

PROMPTS = [
    "a photo of a red car on a mountain",
    "a photo of a big dog on a mountain in winter",
    "a drawing of a red car",
    "a photo of a big car on a mountain",
]
TEXTS = 20
SAID = ["Write of a photo", "Start "]
_SIZE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
}


def tiny_sana_pipeline(pipe=None, dtype=torch.float64, kind=SanaPipeline, scheduler=None, **config):
    """A Sana pipeline without a decoder."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(**_SIZE | {"sample_size": 32} | config)
    return _around(transformer, kind, scheduler or ExactEuler(), dtype)


def tiny_sana_videos(pipe=None, dtype=torch.float64, kind="SanaVideoPipeline", vae=None, **config):
    """A Sana-Video pipeline, without a decoder unless one is given."""
    torch.manual_seed(0)
    transformer = diffusers.SanaVideoTransformer3DModel(**_SIZE | config)
    return _around(transformer, getattr(diffusers, kind), ExactEuler(), dtype, vae)


def _around(transformer, kind, scheduler, dtype, vae=None):
    tokenizer = gemma_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    tiny = kind(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **size)).to(dtype).eval(),
        vae=vae,
        transformer=sharpened(transformer).to(dtype).eval(),
        scheduler=scheduler,
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_sana(pipe, prompts=2, *, steps=4, size=(8, 8), guidance_scale=4.0, seed=0, frames=None, **options):
    """Latents [prompts, 4, h, w], or [prompts, 4, frames, h, w] of videos; the rows start from the same noise."""
    options = {"complex_human_instruction": SAID, **options}
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if frames is not None:
        noise = torch.randn(1, 4, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        options |= {"frames": 4 * frames - 3}
    side = 32 if frames is None else 8
    options.setdefault("latents", noise.repeat(len(texts), *[1] * (noise.ndim - 1)))
    return pipe(
        prompt=list(texts),
        height=size[0] * side,
        width=size[1] * side,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXTS,
        use_resolution_binning=False,
        output_type="latent",
        return_dict=False,
        **options,
    )[0]


class DenseSana(DenseRows):
    """The layers of Sana that attend to its text: norms over all heads, where a model has any."""

    def __init__(self, rule):
        super().__init__(rule, across=True)


def dense_sana(pipe, rules, steps):
    """The pipeline with dense layers that follow rules; those of linear attention stay as they are."""
    return dense_rows(
        [pipe.transformer], DenseSana, rules, steps, lambda: pipe.scheduler.step_index or 0, (None, "attn2")
    )
