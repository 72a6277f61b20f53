"""What callers pass to `FreePromptPipeline`, brought into one form or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..edits import Edit
from ..edits.registry import make_edit, require_edit
from ..errors import warn_of_size
from ..texts import check_text, did_you_mean

__all__ = [
    "check_embeddings",
    "check_option_names",
    "check_size",
    "chosen_edit",
    "image_size",
    "negative_list",
    "prompt_list",
]


def prompt_list(prompt: Any, target_prompt: Any, prompt_embeds: torch.Tensor | None) -> list[str]:
    """All prompts, the source's first; none where embeddings stand in for them."""
    if prompt_embeds is not None:
        if prompt is not None or target_prompt is not None:
            raise ValueError("pass prompts or prompt_embeds (the source's first), not both")
        return []
    for text in (prompt, target_prompt):
        _refuse_pictures(text)
    if isinstance(prompt, str):
        prompts = [prompt]
    elif prompt is None:
        raise ValueError("expected a source prompt, or prompt_embeds; got neither")
    else:
        prompts = list(prompt)
        if target_prompt is not None and len(prompts) != 1:
            raise ValueError(
                f"expected one source prompt beside target_prompt, got a list of {len(prompts)}; pass "
                "prompt=source, target_prompt=[target, …] or prompt=[source, target, …]"
            )
    prompts += [target_prompt] if isinstance(target_prompt, str) else list(target_prompt or ())
    if not prompts:
        raise ValueError("expected a source prompt and any number of targets, got an empty list")
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"prompts must be text, got {type(text).__name__}: {text!r}")
        check_text("a prompt", text)
    return prompts


def check_embeddings(count: int | None, axes: str = "tokens, channels", **embeddings: Any) -> None:
    """Raise for embeddings in the place of texts that are no [prompts, tokens, channels], the source's first.

    Args:
        count: of the prompts; None where it follows from the embeddings.
        axes: behind the prompts', in words: pooled embeddings have channels alone.
        **embeddings: by the names of a call's arguments; None where one was not passed.

    Raises:
        TypeError: no tensor.
        ValueError: a tensor of another shape, or of another number of prompts.
    """
    for name, given in embeddings.items():
        if given is None:
            continue
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [prompts, {axes}], got {type(given).__name__}")
        if given.ndim != 2 + axes.count(",") or (count is not None and len(given) != count):
            rows = "prompts" if count is None else str(count)
            raise ValueError(
                f"expected {name} [{rows}, {axes}], a row for each prompt, the source's first, got {list(given.shape)}"
            )


def check_option_names(options: Mapping[str, Any], own: Iterable[str], parents: Iterable[str]) -> None:
    """Raise TypeError for options that neither this pipeline nor its parent has, with the name that was meant."""
    known = {*own, *parents}
    unknown = sorted(options.keys() - known)
    if not unknown:
        return
    hint = did_you_mean(unknown, known)
    listed = f"{'There' if hint else 'there'} are {', '.join(sorted(known))}"
    raise TypeError(f"unknown option {', '.join(unknown)}; {hint}{listed}")


def _refuse_pictures(text: Any) -> None:
    """Raise TypeError for a picture where a prompt is expected."""
    for each in text if isinstance(text, list | tuple) else (text,):
        if isinstance(each, Image.Image | torch.Tensor | np.ndarray):
            raise TypeError(
                f"prompts must be text, got a picture ({type(each).__name__}): invert it first, inversion = "
                "pipe.invert(picture, prompt), then pipe(inversion=inversion, target_prompt=…)"
            )


def negative_list(negative_prompt: Any, count: int, name: str = "negative_prompt") -> list[str] | None:
    """A negative prompt, or another text of that ``name``, for each of ``count`` prompts, or None."""
    word = name.replace("_", " ")
    if negative_prompt is None:
        return None
    for text in [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt:
        check_text(f"a {word}", text)
    negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(negatives) == 1:
        return negatives * count
    if len(negatives) != count:
        raise ValueError(
            f"expected one {word}, or one for each of the {count} prompts (the source's first), got {len(negatives)}"
        )
    return negatives


def chosen_edit(
    edit: Edit | None, self_replace_steps: Any, levels: Any, max_tokens: Any, layers: Any, unet: Any
) -> Edit:
    """The edit, or the `FreePromptEdit` that the four arguments describe, in layers that suit the UNet."""
    given = {"levels": levels, "max_tokens": max_tokens, "layers": layers}
    if edit is None:
        chosen = {name: value for name, value in given.items() if value is not None}
        return make_edit("fpe", (), None, unet, self_replace_steps=self_replace_steps, **chosen)
    require_edit(edit)
    if self_replace_steps != 0.8 or any(value is not None for value in given.values()):
        raise ValueError("self_replace_steps, levels, max_tokens and layers belong to the edit; pass them to it")
    return edit


def check_size(height: int, width: int, factor: int, stands_for: str = "one latent pixel") -> None:
    """Raise ValueError for sides that are no positive multiple of ``factor`` pixels, which something stands for."""
    for name, side in (("height", height), ("width", width)):
        if side <= 0 or side % factor:
            nearest = max(1, round(side / factor)) * factor
            raise ValueError(
                f"{name} must be a positive multiple of {factor} pixels, which {stands_for} stands for; "
                f"got {side}, the nearest is {nearest}"
            )


def image_size(
    native: tuple[int, int],
    factor: int,
    height: int | None,
    width: int | None,
    latents: torch.Tensor | None,
    multiple: int | None = None,
) -> tuple[int, int]:
    """Height and width in pixels; the parent ignores one given without the other, and sizes against latents.

    Args:
        native: those of the model.
        factor: pixels a latent pixel.
        height, width: what was asked for.
        latents: [..., h, w] to start from.
        multiple: pixels that a token of the model's stands for, where that is more than one latent pixel.

    Raises:
        ValueError: a size that is none of the latents', or no multiple.
    """
    grid = (native[0] // factor, native[1] // factor) if latents is None else tuple(latents.shape[-2:])
    size = (
        grid[0] * factor if height is None else height,
        grid[1] * factor if width is None else width,
    )
    asked = {name: side for name, side in (("height", height), ("width", width)) if side is not None}
    if latents is not None and (size[0] // factor, size[1] // factor) != grid:
        raise ValueError(
            f"latents of {grid[0]} x {grid[1]} make images of {grid[0] * factor} x {grid[1] * factor} pixels "
            f"(height x width), got {' and '.join(f'{name} {side}' for name, side in asked.items())}; leave "
            f"{' and '.join(asked)} out, or pass latents of that size"
        )
    if multiple in (None, factor):
        check_size(*size, factor)
    else:
        check_size(*size, multiple, "one token of the model")
    warn_of_size(size, native)
    return size
