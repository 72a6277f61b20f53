"""Maps as pictures, a file for each token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ...callers import warn
from ...errors import EditWarning
from ..given import listed
from ..lazy import LazyMap

__all__ = ["save_attention_maps"]


def save_attention_maps(
    attn_maps: Mapping[int | float, Mapping[str, LazyMap | torch.Tensor]],
    tokenizer: Any,
    prompts: str | Sequence[str],
    base_dir: str | Path = "attn_maps",
    unconditional: bool = True,
) -> None:
    """Write a grey picture for each token: ``base_dir/<timestep>/<layer>/batch-<n>/<place>-<token>.png``, summed over
    heads, and in ``base_dir/batch-<n>/`` the mean over all timesteps and layers, as large as the first layer.

    Args:
        attn_maps: what `init_pipeline` keeps, lazy or as tensors [rows, heads, h, w, tokens].
        tokenizer: the pipeline's, whose tokens the maps' columns are. Where they are another's, as of FLUX.1 those of
            ``tokenizer_2``, that one is taken, with a warning.
        prompts: of the call.
        base_dir: made where it is not there.
        unconditional: whether the first half of the rows is unconditional, and left out.

    Raises:
        ValueError: no maps, no prompts, or maps of other rows than there are prompts.
        TypeError: maps that are not by timestep and layer, what is no tokenizer, no text or no truth value.
    """
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(
            f"expected the pipeline's tokenizer, pipe.tokenizer, of FLUX.1 pipe.tokenizer_2, got "
            f"{type(tokenizer).__name__}"
        )
    if not isinstance(unconditional, bool):
        raise TypeError(f"expected unconditional to be True or False, got {unconditional!r}")
    _check(attn_maps)
    prompts = listed(prompts)
    keys = min(view.shape[-1] for layers in attn_maps.values() for view in layers.values())
    own = getattr(attn_maps, "tokenizer", None)
    if own is not None and _ids(own, prompts, keys) != _ids(tokenizer, prompts, keys):
        warn(
            "the columns of these maps are the tokens of another tokenizer than the one that was passed, which is "
            "taken in its place: for FLUX.1 pass pipe.tokenizer_2",
            EditWarning,
        )
        tokenizer = own
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in _ids(tokenizer, prompts, keys)]
    totals: list[torch.Tensor] | None = None
    count = 0
    for timestep, layers in attn_maps.items():
        for layer, view in layers.items():
            heats = _heats(view, [len(words) for words in tokens], unconditional)
            size = heats[0].shape[-2:] if totals is None else totals[0].shape[-2:]
            shown = [F.interpolate(heat[None], size=size, mode="bilinear", align_corners=False)[0] for heat in heats]
            totals = shown if totals is None else [total + heat for total, heat in zip(totals, shown, strict=True)]
            count += 1
            _save(Path(base_dir, str(timestep), layer), tokens, heats)
    assert totals is not None
    _save(Path(base_dir), tokens, [total / count for total in totals])


def _check(attn_maps: Any) -> None:
    """Refuse what is not maps by timestep and layer."""
    if isinstance(attn_maps, Mapping) and not attn_maps:
        raise ValueError("there are no maps: call a pipeline after init_pipeline(pipe), then save them")
    layers = list(attn_maps.values()) if isinstance(attn_maps, Mapping) else [attn_maps]
    views = [view for one in layers for view in (one.values() if isinstance(one, Mapping) else [None])]
    if not views or not all(isinstance(view, LazyMap | torch.Tensor) and view.ndim == 5 for view in views):
        raise TypeError(
            "expected attn_maps as init_pipeline keeps them, {timestep: {layer: map [rows, heads, h, w, tokens]}}, got "
            f"{type(attn_maps).__name__} of {type(layers[0]).__name__}: pass one timestep's as {{timestep: layers}}"
        )


def _ids(tokenizer: Any, prompts: Sequence[str], keys: int) -> list[list[int]]:
    """Token numbers of prompts, without padding, as far as there are columns of them."""
    length = min(int(tokenizer.model_max_length), keys)
    ids: list[list[int]] = tokenizer(prompts, truncation=True, max_length=length)["input_ids"]
    return ids


def _heats(view: LazyMap | torch.Tensor, counts: Sequence[int], unconditional: bool) -> list[torch.Tensor]:
    """For each prompt [tokens, h, w], float32: sums over heads of the columns of its tokens."""
    rows, _, height, width, keys = view.shape
    first = rows // 2 if unconditional else 0
    if rows - first != len(counts):
        raise ValueError(
            f"the maps have {rows - first} {'conditional ' if unconditional else ''}rows, for {len(counts)} prompts: "
            "pass those of the call, one for each image, and whether it was guided as unconditional="
        )
    columns = torch.eye(keys, max(counts), dtype=view.dtype)
    heats = []
    for row, count in enumerate(counts, first):
        if isinstance(view, torch.Tensor):
            heats.append(view[row, ..., :count].float().sum(0).permute(2, 0, 1).cpu())
            continue
        operator = view[row].operator  # [H, 1, N, M]
        heat = operator @ columns[:, :count].expand(operator.shape[0], 1, keys, count)
        heats.append(heat.float().sum((0, 1)).T.reshape(count, height, width))
    return heats


def _save(folder: Path, tokens: Sequence[Sequence[str]], heats: Sequence[torch.Tensor]) -> None:
    for number, (words, heat) in enumerate(zip(tokens, heats, strict=True)):
        place = folder / f"batch-{number}"
        place.mkdir(parents=True, exist_ok=True)
        grey = (heat.clamp(0, 1) * 255).round().numpy().astype(np.uint8)
        for position, word in enumerate(words):
            name = re.sub(r"[^\w-]+", "", word.replace("</w>", ""))
            Image.fromarray(grey[position]).save(place / f"{position}-{name}.png")
