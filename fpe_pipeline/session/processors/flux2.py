"""The attention processors that compute an edit's joint products in the blocks of FLUX.2."""

from __future__ import annotations

from typing import Any

import torch

from ...edits.joint_products import JointPlan
from ..layers.around import ProcessorAround
from ..layers.computing import take
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import SegmentProjections
from ..layers.joint_projections import segment_rows
from ..layers.places import Turn
from .flux import EditFluxProcessor, Segment, joint_tokens

__all__ = ["EditFlux2Processor", "EditFlux2SingleProcessor", "flux2_processor", "unsupported_flux2_reasons"]


class EditFlux2Processor(EditFluxProcessor):
    """Drop-in processor for the dual blocks, which are those of FLUX.1."""

    plain = ("Flux2AttnProcessor",)


class EditFlux2SingleProcessor(DispatchedAround):
    """Drop-in processor for the single blocks, whose feed-forward part is projected with queries, keys and values.

    The one projection is computed for every row, as its weights are never cut; attention is computed as in FLUX.1's
    single blocks, and the feed-forward part stays each row's own.
    """

    plain = ("Flux2ParallelSelfAttnProcessor",)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        order = self.order
        if order is None:
            out: torch.Tensor = self.inner(attn, hidden_states, attention_mask, image_rotary_emb, **kwargs)
            return out
        plan = order.plan
        assert isinstance(plan, JointPlan) and order.site.tokens is not None
        together = attn.to_qkv_mlp_proj(hidden_states)
        width = 3 * attn.inner_dim
        attended, forward = together[..., :width], attn.mlp_act_fn(together[..., width:])
        texts = hidden_states.shape[1] - order.site.tokens - order.references

        def projected(name: Segment, tokens: torch.Tensor, turn: Turn | None, added: bool) -> SegmentProjections:
            used = [plan.used(part, name) for part in ("query", "key", "value")]
            split = [take(part, rows) for part, rows in zip(tokens.chunk(3, dim=-1), used, strict=True)]
            return segment_rows(attn, used, split, turn)

        text, given = attended[:, :texts], attended[:, texts:]
        image, context, self.record = joint_tokens(
            attn, order, text, given, attention_mask, image_rotary_emb, projected, added=False
        )
        projection: torch.Tensor = attn.to_out(torch.cat([torch.cat([context, image], dim=1), forward], dim=-1))
        return projection


def flux2_processor(inner: Any) -> ProcessorAround:
    """The processor around one of a dual or of a single block."""
    return (EditFlux2SingleProcessor if _is_single(inner) else EditFlux2Processor)(inner)


def unsupported_flux2_reasons(attn: Any, processor: Any, override: tuple[type, ...] = ()) -> list[str]:
    """Why a layer with this processor cannot be edited; empty where it can."""
    kind = EditFlux2SingleProcessor if hasattr(attn, "to_qkv_mlp_proj") else EditFlux2Processor
    return kind.unsupported_reasons(attn, processor, override)


def _is_single(processor: Any) -> bool:
    # Its layers call it with no text beside the tokens.
    return "ParallelSelf" in type(processor).__name__
