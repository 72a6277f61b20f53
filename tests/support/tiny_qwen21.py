"""Tiny Qwen-Image 2.1 pipelines, and their layers written out densely."""

from contextlib import contextmanager

import diffusers
import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from transformers import BatchEncoding, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.support.dense_joint import DenseJoint, heads, linear, replaced_processors, written_out
from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened

__all__ = ["PADS", "QWEN21", "draw_qwen21", "tiny_qwen21_pipeline"]

PADS = 8  # tokens that the encoder makes of a picture: 2 x 4 of them
_CHANNELS = 16
_SIZE = {
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "context_in_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


class Processor:
    """Reads texts, and makes some tokens of each picture, as Qwen's does."""

    image_processor = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, said, tokenize, return_dict):
        (only,) = said
        return [self.tokenizer(f"<|im_start|>{only['role']}\n{only['content'][0]['text']}<|im_end|>\n")["input_ids"]]

    def __call__(self, text, images=None, **options):
        marked = [one.replace("<|image_pad|>", "<|image_pad|>" * PADS) for one in text]
        return BatchEncoding(self.tokenizer(marked, **options))


def tiny_qwen21_pipeline(pipe=None, dtype=torch.float64):
    """A Qwen-Image 2.1 pipeline."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": []})
    model = sharpened(diffusers.QwenImage21Transformer2DModel(**_SIZE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("modulation"):  # what an attention adds is as loud as what it is added to
                parameter.mul_(8)
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=_CHANNELS,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * _CHANNELS,
        latents_std=[1.0] * _CHANNELS,
    )
    tiny = diffusers.QwenImage21Pipeline(
        scheduler=ExactEuler(),
        vae=vae.to(dtype).eval(),
        text_encoder=Qwen3VLForConditionalGeneration(config).to(dtype).eval(),
        processor=Processor(tokenizer),
        transformer=model.to(dtype).eval(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_qwen21(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, latents=None, **options):
    """Packed latents of ``pipe`` for prompts, which start from the same noise; two of a size's sides to a token."""
    tokens = size[0] // 2 * (size[1] // 2)
    noise = torch.randn(1, tokens, _CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pipe(
        prompt=list(prompts),
        negative_prompt=["a drawing"] * len(prompts) if guidance > 1 else None,
        true_cfg_scale=guidance,
        latents=noise.repeat(len(prompts), 1, 1).to(pipe.transformer.dtype) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images


class _DenseQwen21(DenseJoint):
    """The layers of Qwen-Image 2.1: text first, which looks back alone, and pictures among it, which see themselves."""

    order = ("text", "image", "reference")

    def __init__(self, rule, state, keep=None):
        super().__init__(rule, keep)
        self.state = state

    def __call__(
        self,
        attn,
        hidden_states,
        attention_mask=None,
        rotary_emb=None,
        layer_cache=None,
        kv_cache_mode=None,
        cache_write_slice=None,
        segments=None,
        key_valid=None,
    ):
        rows, ids, exists = len(hidden_states), self.state["ids"], self.state["exists"]
        before = sum(ids != ids.max()) if kv_cache_mode != "cached" else 0
        q, k, v = (
            heads(attn, getattr(attn, f"to_{letter}"), hidden_states, getattr(attn, f"norm_{letter}", None))
            for letter in "qkv"
        )
        q, k = (
            apply_rotary_emb_qwen(part.transpose(1, 2), rotary_emb, use_real=False).transpose(1, 2) for part in (q, k)
        )
        raw = heads(attn, attn.to_q, hidden_states)[:, :, before:]
        if kv_cache_mode == "extract":
            layer_cache.store(*(part[:, :, :before].transpose(1, 2).clone() for part in (k, v)))
        if kv_cache_mode == "cached":
            kept = (part.transpose(1, 2) for part in layer_cache.get())
            k, v = (torch.cat([first, part], dim=2) for first, part in zip(kept, (k, v), strict=True))
        text, shown = ids == -1, (ids >= 0) & (ids < ids.max())
        image = ids == ids.max()
        parts = {"q_image": q[:, :, before:], "raw": raw}
        parts |= {f"{letter}_image": part[:, :, image] for letter, part in (("k", k), ("v", v))}
        for segment, where in (("text", text), ("reference", shown)):
            if where.any():
                parts |= {f"{letter}_{segment}": part[:, :, where] for letter, part in (("k", k), ("v", v))}
                parts[f"q_{segment}"] = torch.zeros_like(parts[f"k_{segment}"])  # whose output is not looked at
        self.mask = None if exists is None else exists[:, text]
        texts = int(text.sum())
        behind = slice(texts, texts + int(image.sum()))
        out = torch.stack([self.row(row, rows, parts)[behind] for row in range(rows)])
        if before:
            place = torch.arange(before)
            looks = (place[:, None] >= place) | (ids[:before, None] == ids[:before]) & (ids[:before] >= 0)
            first = []
            for row in range(rows):
                there = looks if exists is None else looks & exists[row, :before]
                sees = torch.where(there, 0.0, float("-inf")).double()
                whole = written_out(q[row, :, :before], k[row, :, :before], sees)
                first.append((whole @ v[row, :, :before]).transpose(0, 1).flatten(1))
            out = torch.cat([torch.stack(first), out], dim=1)
        return linear(attn.to_out[0], out)


@contextmanager
def _dense(pipe, rule, *, layers="", fault=None, keep=None):
    state = {"step": 0, "calls": 0}

    def read(module, args, kwargs):
        state["step"] = pipe.scheduler.step_index or 0
        state["calls"] += 1
        slots, mask = kwargs["img_mask"][0], kwargs["encoder_hidden_states_mask"]
        is_image = slots.repeat_interleave(torch.where(slots, 4, 1))
        state["ids"], _ = module.build_token_metadata(is_image, kwargs["img_shapes"][0])
        state["exists"] = None
        if mask is not None:
            state["exists"] = torch.ones(len(mask), len(is_image), dtype=torch.bool)
            state["exists"][:, ~is_image] = mask.bool()[:, ~slots[: mask.shape[1]]]

    def processor(name):
        follows = name.startswith(layers)
        made = _DenseQwen21(rule if follows else lambda row, rows: None, state, keep)
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _Qwen21(Model):
    def dense(self, pipe, rule, layers, fault, keep=None):
        return _dense(pipe, rule, layers=layers, fault=fault, keep=keep)

    def template(self, pipe):
        return *pipe.prompt_template_t2i.split("{}"), pipe._drop_idx

    def tokenizer(self, pipe):
        return pipe.processor.tokenizer

    def fits(self, size):
        """Pictures are made of squares of two tokens a side."""
        return tuple(-(-side // 4) * 4 for side in size)


_MADE = tiny_qwen21_pipeline, draw_qwen21
#: With keys and values of texts kept from the first step on, and computed at every one.
QWEN21 = {
    "Qwen-Image 2.1": _Qwen21(*_MADE, family="qwen21"),
    "Qwen-Image 2.1, nothing kept": _Qwen21(*_MADE, {"use_kv_cache": False}, family="qwen21"),
}
