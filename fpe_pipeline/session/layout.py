"""The layout of a UNet's batch, from what a pipeline call encoded or from what was said, checked against its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..models.roles import BatchRoles
from ..prompts.encoding import Encoding

__all__ = ["layout_as_given", "layout_of_call"]


def layout_of_call(
    rows: int, encoding: Encoding, *, guided: bool, images: int | None, source_of: Sequence[int] | None
) -> BatchRoles:
    """The roles of a batch.

    Args:
        rows: the UNet's batch size.
        encoding: what the pipeline call encoded.
        guided: whether the batch holds an unconditional half.
        images: images a prompt, where that was said.
        source_of: for each prompt, the index of its source prompt; default: prompt 0.

    Raises:
        ValueError: a batch that is not made of these prompts and images.
    """
    if encoding.count is not None and encoding.images is not None:
        _check(rows, encoding, guided, images)
    roles = BatchRoles.from_batch(
        rows,
        classifier_free_guidance=guided,
        images_per_prompt=images or encoding.images or 1,
        source_of=source_of,
    )
    if not encoding.dropped:
        return roles
    return replace(roles, prompts=tuple(prompt + encoding.dropped for prompt in roles.prompts))


def layout_as_given(roles: BatchRoles, rows: int, pipe: Any) -> BatchRoles:
    """``roles=`` for a batch of so many rows; their conditional half where the pipeline's guidance has ended.

    Raises:
        ValueError: they describe another batch.
    """
    if roles.rows == rows:
        return roles
    if not getattr(pipe, "do_classifier_free_guidance", True) and roles.without_guidance().rows == rows:
        return roles.without_guidance()
    raise ValueError(f"roles= describes a batch of {roles.rows} rows; the UNet received {rows}")


def _check(rows: int, encoding: Encoding, guided: bool, images: int | None) -> None:
    if images not in (None, encoding.images):
        raise ValueError(
            f"images_per_prompt={images} was said of a pipeline call with num_images_per_prompt={encoding.images}: "
            "leave it out, it is read from the call"
        )
    expected = (1 + guided) * (encoding.images or 1) * (encoding.count or 0)
    if rows != expected:
        raise ValueError(
            f"the pipeline encodes {encoding.count} prompts with {encoding.images} images each, which with guidance "
            f"{'on' if guided else 'off'} is a batch of {expected} rows; the UNet received {rows}: describe this batch "
            "with roles=, or encode what does not belong to the run in `with session.paused():`"
        )
