"""Tiny Wan pipelines, with one transformer or two, and their layers written out densely."""

import torch
from diffusers import WanPipeline, WanTransformer3DModel

from tests.support.dense_rows import DenseRows, dense_rows
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_t5

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
PROMPTS = [
    "a photo of a red car on a mountain",
    "a photo of a big dog on a mountain",
    "a photo of a red car on a house",
    "a photo of a big car on a mountain",
]
TEXTS = 24


def tiny_wan(seed=0, dtype=torch.float64, **config):
    """A Wan transformer."""
    torch.manual_seed(seed)
    return sharpened(WanTransformer3DModel(**{**WAN, **config})).to(dtype).eval()


def tiny_wan_pipeline(pipe, transformers=1, dtype=torch.float64, kind=WanPipeline, given=None, **config):
    """A Wan pipeline without a decoder; with two transformers the second has the steps of the latter half."""
    torch.manual_seed(1)
    both = {"transformer_2": tiny_wan(1, dtype, **config), "boundary_ratio": 0.5} if transformers == 2 else {}
    tiny = kind(
        tokenizer=pipe.tokenizer,
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        vae=None,
        scheduler=ExactEuler(),
        transformer=tiny_wan(0, dtype, **config),
        **both,
        **(given or {}),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_wan(pipe, prompts=2, *, steps=4, size=(8, 8), frames=3, guidance_scale=4.0, seed=0, **options):
    """Latents [prompts, 16, frames, h, w]; the rows start from the same noise."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    noise = torch.randn(1, 16, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(texts), 1, 1, 1, 1))
    return pipe(
        texts,
        height=size[0] * 8,
        width=size[1] * 8,
        num_frames=4 * frames - 3,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXTS,
        output_type="latent",
        **options,
    ).frames


class DenseWan(DenseRows):
    """The layers of Wan: norms over all heads, rotary embedding by complex numbers, a picture beside the text."""

    def __init__(self, rule):
        super().__init__(rule, across=True, turn=turned)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def split(self, attn, tokens):
        if attn.add_k_proj is None:
            return None, tokens
        return tokens[:, :-512], tokens[:, -512:]

    def of_picture(self, attn, query, picture):
        key, value = attn.norm_added_k(attn.add_k_proj(picture)), attn.add_v_proj(picture)
        key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (key, value))
        return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def turned(part, tables):
    cosine, sine = tables
    angles = torch.complex(cosine[..., ::2], sine[..., ::2])  # [1, N, 1, D / 2]
    pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2)


def dense_wan(pipe, rules, steps):
    """The pipeline with dense layers that follow rules; each step calls a transformer twice, conditional rows first."""

    def step_of():
        index = pipe.scheduler.step_index
        return (pipe.scheduler.begin_index or 0) if index is None else index

    models = [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]
    return dense_rows(models, DenseWan, rules, steps, step_of)
