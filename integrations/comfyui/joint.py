"""Free-Prompt-Editing as what ComfyUI's transformers call in the place of their attention.

A transformer attends to image and text under one softmax. The image's queries and keys of a target are its source's
there, and everything of its text stays its own. The image's part of the map is then one for a source and its targets::

    image rows:      join([A(q_I, k_I), A(q_I, k_T)]) @ [v_I ; v_T]
    text's rows:     A(q_T, [k_I | k_T]) @ [v_I ; v_T]

so that it is computed once for all of them, and not stored. Tokens of reference pictures are treated as text.

ComfyUI hands every call of its attention to ``transformer_options["optimized_attention_override"]``, which is told the
block but not where its image is. That is known around the model's call, from the sizes of latents and text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fpe_kernels import AttentionMap, join

from .attention import by_head, is_edited, maps_of_rows

__all__ = ["JointMaps", "Tokens", "served", "tokens_of"]

#: Models of ComfyUI by the names of their classes, and whether text and image attend together: text stands first then.
SERVED = {
    "Flux": True,
    "Chroma": True,
    "OpenAISignatureMMDITWrapper": True,
    "QwenImageTransformer2DModel": True,
    "SingleStreamDiT": True,
    "WanModel": False,
}
_KEY = "fpe_tokens"
#: What a call of a model is given behind latents and noise levels.
_GIVEN = ("c_concat", "c_crossattn", "control", "transformer_options")
_NEVER = (
    "none of the model's attention was handed to Free-Prompt-Editing in a step that it edits: another node has taken "
    "its place (connect that one before it), or this ComfyUI is too old (update it)"
)


@dataclass
class Tokens:
    """Where a call's image is in its layers: behind ``text`` tokens, ``image`` of them; how many layers were edited."""

    text: int
    image: int
    edited: int = field(default=0, compare=False)


@dataclass(frozen=True)
class JointMaps:
    """Attention of a transformer in which targets have the image map of their source.

    Args:
        start, stop: the steps with ``int(total * start) <= index < int(total * stop)`` are edited.
        strength: 1 for the source's map alone, less for a blend with the target's own.
        inner: the attention that another node has chosen, which computes what is not edited.
        backend: one of ``fpe_kernels.backends()``, or "auto".
    """

    start: float = 0.0
    stop: float = 0.2
    strength: float = 1.0
    inner: Callable[..., torch.Tensor] | None = None
    backend: str = "auto"

    def around(self, executor: Any, x: torch.Tensor, t: Any, *given: Any, **named: Any) -> Any:
        """A call of the model (``APPLY_MODEL``), in which layers are told where the image is.

        Args:
            executor: calls what is around the model further inside, and the model.
            x: latents [rows, channels, height, width] or [rows, channels, frames, height, width].
            t: the noise level of each row.
            given: what ComfyUI passes behind these, among it text embeddings and ``transformer_options``.
            named: the same, by name.

        Raises:
            ValueError: a step was to be edited and none of the model's attention came here.
        """
        call = dict(zip(_GIVEN, given, strict=False)) | named
        options = call.get("transformer_options") or {}
        if not is_edited(self.start, self.stop, options):
            return executor(x, t, *given, **named)
        tokens = tokens_of(executor.class_obj.diffusion_model, x, call.get("c_crossattn"))
        told, place = {**options, _KEY: tokens}, _GIVEN.index("transformer_options")
        if len(given) > place:
            given = (*given[:place], told, *given[place + 1 :])
        else:
            named["transformer_options"] = told
        out = executor(x, t, *given, **named)
        chunks = options["cond_or_uncond"]
        if not tokens.edited and maps_of_rows(len(x), chunks) != list(range(len(x))):
            raise ValueError(_NEVER)
        return out

    def __call__(
        self,
        attention: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: int,
        *given: Any,
        **named: Any,
    ) -> torch.Tensor:
        """What ``attention(query, key, value, heads, …)`` gives, with the source's maps where this is a layer of a call
        that is edited."""
        options = named.get("transformer_options") or {}
        tokens = options.get(_KEY)

        def plain(*states: torch.Tensor) -> torch.Tensor:
            if self.inner is not None:
                return self.inner(attention, *states, heads, *given, **named)
            return attention(*states, heads, *given, **named)

        is_by_head = bool(named.get("skip_reshape"))
        if tokens is None or not _is_layer(tokens, query, key, is_by_head):
            return plain(query, key, value)
        _check_place(tokens, options)
        maps = maps_of_rows(len(query), options["cond_or_uncond"])
        targets = [row for row, source in enumerate(maps) if source != row]
        if not targets:  # ComfyUI may ask for the rows of the negative prompt alone
            return plain(query, key, value)
        tokens.edited += 1
        mask = given[0] if given else named.get("mask")
        if mask is not None:  # the rows of a mask are each row's own: as ComfyUI computes it, of what is put together
            out = plain(*(put_together(each, maps, tokens, is_by_head) for each in (query, key)), value)
        else:
            by_heads = [each if is_by_head else by_head(each, heads) for each in (query, key, value)]
            out = edited_rows(*by_heads, maps, tokens, scale=named.get("scale"), backend=self.backend)
            out = out if named.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)
        if self.strength < 1:
            states = (query, key, value)
            own = plain(*states)[targets] if mask is not None else plain(*(each[targets] for each in states))
            out[targets] = torch.lerp(own, out[targets], self.strength)
        return out


def served(model: Any) -> bool:
    """Whether layers of a diffusion model of ComfyUI are known here."""
    return type(_uncompiled(model)).__name__ in SERVED


def tokens_of(model: Any, latents: torch.Tensor, text: torch.Tensor | None) -> Tokens:
    """Where images are in the layers of a model.

    Args:
        model: a diffusion model of :data:`SERVED`.
        latents: [rows, channels, height, width] or [rows, channels, frames, height, width].
        text: embeddings [rows, tokens, …].

    Raises:
        ValueError: the model does not say the size of its patches, or an image has as many tokens as a text that has
            a layer of its own.
    """
    model = _uncompiled(model)
    patch = getattr(model, "patch_size", getattr(model, "patch", None))
    if patch is None:
        raise ValueError(
            f"expected {type(model).__name__} to have a patch_size, got none: update fpe-kernels or ComfyUI"
        )
    sides = latents.shape[2:]
    patches = tuple(patch) if isinstance(patch, Sequence) else (patch, patch)
    patches = (1,) * (len(sides) - len(patches)) + patches
    image = math.prod(-(-side // size) for side, size in zip(sides, patches, strict=True))
    words = 0 if text is None else text.shape[1]
    if SERVED[type(model).__name__]:
        return Tokens(words, image)
    if words == image:  # layers of the image, and of the image to its text, are told apart by their keys alone
        raise ValueError(
            f"expected an image or a video of more or fewer tokens than its text, got {image} of both, so that layers "
            "of the one cannot be told from layers of the other: choose another size or number of frames"
        )
    return Tokens(0, image)


def edited_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    maps: Sequence[int],
    tokens: Tokens,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention whose image queries and keys are those of other rows.

    Args:
        query: [rows, H, tokens, D].
        key: [rows, H or fewer, tokens, D].
        value: as keys.
        maps: for each row, the row whose image queries and keys it has.
        tokens: where the image is among them; all others are each row's own.
        scale: what scores are multiplied with; default: ``D ** -0.5``.
        backend: of the maps.

    Returns:
        [rows, H, tokens, D].
    """
    image = slice(tokens.text, tokens.text + tokens.image)

    def others(states: torch.Tensor) -> torch.Tensor:
        return torch.cat([states[:, :, : image.start], states[:, :, image.stop :]], dim=2)

    first = sorted(set(maps))
    index = [first.index(row) for row in maps]
    queries, keys = query[first][:, :, image], key[first][:, :, image]
    over_image: Any = AttentionMap(queries, keys, scale=scale, backend=backend).take(index)
    if tokens.image == query.shape[2]:
        return over_image @ value
    of_others = others(key)
    over_others = AttentionMap(queries[index], of_others, scale=scale, backend=backend)
    values = torch.cat([value[:, :, image], others(value)], dim=2)
    of_image = join([over_image, over_others]) @ values
    rest = (
        AttentionMap(others(query), torch.cat([keys[index], of_others], dim=2), scale=scale, backend=backend) @ values
    )
    before, behind = rest[:, :, : image.start], rest[:, :, image.start :]
    return torch.cat([before, of_image, behind], dim=2)


def put_together(states: torch.Tensor, maps: Sequence[int], tokens: Tokens, is_by_head: bool) -> torch.Tensor:
    """Queries or keys [rows, H, tokens, D] or [rows, tokens, H × D] whose image tokens are those of other rows."""
    states = states.clone()
    place = (slice(None),) * (2 if is_by_head else 1) + (slice(tokens.text, tokens.text + tokens.image),)
    states[place] = states[place][list(maps)]
    return states


def _uncompiled(model: Any) -> Any:
    """What ``torch.compile`` was given; ComfyUI puts its result in the model's place around a call."""
    return getattr(model, "_orig_mod", model)


def _is_layer(tokens: Tokens, query: torch.Tensor, key: torch.Tensor, is_by_head: bool) -> bool:
    """Whether a call of attention is that of a layer over the image, not of text alone or of an image to text."""
    dim = 2 if is_by_head else 1
    if query.shape[dim] != key.shape[dim]:
        return False
    if not tokens.text:
        return query.shape[dim] == tokens.image
    return query.shape[dim] >= tokens.text + tokens.image


def _check_place(tokens: Tokens, options: Any) -> None:
    """Raise ValueError where a block says that its image begins elsewhere."""
    place = options.get("img_slice") if options.get("block_type") == "single" else None
    if place is not None and place[0] != tokens.text:
        raise ValueError(
            f"expected the image behind the prompt's {tokens.text} tokens, got it behind {place[0]}: another node puts "
            "tokens of its own there; connect the model without that node"
        )
