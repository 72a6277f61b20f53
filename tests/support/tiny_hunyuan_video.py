"""Tiny HunyuanVideo pipelines, and their layers written out densely."""

from contextlib import contextmanager

import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
from transformers import CLIPTextModel, LlamaConfig, LlamaModel
from transformers.models.llama import modeling_llama

from tests.support.dense_joint import DenseJoint, heads, linear
from tests.support.tiny_cogvideox import over_frames
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_clip
from tests.support.wide_torch import widened

TEXTS = 24
HUNYUAN_VIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 1.0,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
SAID = "<|im_start|>a drawing, a house {}<|im_end|>"


def tiny_hunyuan_video_pipeline(pipe, dtype=torch.float64, kind=HunyuanVideoPipeline, **config):
    """A HunyuanVideo pipeline without an autoencoder, whose template is cut where its prompt begins."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **size))
    tiny = kind(
        text_encoder=llama.to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=sharpened(HunyuanVideoTransformer3DModel(**HUNYUAN_VIDEO, **config)).to(dtype).eval(),
        vae=None,
        scheduler=ExactEuler(),
        text_encoder_2=tiny_clip(pipe.tokenizer, CLIPTextModel).to(dtype),
        tokenizer_2=pipe.tokenizer,
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def template_of(pipe):
    """What the pipeline is told of the text around prompts."""
    before = SAID.partition("{}")[0]
    return {"template": SAID, "crop_start": len(pipe.tokenizer(before)["input_ids"]) - 1}


def draw_hunyuan_video(pipe, prompts, *, steps=4, size=(8, 8), frames=2, guidance=3.0, seed=0, **options):
    """Latents [prompts, 16, frames, h, w]; the rows start from the same noise."""
    noise = torch.randn(1, 16, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(prompts), 1, 1, 1, 1))
    options.setdefault("negative_prompt", ["a drawing"] * len(prompts))
    options.setdefault("prompt_template", template_of(pipe))
    return pipe(
        prompt=list(prompts),
        true_cfg_scale=guidance,
        height=size[0] * 8,
        width=size[1] * 8,
        num_frames=4 * frames - 3,
        num_inference_steps=steps,
        max_sequence_length=TEXTS,
        output_type="latent",
        **options,
    ).frames


def wide_hunyuan_video():
    """Where diffusers narrows to float32 on the way, what is in float64 stays so."""
    return widened(pipeline_hunyuan_video, modeling_llama)


class DenseHunyuanVideo(DenseJoint):
    """The layers of HunyuanVideo: image first, whose tokens alone are turned, and padding of texts masked."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        streams, tokens = attn.add_q_proj is not None, hidden_states.shape[1]
        named = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
        added = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k") if streams else named
        parts = {}
        for segment, given, names in (("image", hidden_states, named), ("text", encoder_hidden_states, added)):
            for letter, name, norm in zip("qkv", names[:3], (*names[3:], None), strict=True):
                part = heads(attn, getattr(attn, name), given, norm and getattr(attn, norm))
                turns = segment == "image" and letter != "v"
                parts[f"{letter}_{segment}"] = apply_rotary_emb(part, image_rotary_emb) if turns else part
        parts["raw"] = heads(attn, attn.to_q, hidden_states)
        self.mask = self.of_texts(attention_mask, tokens)
        out = torch.stack([self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))])
        image, text = out[:, :tokens], out[:, tokens:]
        return (linear(attn.to_out[0], image), linear(attn.to_add_out, text)) if streams else (image, text)

    def of_texts(self, mask, tokens):
        return mask[:, 0, 0, tokens:]


class DenseHunyuanVideo15(DenseHunyuanVideo):
    """The same of HunyuanVideo 1.5, whose layers are told of their texts alone."""

    def of_texts(self, mask, tokens):
        return mask.bool()


@contextmanager
def dense_hunyuan_video(pipe, rule, *, layers="", fault=None, dense=DenseHunyuanVideo):
    """A pipeline whose layers with such paths follow ``rule(row, rows)``; shares of a frame's tokens are every frame's.

    Each guided step is two calls of the model, of which the first sees the prompts.
    """
    state, transformer = {"step": 0, "calls": 0, "frames": 1}, pipe.transformer

    def read(module, args, kwargs):
        index = pipe.scheduler.step_index
        state["step"] = (pipe.scheduler.begin_index or 0) if index is None else index
        state["calls"] += 1
        latents = kwargs["hidden_states"]
        state["frames"] = latents.shape[2] if latents.ndim == 5 else 1

    of_frames = over_frames(rule, state)
    blocks = [
        (f"{kind}.{index}", block.attn)
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for index, block in enumerate(getattr(transformer, kind, ()))
    ]
    before = [layer.processor for _, layer in blocks]
    handle = transformer.register_forward_pre_hook(read, with_kwargs=True)
    for path, layer in blocks:
        follows = path.startswith(layers)
        made = dense(of_frames if follows else lambda row, rows: None)
        made.fault = fault if follows else None
        layer.set_processor(made)
    try:
        yield state
    finally:
        handle.remove()
        for (_, layer), processor in zip(blocks, before, strict=True):
            layer.set_processor(processor)
