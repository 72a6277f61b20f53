"""The attention processor that computes an edit's joint products; everywhere else it is the processor it replaced."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_processor as diffusers_processors

from ..edits.joint_products import JointPlan
from .around import ProcessorAround, may_do_more
from .computing import Rows, take
from .instructions import Order
from .joint_computing import JointLayer, SegmentProjections, evaluate_joint, text_maps
from .record import LayerRecord

__all__ = [
    "EditJointProcessor",
    "check_joint_input",
    "is_fused",
    "joint_record",
    "joint_rows",
    "merged_heads",
    "unsupported_joint_reasons",
]

# Processors that compute plain joint attention and nothing else: an edit may compute a layer in their stead.
_PLAIN = tuple(
    getattr(diffusers_processors, name)
    for name in ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "XFormersJointAttnProcessor")
    if hasattr(diffusers_processors, name)
)


def unsupported_joint_reasons(attn: Any, processor: Any, override: tuple[type, ...] = ()) -> list[str]:
    """Why a layer of joint attention cannot be edited; empty where it can.

    Args:
        attn: the diffusers ``Attention`` module.
        processor: the processor it has without the edit.
        override: further processor classes that an edit may compute in the stead of.
    """
    reasons = []
    if type(processor) not in (*_PLAIN, *override):
        reasons.append(may_do_more(processor))
    normed = any(getattr(attn, name, None) is not None for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
    if is_fused(processor) and normed:
        reasons.append(
            f"{type(processor).__name__} leaves out the norms of queries and keys that this layer has, so that the "
            "unedited image is wrong as well: call unfuse_qkv_projections() on the transformer"
        )
    return reasons


class EditJointProcessor(ProcessorAround):
    """Drop-in processor for the layers of Stable Diffusion 3, wrapped around the one that a layer already has.

    With an :class:`Order` it computes the order's products: image and text tokens, one softmax over both, of which the
    part that rows share is computed once; only rows whose queries or keys some map uses are projected, and no map is
    materialised. In a layer that receives no text (``attn2``) the same holds of the image's tokens alone.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        order = self.order
        if order is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        plan = order.plan
        assert isinstance(plan, JointPlan)
        check_joint_input(order, hidden_states, encoder_hidden_states, attention_mask)
        fused = is_fused(self.inner)
        image = _project(attn, plan, "image", hidden_states, fused).beside("image", order.recorded)
        text = None
        if encoder_hidden_states is not None:
            text = _project(attn, plan, "text", encoder_hidden_states, fused).beside("text", order.recorded)
        layer = JointLayer(image, text, image.query.tensor.shape[-1] ** -0.5, order.backend)
        self.record = joint_record(plan, layer, attn.heads)
        rows, text_rows = joint_rows(order, plan, layer)
        out = attn.to_out[1](attn.to_out[0](merged_heads(rows)))  # the second is dropout
        if text_rows is None:
            return out
        context = merged_heads(text_rows)
        # The last block has no use for its text, and no projection of it.
        return out, context if attn.context_pre_only else attn.to_add_out(context)


def is_fused(processor: Any) -> bool:
    """Whether a processor of diffusers takes the projections of a layer that were put together."""
    # The class of the processor tells whether fused projections are in use: `attn.fused_projections` stays True after
    # unfusing, and an adapter loaded since then lives in the separate ones.
    return type(processor).__name__.startswith("Fused")


def _project(attn: Any, plan: JointPlan, segment: Any, tokens: torch.Tensor, fused: bool) -> SegmentProjections:
    """The rows of a segment that the plan uses, projected and normed: [rows, H, tokens, D]."""
    used = [plan.used(part, segment) for part in ("query", "key", "value")]
    if fused:
        together = attn.to_qkv if segment == "image" else attn.to_added_qkv
        split = [take(part, rows) for part, rows in zip(together(tokens).chunk(3, dim=-1), used, strict=True)]
    else:
        names = ("to_q", "to_k", "to_v") if segment == "image" else ("add_q_proj", "add_k_proj", "add_v_proj")
        split = [getattr(attn, name)(take(tokens, rows)) for name, rows in zip(names, used, strict=True)]
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in split)
    norm_q, norm_k = (attn.norm_q, attn.norm_k) if segment == "image" else (attn.norm_added_q, attn.norm_added_k)
    # A norm may return a wider type (under autocast), which attention has to narrow again.
    query = (query if norm_q is None else norm_q(query)).to(value.dtype)
    key = (key if norm_k is None else norm_k(key)).to(value.dtype)
    return SegmentProjections(Rows(query, used[0]), Rows(key, used[1]), Rows(value, used[2]))


def merged_heads(rows: torch.Tensor) -> torch.Tensor:
    """[B, H, N, E] as [B, N, H·E]."""
    return rows.transpose(1, 2).flatten(2)


def joint_record(plan: JointPlan, layer: JointLayer, heads: int) -> LayerRecord:
    """What is told of a layer whose products are about to be computed."""
    held, itemsize = layer.nbytes
    tokens = layer.image.query.tensor.shape[2] + (0 if layer.text is None else layer.text.query.tensor.shape[2])
    return LayerRecord("", itemsize, held, plan.rows * heads * tokens * tokens * itemsize)


def joint_rows(order: Order, plan: JointPlan, layer: JointLayer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What image rows and text rows become, after the layer and before its maps are shown to whom they are for."""
    if order.receive is not None:
        order.receive(plan, layer)
    image, text, heat = evaluate_joint(plan, layer, order.columns)
    if order.observe is not None:
        order.observe(layer, image)
    if order.deliver is not None:
        order.deliver(heat, text_maps(plan, order.maps, layer))
    return image, text


def check_joint_input(
    order: Order, hidden_states: torch.Tensor, text: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> None:
    """Raise ValueError where a layer receives something else than its order was made for."""
    site, rows = order.site, order.plan.rows
    batches = [given.shape[0] for given in (hidden_states, text) if given is not None]
    if any(batch != rows for batch in batches):
        raise ValueError(f"{site.path} was planned for a batch of {rows} rows and got {batches}")
    if hidden_states.shape[1] != site.tokens:
        raise ValueError(
            f"{site.path} was expected to have {site.grid} = {site.tokens} image tokens and got "
            f"{hidden_states.shape[1]}: something between the latent and this layer changes its size"
        )
    if (text is None) is not (site.kind == "image"):
        raise ValueError(f"{site.path} is {site.kind} attention and got {'no' if text is None else 'a'} text")
    if attention_mask is not None:
        raise ValueError(
            f"{site.path} receives an attention mask, which products of joint attention do not describe yet: leave the "
            "mask out, or the layer with layers="
        )
