"""LTX-2 in small, without encoders and decoders: it takes embeddings, and gives latents of a video."""

from types import SimpleNamespace

import torch
from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel

from tests.support.dense_rows import DenseRows, dense_rows
from tests.support.tiny_transformers import ExactEuler, sharpened

TEXTS = 5


class _Part(torch.nn.Module):
    device, dtype = torch.device("cpu"), torch.float64


class _Decoder(_Part):
    """What a pipeline asks of autoencoders that decode nothing."""

    spatial_compression_ratio, temporal_compression_ratio, mel_compression_ratio = 32, 8, 4

    def __init__(self, dtype):
        super().__init__()
        self.config = SimpleNamespace(
            scaling_factor=1.0, sample_rate=16000, mel_hop_length=160, mel_bins=8, latent_channels=4
        )
        self.latents_mean, self.latents_std = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)


class _Connectors(_Part):
    """Tokens as they are, for video and for sound."""

    def forward(self, embeddings, mask, padding_side):
        return embeddings, embeddings.flip(-1), mask


def tiny_ltx2(dtype=torch.float64, **config):
    """An LTX-2 transformer of two blocks."""
    torch.manual_seed(0)
    size = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16}
    size |= {"cross_attention_dim": 32, "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2}
    size |= {"audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12}
    return sharpened(LTX2VideoTransformer3DModel(**size, **config)).to(dtype).eval()


def tiny_ltx2_pipeline(dtype=torch.float64, **config):
    """An LTX-2 pipeline that reads nothing and decodes nothing."""
    tiny = LTX2Pipeline(
        scheduler=ExactEuler(),
        vae=_Decoder(dtype),
        audio_vae=_Decoder(dtype),
        text_encoder=None,
        tokenizer=None,
        connectors=_Connectors(),
        transformer=tiny_ltx2(dtype, **config),
        vocoder=None,
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_ltx2(pipe, rows=2, *, guidance_scale=4.0, generator=None, **options):
    """Latents of a video of three frames, and of its sound, for so many texts."""
    draw = torch.Generator().manual_seed(1)
    texts = torch.randn(2, rows, TEXTS, 12, generator=draw, dtype=torch.float64).to(pipe.transformer.dtype)
    mask = torch.ones(rows, TEXTS, dtype=torch.int64)
    options = {"guidance_scale": guidance_scale, "audio_guidance_scale": guidance_scale, **options}
    return pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask,
        height=64,
        width=96,
        num_frames=17,
        num_inference_steps=4,
        generator=generator or torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
        **options,
    )


class DenseLTX2(DenseRows):
    """The layers of LTX-2: norms over all heads at once, pairs side by side or in halves of a head, gates of heads."""

    _attention_backend = _parallel_config = None

    def __init__(self, rule):
        super().__init__(rule, across=True)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, rotary=None, _=None, **given):
        plain, rule = super().__call__, self.rule
        gates = 1.0
        if attn.to_gate_logits is not None:
            gates = 2 * attn.to_gate_logits(hidden_states).sigmoid().transpose(1, 2).unsqueeze(-1)

        def gated(row, rows, map_of, value):
            out = rule(row, rows, map_of, value)
            out = map_of(row, row) @ value[row] if out is None else out
            return out if isinstance(gates, float) else out * gates[row]

        self.rule, self.turn = gated, _split if attn.rope_type == "split" else _interleaved
        try:
            return plain(attn, hidden_states, encoder_hidden_states, mask, rotary)
        finally:
            self.rule = rule


def _interleaved(part, tables):
    cosine, sine = (table.unflatten(-1, part.shape[-2:]) for table in tables)  # [B, N, H, D]
    swapped = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
    return part * cosine + swapped * sine


def _split(part, tables):
    cosine, sine = (torch.cat([table.transpose(1, 2)] * 2, dim=-1) for table in tables)  # [B, N, H, D]
    first, second = part.chunk(2, dim=-1)
    return part * cosine + torch.cat([-second, first], dim=-1) * sine


def dense_ltx2(pipe, rules, steps):
    """The pipeline with the video's layers written out, which follow rules."""
    return dense_rows([pipe.transformer], DenseLTX2, rules, steps, lambda: pipe.scheduler.step_index or 0)
