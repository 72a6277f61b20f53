"""Tiny Kandinsky 6 pipelines, of pictures and of videos with sound, and their layers written out densely."""

import sys
from types import FunctionType, SimpleNamespace

import diffusers
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.support.dense_rows import DenseRows, dense_rows
from tests.support.tiny_kandinsky5 import PROMPTS, SAID, Processor
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_clip
from tests.support.wide_torch import widened

TEXTS = 26
_SIZE = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 24,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
    "in_audio_dim": 3,
    "out_audio_dim": 3,
    "visual_token_type_num_embeddings": 2,
    # As in models that are released.
    "text_token_padding": True,
    "ca_rope": True,
    "cross_gates": True,
    "fix_modulation": True,
}


class _Part(torch.nn.Module):
    device, dtype = torch.device("cpu"), torch.float64


class _Sound(_Part):
    """What a pipeline asks of a decoder of sound that decodes nothing."""

    config = SimpleNamespace(sample_rate=96)
    latent_hop_length = 16


class _Pictures(_Part):
    """What a pipeline asks of an autoencoder: pictures [B, 3, 1, H, W] become the means of [B, 4, 1, h, w]."""

    config = SimpleNamespace(spatial_compression_ratio=8, temporal_compression_ratio=4, scaling_factor=0.5)

    def encode(self, pictures):
        small = F.avg_pool3d(pictures, (1, 8, 8))
        moments = torch.cat([small, small[:, :1], small - 1, small[:, :1] - 1], dim=1)
        found = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
        return SimpleNamespace(latent_dist=found)


def tiny_kandinsky6(dtype=torch.float64, **config):
    """A Kandinsky 6 transformer, in which every layer is heard at once: its gates are not 0 as in a new one."""
    torch.manual_seed(0)
    model = diffusers.Kandinsky6Transformer3DModel(**_SIZE | config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation.out_layer" in name:
                parameter.normal_(0.0, 0.3)
    sharpened(model, ("to_query", "to_key", "query_norm", "key_norm")).to(dtype).eval()
    for name, part in model.named_modules() if dtype is torch.bfloat16 else ():
        if any(kept in name for kept in model._keep_in_fp32_modules):  # as where it is loaded from a file
            part.float()
    return model


def tiny_kandinsky6_pipeline(pipe, dtype=torch.float64, **config):
    """A pipeline without decoders, with a short template."""
    torch.manual_seed(1)
    tokenizer = qwen_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    tiny = diffusers.Kandinsky6TI2VAPipeline(
        transformer=tiny_kandinsky6(dtype, **config),
        vae=_Pictures(),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=Processor(tokenizer),
        text_encoder_2=tiny_clip(pipe.tokenizer, CLIPTextModel).to(dtype),
        tokenizer_2=pipe.tokenizer,
        scheduler=ExactEuler(),
        audio_vae=_Sound(),
        vocoder=_Sound(),
    )
    # A template as short as the tiny tokenizer's texts, beside the code that reads it.
    reads = tiny._get_prompt_embeds
    dropped = len(tokenizer(SAID.partition("{}")[0])["input_ids"]) - 1
    beside = {**reads.__globals__, "_PROMPT_TEMPLATE": SAID, "_QWEN_CROP_START": dropped}
    tiny._get_prompt_embeds = FunctionType(reads.__code__, beside)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_kandinsky6(
    pipe, prompts=2, *, steps=4, size=(8, 8), frames=1, guidance_scale=3.0, seed=0, sound=False, shown=False, **options
):
    """Latents [prompts, 4, frames, h, w]; rows start from the same noise, of sound too, and from one picture."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    noise = torch.randn((1, 4, frames, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(texts), 1, 1, 1, 1).to(pipe.transformer.dtype))
    if shown:
        options["image"] = [Image.new("RGB", (size[1] * 8, size[0] * 8), (200, 90, 20))] * len(texts)
    options.setdefault("generator", [torch.Generator().manual_seed(seed) for _ in texts])
    narrows = [sys.modules[type(pipe.transformer).__module__]] if pipe.transformer.dtype is torch.float64 else []
    with widened(*narrows):
        return pipe(
            prompt=texts,
            negative_prompt="a drawing",
            height=size[0] * 8,
            width=size[1] * 8,
            num_frames=4 * frames - 3,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            sample_audio=sound,
            max_sequence_length=TEXTS,
            output_type="latent",
            **options,
        ).frames


class DenseKandinsky6(DenseRows):
    """The layers of Kandinsky 6: norms of each head, turns by matrices, and masks of padding."""

    def __init__(self, rule):
        super().__init__(rule, turn=turned)

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, rotary_emb=None, rotary_emb_kv=None, attn_mask=None
    ):
        bias = None
        if attn_mask is not None:
            bias = torch.zeros_like(attn_mask, dtype=hidden_states.dtype).masked_fill(~attn_mask, -torch.inf)
        return super().__call__(_Named(attn), hidden_states, encoder_hidden_states, bias, rotary_emb)


class _Named:
    """A layer's parts by the names that other families give them."""

    def __init__(self, attn):
        self.heads, self.to_q, self.to_k, self.to_v = attn.num_heads, attn.to_query, attn.to_key, attn.to_value
        self.norm_q, self.norm_k, self.to_out = attn.query_norm, attn.key_norm, [attn.out_layer]


def turned(part, places):
    """By the model's matrices [N, 1, D / 2, 2, 2]."""
    pairs = part.unflatten(-1, (-1, 2))
    return torch.stack([(places[..., line, :] * pairs).sum(-1) for line in (0, 1)], dim=-1).flatten(-2)


def dense_kandinsky6(pipe, rules, steps):
    """The pipeline with dense layers that follow rules; of a guided step's two calls the first sees the prompts."""
    return dense_rows(
        [pipe.transformer],
        DenseKandinsky6,
        rules,
        steps,
        lambda: pipe.scheduler.step_index or 0,
        ("video_dec_block.self_attention", "video_dec_block.cross_attention"),
        within="visual_transformer_blocks.",
    )
