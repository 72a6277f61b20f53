"""Concepts that walk along a transformer's dual blocks, and see the image without being seen by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fpe_kernels import join

from ..models.adapters.adapter import identity
from ..session.layers.joint_computing import JointLayer

__all__ = ["ConceptStream"]


class ConceptStream:
    """Concept tokens of a call of the model, block by block; each block's text stream moves them on.

    In a block they are normed, modulated and projected as its text tokens are. Their queries attend to themselves and
    to the image's tokens under one softmax; image and text do not attend to them, and stay as they were::

        o_c = join([A(q_c, k_c), A(q_c, k_image)]) @ [v_c ; v_image]

    Args:
        model: a transformer of Stable Diffusion 3 or FLUX.1.
        embeddings: of the concepts, as its text encoder gives them [C, E].
        rows: of the call's batch, in which concepts look at the image; read when a call reaches its first block.
    """

    def __init__(self, model: Any, embeddings: torch.Tensor, rows: Callable[[], Sequence[int]]) -> None:
        module: Any = identity(model)
        self._blocks = list(module.transformer_blocks)
        self._embed, self._embeddings, self._rows = module.context_embedder, embeddings, rows
        self._modulations: dict[int, torch.Tensor] = {}
        self._tokens: torch.Tensor | None = None  # [rows, C, dim]
        self._handles: list[Any] = []
        for index, block in enumerate(self._blocks):
            # Before the block, of which attention is a part: what it is modulated by is an argument of its own.
            hook = torch.compiler.disable(self._noting(index))
            self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _noting(self, index: int) -> Callable[..., None]:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._modulations[index] = kwargs["temb"] if "temb" in kwargs else args[2]

        return note

    def enter(self) -> None:
        """The call has come to its first block."""
        device, dtype = self._modulations[0].device, self._modulations[0].dtype
        tokens = self._embed(self._embeddings.to(device, dtype))
        self._tokens = tokens.expand(len(self._rows()), *tokens.shape)

    def attend(self, index: int, layer: JointLayer) -> torch.Tensor:
        """What the concepts' attention in a block gives [rows, C, H·E]; they are then behind the block.

        Args:
            index: of the block, among the dual ones.
            layer: its image keys and values.
        """
        assert self._tokens is not None, "a call begins with enter()"
        block, rows = self._blocks[index], list(self._rows())
        modulation = self._modulations[index][rows]
        if getattr(block, "context_pre_only", False):
            normed, moves = block.norm1_context(self._tokens, modulation), None
        else:
            normed, *moves = block.norm1_context(self._tokens, emb=modulation)
        query, key, value = _projected(block.attn, normed)
        image_key, image_value = layer.image.key.take(rows), layer.image.value.take(rows)
        seen = join([layer.map(query, key), layer.map(query, image_key)]) @ torch.cat([value, image_value], dim=2)
        out: torch.Tensor = seen.transpose(1, 2).flatten(2)
        if moves is not None:
            gate, shift, scale, gate_ff = (part[:, None] for part in moves)
            tokens = self._tokens + gate * block.attn.to_add_out(out)
            widened = block.norm2_context(tokens) * (1 + scale) + shift
            self._tokens = tokens + gate_ff * block.ff_context(widened)
        return out


def _projected(attn: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [rows, H, C, D] by the weights of a block's text.

    FLUX.1 turns queries and keys by their places, and all of its text stands at place 0, which turns nothing.
    """
    if getattr(attn, "fused_projections", False) and hasattr(attn, "to_added_qkv"):
        split = attn.to_added_qkv(tokens).chunk(3, dim=-1)
    else:
        split = tuple(getattr(attn, name)(tokens) for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in split)
    query = query if attn.norm_added_q is None else attn.norm_added_q(query)
    key = key if attn.norm_added_k is None else attn.norm_added_k(key)
    return query.to(value.dtype), key.to(value.dtype), value
