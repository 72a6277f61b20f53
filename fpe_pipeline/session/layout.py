"""The layout of a batch, from what a pipeline call encoded or from what was said, checked against its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from ..models.adapters.adapter import Half, ModelAdapter, ModelCall, is_guided
from ..models.adapters.padding import counted_tokens
from ..models.roles import BatchRoles
from ..prompts.encoding import Encoding

__all__ = ["SHARED_NOISE", "CallLayout", "layout_as_given", "layout_of_call"]

#: What a report says of noise that rows share.
SHARED_NOISE = (
    "rows of one image draw the same noise where the call passes none (generator and no latents); "
    'editing(…, noise="separate") keeps them apart'
)


def layout_of_call(
    rows: int,
    encoding: Encoding,
    *,
    guided: bool,
    images: int | None,
    source_of: Sequence[int] | None,
    prompts_first: bool = False,
) -> BatchRoles:
    """The roles of a batch.

    Args:
        rows: the batch size of a call.
        encoding: what the pipeline call encoded.
        guided: whether the batch holds an unconditional half.
        images: images a prompt, where that was said.
        source_of: for each prompt, the index of its source prompt; default: prompt 0.
        prompts_first: whether the conditional half comes first.

    Raises:
        ValueError: a batch that is not made of these prompts and images.
    """
    if encoding.count is not None and encoding.images is not None:
        _check(rows, encoding, guided, images)
    sources = None if source_of is None else tuple(source_of)
    return _roles(rows, guided, images or encoding.images or 1, sources, encoding.dropped, prompts_first)


@lru_cache(maxsize=64)  # every step of a run has the same
def _roles(
    rows: int, guided: bool, images: int, sources: tuple[int, ...] | None, dropped: int, prompts_first: bool
) -> BatchRoles:
    roles = BatchRoles.from_batch(
        rows,
        classifier_free_guidance=guided,
        images_per_prompt=images,
        source_of=sources,
        prompts_first=prompts_first,
    )
    if not dropped:
        return roles
    return replace(roles, prompts=tuple(prompt + dropped for prompt in roles.prompts))


def layout_as_given(roles: BatchRoles, rows: int, pipe: Any, half: Half = "as guided") -> BatchRoles:
    """``roles=`` for a batch of so many rows; their conditional half where the call, or the pipeline from here on, has
    no other.

    Raises:
        ValueError: they describe another batch.
    """
    if roles.rows == rows:
        return roles
    alone = half == "conditional" or not getattr(pipe, "do_classifier_free_guidance", True)
    if alone and roles.without_guidance().rows == rows:
        return roles.without_guidance()
    raise ValueError(f"roles= describes a batch of {roles.rows} rows; the model got {rows}")


def _drawn_sources(roles: BatchRoles, rows: int | None) -> tuple[int, ...] | None:
    """For each of so many rows of latents its source, where a batch as ``roles=`` describe it repeats them; or None."""
    if not rows or roles.recorded or roles.batch % rows:
        return None
    parts = {
        tuple(source - start for source in roles.source_of[start : start + rows])
        for start in range(0, roles.batch, rows)
    }
    sources = parts.pop()
    return sources if not parts and all(0 <= source < rows for source in sources) else None


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
            f"{'on' if guided else 'off'} is a batch of {expected} rows; the model got {rows}: describe this "
            "batch with roles=, or encode what does not belong to the run in `with session.paused():`"
        )


def _check_texts(call: ModelCall, roles: BatchRoles) -> None:
    """Raise ValueError where rows of one prompt see texts that end at different tokens.

    Several pipelines of diffusers 0.42 repeat texts prompt by prompt, and their masks of padding one after the other.
    """
    rows_of: dict[tuple[bool, int], list[int]] = {}
    for row in range(roles.batch):
        rows_of.setdefault((roles.conditional[row], roles.prompt_of(row)), []).append(row)
    if len(rows_of) == roles.batch:
        return
    for name, mask in call.arguments[1].items():
        if "mask" not in name or not isinstance(mask, torch.Tensor) or mask.ndim != 2 or len(mask) != call.rows:
            continue
        tokens = counted_tokens(mask)
        for (_, prompt), rows in rows_of.items():
            seen = [tokens[row] for row in rows]
            if len(set(seen)) > 1:
                raise ValueError(
                    f"expected the images of prompt {prompt + 1} to see as many tokens of its text, got "
                    f"{', '.join(map(str, seen))} in {name}: for several images a prompt this pipeline repeats masks "
                    "of texts in another order than the texts, with an edit and without one, so that words are left "
                    "out where another prompt's text ends; make one image a prompt in each call, or write prompts of "
                    "as many tokens"
                )


@dataclass(frozen=True)
class CallLayout:
    """How a session reads the layout of a call: what was said of it, and of the pipeline what was not.

    Args:
        adapter: of the model.
        images, source_of, guided, roles, noise: as `EditingSession` takes them.
    """

    adapter: ModelAdapter
    images: int | None = None
    source_of: Sequence[int] | None = None
    guided: bool | None = None
    roles: BatchRoles | None = None
    noise: Literal["shared", "separate"] | None = None

    def of_call(self, call: ModelCall, encoding: Encoding) -> BatchRoles:
        """The roles of a call's rows, where those of one prompt see as much of its text."""
        roles = self.of(call.rows, encoding, call.half)
        _check_texts(call, roles)
        return roles

    def of(self, rows: int, encoding: Encoding, half: Half = "as guided") -> BatchRoles:
        """The roles of a batch of ``rows``, in a call that encoded this and that holds these rows of it."""
        if self.adapter.prompts_first and half == "as guided" and self._is_conditional(rows, encoding):
            half = "conditional"
        if self.roles is not None:
            return layout_as_given(self.roles, rows, self.adapter.pipe, half)
        if half != "as guided":
            guided = False
        else:
            guided = is_guided(self.adapter.pipe, encoding.guided) if self.guided is None else self.guided
        roles = layout_of_call(
            rows,
            encoding,
            guided=guided,
            images=self.images,
            source_of=self.source_of,
            prompts_first=self.adapter.prompts_first,
        )
        return roles.all_unconditional() if half == "unconditional" else roles

    def _is_conditional(self, rows: int, encoding: Encoding) -> bool:
        """Whether a batch of so many rows holds those alone that see their prompts."""
        if self.roles is not None:
            return rows == self.roles.without_guidance().rows
        return encoding.count is not None and rows == encoding.count * (encoding.images or 1)

    def drawn(self, encoding: Encoding, rows: int | None) -> Encoding:
        """What a pipeline encoded, which tells nobody of the images a prompt, once it draws noise for so many rows.

        Args:
            encoding: of the call; of no known count where it encoded nothing, and got embeddings.
            rows: of the latents; None where that is not known.

        Raises:
            ValueError: rows of which the images a prompt cannot be told.
        """
        if rows is None or self.roles is not None:
            return encoding
        if encoding.count is None and self.images is None:
            raise ValueError(
                f"{type(self.adapter.pipe).__name__} got embeddings, and does not say how many images each has: "
                "pass prompts, or say editing(..., images_per_prompt=1)"
            )
        count = encoding.count or rows // (self.images or 1)
        if not count or rows % count:
            raise ValueError(
                f"{type(self.adapter.pipe).__name__} draws noise for {rows} rows, which are not {count} prompts with "
                "some images each: describe this batch with roles="
            )
        return replace(encoding, count=count, images=rows // count)

    def paired(
        self, encoding: Encoding, pairs_pixels: bool, rows: int | None = None
    ) -> tuple[Sequence[int], int] | None:
        """The sources of the prompts and images a prompt, where rows of one image are to draw the same noise.

        Args:
            encoding: of the call, or what it asks for where it has encoded nothing yet.
            pairs_pixels: whether the edit asks for it.
            rows: of the latents that the pipeline draws; None where that is not known.

        Raises:
            ValueError: ``noise="shared"`` of rows that ``roles=`` do not tell, or a batch with further parts that
                nobody describes.
        """
        if self.roles is None and getattr(self.adapter.pipe, "do_perturbed_attention_guidance", False):
            is_guided(self.adapter.pipe)  # refused before the pipeline puts processors of its own into the layers
        shared = pairs_pixels if self.noise is None else self.noise == "shared"
        if not shared:
            return None
        if self.roles is not None:
            sources = _drawn_sources(self.roles, rows)
            if sources is None and self.noise == "shared":
                raise ValueError(
                    f'noise="shared" of {rows} rows, of which a batch of {self.roles.batch} as roles= describe it is '
                    "not made part by part: leave it out, and pass a list of generators, one with the same seed for "
                    "each row of an image"
                )
            return None if sources is None else (sources, 1)
        count, images = encoding.count, self.images or encoding.images
        if count is None:
            return None
        if images is None:  # of a call that draws before it encodes, such as HunyuanVideo's from a picture
            images = self.drawn(encoding, rows).images
        return self.source_of or (0,) * count, images or 1
