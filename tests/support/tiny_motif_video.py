"""Tiny Motif-Video pipelines, and their layers written out densely."""

from contextlib import contextmanager

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.embeddings import apply_rotary_emb

from tests.support.dense_joint import DenseJoint, heads, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_cogvideox import over_frames
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_t5

__all__ = ["MOTIF_VIDEO", "WITH_A_DECODER"]
__all__ += ["dense_motif_video", "draw_motif_video", "tiny_motif_video_pipeline"]

TEXTS = 24
_SIZE = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 1,
    "text_embed_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}
#: As models are released, with a decoder, and attention to the text beside that of the joint softmax.
WITH_A_DECODER = {"num_single_layers": 3, "num_decoder_layers": 1, "enable_text_cross_attention_single": True}


class _Decoder(torch.nn.Module):
    """What a pipeline asks of an autoencoder that decodes nothing."""

    device, dtype = torch.device("cpu"), torch.float64

    class config:
        z_dim, scale_factor_temporal, scale_factor_spatial = 4, 4, 8


def tiny_motif_video_pipeline(pipe, dtype=torch.float64, **config):
    """A Motif-Video pipeline."""
    torch.manual_seed(0)
    model = diffusers.MotifVideoTransformer3DModel(**_SIZE | config)
    # Which diffusers gives numbers in float32, but where the model is in half of that.
    model.time_text_embed.timestep_embedder.register_forward_pre_hook(lambda module, given: (given[0].to(dtype),))
    tiny = diffusers.MotifVideoPipeline(
        scheduler=ExactEuler(),
        vae=_Decoder(),
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        tokenizer=pipe.tokenizer,
        transformer=sharpened(model).to(dtype).eval(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_motif_video(pipe, prompts, *, steps=4, size=(8, 8), frames=2, seed=0, latents=None, **options):
    """Latents [prompts, 4, frames, h, w], which start from the same noise."""
    noise = torch.randn(1, 4, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("negative_prompt", ["a drawing"] * len(prompts))
    given = noise.repeat(len(prompts), 1, 1, 1, 1) if latents is None else latents
    return pipe(
        prompt=list(prompts),
        latents=given.to(pipe.transformer.dtype),
        height=size[0] * 8,
        width=size[1] * 8,
        num_frames=4 * frames - 3,
        num_inference_steps=steps,
        max_sequence_length=TEXTS,
        output_type="latent",
        **options,
    ).frames


class _DenseMotifVideo(DenseJoint):
    """The layers of Motif-Video: image tokens alone turned, and text that counts, wherever it stands, put first."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        named = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
        added = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
        rows, images, texts = len(hidden_states), hidden_states.shape[1], encoder_hidden_states.shape[1]
        counts = torch.ones(rows, texts, dtype=torch.bool)
        if attention_mask is not None:
            counts = attention_mask[:, 0, 0, images:]
        order = [torch.cat([row.nonzero()[:, 0], (~row).nonzero()[:, 0]]) for row in counts]
        text = torch.stack([row[places] for row, places in zip(encoder_hidden_states, order, strict=True)])
        parts = {"raw": heads(attn, attn.to_q, hidden_states)}
        streams = {"image": (hidden_states, named), "text": (text, named if attn.add_q_proj is None else added)}
        for segment, (tokens, names) in streams.items():
            for letter, name, norm in zip("qkv", names[:3], (*names[3:], None), strict=True):
                part = heads(attn, getattr(attn, name), tokens, norm and getattr(attn, norm))
                turns = segment == "image" and letter != "v"
                parts[f"{letter}_{segment}"] = apply_rotary_emb(part, image_rotary_emb) if turns else part
        self.mask = torch.stack([row.sort(descending=True).values for row in counts])
        out = torch.stack([self.row(row, rows, parts) for row in range(rows)])
        image, text = out[:, :images], out[:, images:]
        text = torch.stack([row[places.argsort()] for row, places in zip(text, order, strict=True)])
        image = image if attn.to_out is None else linear(attn.to_out[0], image)
        return image, text if attn.to_add_out is None else linear(attn.to_add_out, text)


@contextmanager
def dense_motif_video(pipe, rule, *, layers="", fault=None):
    """A pipeline whose layers with such paths follow ``rule(row, rows)``, but for its decoder's."""
    state = {"step": 0, "calls": 0, "frames": 1}
    last = len(pipe.transformer.single_transformer_blocks) - pipe.transformer.config.num_decoder_layers
    decodes = [f"single_transformer_blocks.{index}." for index in range(last, last + 9)]

    def read(module, args, kwargs):
        state["step"] = pipe.scheduler.step_index or 0
        state["calls"] += 1
        state["frames"] = kwargs["hidden_states"].shape[2]

    of_frames = over_frames(rule, state)

    def processor(name):
        if "cross_attn" in name or name.startswith(tuple(decodes)):
            return pipe.transformer.get_submodule(name.removesuffix(".processor")).processor
        follows = name.startswith(layers)
        made = _DenseMotifVideo(of_frames if follows else lambda row, rows: None, None)
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _MotifVideo(Model):
    def dense(self, pipe, rule, layers, fault):
        return dense_motif_video(pipe, rule, layers=layers, fault=fault)


MOTIF_VIDEO = _MotifVideo(tiny_motif_video_pipeline, draw_motif_video, family="motif_video")
