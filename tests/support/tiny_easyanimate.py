"""Tiny EasyAnimate pipelines, and their layers written out densely."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from diffusers import EasyAnimatePipeline, EasyAnimateTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.support.dense_joint import DenseJoint, heads, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_cogvideox import over_frames
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened

__all__ = ["EASYANIMATE", "draw_easyanimate", "tiny_easyanimate_pipeline"]

TEXTS = 256  # tokens of every text
_SAYS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Decoder(torch.nn.Module):
    """What a pipeline asks of an autoencoder that decodes nothing."""

    device, dtype = torch.device("cpu"), torch.float64
    config = SimpleNamespace(latent_channels=4)
    spatial_compression_ratio, temporal_compression_ratio = 8, 4


def tiny_easyanimate_pipeline(pipe=None, dtype=torch.float64):
    """An EasyAnimate pipeline of two blocks with weights of the text's own, and one without."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _SAYS
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2}
    encoder = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=16,
        text_embed_dim=16,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".to_v." in name or ".to_out." in name:  # what an attention adds is heard beside so long a text
                parameter.mul_(4)
    tiny = EasyAnimatePipeline(
        vae=_Decoder(),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=sharpened(model).to(dtype).eval(),
        scheduler=ExactEuler(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_easyanimate(pipe, prompts, *, steps=4, size=(8, 8), frames=2, guidance=3.0, seed=0, latents=None, **options):
    """Latents [prompts, 4, frames, h, w], which start from the same noise."""
    noise = torch.randn(1, 4, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("negative_prompt", ["a drawing"] * len(prompts))
    return pipe(
        list(prompts),
        guidance_scale=guidance,
        latents=noise.repeat(len(prompts), 1, 1, 1, 1) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_frames=4 * frames - 3,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).frames


class _DenseEasyAnimate(DenseJoint):
    """The layers of EasyAnimate: text first, by weights of its own or the image's, and image tokens alone turned."""

    order = ("text", "image")

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        named = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
        added = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
        parts = {"raw": heads(attn, attn.to_q, hidden_states)}
        streams = {"text": (encoder_hidden_states, named if attn.add_q_proj is None else added)}
        streams["image"] = hidden_states, named
        for segment, (tokens, names) in streams.items():
            for letter, name, norm in zip("qkv", names[:3], (*names[3:], None), strict=True):
                part = heads(attn, getattr(attn, name), tokens, norm and getattr(attn, norm))
                turns = segment == "image" and letter != "v"
                parts[f"{letter}_{segment}"] = apply_rotary_emb(part, image_rotary_emb) if turns else part
        out = torch.stack([self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))])
        text, image = out[:, : encoder_hidden_states.shape[1]], out[:, encoder_hidden_states.shape[1] :]
        return linear(attn.to_out[0], image), text if attn.to_add_out is None else linear(attn.to_add_out, text)


@contextmanager
def _dense(pipe, rule, *, layers="", fault=None):
    state = {"step": 0, "calls": 0, "frames": 1}

    def read(module, args, kwargs):
        state["step"] = pipe.scheduler.step_index or 0
        state["calls"] += 1
        state["frames"] = args[0].shape[2]

    of_frames = over_frames(rule, state)

    def processor(name):
        follows = name.startswith(layers)
        made = _DenseEasyAnimate(of_frames if follows else lambda row, rows: None, None)
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _EasyAnimate(Model):
    def dense(self, pipe, rule, layers, fault):
        return _dense(pipe, rule, layers=layers, fault=fault)

    def template(self, pipe):
        return "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", 0

    def texts(self, longest):
        return TEXTS


EASYANIMATE = _EasyAnimate(tiny_easyanimate_pipeline, draw_easyanimate, is_doubled=True, family="easyanimate")
