"""Tiny Bria FIBO 2 pipelines, and their layers written out densely."""

from contextlib import contextmanager, nullcontext

import diffusers
import torch
from diffusers.models.transformers import transformer_bria_fibo2
from diffusers.pipelines.bria_fibo2 import pipeline_bria_fibo2

from tests.support.dense_joint import DenseFlux, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_transformers import ExactEuler, sharpened
from tests.support.wide_torch import widened

__all__ = ["FIBO2", "draw_bria_fibo2", "embedded", "tiny_bria_fibo2_pipeline"]

_WIDTH = 16  # of text features
_SIZE = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": _WIDTH,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    # Of texts of 4 to 12 words.
    "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 12,
    "gist_step": 2,
    "gist_min_text_len": 4,
    "gist_max_text_len": 12,
    "axes_dims": (4, 6, 6),
    "axes_lens": (32, 32, 32),
}


def tiny_bria_fibo2_pipeline(pipe=None, dtype=torch.float64):
    """A FIBO 2 pipeline without encoder and decoder: it takes embeddings and gives latents."""
    torch.manual_seed(0)
    model = sharpened(diffusers.BriaFibo2Transformer2DModel(**_SIZE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN_modulation" in name or "cross_attn_gate" in name:  # gates of what layers say
                parameter.normal_(std=0.2)
    tiny = diffusers.BriaFibo2Pipeline(model.to(dtype).eval(), ExactEuler(), None, None, None)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def embedded(prompts, dtype, seed=0):
    """Features of a token for each word, padded to the longest prompt, and which of them count; None where all do."""
    lengths = [len(prompt.split()) for prompt in prompts]
    features = torch.zeros(len(prompts), 2, max(lengths), _WIDTH, dtype=dtype)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        noise = torch.Generator().manual_seed(seed + sum(map(ord, prompt)))
        features[row, :, :length] = torch.randn(2, length, _WIDTH, generator=noise, dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return features, None if bool(mask.all()) else mask


def draw_bria_fibo2(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, pictures=None, **options):
    """Latents of ``pipe`` for prompts, which start from the same noise and edit the same pictures, if any."""
    dtype = pipe.transformer.dtype
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(prompts), 1, 1, 1))
    texts, mask = embedded(prompts, dtype)
    away, away_mask = embedded(["a drawing of a house", *["a drawing"] * (len(prompts) - 1)], dtype, seed=1)
    shown = {} if pictures is None else {"context_latents": pictures}  # which an encoder would have made latents of
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **shown}), with_kwargs=True, prepend=True
    )
    try:
        with widened(pipeline_bria_fibo2, transformer_bria_fibo2) if dtype is torch.float64 else nullcontext():
            return pipe(
                prompt_embeds=texts,
                prompt_embeds_mask=mask,
                negative_prompt_embeds=away,
                negative_prompt_embeds_mask=away_mask,
                guidance_scale=guidance,
                height=size[0] * 8,
                width=size[1] * 8,
                num_inference_steps=steps,
                output_type="latent",
                **options,
            ).images
    finally:
        handle.remove()


class _DenseFibo2(DenseFlux):
    """The layers of FIBO 2: gist tokens first, or last where some of them are padding; pictures behind the image."""

    order = ("text", "image", "reference")

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        images, pictures = self.texts()
        gist = hidden_states.shape[1] - images - pictures
        names = ("text", "image", "reference") if attention_mask is None else ("image", "reference", "text")
        counts, parts = {"text": gist, "image": images, "reference": pictures}, {}
        for letter in "qkv":
            part = linear(getattr(attn, f"to_{letter}"), hidden_states).unflatten(-1, (attn.heads, -1))
            raw = part
            if letter != "v":
                pairs = torch.view_as_complex(getattr(attn, f"norm_{letter}")(part).unflatten(-1, (-1, 2)))
                part = torch.view_as_real(pairs * freqs_cis[:, :, None]).flatten(-2)
            split = part.transpose(1, 2).split([counts[name] for name in names], dim=2)
            parts |= {f"{letter}_{name}": one for name, one in zip(names, split, strict=True) if counts[name]}
            if letter == "q":
                start = names.index("image") and gist
                parts["raw"] = raw.transpose(1, 2)[:, :, start : start + images]
        self.mask = None if attention_mask is None else attention_mask[:, -gist:]
        out = torch.stack([self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))])
        if attention_mask is not None:
            out = torch.cat([out[:, gist:], out[:, :gist]], dim=1)
        return linear(attn.to_out[0], out)


@contextmanager
def _dense(pipe, rule, *, layers="", fault=None):
    state = {"step": 0, "calls": 0, "tokens": (0, 0)}

    def read(module, args, kwargs):
        pictures = sum(given[0, 0].numel() // 4 for given in kwargs.get("context_latents") or ())
        state.update(step=pipe.scheduler.step_index or 0, calls=state["calls"] + 1)
        state["tokens"] = kwargs["hidden_states"][0, 0].numel() // 4, pictures

    def processor(name):
        if not name.startswith("layers") or "cross_attention" in name:
            return pipe.transformer.get_submodule(name.removesuffix(".processor")).processor
        follows = name.startswith(layers)
        made = _DenseFibo2(rule if follows else lambda row, rows: None, lambda: state["tokens"])
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _Fibo2(Model):
    def dense(self, pipe, rule, layers, fault):
        return _dense(pipe, rule, layers=layers, fault=fault)


FIBO2 = _Fibo2(tiny_bria_fibo2_pipeline, draw_bria_fibo2, family="fibo2")
