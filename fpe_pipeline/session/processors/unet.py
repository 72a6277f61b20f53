"""The attention processor that computes an edit's products; everywhere else it is the processor it replaced."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models import attention_processor as diffusers_processors
from diffusers.models.attention_processor import AttnProcessor2_0

from ...edits.products import ProductPlan
from ..layers.around import ProcessorAround, may_do_more
from ..layers.computing import Rows, mask_bias
from ..layers.image_prompts import IMAGE_PROMPT_PROCESSORS, image_prompt_attention, split_image_prompts
from ..layers.instructions import Order
from ..layers.places import turned
from ..layers.record import LayerRecord
from ..layers.row_attention import attended, check_rows, merged, of_heads, projected
from ..layers.straight_line import unedited_layer
from .straight import StraightAttnProcessor, goes_straight

__all__ = ["SLICED", "EditAttnProcessor", "Order", "editing_processor", "is_sliced", "unsupported_reasons"]

# Processors that compute plain attention and nothing else: an edit may compute a layer in their stead.
_PLAIN = tuple(
    getattr(diffusers_processors, name)
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "FusedHunyuanAttnProcessor2_0",
        "HunyuanAttnProcessor2_0",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    )
    if hasattr(diffusers_processors, name)
)

# With fused projections. The class of the processor tells whether they are in use: `attn.fused_projections` stays True
# after unfusing, and an adapter loaded since then lives in the separate ones.
_FUSED = tuple(kind for kind in _PLAIN if kind.__name__.startswith("Fused"))

#: Why a layer with attention slicing is not edited: a setting that would be dropped has to be dropped by the user.
SLICED = (
    "attention slicing is on, which computes a map in slices to bound its memory, and an edit computes the layer "
    "without ever storing its map: call pipe.disable_attention_slicing() first, or leave the layer out with layers="
)


def is_sliced(processor: Any) -> bool:
    """Whether a layer's processor is one that ``enable_attention_slicing`` sets."""
    return isinstance(
        processor, diffusers_processors.SlicedAttnProcessor | diffusers_processors.SlicedAttnAddedKVProcessor
    )


def unsupported_reasons(attn: Any, processor: Any, override: tuple[type, ...] = ()) -> list[str]:
    """Why a layer cannot be edited; empty where it can.

    Args:
        attn: the diffusers ``Attention`` module.
        processor: the processor it has without the edit.
        override: further processor classes that an edit may compute in the stead of.
    """
    reasons = []
    if is_sliced(processor):
        reasons.append(SLICED)
    elif type(processor) not in (*_PLAIN, *IMAGE_PROMPT_PROCESSORS, *override):
        reasons.append(may_do_more(processor))
    if getattr(attn, "added_kv_proj_dim", None) is not None:
        reasons.append("it projects added keys and values (added_kv_proj_dim), which no edit describes yet")
    if getattr(attn, "inner_kv_dim", None) != getattr(attn, "inner_dim", None):
        reasons.append("it has fewer key and value heads than query heads")
    return reasons


class EditAttnProcessor(ProcessorAround):
    """Drop-in processor for diffusers' ``Attention``, wrapped around the one that a layer already has.

    With an :class:`Order` it computes, in the place of ``softmax(q kᵀ) v`` for every row, the order's products:
    only the rows whose queries or keys some map uses are projected, no map is materialised, and rows that use
    the same map are computed together. Without an order it calls the processor it wraps, with the same arguments.
    Image prompts (IP-Adapter) are added to the edited attention over the text as they are to the unedited.

    Args:
        inner: the layer's processor without the edit.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        named = inspect.signature(inner.__call__).parameters
        self._inner_takes_temb = "temb" in named
        self._is_plain = type(inner) in _PLAIN and type(inner) not in _FUSED and "image_rotary_emb" not in named
        self._is_default = type(inner) is AttnProcessor2_0

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        order = self.order
        if order is not None and _scores_are_skipped():
            self.record = LayerRecord(skipped="a guider replaces the layer's attention by its values")
            order = None
        if order is None:
            if self._is_default and goes_straight(attn, hidden_states, attention_mask, kwargs):
                return unedited_layer(attn, hidden_states, encoder_hidden_states)
            if self._inner_takes_temb:
                kwargs["temb"] = temb
            return self.inner(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )
        line = None if torch.compiler.is_compiling() or not self._is_plain else order.straight_line
        if line is not None and line.serves(attn, hidden_states, encoder_hidden_states, attention_mask):
            out, self.record = line(attn, hidden_states)
            return out

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, N, C]
        text, images = split_image_prompts(order.site.path, self.inner, encoder_hidden_states)
        check_rows(order, hidden_states, [*images] if text is None else [text, *images])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if text is not None:
            context = text
            if attn.norm_cross is not None:
                context = attn.norm_encoder_hidden_states(context)

        # Every row asks for its own image, also where it takes another's map of the text.
        queries = tuple(range(order.plan.rows)) if images else order.row_plan.queries
        places = kwargs.get("image_rotary_emb")
        query, key, value = _project(attn, self.inner, order.row_plan, queries, hidden_states, context, places)
        bias = mask_bias(attention_mask, order.plan.rows, attn.heads, key)
        hidden_states, self.record = attended(order, query, key, value, attn.scale, bias)  # [B, H, N, E]
        if images:
            masks, options = kwargs.get("ip_adapter_masks"), {"scale": attn.scale, "backend": order.backend}
            added = image_prompt_attention(self.inner, query.tensor, images, masks, **options)
            hidden_states = hidden_states if added is None else hidden_states + added

        hidden_states = merged(hidden_states).to(value.tensor.dtype)  # [B, N, H·E]
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)  # dropout
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


# `Attention.forward` looks at it at every call, and working it out takes longer than launching the layer's attention.
EditAttnProcessor.__call__.__signature__ = inspect.signature(EditAttnProcessor.__call__)  # type: ignore[attr-defined]


class _EditAttnModule(EditAttnProcessor, torch.nn.Module):
    """The processor around one that is a module, such as an IP-Adapter's, in whose place it is a module itself.

    It shows the wrapped module's weights under the names that they had, so that during a session too they move with
    the UNet (offloading), are cast with it and are in its state dict.
    """

    def __init__(self, inner: torch.nn.Module) -> None:
        torch.nn.Module.__init__(self)
        EditAttnProcessor.__init__(self, inner)

    def _keep(self, inner: Any) -> None:
        self.__dict__["inner"] = inner  # not as a submodule, which would give the weights a second name
        for name in ("_modules", "_parameters", "_buffers"):
            self.__dict__[name] = inner.__dict__[name]


class _EditImagePrompts(_EditAttnModule):
    """The processor around an IP-Adapter's, whose scales are set and read in the wrapped one."""

    @property
    def scale(self) -> Any:
        return self.inner.scale

    @scale.setter
    def scale(self, scale: Any) -> None:
        self.inner.scale = scale


# diffusers tells an adapter's layers by the class of their processors: `set_ip_adapter_scale` in a session would pass
# by a wrapper of any other class without a word.
_AROUND = {kind: type(f"Edit{kind.__name__}", (_EditImagePrompts, kind), {}) for kind in IMAGE_PROMPT_PROCESSORS}


def editing_processor(inner: Any) -> EditAttnProcessor:
    """An :class:`EditAttnProcessor` around a layer's processor, of the kind that can stand where that one stood."""
    default = _EditAttnModule if isinstance(inner, torch.nn.Module) else EditAttnProcessor
    return _AROUND.get(type(inner), default)(inner)


def _project(
    attn: Any,
    inner: Any,
    plan: ProductPlan,
    queries: tuple[int, ...],
    hidden_states: torch.Tensor,
    context: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[Rows, Rows, Rows]:
    fused = isinstance(inner, _FUSED)
    query, key, value = (
        of_heads(part, attn.heads) for part in projected(attn, plan, queries, hidden_states, context, fused)
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    if places is not None:  # HunyuanDiT's: cosines and sines [N, D], each angle twice; text has no places
        cosines, sines = (table[..., ::2] for table in places)
        query = turned(query, cosines, sines)
        key = key if attn.is_cross_attention else turned(key, cosines, sines)
    # A norm may return a wider type (layer norm under autocast), which attention has to narrow again.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return Rows(query, queries), Rows(key, plan.keys), Rows(value, plan.values)


def _scores_are_skipped() -> bool:
    """Whether a guider (PAG, SLG) is replacing attention by its values.

    diffusers does that by intercepting ``F.scaled_dot_product_attention``, which a fused kernel never calls.
    """
    if torch.compiler.is_compiling() or not torch._C._is_torch_function_mode_enabled():
        return False  # while compiling, guiders' hooks are not traced
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in modes)


def _register() -> None:
    """Tell diffusers' hooks (layer skipping) that this processor returns hidden states as AttnProcessor2_0 does."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry
    except ImportError:  # diffusers before 0.34
        return
    metadata = AttentionProcessorRegistry.get(diffusers_processors.AttnProcessor2_0)
    for processor in (EditAttnProcessor, _EditAttnModule, StraightAttnProcessor, *_AROUND.values()):
        AttentionProcessorRegistry.register(processor, metadata)


_register()
