"""Tiny Mochi pipelines, and their layers written out densely."""

from contextlib import contextmanager

import torch
from diffusers import MochiPipeline, MochiTransformer3DModel
from diffusers.pipelines.mochi import pipeline_mochi

from tests.support.dense_joint import DenseJoint, heads, linear
from tests.support.edited_transformers import Model
from tests.support.tiny_cogvideox import over_frames
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_t5
from tests.support.wide_torch import widened

__all__ = ["MOCHI", "draw_mochi", "tiny_mochi_pipeline"]

TEXTS = 12
CHANNELS = 4


def tiny_mochi_pipeline(pipe, dtype=torch.float64, **options):
    """A Mochi pipeline without a decoder, whose heads turn by angles of their own."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=8,
        in_channels=CHANNELS,
        text_embed_dim=32,
        time_embed_dim=16,
    )
    with torch.no_grad():
        transformer.pos_frequencies.normal_(0.0, 0.5)
    tiny = MochiPipeline(
        scheduler=ExactEuler(),
        vae=None,
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        tokenizer=pipe.tokenizer,
        transformer=sharpened(transformer).to(dtype).eval(),
        **options,
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_mochi(pipe, prompts, *, steps=4, size=(8, 8), frames=2, guidance=3.0, seed=0, negative="a drawing", **options):
    """Latents [prompts, 4, frames, h, w]; the rows start from the same noise."""
    noise = torch.randn(1, CHANNELS, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(prompts), 1, 1, 1, 1).to(pipe.transformer.dtype))
    with widened(*([pipeline_mochi] if pipe.transformer.dtype is torch.float64 else ())):
        return pipe(
            prompt=list(prompts),
            negative_prompt=[negative] * len(prompts),
            height=size[0] * 8,
            width=size[1] * 8,
            num_frames=6 * frames - 5,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=TEXTS,
            output_type="latent",
            **options,
        ).frames


class _DenseMochi(DenseJoint):
    """The layers of Mochi: image first, whose tokens alone are turned, and texts that end where they end."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=None):
        parts, tokens = {}, hidden_states.shape[1]
        image, text = ("to_q", "to_k", "to_v", "norm_q", "norm_k"), ("add_q_proj", "add_k_proj", "add_v_proj")
        for segment, given, names in (
            ("image", hidden_states, image),
            ("text", encoder_hidden_states, (*text, "norm_added_q", "norm_added_k")),
        ):
            for letter, name, norm in zip("qkv", names[:3], (*names[3:], None), strict=True):
                part = heads(attn, getattr(attn, name), given, norm and getattr(attn, norm))
                turns = segment == "image" and letter != "v"
                parts[f"{letter}_{segment}"] = _turned(part, *image_rotary_emb) if turns else part
        parts["raw"] = heads(attn, attn.to_q, hidden_states)
        self.mask = attention_mask.bool()
        out = torch.stack([self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))])
        context = out[:, tokens:]
        if hasattr(attn, "to_add_out"):
            context = linear(attn.to_add_out, context)
        return linear(attn.to_out[0], out[:, :tokens]), context


def _turned(part, cosines, sines):
    """[rows, H, N, D] by complex numbers [N, H, D / 2]."""
    angles = torch.complex(cosines.double(), sines.double()).transpose(0, 1)
    pairs = torch.view_as_complex(part.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2).to(part.dtype)


@contextmanager
def _dense(pipe, rule, *, layers="", fault=None):
    state = {"step": 0, "calls": 0, "frames": 1}

    def read(module, args, kwargs):
        state["step"] = pipe.scheduler.step_index or 0
        state["calls"] += 1
        state["frames"] = kwargs["hidden_states"].shape[2]

    of_frames, blocks = over_frames(rule, state), pipe.transformer.transformer_blocks
    before = [block.attn1.processor for block in blocks]
    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    for index, block in enumerate(blocks):
        follows = f"transformer_blocks.{index}".startswith(layers)
        block.attn1.processor = _DenseMochi(of_frames if follows else lambda row, rows: None)
        block.attn1.processor.fault = fault if follows else None
    try:
        yield state
    finally:
        handle.remove()
        for block, processor in zip(blocks, before, strict=True):
            block.attn1.processor = processor


class _Mochi(Model):
    """All frames stand in one sequence, before the text."""

    def dense(self, pipe, rule, layers, fault):
        return _dense(pipe, rule, layers=layers, fault=fault)


_MADE = tiny_mochi_pipeline, draw_mochi
MOCHI = {"Mochi": _Mochi(*_MADE, is_doubled=True, family="mochi")}
