"""Tiny pipelines of PixArt-α, whose model is told its images' size, and PixArt-Σ, and their layers, written out."""

from contextlib import contextmanager

import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch.nn import functional as F

from tests.support.tiny_transformers import sharpened, tiny_t5, tiny_vae

#: By name, the pipeline's class and what its model differs in.
KINDS = {
    "alpha": (PixArtAlphaPipeline, {"sample_size": 128, "interpolation_scale": 1, "use_additional_conditions": True}),
    "sigma": (PixArtSigmaPipeline, {"sample_size": 32, "use_additional_conditions": False}),
}


def tiny_pixart_pipeline(pipe, kind="sigma", dtype=torch.float64, **config):
    """One that predicts a variance beside the noise, which its pipeline drops."""
    torch.manual_seed(0)
    made, differences = KINDS[kind]
    sizes = {"num_attention_heads": 3, "attention_head_dim": 8, "cross_attention_dim": 24, "num_layers": 3}
    sizes |= {"in_channels": 16, "out_channels": 32, "caption_channels": 32}
    transformer = PixArtTransformer2DModel(**(sizes | differences | config))
    tiny = made(
        tokenizer=pipe.tokenizer,
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        vae=tiny_vae().to(dtype),
        transformer=sharpened(transformer).to(dtype).eval(),
        scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1, clip_sample=False),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


class Dense:
    """A processor that writes every map out: ``rule(row, rows, maps, values)`` gives a row's output, or None."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            F.linear(given, layer.weight, layer.bias).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, given in ((attn.to_q, hidden_states), (attn.to_k, tokens), (attn.to_v, tokens))
        )
        rows = hidden_states.shape[0]

        def map_of(queries, keys):
            scores = query[queries] @ key[keys].mT / query.shape[-1] ** 0.5
            return (scores if attention_mask is None else scores + attention_mask[keys]).softmax(-1)

        out = []
        for row in range(rows):
            given = self.rule(row, rows, map_of, value)
            out.append(map_of(row, row) @ value[row] if given is None else given)
        merged = torch.stack(out).transpose(1, 2).flatten(2)
        return F.linear(merged, attn.to_out[0].weight, attn.to_out[0].bias)


@contextmanager
def dense_pixart(pipe, rules, steps):
    """Layers by the end of their path, "attn1" and "attn2", whose rows follow a rule at some steps."""
    transformer, state = pipe.transformer, {"call": -1}

    def follow(kind):
        def rule(*given):
            return rules[kind](*given) if kind in rules and state["call"] in steps else None

        return rule

    def count(*_):
        state["call"] += 1

    before = dict(transformer.attn_processors)
    hook = transformer.register_forward_pre_hook(count)
    transformer.set_attn_processor({name: Dense(follow(name.split(".")[-2])) for name in before})
    try:
        yield
    finally:
        hook.remove()
        transformer.set_attn_processor(before)


def source_maps(row, rows, map_of, value):
    """Free-Prompt-Editing: prompts' rows after the first attend as the first does."""
    source = rows // 2
    return map_of(source, source) @ value[row] if row > source else None


def source_memory(row, rows, map_of, value):
    """MasaCtrl, in both halves."""
    source = row // (rows // 2) * (rows // 2)
    return map_of(row, source) @ value[source] if row > source else None
