"""Four ways to compute one UNet step: unedited, ours, the dense original, and gathered queries and keys.

Each is a context manager around a UNet. The rivals are written here as their users write them: processors on
every layer, the batch halved by position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .unets import UNetCase

STEPS = 50
WINDOW = 0.8


@contextmanager
def unedited(unet: Any, case: UNetCase) -> Iterator[Any]:
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor(AttnProcessor2_0())
    yield lambda step: None


@contextmanager
def ours(unet: Any, case: UNetCase) -> Iterator[Any]:
    from diffusers.models.attention_processor import AttnProcessor2_0

    from fpe_pipeline import FreePromptEdit, editing

    unet.set_attn_processor(AttnProcessor2_0())
    edit = FreePromptEdit(WINDOW) if case.selection == "default" else FreePromptEdit(WINDOW, levels=range(8))
    with editing(unet, edit, classifier_free_guidance=True) as session:
        yield lambda step: session.step(step, max(case.steps, STEPS))


@contextmanager
def dense_original(unet: Any, case: UNetCase) -> Iterator[Any]:
    with _installed(unet, case, DenseProcessor) as set_step:
        yield set_step


@contextmanager
def sdpa_gathered(unet: Any, case: UNetCase) -> Iterator[Any]:
    with _installed(unet, case, GatheredProcessor) as set_step:
        yield set_step


EDITORS = {
    "unedited": unedited,
    "fpe": ours,
    "sdpa-gathered": sdpa_gathered,
    "dense-original": dense_original,
}


class _Controller:
    """Which step it is, and so whether maps are replaced."""

    def __init__(self, last: int) -> None:
        self.step, self.last = 0, last

    @property
    def active(self) -> bool:
        return self.step < self.last


@contextmanager
def _installed(unet: Any, case: UNetCase, processor: type) -> Iterator[Any]:
    controller = _Controller(int(max(case.steps, STEPS) * WINDOW))
    finest = case.side if case.model != "sdxl" else case.side // 2
    # The method's choice, all but the finest level that has attention; as a limit on the number of tokens.
    most = finest**2 if case.selection == "all" or case.model == "sdxl" else (finest // 2) ** 2
    names = list(unet.attn_processors)
    unet.set_attn_processor(
        {name: processor(controller, most if name.endswith("attn1.processor") else 0) for name in names}
    )

    def set_step(step: int) -> None:
        controller.step = step

    yield set_step


class _Processor:
    """Projections before and after the attention of an editor; :meth:`attend` says how it is edited."""

    def __init__(self, controller: _Controller, most_tokens: int) -> None:
        self.controller, self.most_tokens = controller, most_tokens

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        replaced = self.controller.active and hidden_states.shape[1] <= self.most_tokens
        out = self.attend(attn, attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context), replaced)
        return attn.to_out[1](attn.to_out[0](out))

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, replaced: bool) -> Tensor:
        """From [B, N | M, H·D] to [B, N, H·D]; the targets' maps are the source's where ``replaced``."""
        raise NotImplementedError


class DenseProcessor(_Processor):
    """Maps in memory at every layer, the source's copied over the targets' where the edit says so."""

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, replaced: bool) -> Tensor:
        batch = query.shape[0]
        query, key, value = (attn.head_to_batch_dim(tensor) for tensor in (query, key, value))
        maps = attn.get_attention_scores(query, key)  # [B·H, N, M]
        if replaced:
            rows = maps.unflatten(0, (batch, attn.heads))
            rows[batch // 2 + 1 :] = rows[batch // 2]
        return attn.batch_to_head_dim(torch.bmm(maps, value))


class GatheredProcessor(_Processor):
    """Fused attention on queries and keys in which the source's stand in the targets' places."""

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, replaced: bool) -> Tensor:
        query, key, value = (
            tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in (query, key, value)
        )  # [B, H, N | M, D]
        if replaced:
            half = query.shape[0] // 2
            query[half + 1 :] = query[half]
            key[half + 1 :] = key[half]
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
