"""What processors of layers have in common whose rows have one kind of tokens: projections, products, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...edits.products import ProductPlan
from .computing import Projections, Rows, evaluate, row_maps, take
from .instructions import Order
from .record import LayerRecord

__all__ = ["attended", "check_rows", "merged", "of_heads", "projected"]


def attended(
    order: Order, query: Rows, key: Rows, value: Rows, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, LayerRecord]:
    """A layer's attention [B, H, N, E] from the projected rows that an order's plan names, and what is told of it."""
    if order.compute is not None:
        return order.compute(query, key, value, scale, bias), LayerRecord()
    logsumexp: dict[int, torch.Tensor] = {}
    if order.recorded is not None:
        if bias is not None:
            raise ValueError(f"{order.site.path} receives an attention mask, which recordings do not hold")
        known = order.recorded.unpacked(value.tensor.dtype)
        logsumexp = known["logsumexp"]
        query, key, value = (
            replace(own, recorded=known[part]) for part, own in (("query", query), ("key", key), ("value", value))
        )
    layer = Projections(query, key, value, scale, bias, order.backend, logsumexp)
    record = LayerRecord("", value.tensor.element_size(), *_bytes(order.row_plan, query, key, value))
    out, heat = evaluate(order.row_plan, layer, order.columns)
    if order.deliver is not None:
        order.deliver(heat, row_maps(order.row_plan, order.maps, layer))
    return out, record


def check_rows(order: Order, hidden_states: torch.Tensor, contexts: Sequence[torch.Tensor]) -> None:
    """Raise ValueError where a layer receives something else than its order was made for.

    Args:
        order: of the layer.
        hidden_states: [B, N, C].
        contexts: what else it attends to, a row of the batch a row.
    """
    site = order.site
    batches = [given.shape[0] for given in (hidden_states, *contexts)]
    if any(batch != order.plan.rows for batch in batches):
        raise ValueError(f"{site.path} was planned for a batch of {order.plan.rows} rows and got {batches}")
    if hidden_states.shape[1] != site.tokens:
        raise ValueError(
            f"{site.path} was expected to have {site.grid} = {site.tokens} tokens and got "
            f"{hidden_states.shape[1]}: something between the latent and this layer changes its size"
        )


def projected(
    attn: Any,
    plan: ProductPlan,
    queries: tuple[int, ...],
    tokens: torch.Tensor,
    context: torch.Tensor,
    fused: bool,
    names: tuple[str, str, str] = ("to_q", "to_k", "to_v"),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of the rows that are used, heads in one dimension: [rows, N | M, H·D].

    The layer's linear modules are called, whatever they are: weights that are quantised or adapted are never read.

    Args:
        attn: the layer.
        plan: which rows' keys and values are used.
        queries: whose queries are used.
        tokens: what asks [B, N, C].
        context: what is asked [B, M, C'], the same object in self-attention.
        fused: whether the layer's fused projections are in use.
        names: of the layer's projections of queries, keys and values.
    """
    if fused and context is tokens:
        query, key, value = attn.to_qkv(tokens).chunk(3, dim=-1)
        return take(query, queries), take(key, plan.keys), take(value, plan.values)
    to_query, to_key, to_value = (getattr(attn, name) for name in names)
    query = to_query(take(tokens, queries))
    if fused:
        key, value = attn.to_kv(context).chunk(2, dim=-1)
        return query, take(key, plan.keys), take(value, plan.values)
    return query, to_key(take(context, plan.keys)), to_value(take(context, plan.values))


def of_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[rows, N, H·D] as [rows, H, N, D]."""
    split: torch.Tensor = tensor.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def merged(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, N, E] as [B, N, H·E]."""
    return tensor.transpose(1, 2).flatten(2)


def _bytes(plan: ProductPlan, query: Rows, key: Rows, value: Rows) -> tuple[int, int]:
    """Bytes of what a layer's products are made from, and of a map for every row, which dense code keeps."""
    tensors = (query.tensor, key.tensor, value.tensor)
    _, heads, queries, _ = query.tensor.shape
    keys = key.tensor.shape[-2] * max(len(spec.keys) for call in plan.calls for spec in call.maps)
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return held, plan.rows * heads * queries * keys * query.tensor.element_size()
