"""Calls of a modular pipeline, which has no methods to listen to: what it is asked stands in its blocks' state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..models.adapters.adapter import ModelAdapter
from ..prompts.encoding import Encoding, received_by, text_of_parts
from ..text_parts import inner_blocks
from .shared_noise import are_paired, paired_generators

__all__ = ["ModularCalls"]


class ModularCalls:
    """Hands on what a modular pipeline is asked and encodes, and has rows of one image draw the same noise.

    Args:
        adapter: of the model, with the pipeline around it.
        called: is told that a call of the pipeline begins.
        encoded: is shown what the call has encoded, before the model is called for the first time.
        paired: as `PipelineHooks` takes it.
        drawn: is told what the rows of a call draw from, as `_PairedNoise.take`.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        called: Callable[[], None],
        encoded: Callable[[Encoding], None],
        paired: Callable[[int | None, Encoding | None], tuple[Sequence[int], int] | None],
        drawn: Callable[..., None],
    ) -> None:
        self._adapter = adapter
        self._called, self._encoded, self._paired, self._drawn = called, encoded, paired, drawn
        self._pending: Callable[[], Encoding] | None = None  # of a call that has not come to the model yet
        pipe: Any = adapter.pipe
        self._name = "_blocks" if hasattr(pipe, "_blocks") else "blocks"  # as in diffusers 0.35
        self._pipe, self._covered = pipe, _Blocks(getattr(pipe, self._name), self._run)
        setattr(pipe, self._name, self._covered)
        tell = torch.compiler.disable(self._tell)
        # Before the session's own hooks, which ask what was encoded.
        self._handles = [model.register_forward_pre_hook(tell, prepend=True) for model in adapter.models.values()]

    def remove(self) -> None:
        """Leave the pipeline as it was found."""
        for handle in self._handles:
            handle.remove()
        if getattr(self._pipe, self._name) is self._covered:
            setattr(self._pipe, self._name, self._covered.original)

    def _run(self, blocks: Any, pipe: Any, state: Any) -> Any:
        """The blocks, with generators that the rows of one image share."""
        for name in ("prompt", "negative_prompt"):
            if isinstance(texts := state.values.get(name), list):
                state.set(name, list(texts))  # Z-Image writes its template into the very list, which is the caller's
        values = {name: list(value) if isinstance(value, list) else value for name, value in state.values.items()}
        self._called()
        layout, generator = self._paired(None, Encoding.of(values, {})), values.get("generator")
        self._drawn(generator if isinstance(generator, list) else None)
        draws = "generator" in values and values.get("latents") is None
        if draws and layout is not None and not isinstance(generator, list):  # a list says every row's own
            self._check_picture(values)
            made = paired_generators(generator, *layout)
            state.set("generator", made)
            self._drawn(made, layout)  # for the scheduler's steps, to which most blocks hand no generator
        elif draws and layout is not None and isinstance(generator, list) and are_paired(generator, *layout):
            self._drawn(generator, layout, given=True)
        parts = () if self._adapter.words_refused else self._adapter.text_parts
        with received_by(pipe, self._adapter.text_parts) as received:
            self._pending = lambda: Encoding.of(
                values, received.tokens, text_of_parts(pipe, parts, received, values, fills_apart=True)
            )
            try:
                return blocks(pipe, state)
            finally:
                self._pending = None

    def _check_picture(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError for a picture that a generator encodes, of which there would have to be one a row.

        FLUX.3 encodes its reference pictures by none.
        """
        if values.get("image") is not None and any(map(_draws_by_autoencoder, inner_blocks(self._pipe))):
            raise ValueError(
                f"{type(self._pipe).__name__} is given a picture, and encodes it by the generators that draw noise: "
                "pass a list of generators, one a row, with the same seed for rows of one image (and as many pictures, "
                'where its blocks ask for one a prompt), or say editing(..., noise="separate")'
            )

    def _tell(self, *_: Any) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._encoded(pending())


def _draws_by_autoencoder(block: Any) -> bool:
    """Whether a block that holds no others takes a generator beside an autoencoder."""
    if getattr(block, "sub_blocks", None):
        return False
    parts = {part.name for part in block.expected_components}
    return "vae" in parts and "generator" in {given.name for given in block.inputs}


class _Blocks:
    """What stands in the place of blocks: all that they are, run by another function.

    Args:
        original: the blocks.
        run: is called with them, and with what they are called with.
    """

    def __init__(self, original: Any, run: Callable[[Any, Any, Any], Any]) -> None:
        self.original, self._run = original, run

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __call__(self, pipe: Any, state: Any) -> Any:
        return self._run(self.original, pipe, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What ``pipe.blocks`` gives, and what a copy of the pipeline has: the blocks themselves."""
        return copy.deepcopy(self.original, memo)
