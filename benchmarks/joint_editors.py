"""Ways to compute one step of a transformer with joint attention: unedited, ours, dense, and gathered by hand.

The rivals are written here as their users write them: processors on every layer, the batch halved by position, the
source's image queries and keys copied over the targets'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .joint_models import JointCase

__all__ = ["EDITORS", "Attention", "attention_inputs"]

Attention = tuple[Tensor, Tensor, Tensor]
Begin = Callable[[int, int], None]
Product = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@contextmanager
def _unedited(model: Any, case: JointCase) -> Iterator[Begin]:
    yield lambda step, total: None


@contextmanager
def _ours(model: Any, case: JointCase) -> Iterator[Begin]:
    from fpe_pipeline import FreePromptEdit, editing

    with editing(model, FreePromptEdit(1.0), **_layout(case)) as session:
        yield session.step


def _layout(case: JointCase) -> dict[str, Any]:
    return {"classifier_free_guidance": case.family == "sd3"}


@contextmanager
def _gathered(model: Any, case: JointCase) -> Iterator[Begin]:
    with _computing(model, case, _sdpa_gathered):
        yield lambda step, total: None


@contextmanager
def _dense(model: Any, case: JointCase) -> Iterator[Begin]:
    with _computing(model, case, _dense_gathered):
        yield lambda step, total: None


EDITORS = {"unedited": _unedited, "fpe": _ours, "sdpa-gathered": _gathered, "dense-original": _dense}


def _images(query: Tensor, case: JointCase) -> slice:
    """The places of image tokens, which FLUX.1 puts after the text."""
    texts = case.texts
    return slice(0, query.shape[2] - texts) if case.family == "sd3" else slice(texts, query.shape[2])


def _exchange(query: Tensor, key: Tensor, case: JointCase) -> None:
    """The source's image queries and keys over its targets', in the conditional rows."""
    first, image = len(query) - (1 + case.targets), _images(query, case)
    for tensor in (query, key):
        tensor[first + 1 :, :, image] = tensor[first, :, image]


def _sdpa_gathered(query: Tensor, key: Tensor, value: Tensor, case: JointCase) -> Tensor:
    _exchange(query, key, case)
    return F.scaled_dot_product_attention(query, key, value)


def _dense_gathered(query: Tensor, key: Tensor, value: Tensor, case: JointCase) -> Tensor:
    _exchange(query, key, case)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


@contextmanager
def attention_inputs(model: Any, case: JointCase, kept: list[Attention]) -> Iterator[None]:
    """Keep queries, keys and values of every layer of the calls in a block."""

    def keep(query: Tensor, key: Tensor, value: Tensor, case: JointCase) -> Tensor:
        kept.append((query, key, value))
        return F.scaled_dot_product_attention(query, key, value)

    with _computing(model, case, keep):
        yield


@contextmanager
def _computing(model: Any, case: JointCase, product: Any) -> Iterator[None]:
    """Processors around a product of queries, keys and values [B, H, N, D] in every layer."""
    kind = _SD3Processor if case.family == "sd3" else _FluxProcessor
    before = model.attn_processors
    model.set_attn_processor(kind(case, product))
    try:
        yield
    finally:
        model.set_attn_processor(before)


def _heads(attn: Any, states: Tensor, norm: Any) -> Tensor:
    split = states.unflatten(-1, (attn.heads, -1))
    return split if norm is None else norm(split)


class _SD3Processor:
    def __init__(self, case: JointCase, product: Any) -> None:
        self._case, self._product = case, product

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        count = hidden_states.shape[1]
        image = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        text = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None)
        joint = [
            torch.cat([_heads(attn, i(hidden_states), a), _heads(attn, t(encoder_hidden_states), b)], dim=1)
            for (i, a), (t, b) in zip(image, text, strict=True)
        ]
        out = self._product(*(part.transpose(1, 2) for part in joint), self._case).transpose(1, 2).flatten(2)
        seen, read = attn.to_out[0](out[:, :count]), out[:, count:]
        return seen, read if attn.context_pre_only else attn.to_add_out(read)


class _FluxProcessor:
    def __init__(self, case: JointCase, product: Any) -> None:
        self._case, self._product = case, product

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        from diffusers.models.embeddings import apply_rotary_emb

        named = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        joint = [_heads(attn, project(hidden_states), norm) for project, norm in named]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None)
            texts = [_heads(attn, project(encoder_hidden_states), norm) for project, norm in added]
            joint = [torch.cat(parts, dim=1) for parts in zip(texts, joint, strict=True)]
        query, key = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in joint[:2])
        turned = (part.transpose(1, 2) for part in (query, key, joint[2]))
        out = self._product(*turned, self._case).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        count = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, count:]), attn.to_add_out(out[:, :count])
