"""The attention processor that computes an edit's joint products in the blocks of Qwen-Image 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...edits.joint_products import JointPlan
from ..layers.computing import Rows
from ..layers.dispatched import DispatchedAround
from ..layers.joint_computing import JointLayer, SegmentProjections
from ..layers.joint_processor import check_joint_input, joint_record, joint_rows, merged_heads
from ..layers.joint_projections import segment_projections
from ..layers.kept_texts import check_kept
from .qwen import qwen_turn

__all__ = ["EditQwen21Processor", "qwen21_processor"]

_FLEX = "QwenImage21FlexAttnProcessor"


class EditQwen21Processor(DispatchedAround):
    """Drop-in processor for the layers of Qwen-Image 2.1, wrapped around the one that a layer already has.

    With an order it computes the order's products of the image's tokens, from queries and keys after their norms and
    rotary embedding. What stands before them, text and pictures that are shown, looks at no image and is computed as
    diffusers does, at steps that compute it at all; its keys and values are handed from there, or from an earlier step.
    Pictures that are shown are a row's own as its text is. Padding of a row's text takes no attention.
    """

    plain = ("QwenImage21AttnProcessor", _FLEX)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        rotary_emb: torch.Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        order = self.order
        if order is None:
            out: torch.Tensor = self.inner(
                attn,
                hidden_states,
                attention_mask,
                rotary_emb,
                layer_cache,
                kv_cache_mode,
                cache_write_slice,
                segments,
                key_valid,
            )
            return out
        plan = order.plan
        assert isinstance(plan, JointPlan) and order.site.tokens is not None
        check_kept(plan.terms)
        before = 0 if kv_cache_mode == "cached" else hidden_states.shape[1] - order.site.tokens
        image, context = hidden_states[:, before:], None
        if before:
            keeps = _Kept() if layer_cache is None else layer_cache
            turned = None if rotary_emb is None else rotary_emb[:before]
            valid = None if key_valid is None else key_valid[:, :before]
            # Diffusers' own, which needs no mask of flex attention, for the tokens up to the image and for no others.
            whole = (None, turned, keeps, "extract", slice(before), _segments(order.shown, before), valid)
            context = attn._default_processor_cls()(attn, hidden_states[:, :before], *whole)
            layer_cache = keeps
        key, value = (_shown_first(part, order.shown).transpose(1, 2) for part in layer_cache.get())
        check_joint_input(order, image, key, None)  # the mask is of padding: text_lengths
        every = tuple(range(plan.rows))
        turn = qwen_turn(None if rotary_emb is None else rotary_emb[before:])
        text = SegmentProjections(Rows(key[:0], ()), Rows(key, every), Rows(value, every))
        layer = JointLayer(
            segment_projections(attn, plan, "image", image, turn).beside("image", order.recorded),
            text.beside("text", order.recorded, ends=True),
            (attn.inner_dim // attn.heads) ** -0.5,
            order.backend,
            order.lengths(key.shape[2]),
            order.references,
            references_first=True,
            text_asks=False,
        )
        self.record = joint_record(plan, layer, attn.heads)
        rows, _ = joint_rows(order, plan, layer)
        out = attn.to_out[1](attn.to_out[0](merged_heads(rows)))  # the second is dropout
        return out if context is None else torch.cat([context, out], dim=1)


#: By class of the wrapped processors that the model tells by their class, ours of that class too: one for all layers,
#: so that `torch.compile` traces them once.
_AROUND: dict[type, type[EditQwen21Processor]] = {}


def qwen21_processor(inner: Any) -> EditQwen21Processor:
    """An :class:`EditQwen21Processor` around a layer's processor."""
    kind = type(inner)
    if not any(base.__name__ == _FLEX for base in kind.__mro__):
        return EditQwen21Processor(inner)
    if kind not in _AROUND:
        _AROUND[kind] = type(f"Edit{kind.__name__}", (EditQwen21Processor, kind), {})
    return _AROUND[kind](inner)


class _Kept:
    """Takes what a layer keeps of the tokens before the image, where the pipeline keeps nothing."""

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pair = key, value

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pair


def _segments(shown: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int, bool]]:
    """Runs of text, and pictures, among so many tokens: where each begins and ends, and whether it is text."""
    found, place = [], 0
    for first, behind in shown:
        found += [(place, first, True)] * (place < first) + [(first, behind, False)]
        place = behind
    return found + [(place, count, True)] * (place < count)


def _shown_first(tokens: torch.Tensor, shown: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Tokens [B, T, …] of which those of pictures are put before the text."""
    if not shown:
        return tokens
    runs = _segments(shown, tokens.shape[1])
    return torch.cat([tokens[:, first:behind] for first, behind, _ in sorted(runs, key=lambda run: run[2])], dim=1)
