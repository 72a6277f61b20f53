"""The attention processor that computes an edit's products; everywhere else it is the processor it replaced."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_processor as diffusers_processors

from fpe_kernels import shared_attention

from .products import AttentionCall, ProductPlan
from .sites import Site

__all__ = ["EditAttnProcessor", "Order", "unsupported_reasons"]

# Processors that compute plain attention and nothing else: an edit may compute a layer in their stead.
_PLAIN = tuple(
    getattr(diffusers_processors, name)
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    )
    if hasattr(diffusers_processors, name)
)


@dataclass(frozen=True)
class Order:
    """What a processor is to do in the UNet call at hand."""

    site: Site
    plan: ProductPlan
    backend: str = "auto"


def unsupported_reasons(attn: Any, processor: Any, override: tuple[type, ...] = ()) -> list[str]:
    """Why a layer cannot be edited; empty where it can.

    Args:
        attn: the diffusers ``Attention`` module.
        processor: the processor it has without the edit.
        override: further processor classes that an edit may compute in the stead of.
    """
    reasons = []
    if type(processor) not in (*_PLAIN, *override):
        reasons.append(
            f"its processor {type(processor).__name__} may do more than attention, which an edit would drop: leave "
            "the layer out with layers=, or allow the class with editing(..., override_processors=(…,))"
        )
    if getattr(attn, "added_kv_proj_dim", None) is not None:
        reasons.append("it projects added keys and values (added_kv_proj_dim), which no edit describes yet")
    if getattr(attn, "inner_kv_dim", None) != getattr(attn, "inner_dim", None):
        reasons.append("it has fewer key and value heads than query heads")
    return reasons


class EditAttnProcessor:
    """Drop-in processor for diffusers' ``Attention``, wrapped around the one that a layer already has.

    With an :class:`Order` it computes, in the place of ``softmax(q kᵀ) v`` for every row, the order's products:
    only the rows whose queries or keys some map uses are projected, no map is materialised, and rows that use
    the same map are computed together. Without an order it calls the processor it wraps, with the same arguments.

    Args:
        inner: the layer's processor without the edit.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.order: Order | None = None
        self.executed = False
        # `Attention.forward` passes on only those keywords that it finds in `inspect.signature(processor.__call__)`,
        # so this attribute shows it the signature of `inner`. Calls go to the class's method all the same.
        self.__dict__["__call__"] = _SignatureOf(inner, self)

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.order is None or _scores_are_skipped():
            return self.inner(attn, *args, **kwargs)
        self.executed = True
        return self._edited(self.order, attn, *args, **kwargs)

    def _edited(
        self,
        order: Order,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, N, C]
        _check_input(order, hidden_states, encoder_hidden_states)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross is not None:
                context = attn.norm_encoder_hidden_states(context)

        query, key, value = _project(attn, self.inner, order.plan, hidden_states, context)
        bias = _mask_bias(attention_mask, order.plan.rows, attn.heads, key)
        hidden_states = _compute(order, query, key, value, bias, attn.scale)  # [B, H, N, E]

        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(residual.dtype)  # [B, N, H·E]
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)  # dropout
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class _SignatureOf:
    """A processor that ``inspect.signature`` takes for another one."""

    def __init__(self, inner: Any, processor: EditAttnProcessor) -> None:
        self.__signature__ = inspect.signature(inner.__call__)
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.processor(*args, **kwargs)


def _project(
    attn: Any, inner: Any, plan: ProductPlan, hidden_states: torch.Tensor, context: torch.Tensor
) -> tuple[_Rows, _Rows, _Rows]:
    # The class of the processor tells whether fused projections are in use: `attn.fused_projections` stays True
    # after unfusing, and an adapter loaded since then lives in the separate ones.
    if isinstance(inner, diffusers_processors.FusedAttnProcessor2_0):
        if attn.is_cross_attention:
            query = attn.to_q(_take(hidden_states, plan.queries))
            key, value = attn.to_kv(context).chunk(2, dim=-1)
            key, value = _take(key, plan.keys), _take(value, plan.values)
        else:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            query, key, value = _take(query, plan.queries), _take(key, plan.keys), _take(value, plan.values)
    else:
        query = attn.to_q(_take(hidden_states, plan.queries))
        key = attn.to_k(_take(context, plan.keys))
        value = attn.to_v(_take(context, plan.values))
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return _Rows(query, plan.queries), _Rows(key, plan.keys), _Rows(value, plan.values)


@dataclass(frozen=True)
class _Rows:
    """Some rows of the batch, by their number in the whole batch."""

    tensor: torch.Tensor  # [len(rows), H, N, E]
    rows: tuple[int, ...]

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        return _take(self.tensor, [self.rows.index(row) for row in rows])

    def concatenated(self, groups: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """For each group of rows, their tokens one after the other: [len(groups), H, len(group)·M, E]."""
        if all(len(group) == 1 for group in groups):
            return self.take([row for (row,) in groups])
        return torch.stack([torch.cat([self.take([row])[0] for row in group], dim=-2) for group in groups])


def _take(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """``tensor[rows]`` without an index tensor, which would have to be copied to the device; a view where it can be."""
    if len(rows) == tensor.shape[0] and all(row == index for index, row in enumerate(rows)):
        return tensor
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    pieces = [tensor[start:stop] for start, stop in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _compute(
    order: Order, query: _Rows, key: _Rows, value: _Rows, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    outputs: list[torch.Tensor | None] = [None] * order.plan.rows
    for call in order.plan.calls:
        result = shared_attention(
            query.take([row for row, _ in call.maps]),
            key.concatenated([keys for _, keys in call.maps]),
            _values(call, value),
            call.map_index,
            scale=scale,
            bias=_map_bias(call, bias),
            backend=order.backend,
        )  # [len(products), H, N, E]
        if call.is_plain and len(call.products) == order.plan.rows:
            return result
        for row, product, term in zip(call.rows, call.products, result):
            weight = product.weight
            if isinstance(weight, torch.Tensor):
                weight = weight.to(term)[:, None]  # [N, 1], over heads and channels
            term = term * weight
            outputs[row] = term if outputs[row] is None else outputs[row] + term
    return torch.stack([output for output in outputs if output is not None])


def _values(call: AttentionCall, value: _Rows) -> torch.Tensor:
    values = value.concatenated([product.values for product in call.products])
    if all(product.mixing is None for product in call.products):
        return values
    mixed = [
        row if product.mixing is None else product.mixing.to(row) @ row
        for product, row in zip(call.products, values)
    ]
    return torch.stack(mixed)


def _mask_bias(mask: torch.Tensor | None, rows: int, heads: int, key: _Rows) -> torch.Tensor | None:
    """A processor's ``attention_mask`` as a bias [B, 1 | H, 1 | N, M] of every row of the batch."""
    if mask is None:
        return None
    if mask.shape[-1] != key.tensor.shape[-2]:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} masks {mask.shape[-1]} keys; the layer has "
            f"{key.tensor.shape[-2]}: pad the mask to the keys' number"
        )
    if mask.ndim == 2:
        mask = mask[:, None]
    if mask.ndim == 3:  # [B, …] or, as Attention.prepare_attention_mask leaves it, [B·H, …]
        mask = mask.unflatten(0, (rows, heads)) if mask.shape[0] == rows * heads and heads > 1 else mask[:, None]
    if mask.ndim != 4 or mask.shape[0] not in (1, rows):
        raise ValueError(f"expected an attention_mask for a batch of {rows} rows, got shape {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=key.tensor.dtype).masked_fill_(~mask, float("-inf"))
    return mask.to(key.tensor.dtype).expand(rows, -1, -1, -1)


def _map_bias(call: AttentionCall, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias of each map. A mask says which keys exist, so it follows the keys."""
    if bias is None:
        return None
    return _Rows(bias.transpose(-1, -2), tuple(range(bias.shape[0]))).concatenated(
        [keys for _, keys in call.maps]
    ).transpose(-1, -2)


def _check_input(order: Order, hidden_states: torch.Tensor, encoder_hidden_states: Any) -> None:
    site = order.site
    if isinstance(encoder_hidden_states, tuple):
        raise ValueError(f"{site.path} receives image prompts (IP-Adapter), whose attention no edit describes yet")
    batches = [hidden_states.shape[0]] + ([] if encoder_hidden_states is None else [encoder_hidden_states.shape[0]])
    if any(batch != order.plan.rows for batch in batches):
        raise ValueError(f"{site.path} was planned for a batch of {order.plan.rows} rows and received {batches}")
    if hidden_states.shape[1] != site.tokens:
        raise ValueError(
            f"{site.path} was expected to have {site.grid} = {site.tokens} tokens and received "
            f"{hidden_states.shape[1]}: something between the latent and this layer changes its size"
        )


def _scores_are_skipped() -> bool:
    """Whether a guider (PAG, SLG) is replacing attention by its values.

    diffusers does that by intercepting ``F.scaled_dot_product_attention``, which a fused kernel never calls.
    """
    if _SkipMode is None or torch.compiler.is_compiling():
        return False
    return any(isinstance(mode, _SkipMode) for mode in torch.overrides._get_current_function_mode_stack())


try:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode as _SkipMode
except ImportError:  # older diffusers has no such guiders
    _SkipMode = None


def _register() -> None:
    """Tell diffusers' hooks (layer skipping) that this processor returns hidden states as AttnProcessor2_0 does."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry
    except ImportError:  # diffusers before 0.34
        return
    metadata = AttentionProcessorRegistry.get(diffusers_processors.AttnProcessor2_0)
    AttentionProcessorRegistry.register(EditAttnProcessor, metadata)


_register()
