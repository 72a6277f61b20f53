"""Tiny Nucleus-Image pipelines, and their layers written out densely."""

from contextlib import contextmanager

import diffusers
import torch
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.support.dense_joint import DenseFlux, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer, tiny_video_vae
from tests.support.tiny_transformers import ExactEuler, sharpened

__all__ = ["NUCLEUS", "draw_nucleus", "tiny_nucleus_pipeline"]

_SIZE = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
    "mlp_ratio": 12.0,  # of which diffusers takes multiples of 128
    "dense_moe_strategy": "leave_first_block_dense",
    "num_experts": 2,
    "moe_intermediate_dim": 16,
    "capacity_factors": 1.0,
}
_SAYS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Processor:
    """Reads texts, and would read pictures."""

    image_processor = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **options):
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, **options)


def tiny_nucleus_pipeline(pipe=None, dtype=torch.float64, padding="right", saves=False):
    """A Nucleus-Image pipeline whose tokenizer pads texts on this side.

    Args:
        saves: whether it is to be saved: with as many layers of its encoder as diffusers reads from, and a tokenizer
            alone in the place of its processor.
    """
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template, tokenizer.padding_side = _SAYS, padding
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 8 if saves else 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": []}))
    model = diffusers.NucleusMoEImageTransformer2DModel(**_SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts." in name:  # which a new model leaves as memory was
                parameter.normal_(std=0.2)
            elif "img_mod" in name:  # gates of what layers say
                parameter.normal_(std=0.3)
    tiny = diffusers.NucleusMoEImagePipeline(
        transformer=sharpened(model).to(dtype).eval(),
        scheduler=ExactEuler(),
        vae=tiny_video_vae().to(dtype),
        text_encoder=encoder.to(dtype).eval(),
        processor=tokenizer if saves else _Processor(tokenizer),
    )
    if not saves:
        tiny.default_return_index = -1
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_nucleus(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, latents=None, **options):
    """Packed latents of ``pipe`` for prompts, which start from the same noise."""
    tokens = size[0] // 2 * (size[1] // 2)
    noise = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("negative_prompt", ["a drawing"] * len(prompts))
    return pipe(
        list(prompts),
        guidance_scale=guidance,
        latents=noise.repeat(len(prompts), 1, 1) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images


class _DenseNucleus(DenseFlux):
    """The layers of Nucleus-Image: queries of the image alone, heads that share keys, texts with padding anywhere."""

    order = ("image", "text")

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        rows, images, texts = len(hidden_states), hidden_states.shape[1], encoder_hidden_states.shape[1]
        counts = torch.ones(rows, texts, dtype=torch.bool) if attention_mask is None else attention_mask[:, images:]
        order = [torch.cat([row.nonzero()[:, 0], (~row).nonzero()[:, 0]]) for row in counts.bool()]
        image_places, text_places = image_rotary_emb
        parts = {}
        for letter in "qkv":
            part = linear(getattr(attn, f"to_{letter}"), hidden_states)
            part, raw = self._heads(attn, part, letter, "", image_places)
            parts[f"{letter}_image"] = part
            if letter == "q":
                parts["raw"] = raw
                continue
            text = linear(getattr(attn, f"add_{letter}_proj"), encoder_hidden_states)
            text, _ = self._heads(attn, text, letter, "added_", text_places)
            parts[f"{letter}_text"] = torch.stack([row[:, first] for row, first in zip(text, order, strict=True)])
        parts["q_text"] = parts["k_text"]  # who does not ask may ask for anything
        self.mask = torch.stack([row.sort(descending=True).values for row in counts.bool()])
        out = torch.stack([self.row(row, rows, parts) for row in range(rows)])[:, :images]
        return linear(attn.to_out[0], out)

    @staticmethod
    def _heads(attn, part, letter, added, places):
        raw = part.unflatten(-1, (-1, attn.inner_dim // attn.heads))
        part = raw
        if letter != "v":
            pairs = torch.view_as_complex(getattr(attn, f"norm_{added}{letter}")(raw).unflatten(-1, (-1, 2)))
            part = torch.view_as_real(pairs * places[:, None]).flatten(-2)
        part, raw = (one.repeat_interleave(attn.heads // one.shape[2], dim=2).transpose(1, 2) for one in (part, raw))
        return part, raw


@contextmanager
def _dense(pipe, rule, *, layers="", fault=None):
    state = {"step": 0, "calls": 0}

    def read(module, args, kwargs):
        state.update(step=pipe.scheduler.step_index or 0, calls=state["calls"] + 1)

    def processor(name):
        follows = name.startswith(layers)
        made = _DenseNucleus(rule if follows else lambda row, rows: None, None)
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _Nucleus(Model):
    def dense(self, pipe, rule, layers, fault):
        return _dense(pipe, rule, layers=layers, fault=fault)

    def template(self, pipe):
        return *pipe._format_prompt("{}").split("{}"), 0

    def tokenizer(self, pipe):
        return pipe.processor.tokenizer

    def texts(self, longest):
        return -(-longest // 8) * 8


NUCLEUS = _Nucleus(tiny_nucleus_pipeline, draw_nucleus, family="nucleus")
