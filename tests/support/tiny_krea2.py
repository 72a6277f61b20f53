"""Tiny Krea 2 pipelines, and their layers written out densely."""

from contextlib import contextmanager

import diffusers
import torch
from diffusers.models.embeddings import apply_rotary_emb
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.support.dense_joint import DenseFlux, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer, tiny_video_vae
from tests.support.tiny_transformers import ExactEuler, sharpened

__all__ = ["KREA2", "TEXTS"]

TEXTS = 40  # tokens of every text that the model receives
_SIZE = {
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 16,
    "num_text_layers": 2,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (2, 2, 4),
}


def tiny_krea2_pipeline(pipe=None, dtype=torch.float64):
    """A Krea 2 pipeline, whose template is as long as its tokenizer makes it."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": []}))
    model = sharpened(diffusers.Krea2Transformer2DModel(**_SIZE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("time_mod_proj"):  # what an attention adds is as loud as what it is added to
                parameter.mul_(8)
    tiny = diffusers.Krea2Pipeline(
        scheduler=ExactEuler(),
        vae=tiny_video_vae().to(dtype),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=model.to(dtype).eval(),
        text_encoder_select_layers=(1, 2),
    )
    tiny.prompt_template_encode_prefix = "<|im_start|>a photo:<|im_end|>\n<|im_start|>"
    tiny.prompt_template_encode_start_idx = len(tokenizer(tiny.prompt_template_encode_prefix)["input_ids"])
    tiny.prompt_template_encode_num_suffix_tokens = len(tokenizer(tiny.prompt_template_encode_suffix)["input_ids"])
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_krea2(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, latents=None, **options):
    """Packed latents of ``pipe`` for prompts, which start from the same noise."""
    tokens = size[0] // 2 * (size[1] // 2)
    noise = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pipe(
        list(prompts),
        negative_prompt=["a drawing"] * len(prompts),
        guidance_scale=guidance,
        latents=noise.repeat(len(prompts), 1, 1).to(pipe.transformer.dtype) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        max_sequence_length=TEXTS,
        output_type="latent",
        **options,
    ).images


class _DenseKrea2(DenseFlux):
    """The layers of Krea 2: text first, heads that share keys and values, a gate; text that counts is put first."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        counts, parts = attention_mask[:, 0, 0, :TEXTS], {}
        order = [torch.cat([row.nonzero()[:, 0], (~row).nonzero()[:, 0]]) for row in counts]
        for letter in "qkv":
            part = linear(getattr(attn, f"to_{letter}"), hidden_states).unflatten(-1, (-1, attn.head_dim))
            part = part if letter == "v" else getattr(attn, f"norm_{letter}")(part)
            part = part.transpose(1, 2).repeat_interleave(attn.num_heads * attn.head_dim // part[0, 0].numel(), dim=1)
            raw = part
            part = part if letter == "v" else apply_rotary_emb(part, image_rotary_emb)
            text = torch.stack([row[:, :TEXTS][:, places] for row, places in zip(part, order, strict=True)])
            parts |= {f"{letter}_text": text, f"{letter}_image": part[:, :, TEXTS:]}
            if letter == "q":
                parts["raw"] = raw[:, :, TEXTS:]
        self.mask = torch.stack([row.sort(descending=True).values for row in counts])
        out = torch.stack([self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))])
        back = [torch.cat([row[:TEXTS][places.argsort()], row[TEXTS:]]) for row, places in zip(out, order, strict=True)]
        return linear(attn.to_out[0], torch.stack(back) * linear(attn.to_gate, hidden_states).sigmoid())


@contextmanager
def _dense(pipe, rule, *, layers="", fault=None):
    state = {"step": 0, "calls": 0}

    def read(module, args, kwargs):
        state["step"] = pipe.scheduler.step_index or 0
        state["calls"] += 1

    def processor(name):
        if name.startswith("text_fusion"):
            return pipe.transformer.get_submodule(name.removesuffix(".processor")).processor
        follows = name.startswith(layers)
        made = _DenseKrea2(rule if follows else lambda row, rows: None, None)
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _Krea2(Model):
    def dense(self, pipe, rule, layers, fault):
        return _dense(pipe, rule, layers=layers, fault=fault)

    def template(self, pipe):
        return pipe.prompt_template_encode_prefix, "", pipe.prompt_template_encode_start_idx

    def texts(self, longest):
        return TEXTS


KREA2 = _Krea2(tiny_krea2_pipeline, draw_krea2, family="krea2")
