"""What other tools' originals do in a layer, written from their rules, with the map written out where they do that.

Functions of a :class:`LayerCall`, for `ControlledLayers`, which puts them where ours stand: what surrounds the
attention is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from fpe_pipeline.compat.controlled import LayerCall

__all__ = [
    "Controlled",
    "Kept",
    "Replaced",
    "Shared",
    "image_tokens_of_the_source",
    "map_of_the_source",
    "memory_of_the_source",
]

Tensor = torch.Tensor


def written_out(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The map [B·H, N, M] of queries and keys [B, H, …]."""
    query, key = query.flatten(0, 1), key.flatten(0, 1)
    room = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
    return torch.baddbmm(room, query, key.transpose(1, 2), beta=0, alpha=scale).softmax(-1)


def product(attention: Tensor, value: Tensor) -> Tensor:
    """The map [B·H, N, M] times values [B, H, M, E]."""
    return torch.bmm(attention, value.flatten(0, 1)).unflatten(0, value.shape[:2])


class Controlled:
    """Prompt-to-Prompt and its kin: a controller sees and edits the matrix.

    Args:
        controller: called ``controller(attn, is_cross, place)`` with tensors.
    """

    def __init__(self, controller: Any) -> None:
        self.controller = controller

    def __call__(self, call: LayerCall) -> Tensor:
        attention: Any = written_out(call.query, call.key, call.scale)
        attention.guided = call.guided
        return product(self.controller(attention, call.site.kind == "cross", call.site.place), call.value)


class Replaced:
    """Prompt-to-Prompt and PnPInversion in their window: targets' columns are the source's, by words, and small
    self-attention maps are the source's.

    Args:
        mapper: of words [targets, M, M].
        factors: of the targets' columns [targets, M], or None.
        self_tokens: most query tokens of the self-attention layers that are replaced.
    """

    def __init__(self, mapper: Tensor, factors: Tensor | None, self_tokens: int) -> None:
        self.mapper, self.factors, self.self_tokens = mapper, factors, self_tokens

    def __call__(self, attention: Tensor, is_cross: bool, place: str) -> Tensor:
        first = attention.shape[0] // 2 if attention.guided else 0  # type: ignore[attr-defined]
        half = attention[first:].unflatten(0, (1 + len(self.mapper), -1))
        if is_cross:
            columns = torch.einsum("hpw,bwn->bhpn", half[0], self.mapper.to(half))
            half[1:] = columns if self.factors is None else columns * self.factors.to(half)[:, None, None]
        elif attention.shape[1] <= self.self_tokens:
            half[1:] = half[:1].clone()
        return attention


class Kept:
    """DAAM and attention-map-diffusers: the map of every cross-attention layer is kept.

    Args:
        pick: what of a map [B, H, N, M] is kept.
    """

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        self.pick, self.maps = pick, dict[str, Tensor]()

    def __call__(self, call: LayerCall) -> Tensor:
        attention = written_out(call.query, call.key, call.scale)
        mine = self.pick(attention.unflatten(0, call.query.shape[:2])).clone()
        before = self.maps.get(call.site.path)
        self.maps[call.site.path] = mine if before is None else before + mine
        return product(attention, call.value)


def memory_of_the_source(call: LayerCall) -> Tensor:
    """MasaCtrl: in either half of the batch all rows attend to the first one's keys and values."""
    if call.site.kind == "cross":
        return product(written_out(call.query, call.key, call.scale), call.value)
    first = _firsts(call)
    return product(written_out(call.query, call.key[first], call.scale), call.value[first])


def _firsts(call: LayerCall) -> list[int]:
    """For each row the first one of its half of the batch, or of the batch where that holds no unconditional half."""
    rows = call.query.shape[0]
    half = rows // 2 if call.guided else rows
    return [row // half * half for row in range(rows)]


def map_of_the_source(call: LayerCall) -> Tensor:
    """Plug-and-Play: the rows' maps are the first one's, by its queries and keys."""
    if call.site.kind == "cross":
        return product(written_out(call.query, call.key, call.scale), call.value)
    first = [0] * call.query.shape[0]
    return product(written_out(call.query[first], call.key[first], call.scale), call.value)


class Shared:
    """StyleAligned, whose original calls PyTorch's fused attention: keys and values of the reference beside the own."""

    def __call__(self, call: LayerCall) -> Tensor:
        query, key, value, first = call.query, call.key, call.value, _firsts(call)
        if call.site.kind == "self":
            query, key = _adain(query, first), _adain(key, first)
            key, value = (torch.cat([part, part[first]], dim=2) for part in (key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=call.scale)


def _adain(part: Tensor, first: list[int]) -> Tensor:
    """Features [B, H, N, D] with the mean and deviation over tokens of other rows."""
    means, deviations = part.mean(2, keepdim=True), (part.var(2, keepdim=True) + 1e-5).sqrt()
    return (part - means) / deviations * deviations[first] + means[first]


@contextmanager
def image_tokens_of_the_source(texts: int, parts: str) -> Iterator[None]:
    """Stable Flow and FreeFlux ("kv"), ConsistEdit ("qk"): in FLUX.1, image tokens are the first row's, in a block.

    The originals clone what they change and call PyTorch's fused attention.

    Args:
        texts: tokens of the text, which come first.
        parts: letters of q, k and v.
    """
    from diffusers.models.transformers import transformer_flux

    attend = transformer_flux.dispatch_attention_fn

    def changed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        given = {"q": query, "k": key, "v": value}
        for name in parts:
            part = given[name].clone()
            part[1:, texts:] = part[:1, texts:]
            given[name] = part
        return attend(*given.values(), **options)

    transformer_flux.dispatch_attention_fn = changed
    try:
        yield
    finally:
        transformer_flux.dispatch_attention_fn = attend
