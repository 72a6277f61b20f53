"""Tiny pipelines of LTX-Video, Allegro and HunyuanDiT, and their layers, self and cross, written out densely."""

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    DDIMScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import BertConfig, BertModel

from tests.support.dense_rows import DenseRows, dense_rows
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_t5, tiny_vae

PROMPTS = [
    "a photo of a red car on a mountain",
    "a photo of a big dog on a mountain",
    "a photo of a red car on a house",
    "a photo of a big car on a mountain",
]
TEXTS = 24
BERT_TEXTS, T5_TEXTS = 77, 256


def tiny_ltx_pipeline(pipe, dtype=torch.float64):
    """An LTX pipeline without a decoder."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=32,
    )
    tiny = LTXPipeline(
        scheduler=ExactEuler(),
        vae=None,
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        tokenizer=pipe.tokenizer,
        transformer=sharpened(transformer).to(dtype).eval(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_allegro_pipeline(pipe, dtype=torch.float64):
    """An Allegro pipeline without a decoder."""
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=32,
        sample_height=8,
        sample_width=8,
        sample_frames=4,
    )
    tiny = AllegroPipeline(
        scheduler=ExactEuler(),
        vae=None,
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        tokenizer=pipe.tokenizer,
        transformer=sharpened(transformer, ("to_q", "to_k")).to(dtype).eval(),
    )
    tiny.scheduler.init_noise_sigma = 1.0  # which schedulers of other models have
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_allegro(pipe, prompts=2, *, steps=4, size=(8, 8), frames=2, guidance_scale=4.0, seed=0, **options):
    """Latents [prompts, 4, frames, h, w]; the rows start from the same noise."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    noise = torch.randn(1, 4, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(texts), 1, 1, 1, 1).to(pipe.transformer.dtype))
    return pipe(
        list(texts),
        height=size[0] * 8,
        width=size[1] * 8,
        num_frames=4 * frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXTS,
        output_type="latent",
        **options,
    ).frames


class DenseAllegro(DenseRows):
    """The layers of Allegro: no norms, and a third of each head turned by each of a token's places."""

    def __init__(self, rule):
        super().__init__(rule, turn=_turned_by_thirds)

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, image_rotary_emb=None
    ):
        rotary = image_rotary_emb if encoder_hidden_states is None else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)


def _turned_by_thirds(part, tables):
    out = []
    for third, (cosine, sine), places in zip(part.chunk(3, dim=-1), *tables, strict=True):
        cosine, sine = (table[places[0]][:, None] for table in (cosine, sine))
        first, second = third.chunk(2, dim=-1)
        out.append(third * cosine + torch.cat([-second, first], dim=-1) * sine)
    return torch.cat(out, dim=-1)


def dense_allegro(pipe, rules, steps):
    """The pipeline with dense layers that follow rules."""
    return dense_rows([pipe.transformer], DenseAllegro, rules, steps, lambda: pipe.scheduler.step_index or 0)


def draw_ltx(pipe, prompts=2, *, steps=4, size=(4, 4), frames=3, guidance_scale=4.0, seed=0, **options):
    """Packed latents [prompts, tokens, 16]; the rows start from the same noise."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    tokens = frames * size[0] * size[1]
    noise = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pipe(
        texts,
        latents=noise.repeat(len(texts), 1, 1),
        height=size[0] * 32,
        width=size[1] * 32,
        num_frames=8 * frames - 7,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXTS,
        output_type="latent",
        **options,
    ).frames


class DenseLTX(DenseRows):
    """The layers of LTX: norms and rotary embedding over all heads at once."""

    def __init__(self, rule):
        super().__init__(rule, across=True, turn=_turned_together)


def _turned_together(part, tables):
    cosine, sine = tables  # [B, N, H·D]
    flat = part.flatten(-2)
    swapped = torch.empty_like(flat)
    swapped[..., ::2], swapped[..., 1::2] = -flat[..., 1::2], flat[..., ::2]
    return (flat * cosine + swapped * sine).unflatten(-1, part.shape[-2:])


def dense_ltx(pipe, rules, steps):
    """The pipeline with dense layers that follow rules."""
    return dense_rows([pipe.transformer], DenseLTX, rules, steps, lambda: pipe.scheduler.step_index or 0)


def tiny_hunyuan_pipeline(pipe, dtype=torch.float64, second=None):
    """A HunyuanDiT pipeline; both of its tokenizers are that of ``pipe``, or the second is another one."""
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=2.0,
        learn_sigma=True,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=BERT_TEXTS,
        text_len_t5=T5_TEXTS,
        use_style_cond_and_image_meta_size=False,
    )
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=len(pipe.tokenizer), max_position_embeddings=BERT_TEXTS, **size))
    tiny = HunyuanDiTPipeline(
        vae=tiny_vae().to(dtype),
        text_encoder=bert.to(dtype).eval(),
        tokenizer=pipe.tokenizer,
        transformer=sharpened(transformer).to(dtype).eval(),
        scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=tiny_t5(pipe.tokenizer).to(dtype),
        tokenizer_2=second or pipe.tokenizer,
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_hunyuan(pipe, prompts=2, *, steps=4, size=(8, 8), guidance_scale=4.0, seed=0, **options):
    """Latents [prompts, 16, h, w]; the rows start from the same noise."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    noise = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pipe(
        texts,
        latents=noise.repeat(len(texts), 1, 1, 1).to(pipe.transformer.dtype),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        use_resolution_binning=False,
        output_type="latent",
        **options,
    ).images


class DenseHunyuan(DenseRows):
    """The layers of HunyuanDiT: norms of each head, and queries that are turned in cross-attention too."""

    def __init__(self, rule):
        super().__init__(rule, turn=_turned_apart)

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        image_rotary_emb=None,
    ):
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def _turned_apart(part, tables):
    angles = torch.complex(*(table[:, None, ::2].double() for table in tables))  # [N, 1, D / 2]
    pairs = torch.view_as_complex(part.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2).to(part)


def dense_hunyuan(pipe, rules, steps):
    """The pipeline with dense layers that follow rules; steps are counted by calls of its model."""
    calls = iter(range(1000))
    return dense_rows([pipe.transformer], DenseHunyuan, rules, steps, lambda: next(calls))
