"""The attention processor that computes an edit's joint products; everywhere else it is the processor it replaced."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_processor as diffusers_processors

from ...edits.joint_products import JointPlan
from .around import ProcessorAround, may_do_more
from .instructions import Order
from .joint_computing import JointLayer, evaluate_joint, text_maps
from .joint_projections import segment_projections
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
        image = segment_projections(attn, plan, "image", hidden_states, fused=fused).beside("image", order.recorded)
        text = None
        if encoder_hidden_states is not None:
            text = segment_projections(attn, plan, "text", encoder_hidden_states, added=True, fused=fused).beside(
                "text", order.recorded
            )
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
