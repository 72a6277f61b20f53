"""Prompt-to-Prompt's looks at kept maps: where words act, and what self-attention groups together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..given import listed, number
from ..lazy import LazyMap
from .controllers import AttentionStore
from .ptp_utils import text_under_image, view_images
from .word_tokens import required

__all__ = ["aggregate_attention", "show_cross_attention", "show_self_attention_comp"]

SHOWN = 256  # pixels of a side


def aggregate_attention(
    attention_store: AttentionStore,
    res: int | tuple[int, int],
    from_where: Sequence[str],
    is_cross: bool,
    select: int,
    prompts: Sequence[str] | None = None,
) -> LazyMap:
    """One prompt's map, the mean over heads and over the layers of one resolution: [h, w, M].

    Args:
        attention_store: a controller that has seen a run.
        res: the side of the layers' query tokens, or (height, width).
        from_where: of "down", "mid", "up", one or several.
        is_cross: cross-attention layers, or else self-attention.
        select: the prompt's number.
        prompts: of the run; default: as many as the last batch had.

    Raises:
        TypeError: no store, or prompts that are no texts.
        ValueError: no layer of that resolution is kept there, no such place or prompt, or other prompts than the run's.
    """
    if not hasattr(attention_store, "get_average_attention"):
        raise TypeError(
            f"expected a controller that keeps maps, an AttentionStore, got {type(attention_store).__name__}"
        )
    from_where = (from_where,) if isinstance(from_where, str) else tuple(from_where or ())
    if not from_where or not set(from_where) <= {"down", "mid", "up"}:
        raise ValueError(f'expected from_where to be of "down", "mid" and "up", got {from_where!r}')
    select = number("select", select)
    size = tuple(res) if isinstance(res, Sequence) else (int(res), int(res))
    kind = "cross" if is_cross else "self"
    averages = attention_store.get_average_attention()
    count = attention_store.rows if prompts is None else len(listed(prompts))
    rows, known = attention_store.rows, len(getattr(attention_store, "prompts", ()))
    if rows % max(count, 1) or rows == known != count:  # rows or heads of one prompt would count for another
        raise ValueError(f"expected the prompts of the run, which had {rows} rows, got {count}")
    if not 0 <= select < count:
        raise ValueError(f"select={select} names one of {count} prompts")
    kept = [attn for place in from_where for attn in averages[f"{place}_{kind}"]]
    grid = attention_store.grids.get(size[0] * size[1], size)
    if grid != size:
        raise ValueError(
            f"no layer of {size[0]} × {size[1]} query tokens was seen, and "
            f"those of as many tokens are {grid[0]} × {grid[1]}: "
            f"pass res={grid}"
        )
    maps = [
        attn.reshape(count, -1, *size, attn.shape[-1])[select] for attn in kept if attn.shape[1] == size[0] * size[1]
    ]
    if not maps:
        there = sorted({attn.shape[1] for attn in kept})
        raise ValueError(
            f"no {kind}-attention layer of {size[0]} × {size[1]} query tokens is kept of {list(from_where)}: kept are "
            f"layers of {there} tokens"
        )
    heads: Any = torch.cat(maps, dim=0)  # by LazyMap.__torch_function__
    return (heads.sum(0) / heads.shape[0]).cpu()


def show_cross_attention(
    attention_store: AttentionStore,
    res: int | tuple[int, int],
    from_where: Sequence[str],
    select: int = 0,
    prompts: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> Image.Image:
    """A picture for each token of a prompt, of where it acts, with the token under it.

    Args:
        attention_store, res, from_where, select: as of :func:`aggregate_attention`.
        prompts: of the run; default: those that the controller was made for or run with.
        tokenizer: the pipeline's; default: that of the pipeline where the controller was registered.
    """
    prompts = getattr(attention_store, "prompts", None) if prompts is None else prompts
    if prompts is None:
        raise ValueError("the controller has seen no prompts: pass prompts=")
    prompts = listed(prompts)
    tokenizer = required(getattr(attention_store, "tokenizer", None) if tokenizer is None else tokenizer)
    attention_maps = aggregate_attention(attention_store, res, from_where, True, select, prompts)
    images = []
    for place, token in enumerate(tokenizer.encode(prompts[select])[: attention_maps.shape[-1]]):
        heat = attention_maps[:, :, place].float()
        images.append(text_under_image(_shown(heat / heat.max()), tokenizer.decode(int(token))))
    return view_images(images)


def show_self_attention_comp(
    attention_store: AttentionStore,
    res: int | tuple[int, int],
    from_where: Sequence[str],
    max_com: int = 10,
    select: int = 0,
) -> Image.Image:
    """The first right singular vectors of a prompt's self-attention map, centred row by row, as pictures side by side.

    Args:
        attention_store, res, from_where, select: as of :func:`aggregate_attention`.
        max_com: how many.
    """
    attention_maps = aggregate_attention(attention_store, res, from_where, False, select)
    height, width, keys = attention_maps.shape
    numbers = attention_maps.numbers("a singular value decomposition").reshape(height * width, keys).double()
    _, _, components = torch.linalg.svd(numbers - numbers.mean(1, keepdim=True), full_matrices=False)
    images = []
    for component in components[:max_com]:
        image = component.reshape(height, width)
        image = image - image.min()
        images.append(_shown(image / image.max()))
    return view_images(np.concatenate(images, axis=1))


def _shown(share: torch.Tensor) -> np.ndarray:
    """[256, 256, 3], uint8, of shares [h, w] of 1."""
    grey = Image.fromarray((share * 255).clamp(0, 255).cpu().numpy().astype(np.uint8))
    return np.asarray(grey.resize((SHOWN, SHOWN)).convert("RGB"))
