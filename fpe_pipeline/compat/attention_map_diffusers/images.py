"""Maps as pictures, a file for each token."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ...errors import EditWarning
from ..lazy import LazyMap

__all__ = ["save_attention_maps"]


def save_attention_maps(
    attn_maps: Mapping[int | float, Mapping[str, LazyMap]],
    tokenizer: Any,
    prompts: str | Sequence[str],
    base_dir: str | Path = "attn_maps",
    unconditional: bool = True,
) -> None:
    """Write a grey picture for each token: ``base_dir/<timestep>/<layer>/batch-<n>/<place>-<token>.png``, summed over
    heads, and in ``base_dir/batch-<n>/`` the mean over all timesteps and layers, as large as the first layer.

    Args:
        attn_maps: what `init_pipeline` keeps.
        tokenizer: the pipeline's, whose tokens the maps' columns are. Where they are another's, as of FLUX.1 those of
            ``tokenizer_2``, that one is taken, with a warning.
        prompts: of the call.
        base_dir: made where it is not there.
        unconditional: whether the first half of the rows is unconditional, and left out.

    Raises:
        ValueError: no maps, or maps of other rows than there are prompts.
    """
    if not attn_maps:
        raise ValueError("there are no maps: call a pipeline after init_pipeline(pipe), then save them")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    keys = min(view.shape[-1] for layers in attn_maps.values() for view in layers.values())
    own = getattr(attn_maps, "tokenizer", None)
    if own is not None and _ids(own, prompts, keys) != _ids(tokenizer, prompts, keys):
        warnings.warn(
            "the columns of these maps are the tokens of another tokenizer than the one that was passed, which is "
            "taken in its place: for FLUX.1 pass pipe.tokenizer_2",
            EditWarning,
            stacklevel=2,
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


def _ids(tokenizer: Any, prompts: Sequence[str], keys: int) -> list[list[int]]:
    """Token numbers of prompts, without padding, as far as there are columns of them."""
    length = min(int(tokenizer.model_max_length), keys)
    ids: list[list[int]] = tokenizer(prompts, truncation=True, max_length=length)["input_ids"]
    return ids


def _heats(view: LazyMap, counts: Sequence[int], unconditional: bool) -> list[torch.Tensor]:
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
