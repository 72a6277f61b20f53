"""The source's tokens, so that a replay, which encodes targets alone, can place words among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..prompts.encoding import EncodedText, Encoding, filled

__all__ = ["SourceText", "is_source_text", "source_text", "with_source"]

#: By part of the text tokens, text encoder of the part and call of it, as "text-0-1-0": token numbers [1, tokens]. On a
#: UNet by text encoder, as "text-text_encoder_2", those of its call with the prompts.
SourceText = Mapping[str, torch.Tensor]
_TEXT = "text"


def is_source_text(name: str) -> bool:
    """Whether a tensor of a recording's folder is of the source's tokens."""
    return name.startswith(f"{_TEXT}-")


def source_text(encoding: Encoding) -> dict[str, torch.Tensor]:
    """What the text encoders received in the call that generated a source, on the CPU."""
    return {name: tokens.cpu() for name, tokens in _named(encoding).items()}


def with_source(encoding: Encoding, prompt: str, text: SourceText) -> Encoding:
    """A call of targets alone as if it had encoded their source before them.

    Its number of prompts is left open: the source has no row in the batch. Texts that end where they end become as long
    as the longest.

    Args:
        encoding: of the call.
        prompt: the source's.
        text: of the source.

    Raises:
        ValueError: the pipeline encodes in other parts, or texts of another length, than when it was recorded.
    """
    own = _named(encoding)
    if own.keys() == text.keys():
        own, text = _of_one_length(encoding.texts, own, text)
    widths, recorded = ({name: tokens.shape[1] for name, tokens in one.items()} for one in (own, text))
    if widths != recorded:
        raise ValueError(
            "the pipeline encodes texts otherwise than when the source was recorded, so that the source's words cannot "
            f"be told from its keys: by part, text encoder and call {recorded} tokens there and {widths} here; use the "
            "tokenizers and text encoders that it was recorded with, or record it again"
        )
    joined = {name: torch.cat([text[name].to(tokens), tokens]) for name, tokens in own.items()}
    texts = tuple(
        replace(part, inputs=tuple(_calls(joined, number, encoder) for encoder in range(len(part.inputs))))
        for number, part in enumerate(encoding.texts)
    )
    inputs = encoding.inputs if texts else {name.removeprefix(f"{_TEXT}-"): [joined[name]] for name in joined}
    return replace(encoding, prompts=(prompt, *(encoding.prompts or ())), count=None, inputs=inputs, texts=texts)


def _named(encoding: Encoding) -> dict[str, torch.Tensor]:
    if not encoding.texts:  # of a UNet: an encoder's first call is that with the prompts
        return {f"{_TEXT}-{encoder}": calls[0] for encoder, calls in encoding.inputs.items() if calls}
    return {
        f"{_TEXT}-{part}-{encoder}-{call}": tokens
        for part, encoded in enumerate(encoding.texts)
        for encoder, calls in enumerate(encoded.inputs)
        for call, tokens in enumerate(calls)
    }


def _of_one_length(
    texts: Sequence[EncodedText], own: Mapping[str, torch.Tensor], source: SourceText
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Both with all calls of a part as long as the longest, where its texts end where they end."""
    ends = [name for part, encoded in enumerate(texts) if encoded.ends for name in own if _is_of(name, part)]
    widths = {name: max(tokens[name].shape[1] for tokens in (own, source)) for name in ends}

    def longer(tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: given if name not in widths else filled(given, widths[name]) for name, given in tokens.items()}

    return longer(own), longer(source)


def _is_of(name: str, part: int) -> bool:
    return name.startswith(f"{_TEXT}-{part}-")


def _calls(tokens: Mapping[str, torch.Tensor], part: int, encoder: int) -> list[Any]:
    """The calls of a text encoder, in their order."""
    prefix = f"{_TEXT}-{part}-{encoder}-"
    return [given for name, given in tokens.items() if name.startswith(prefix)]
