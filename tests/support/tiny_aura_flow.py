"""Tiny AuraFlow pipelines, and their layers written out densely."""

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from transformers import T5Config, UMT5EncoderModel

from tests.support.dense_joint import DenseFlux, heads, linear
from tests.support.edited_transformers import Model
from tests.support.placed_words import T5
from tests.support.tiny_cogvideox import dense_cogvideox
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_vae

__all__ = ["AURA_FLOW", "tiny_aura_flow_that_encodes"]

_SIZE = {
    "sample_size": 16,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pos_embed_max_size": 64,
}


_LOUDER = ("to_q", "to_k", "add_q_proj", "add_k_proj", "to_v", "add_v_proj", "to_out", "time_step_proj")
_LOUDER += ("context_embedder",)


def tiny_aura_flow_pipeline(pipe, dtype=torch.float64, vae=None, **config):
    """An AuraFlow pipeline; its tokenizer is that of ``pipe``."""
    torch.manual_seed(0)
    text = T5Config(vocab_size=len(pipe.tokenizer), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = sharpened(AuraFlowTransformer2DModel(**_SIZE, **config))
    with torch.no_grad():  # its norms have no weights that could do so
        for name, parameter in model.named_parameters():
            if any(f"{part}." in f".{name}" for part in _LOUDER):
                parameter.mul_(4)
    tiny = AuraFlowPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=UMT5EncoderModel(text).to(dtype).eval(),
        vae=vae,
        transformer=model.to(dtype).eval(),
        scheduler=ExactEuler(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_aura_flow_that_encodes(pipe):
    """An AuraFlow pipeline with an autoencoder; its tokenizer is that of ``pipe``."""
    vae = tiny_vae().double()
    vae.register_to_config(shift_factor=None)  # of which the pipeline would take no notice
    return tiny_aura_flow_pipeline(pipe, vae=vae, in_channels=16, out_channels=16)


def draw_aura_flow(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, **options):
    """Latents [prompts, 4, h, w]; the rows start from the same noise."""
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.to(pipe.transformer.dtype).repeat(len(prompts), 1, 1, 1))
    return pipe(
        list(prompts),
        negative_prompt=["a drawing"] * len(prompts),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=T5,
        output_type="latent",
        **options,
    ).images


class _DenseAuraFlow(DenseFlux):
    """The layers of AuraFlow: text first, nothing turned, and projected behind single blocks' attention too."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        is_single, texts = encoder_hidden_states is None, self.texts()
        text, image = encoder_hidden_states, hidden_states
        if is_single:
            text, image = hidden_states[:, :texts], hidden_states[:, texts:]
        own = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
        added = own if is_single else ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
        parts = {"raw": heads(attn, attn.to_q, image)}
        for segment, tokens, names in (("text", text, added), ("image", image, own)):
            for letter, name, norm in zip("qkv", names[:3], (*names[3:], None), strict=True):
                parts[f"{letter}_{segment}"] = heads(attn, getattr(attn, name), tokens, norm and getattr(attn, norm))
        out = torch.stack([self.row(row, len(image), parts) for row in range(len(image))])
        if is_single:
            return linear(attn.to_out[0], out)
        return linear(attn.to_out[0], out[:, texts:]), linear(attn.to_add_out, out[:, :texts])


class _AuraFlow(Model):
    registers = 8

    def dense(self, pipe, rule, layers, fault):
        def made(chosen, _):
            return _DenseAuraFlow(chosen, lambda: T5 + self.registers)

        return dense_cogvideox(pipe, rule, layers=layers, fault=fault, made=made)


AURA_FLOW = _AuraFlow(tiny_aura_flow_pipeline, draw_aura_flow, is_doubled=True, family="aura")
