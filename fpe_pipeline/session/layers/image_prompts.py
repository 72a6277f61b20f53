"""Image prompts (IP-Adapter): the attention that a layer adds to that over its text.

An adapter's layer computes ``softmax(q kᵀ) v + Σ scale · softmax(q k_imageᵀ) v_image``. Edits speak of the first term.
The others are computed as the adapter's processor does, each row with its own queries and its own image. Scales are
read at every call, so that ``set_ip_adapter_scale`` acts within a session and between its steps too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models import attention_processor as diffusers_processors

from fpe_kernels import shared_attention

__all__ = ["IMAGE_PROMPT_PROCESSORS", "image_prompt_attention", "split_image_prompts"]

#: Processors of cross-attention layers with an IP-Adapter.
IMAGE_PROMPT_PROCESSORS = tuple(
    getattr(diffusers_processors, name)
    for name in ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")
    if hasattr(diffusers_processors, name)
)


def split_image_prompts(path: str, processor: Any, context: Any) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The text and, for each adapter, the image prompts that a layer attends to.

    Args:
        path: the layer's, for messages.
        processor: the layer's own.
        context: its ``encoder_hidden_states``: None, the text [B, M, C], or, as a UNet with adapters passes them on,
            the text and a list of [B, images, tokens, C].

    Raises:
        ValueError: image prompts without an adapter, or an adapter without as many image prompts as it has.
    """
    adapted = isinstance(processor, IMAGE_PROMPT_PROCESSORS)
    if not isinstance(context, tuple):
        if adapted:
            raise ValueError(
                f"{path} has an IP-Adapter and got no image prompts: pass ip_adapter_image or "
                "ip_adapter_image_embeds to the pipeline, or take the adapter off with pipe.unload_ip_adapter()"
            )
        return context, []
    if not adapted:
        raise ValueError(
            f"{path} receives image prompts (IP-Adapter) and its processor {type(processor).__name__} is none of "
            f"{', '.join(kind.__name__ for kind in IMAGE_PROMPT_PROCESSORS)}, so what it does with them is unknown: "
            "leave the layer out of the edit"
        )
    text, images = context
    if len(images) != len(processor.to_k_ip):
        raise ValueError(f"{path} has {len(processor.to_k_ip)} IP-Adapters and got image prompts of {len(images)}")
    return text, list(images)


def image_prompt_attention(
    processor: Any,
    query: torch.Tensor,
    images: Sequence[torch.Tensor],
    masks: Any = None,
    *,
    scale: float,
    backend: str = "auto",
) -> torch.Tensor | None:
    """What the image prompts add to a layer's heads.

    Args:
        processor: one of :data:`IMAGE_PROMPT_PROCESSORS`, with the adapters' projections and scales.
        query: the queries of every row of the batch: [B, H, N, D].
        images: for each adapter [B, images, tokens, C].
        masks: for each adapter None or [1, images, h, w], as ``cross_attention_kwargs={"ip_adapter_masks": …}``: a
            weight for each query pixel and image.
        scale: what scores are multiplied with.
        backend: of ``shared_attention``.

    Returns:
        [B, H, N, D], or None where every adapter's scale is 0.

    Raises:
        ValueError: masks or scales that do not belong to the images.
    """
    strengths = list(processor.scale)
    masks = _mask_list(masks, len(images))
    total = None
    for index, (tokens, strength, mask) in enumerate(zip(images, strengths, masks, strict=True)):
        project = (processor.to_k_ip[index], processor.to_v_ip[index])
        # Without a mask an adapter's images are one sequence of tokens; with one, each image has its own region.
        parts: list[tuple[torch.Tensor, float, torch.Tensor | None]]
        if mask is None:
            if isinstance(strength, list):
                raise ValueError(
                    f"IP-Adapter {index} has a scale for each of its images, {strength}, and no masks that tell them "
                    "apart: pass ip_adapter_masks, or one scale"
                )
            parts = [(tokens.flatten(1, 2), strength, None)]
        else:
            parts = _regions(index, tokens, strength, mask, query)
        for part, factor, weight in parts:
            if factor == 0:
                continue
            key, value = (
                projection(part).unflatten(-1, (query.shape[1], -1)).transpose(1, 2).to(query.dtype)
                for projection in project
            )  # [B, H, tokens, D]
            term = factor * shared_attention(
                query, key, value, tuple(range(query.shape[0])), scale=scale, backend=backend
            )
            term = term if weight is None else term * weight
            total = term if total is None else total + term
    return total


def _mask_list(masks: Any, adapters: int) -> list[torch.Tensor | None]:
    if masks is None:
        return [None] * adapters
    if isinstance(masks, torch.Tensor):  # [adapters, 1, h, w], which diffusers accepts too
        masks = list(masks.unsqueeze(1))
    if len(masks) != adapters:
        raise ValueError(f"expected ip_adapter_masks for each of {adapters} IP-Adapters, got {len(masks)}")
    return list(masks)


def _regions(
    index: int, tokens: torch.Tensor, strength: Any, mask: torch.Tensor, query: torch.Tensor
) -> list[tuple[torch.Tensor, float, torch.Tensor | None]]:
    """For each image of an adapter: its tokens [B, tokens, C], its scale, its weight of each query [B, 1, N, 1]."""
    count = tokens.shape[1]
    if mask.ndim != 4 or mask.shape[1] != count:
        raise ValueError(
            f"expected ip_adapter_masks[{index}] to be [1, {count}, height, width], a mask for each image of the "
            f"adapter, got {tuple(mask.shape)}: make them with diffusers' IPAdapterMaskProcessor"
        )
    strengths = strength if isinstance(strength, list) else [strength] * count
    if len(strengths) != count:
        raise ValueError(f"IP-Adapter {index} has {len(strengths)} scales for {count} images")
    weights = (
        IPAdapterMaskProcessor.downsample(mask[:, image], query.shape[0], query.shape[2], 1).to(query)
        for image in range(count)
    )  # [B, N, 1]
    return [
        (tokens[:, image], factor, weight[:, None])
        for image, (factor, weight) in enumerate(zip(strengths, weights, strict=True))
    ]
