"""What the tests of silent faults share: the embedded model under plain diffusers, and heat from maps written out."""

import copy
import functools

import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional as F

from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs.loading import load_pipeline

SOURCE, TARGET = "a photo of a red car on the beach", "a photo of a blue car on the beach"


def embedded(kind=StableDiffusionPipeline, **parts):
    """A pipeline of some class around the embedded model, with parts of one's own."""
    pipe = kind(**{**copy.deepcopy(_loaded().components), **parts}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _loaded():
    """What every pipeline has a copy of: reading takes longer."""
    return load_pipeline(find_model("embedded"), dtype=torch.float32, device="cpu")


def noise(*seeds):
    """Latents [seeds, 4, 20, 20]."""
    return torch.cat([torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def add_token(pipe, name, vectors, seed=0):
    """A textual inversion with random embeddings, and the embeddings' rows in the vocabulary."""
    table = pipe.text_encoder.get_input_embeddings().weight
    spread = torch.randn(vectors, table.shape[1], generator=torch.Generator().manual_seed(seed)) * table.std()
    pipe.load_textual_inversion({name: spread})


def positions(pipe, prompt, *texts):
    """Where the tokens of some texts are in what the pipeline's text encoder receives for a prompt."""
    received = []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: received.append(kwargs.get("input_ids", args[0] if args else None)),
        with_kwargs=True,
    )
    pipe.encode_prompt(prompt, "cpu", 1, False)
    hook.remove()
    wanted = {pipe.tokenizer.convert_tokens_to_ids(text) for text in texts}
    return [place for place, token in enumerate(received[0][0].tolist()) if token in wanted]


class _Dense:
    """A layer whose map is written out; the heat of some tokens is added up on the way."""

    def __init__(self, tokens, row, sums):
        self.tokens, self.row, self.sums = list(tokens), row, sums

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        key, value = heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))
        scores = query.double() @ key.double().transpose(-1, -2) * attn.scale
        attention = torch.softmax(scores, -1).to(query)
        heat = attention[self.row(len(attention))].mean(0)[:, self.tokens].sum(-1)
        self.sums.append(heat.reshape(1, 1, int(len(heat) ** 0.5), -1))
        return attn.to_out[0]((attention @ value).transpose(1, 2).flatten(2))


def dense_heat(pipe, call, tokens, row):
    """Mean heat [h, w] of some token positions over a call's cross-attention; ``row(rows)`` is the row that is read."""
    sums, before = [], dict(pipe.unet.attn_processors)
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(_Dense(tokens, row, sums))
    try:
        call()
    finally:
        pipe.unet.set_attn_processor(before)
    finest = max(heat.shape[-1] for heat in sums)
    return torch.stack([F.interpolate(heat, (finest, finest), mode="bilinear")[0, 0] for heat in sums]).mean(0)
