"""Independent dense mathematics: every map is written out, row by row."""

import torch
from torch.nn import functional as F


def dense_attention(attn, hidden_states, products, *, context=None, mask=None, temb=None):
    """What a diffusers `Attention` gives when row b's output is the sum of ``products[b]``.

    Args:
        products: for each row, a list of (query row, key rows, value rows, weight, mixing), and maybe a scale.
        mask: an additive [B, H, N, M], or None.
    """
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.reshape(*hidden_states.shape[:2], -1).permute(0, 2, 1)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.permute(0, 2, 1)).permute(0, 2, 1)
    if context is None:
        context = hidden_states
    elif attn.norm_cross is not None:
        context = attn.norm_encoder_hidden_states(context)

    def heads(projection, tokens, norm=None):
        x = F.linear(tokens, projection.weight, projection.bias)
        x = x.reshape(*x.shape[:2], attn.heads, -1).permute(0, 2, 1, 3)
        return x if norm is None else norm(x)

    query = heads(attn.to_q, hidden_states, attn.norm_q)
    key = heads(attn.to_k, context, attn.norm_k)
    value = heads(attn.to_v, context)

    rows = []
    for terms in products:
        total = 0
        for query_row, key_rows, value_rows, weight, mixing, *scale in terms:
            keys = torch.cat([key[row] for row in key_rows], dim=1)
            values = torch.cat([value[row] for row in value_rows], dim=1)
            scores = (scale or [1.0])[0] * attn.scale * query[query_row] @ keys.transpose(1, 2)
            if mask is not None:
                scores = scores + torch.cat([mask[row] for row in key_rows], dim=2)
            weights = torch.exp(scores - scores.max(dim=2, keepdim=True).values)
            attention_map = weights / weights.sum(dim=2, keepdim=True)  # [H, N, M]
            if mixing is not None:
                values = mixing @ values
            term = attention_map @ values
            total = total + (weight[..., None] * term if isinstance(weight, torch.Tensor) else weight * term)
        rows.append(total.permute(1, 0, 2).reshape(total.shape[1], -1))
    out = F.linear(torch.stack(rows), attn.to_out[0].weight, attn.to_out[0].bias)
    if residual.ndim == 4:
        out = out.permute(0, 2, 1).reshape(residual.shape)
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor


class DenseEditProcessor:
    """A processor that computes an edit densely: ``rule(row)`` gives row b's list of products, or None for its own."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        products = [self.rule(row) or [own(row)] for row in range(hidden_states.shape[0])]
        return dense_attention(attn, hidden_states, products, context=encoder_hidden_states, temb=temb)


def own(row):
    """The product of an unedited row."""
    return row, (row,), (row,), 1.0, None


def replaced(source, row):
    """Free-Prompt-Editing's product."""
    return source, (source,), (row,), 1.0, None
