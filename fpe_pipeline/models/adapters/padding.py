"""How much of each text is no padding, of masks that pipelines give their transformers, and what is said of padding
that is attended to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...callers import warn
from ...errors import EditWarning
from .once import once_a_tensor

__all__ = ["counted_tokens", "lengths_before_images", "text_lengths", "warn_of_padding"]


def warn_of_padding(model: str, alone: Sequence[int], longest: int, least: int = 0) -> None:
    """Say which texts of a call get more padding than they have alone, where a model attends to it.

    Args:
        model: its name.
        alone: of each text, the tokens with which it comes to the model by itself.
        longest: the tokens with which they come together.
        least: tokens to which shorter texts are padded by themselves.
    """
    shorter = [number for number, count in enumerate(alone) if count < longest]
    if shorter:
        many = f"as many tokens, or of at most {least}," if least else "as many tokens,"
        warn(
            f"texts are padded to {longest} tokens, as the longest one of the call is, and {model} attends to padding: "
            f"texts {shorter} have fewer alone, where they make other images than here. Write prompts of {many} to "
            "edit the image that a source has alone",
            EditWarning,
        )


@once_a_tensor
def counted_tokens(mask: torch.Tensor) -> tuple[int, ...]:
    """Text tokens of each row that count, of a mask [rows, tokens] that is 0 for padding, wherever that stands."""
    return tuple(map(int, mask.bool().sum(1).tolist()))


@once_a_tensor
def text_lengths(mask: torch.Tensor) -> tuple[int, ...] | None:
    """Text tokens of each row before its padding, of a mask [rows, tokens] that is 0 there; None where there is none.

    Raises:
        ValueError: tokens that are left out and followed by others.
    """
    if bool(mask.bool().all()):
        return None
    lengths = mask.bool().sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if not bool((mask.bool() == (places < lengths[:, None])).all()):
        raise ValueError("the mask of text tokens leaves out some that are followed by others: pad texts at their end")
    return tuple(int(length) for length in lengths.tolist())


def lengths_before_images(mask: torch.Tensor, texts: int, rows: int, images: int) -> tuple[int, ...] | None:
    """Text tokens of each row that the mask leaves in; None where it leaves out nothing.

    Args:
        mask: of text tokens and then image tokens, [rows or 1, T + N].
        texts: T.
        rows: of the call.
        images: N, with tokens of reference pictures.

    Raises:
        ValueError: a mask of another shape or dtype, or one that leaves out anything but the ends of texts.
    """
    shape, tokens = tuple(mask.shape), texts + images
    if shape not in ((rows, tokens), (1, tokens)):
        raise ValueError(
            f"expected a mask [{rows}, {tokens}] of text and image tokens, got one of {list(shape)}: append ones "
            "for the image's tokens to the mask of the texts, as diffusers' pipelines do"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"expected a mask of truth values or floating-point ones and zeros, got {mask.dtype}: convert it"
        )
    found = _zeros(mask)
    if any(begin < end != texts for begin, end in found):
        raise ValueError(
            "the mask leaves out other tokens than the last ones of texts, such as tokens of the image or text that is "
            "followed by text that counts: pad texts at their ends, and leave image tokens in"
        )
    if all(begin == end for begin, end in found):
        return None
    lengths = tuple(begin if begin < end else texts for begin, end in found)
    return lengths * (rows // len(lengths))


@once_a_tensor
def _zeros(mask: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Of each row of a mask [rows, tokens], where its zeros begin and end; (0, 0) where there are none.

    Raises:
        ValueError: numbers other than ones and zeros, or zeros in more than one place.
    """
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("expected a mask of ones and zeros, got other numbers: pass truth values")
    found = []
    for row in mask.tolist():
        zeros = [place for place, value in enumerate(row) if not value]
        if zeros and zeros[-1] - zeros[0] + 1 != len(zeros):
            raise ValueError(
                "the mask of tokens has holes: it leaves out some in more than one place of a row; pad texts at their "
                "ends"
            )
        found.append((zeros[0], zeros[-1] + 1) if zeros else (0, 0))
    return tuple(found)
