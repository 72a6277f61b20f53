"""Joint attention written out densely, from the papers' rules: tokens are exchanged, then there is one softmax."""

from contextlib import contextmanager

import torch
from torch.nn import functional as F


class DenseJoint:
    """A processor that exchanges tokens between rows and computes every map: ``rule(row)`` says which tokens.

    Args:
        rule: for a row (``rows`` in all), None for its own tokens; or a list of (weight, sources), terms that are added
            up. A term's sources are a mapping from "q_image", "q_text", "k_image" … "v_text" to the row whose tokens
            stand there; what it leaves out is the row's own.
    """

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        image, text = hidden_states, encoder_hidden_states
        parts = {
            "q_image": heads(attn, attn.to_q, image, attn.norm_q),
            "k_image": heads(attn, attn.to_k, image, attn.norm_k),
            "v_image": heads(attn, attn.to_v, image),
        }
        if text is not None:
            parts |= {
                "q_text": heads(attn, attn.add_q_proj, text, attn.norm_added_q),
                "k_text": heads(attn, attn.add_k_proj, text, attn.norm_added_k),
                "v_text": heads(attn, attn.add_v_proj, text),
            }
        rows = hidden_states.shape[0]
        out = torch.stack([self.row(row, rows, parts) for row in range(rows)])
        tokens = image.shape[1]
        out_image = linear(attn.to_out[0], out[:, :tokens])
        if text is None:
            return out_image
        out_text = out[:, tokens:]
        return out_image, out_text if attn.context_pre_only else linear(attn.to_add_out, out_text)

    def row(self, row, rows, parts):
        total = 0
        for weight, sources in self.rule(row, rows) or [(1.0, {})]:
            tokens = {name: part[sources.get(name, row)] for name, part in parts.items()}
            query, key, value = (
                torch.cat(
                    [tokens[f"{name}_{segment}"] for segment in ("image", "text") if f"{name}_{segment}" in tokens], 1
                )
                for name in "qkv"
            )
            scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
            exponentials = torch.exp(scores - scores.max(dim=2, keepdim=True).values)
            term = exponentials / exponentials.sum(dim=2, keepdim=True) @ value  # [H, tokens, D]
            if isinstance(weight, torch.Tensor):
                rest = term.shape[1] - weight.numel()
                weight = torch.cat([weight, weight.mean().expand(rest)])[:, None]
            total = total + weight * term
        return total.transpose(0, 1).flatten(1)


def linear(projection, tokens):
    return F.linear(tokens, projection.weight, projection.bias)


def heads(attn, projection, tokens, norm=None):
    split = linear(projection, tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


@contextmanager
def dense(pipe, rule, *, steps, kinds=("attn",)):
    """A pipeline whose layers of these names follow ``rule(row, rows)`` at some steps, and are dense at all."""
    transformer = pipe.transformer
    state = {"step": 0}

    def at_step(row, rows):
        return rule(row, rows) if state["step"] in steps else None

    def read(module, args, kwargs):
        index = pipe.scheduler.step_index
        state["step"] = (pipe.scheduler.begin_index or 0) if index is None else index

    before = dict(transformer.attn_processors)
    handle = transformer.register_forward_pre_hook(read, with_kwargs=True)
    transformer.set_attn_processor(
        {name: DenseJoint(at_step if name.split(".")[-2] in kinds else own) for name in before}
    )
    try:
        yield
    finally:
        handle.remove()
        transformer.set_attn_processor(before)


def own(row, rows):
    return None
