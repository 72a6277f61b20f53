"""Tiny Bria FIBO pipelines, and their layers written out densely."""

from contextlib import contextmanager

import diffusers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.dense_joint import DenseKontext, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened

__all__ = ["FIBO", "dense_fibo", "draw_fibo", "tiny_fibo_pipeline"]

_SIZE = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "text_encoder_dim": 32,
    "axes_dims_rope": (2, 2, 4),
}
_AUTOENCODER = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 8, "num_res_blocks": 1, "is_residual": True}
_AUTOENCODER |= {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
_AUTOENCODER |= {
    "latents_mean": [0.02 * place for place in range(8)],
    "latents_std": [1.0 + 0.1 * place for place in range(8)],
}
_LOUDER = ("to_v", "add_v_proj", "to_out.0", "proj_out", "norm.linear", "norm1.linear", "caption_projection")


_EMPTY = 128000  # the token that stands for the empty prompt


def tiny_fibo_pipeline(pipe=None, dtype=torch.float64, kind="BriaFiboPipeline", decodes=False, **parts):
    """A FIBO pipeline.

    Args:
        decodes: whether it has an autoencoder, of 16 pixels a latent, and an encoder that reads the empty prompt.
        parts: of it.
    """
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    encoder = LlamaForCausalLM(LlamaConfig(vocab_size=_EMPTY + 1 if decodes else len(tokenizer), **size))
    model = sharpened(diffusers.BriaFiboTransformer2DModel(**_SIZE))
    with torch.no_grad():  # so that layers say something
        for name, parameter in model.named_parameters():
            if any(f"{part}." in name for part in _LOUDER):
                parameter.mul_(3)
    vae = diffusers.AutoencoderKLWan(**_AUTOENCODER).to(dtype).eval() if decodes else None
    given = {"vae": vae, **parts}
    tiny = getattr(diffusers, kind)(
        transformer=model.to(dtype).eval(),
        scheduler=ExactEuler(),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        **given,
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_fibo(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, negative="a drawing", **options):
    """Packed latents [prompts, N, 8] of ``pipe``, which start from the same noise; a token is of 2 × 2 of the size."""
    noise = torch.randn(
        1, size[0] * size[1] // 4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    options.setdefault("latents", noise.to(pipe.transformer.dtype).repeat(len(prompts), 1, 1))
    return pipe(
        prompt=list(prompts),
        negative_prompt=[negative] * len(prompts),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **options,
    ).images


class _DenseFibo(DenseKontext):
    """The layers of FLUX.1, told of their keys which are padding of texts, before any reference picture's tokens."""

    def __init__(self, rule, state):
        super().__init__(rule, lambda: state["texts"], None)
        self.state = state

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        self.images = self.state["images"]
        self.mask = None if attention_mask is None else attention_mask[:, 0, 0, : self.texts()]
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


@contextmanager
def dense_fibo(pipe, rule, *, layers="", fault=None):
    """A pipeline whose layers with such paths follow ``rule(row, rows)``."""
    state = {"step": 0, "calls": 0}

    def read(module, args, kwargs):
        state.update(step=pipe.scheduler.step_index or 0, calls=state["calls"] + 1)
        state.update(texts=kwargs["encoder_hidden_states"].shape[1], images=int((kwargs["img_ids"][:, 0] == 0).sum()))

    def processor(name):
        follows = name.startswith(layers)
        made = _DenseFibo(rule if follows else lambda row, rows: None, state)
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _Fibo(Model):
    """Texts are as long as the longest of the batch."""

    def dense(self, pipe, rule, layers, fault):
        return dense_fibo(pipe, rule, layers=layers, fault=fault)

    def template(self, pipe):
        return "", "", 0


FIBO = _Fibo(tiny_fibo_pipeline, draw_fibo, is_doubled=True, family="fibo")
