"""Flow models whose pipelines pad the texts of a call to the longest, with padding that the model attends to.

What a model sees of a source then depends on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from .flow_model import FlowModel

__all__ = ["PaddedToLongest"]


class PaddedToLongest(FlowModel):
    """A model of texts of its own length alone, and of the longest one's beside others."""

    #: What the model is called.
    title: ClassVar[str]

    def seen_apart(self, inverted: str, length: int, prompts: Sequence[str], text_length: int) -> str | None:
        alone = self.own_text_tokens(inverted, length)
        beside = max(self.own_text_tokens(prompt, text_length) for prompt in prompts)
        if beside == alone:
            return None
        return (
            f"was inverted with {alone} text tokens and is denoised with {beside}, padding among them, to which the "
            "model attends: invert with a prompt of about the targets' length"
        )

    @contextmanager
    def padded_beside(
        self, source: str, targets: Sequence[str], text_length: int, fill: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> Iterator[None]:
        """A block in which the prompts that are encoded first are as long as a source that is not among them.

        Args:
            source: a recorded prompt.
            targets: of the call.
            text_length: tokens to which texts are cut.
            fill: token ids [prompts, tokens], and the source's number of tokens, to as many.

        Raises:
            ValueError: a target that takes more tokens than the source.
        """
        longest = self.own_text_tokens(source, text_length)
        for target in targets:
            tokens = self.own_text_tokens(target, text_length)
            if tokens > longest:
                raise ValueError(
                    f"the target {target!r} takes {tokens} tokens, and the recorded source {longest}: {self.title} "
                    "pads the texts of a call to the longest and attends to padding, so that beside this target the "
                    f"source would be another image's. Write targets of at most {longest} tokens, record a longer "
                    "source prompt, or make both together, pipe(source, targets)"
                )
        is_first = True

        def pad(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            nonlocal is_first
            if not is_first:  # negative prompts, which are as long as when they were recorded
                return args, kwargs
            is_first = False
            if args:
                return (fill(args[0], longest), *args[1:]), kwargs
            return args, {**kwargs, "input_ids": fill(kwargs["input_ids"], longest)}

        handle = self.pipe.text_encoder.register_forward_pre_hook(torch.compiler.disable(pad), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
