"""Tiny CogVideoX pipelines, and their layers written out densely."""

from contextlib import contextmanager

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from tests.support.dense_joint import DenseFlux, heads, linear, replaced_processors
from tests.support.tiny_transformers import sharpened, tiny_t5

TEXTS = 12
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "time_embed_dim": 16,
    "text_embed_dim": 32,
    "num_layers": 3,
    "sample_height": 8,
    "sample_width": 8,
    "sample_frames": 9,
    "max_text_seq_length": TEXTS,
}
#: The 2B model adds places to its tokens, the 5B ones turn queries and keys, and 1.5 takes two frames together.
KINDS = {
    "2B": {},
    "5B": {"use_rotary_positional_embeddings": True},
    "1.5": {
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
        "sample_height": 16,
        "sample_width": 16,
    },
}


def tiny_cogvideox_pipeline(pipe, shape="5B", dtype=torch.float64, kind=CogVideoXPipeline, scheduler=None, **parts):
    """A CogVideoX pipeline, by default without an autoencoder."""
    torch.manual_seed(0)
    tiny = kind(
        tokenizer=pipe.tokenizer,
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        transformer=sharpened(CogVideoXTransformer3DModel(**{**COGVIDEOX, **KINDS[shape]})).to(dtype).eval(),
        scheduler=scheduler or CogVideoXDDIMScheduler(),
        **{"vae": None, **parts},
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_cogvideox(pipe, prompts, *, steps=4, size=(8, 8), frames=2, guidance_scale=3.0, seed=0, **options):
    """Latents [prompts, frames, 16, h, w]; the rows start from the same noise."""
    noise = torch.randn(1, frames, 16, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.to(pipe.transformer.dtype).repeat(len(prompts), 1, 1, 1, 1))
    return pipe(
        list(prompts),
        negative_prompt=["a drawing"] * len(prompts),
        height=size[0] * 8,
        width=size[1] * 8,
        num_frames=4 * frames - 3,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXTS,
        output_type="latent",
        **options,
    ).frames


class DenseCogVideoX(DenseFlux):
    """The layers of CogVideoX: text and image by the same weights, and image tokens alone turned."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        parts, texts = {}, encoder_hidden_states.shape[1]
        for segment, tokens in (("text", encoder_hidden_states), ("image", hidden_states)):
            for letter, norm in zip("qkv", (attn.norm_q, attn.norm_k, None), strict=True):
                parts[f"{letter}_{segment}"] = heads(attn, getattr(attn, f"to_{letter}"), tokens, norm)
        if image_rotary_emb is not None:
            still = [torch.ones_like(image_rotary_emb[0][:1]), torch.zeros_like(image_rotary_emb[1][:1])]
            image_rotary_emb = [
                torch.cat([none.expand(texts, -1), turns]) for none, turns in zip(still, image_rotary_emb, strict=True)
            ]
            out = self.attended(parts, heads(attn, attn.to_q, hidden_states), image_rotary_emb)
        else:
            parts["raw"] = heads(attn, attn.to_q, hidden_states)
            out = torch.stack([self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))])
        out = linear(attn.to_out[0], out)
        return out[:, texts:], out[:, :texts]


def over_frames(rule, state):
    """The rule in which shares of a frame's tokens are every frame's, of which the state says how many there are."""

    def spread(given):
        return given.repeat(state["frames"]) if isinstance(given, torch.Tensor) else given

    def of_frames(row, rows):
        terms = rule(row, rows)
        if not isinstance(terms, list):
            return terms
        return [
            (
                spread(weight),
                {
                    name: (source[0], source[1], spread(source[2])) if isinstance(source, tuple) else source
                    for name, source in sources.items()
                },
            )
            for weight, sources in terms
        ]

    return of_frames


@contextmanager
def dense_cogvideox(pipe, rule, *, layers="", fault=None, calls=1, made=DenseCogVideoX):
    """A pipeline whose layers with such paths follow ``rule(row, rows)``; shares of a frame's tokens are every frame's.

    Each step is so many calls of the model.
    """
    state, transformer = {"step": -1, "calls": 0, "tokens": 0}, pipe.transformer

    def read(module, args, kwargs):
        latents = args[0] if args else kwargs["hidden_states"]
        state["calls"] += 1
        state["step"] = (state["calls"] - 1) // calls % len(pipe.scheduler.timesteps)
        state["frames"] = 1 if latents.ndim == 4 else latents.shape[1] // (module.config.patch_size_t or 1)

    of_frames = over_frames(rule, state)

    def processor(name):
        follows = name.startswith(layers)
        dense = made(of_frames if follows else _own, None)
        dense.fault = fault if follows else None
        return dense

    handle = transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(transformer, processor):
            yield state
    finally:
        handle.remove()


def _own(row, rows):
    return None
