"""What a pipeline call encodes: its prompts, their images, guidance, and the very tokens that its text encoders get.

Nothing else says for certain how a batch is laid out and which key of cross-attention is which word. It is read while
the pipeline's ``encode_prompt`` runs, which every Stable Diffusion pipeline of diffusers has.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..shadows import Shadows
from ..text_parts import Template, TextPart, plain_tokenizer
from .words import TokenizedPrompt

__all__ = ["EncodedText", "Encoding", "EncodingHook", "encoding_tokenizer", "filled", "received_by", "text_of_parts"]

Inputs = dict[str, list[torch.Tensor]]
#: In the place of a token that there is not, in rows of which others are longer.
_NONE = -1
#: What encodes a call's prompts: JoyImage has a method of its own for those beside pictures.
_ENCODES = ("encode_prompt", "encode_prompt_multiple_images")
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
#: Of what comes after encoders and has tokens of its own; it takes them by name.
_TARGETS = ("target_input_ids", "target_attention_mask")


@dataclass(frozen=True)
class EncodedText:
    """One part of the text tokens of joint attention.

    Args:
        tokenizer: of the part.
        inputs: by text encoder that the pipeline has, the token numbers [rows, tokens] of each of its calls, of which
            the model receives the embeddings.
        length: tokens of the part where it has no encoder, and zeros stand there.
        template: the text around the prompts; None where they stand alone.
        registers: tokens of the model's own, which it puts before every text.
        has_quotes: whether prompts quote something, whose tokens stand before these.
        ends: whether texts end where they end, with padding behind those that are shorter than the longest of a call.
        multiple: of each text, tokens up to the next multiple of this number are attended to; 1 where all of a row are,
            or the others are masked.
    """

    tokenizer: Any = field(repr=False, compare=False)
    inputs: tuple[Sequence[torch.Tensor], ...] = field(repr=False)
    length: int = 0
    template: Template | None = None
    registers: int = 0
    ends: bool = False
    has_quotes: bool = False
    multiple: int = 1


@dataclass(frozen=True)
class Encoding:
    """One call of a pipeline's ``encode_prompt``.

    Args:
        prompts: as the call received them, the source's first; None where it received embeddings.
        count: how many there are in the batch; None where that is not known.
        images: images a prompt; None where the call does not say.
        guided: whether it asked for an unconditional half; None where it does not say.
        inputs: by text encoder, the token numbers [rows, tokens] of each of its calls.
        dropped: prompts, the first ones, whose rows have left the batch.
        texts: of a transformer, the parts of its text tokens, in order.
    """

    prompts: tuple[str, ...] | None = None
    count: int | None = None
    images: int | None = None
    guided: bool | None = None
    inputs: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict, repr=False)
    dropped: int = 0
    texts: tuple[EncodedText, ...] = ()

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        inputs: Mapping[str, Sequence[torch.Tensor]],
        texts: tuple[EncodedText, ...] = (),
    ) -> Encoding:
        """From the named arguments of ``encode_prompt``."""
        prompt, embeddings = arguments.get("prompt"), arguments.get("prompt_embeds")
        prompts = None
        if embeddings is None and isinstance(prompt, str):
            prompts = (prompt,)
        elif embeddings is None and isinstance(prompt, Sequence) and all(isinstance(text, str) for text in prompt):
            prompts = tuple(prompt)
        count = len(prompts) if prompts is not None else None
        if isinstance(embeddings, torch.Tensor | list):  # rows, or a list of them where they differ in length
            count = len(embeddings)
        images = arguments.get("num_images_per_prompt", arguments.get("num_videos_per_prompt"))
        guided = arguments.get("do_classifier_free_guidance")
        # Which Bria FIBO is told in its place; Ideogram 4 is told None where it has a scale for every step.
        if guided is None and arguments.get("guidance_scale") is not None:
            guided = arguments["guidance_scale"] > 1
        return cls(prompts, count, images, None if guided is None else bool(guided), inputs, texts=texts)

    def joined(self, later: Encoding) -> Encoding:
        """This and what the same pipeline call encoded later, by other text encoders."""
        inputs = {name: later.inputs.get(name) or self.inputs.get(name, ()) for name in {*self.inputs, *later.inputs}}
        pairs = zip(self.texts, later.texts, strict=True) if self.texts else ((text, text) for text in later.texts)
        return replace(later, inputs=inputs, texts=tuple(new if new.inputs else old for old, new in pairs))

    def placed(self, prompts: Sequence[TokenizedPrompt]) -> tuple[TokenizedPrompt, ...]:
        """The call's prompts where its text encoders received them.

        Raises:
            ValueError: an encoder received other tokens, or two of them received the prompts at different places.
        """
        found: list[tuple[TokenizedPrompt, ...]] = []
        refused: ValueError | None = None
        for batches in filter(None, self.inputs.values()):
            try:
                found.append(self.placed_in(batches, prompts))
            except ValueError as error:
                refused = refused or error
        if refused is not None and not found:
            raise refused
        if refused is not None or any(other != found[0] for other in found[1:]):
            raise ValueError(
                "the pipeline's text encoders receive other words, or the words of a prompt at different places, so "
                "that a key of cross-attention stands for two words: pass one prompt for both (leave prompt_2 out)"
            ) from refused
        return found[0] if found else tuple(prompts)

    @staticmethod
    def placed_in(batches: Sequence[torch.Tensor], prompts: Sequence[TokenizedPrompt]) -> tuple[TokenizedPrompt, ...]:
        """The prompts where one of a text encoder's calls received them; ValueError where none did."""
        first: ValueError | None = None
        for batch in batches:  # the prompts', then the negative prompts'
            if len(batch) == len(prompts):
                try:
                    return tuple(prompt.placed(row) for prompt, row in zip(prompts, batch.tolist(), strict=True))
                except ValueError as error:
                    first = first or error
        if first is not None:
            raise first
        return tuple(prompts)  # encoded in parts of another number: nothing can be told


class EncodingHook:
    """Shows every call of a pipeline's ``encode_prompt`` to a function, until it is removed.

    The method is shadowed on the instance, with its signature, which pipelines and their callers inspect.

    Args:
        pipe: the pipeline.
        receive: is shown what it encodes.
        parts: of the text tokens of its transformer; () for a UNet.
    """

    def __init__(self, pipe: Any, receive: Callable[[Encoding], None], parts: Sequence[TextPart] = ()) -> None:
        def encode_prompt(original: Any, *args: Any, **kwargs: Any) -> Any:
            signature = inspect.signature(original)
            bound = signature.bind(*args, **kwargs)
            given = dict(bound.arguments)
            # Z-Image writes its template into the very list of prompts that it is given, which is the caller's.
            for name in ("prompt", "negative_prompt"):
                if isinstance(given.get(name), list):
                    bound.arguments[name] = list(given[name])
            with received_by(pipe, parts) as received:
                encoded = original(*bound.args, **bound.kwargs)
            default = signature.parameters.get("max_sequence_length")
            if default is not None:
                given.setdefault("max_sequence_length", default.default)
            receive(Encoding.of(given, received.tokens, text_of_parts(pipe, parts, received, given)))
            return encoded

        self._shadows = Shadows(pipe)
        for name in _ENCODES:
            self._shadows.cover(name, encode_prompt)

    def remove(self) -> None:
        """Uncover the method that was there before."""
        self._shadows.remove()


def encoding_tokenizer(pipe: Any) -> Any:
    """The tokenizer whose tokens a pipeline's cross-attention sees; None where it has none.

    Pipelines with two have one vocabulary in both, and refiners have the second alone. In FLUX.2 [dev] and Qwen-Image
    2.1 it is part of a processor, which reads pictures too.
    """
    for name in ("tokenizer", "tokenizer_2", "processor"):
        found = getattr(pipe, name, None)
        if found is not None:
            return plain_tokenizer(found)
    return None


@dataclass(frozen=True)
class _Received:
    """What text encoders received: of each one's calls token numbers [rows, tokens], and which are no padding."""

    tokens: Inputs = field(default_factory=dict)
    masks: dict[str, list[torch.Tensor | None]] = field(default_factory=dict)


def text_of_parts(
    pipe: Any,
    parts: Sequence[TextPart],
    received: _Received,
    arguments: Mapping[str, Any],
    *,
    fills_apart: bool = False,
) -> tuple[EncodedText, ...]:
    """The parts of a transformer's text tokens, as the encoders received them.

    Args:
        pipe: the pipeline.
        parts: of the text tokens of its transformer.
        received: by its encoders.
        arguments: by name, of what encoded the prompts.
        fills_apart: whether the texts of each call of an encoder stand in a batch of their own.
    """
    length = arguments.get("max_sequence_length") or 0
    return tuple(_text(pipe, part, received, length, arguments, fills_apart) for part in parts)


def _text(
    pipe: Any,
    part: TextPart,
    received: _Received,
    length: int,
    arguments: Mapping[str, Any],
    fills_apart: bool,
) -> EncodedText:
    """A part of a transformer's text as the encoders received it; where it has none it is of this length."""
    template = None if part.template is None else part.template(pipe, arguments)
    inputs: list[Sequence[torch.Tensor]] = []
    for name in part.encoders:
        calls = received.tokens.get(name)
        if calls:
            masked = zip(calls, received.masks[name], strict=True)
            is_whole = template is None or part.is_padded
            dropped = 0 if template is None else template.dropped
            received_of = None if template is None else template.received
            begun = itertools.starmap(_begun, zip(calls, received.masks[name], strict=True))
            whole = [call[:, dropped:] if received_of is None else received_of(call) for call in begun]
            if part.one_at_a_time:
                whole = _gathered(whole, 0 if part.keeps_length else length, arguments)
            leaves = None if template is None else template.replaced
            own = whole if is_whole else [_without_padding(*call, dropped, length, leaves) for call in masked]
            if template is not None and template.at_least:
                own = [filled(call, max(call.shape[1], template.at_least)) for call in own]
            if part.in_one_batch or part.multiple > 1:
                batches = [[call] for call in own] if fills_apart else [own]
                own = [call for batch in batches for call in _filled_up(batch, part.multiple)]
            inputs.append(own)
    ends = (template is not None or part.in_one_batch) and not part.is_padded
    has_quotes = part.quotes is not None and bool(received.tokens.get(part.quotes))
    tokenizer = plain_tokenizer(getattr(pipe, part.tokenizer, None))
    return EncodedText(tokenizer, tuple(inputs), length, template, part.registers, ends, has_quotes, part.multiple)


def _begun(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Token numbers [rows, tokens] without those of padding that stands before a text."""
    return tokens if mask is None or mask.shape != tokens.shape else tokens.masked_fill(mask.cumsum(1) == 0, _NONE)


def _without_padding(
    tokens: torch.Tensor, mask: torch.Tensor | None, dropped: int, length: int, replaced: int | None
) -> torch.Tensor:
    """[rows, tokens of the longest]: those that are no padding, without the first ones, at most ``length``, and without
    any of the number ``replaced``."""
    keeps = torch.ones_like(tokens) if mask is None else mask
    rows = [row[kept.bool()][dropped:][: length or None] for row, kept in zip(tokens, keeps, strict=True)]
    if replaced is not None:
        rows = [row[row != replaced] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_NONE)


def _gathered(calls: Sequence[torch.Tensor], length: int, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """Calls of one text each, filled up to a length or to the longest: those of the prompts, then the negative ones."""
    prompt = arguments.get("prompt")
    count = len(prompt) if isinstance(prompt, list) else 1
    batches = filter(None, (calls[:count], calls[count:]))
    return [torch.cat([filled(call, max(length, *(c.shape[1] for c in batch))) for call in batch]) for batch in batches]


def _filled_up(calls: Sequence[torch.Tensor], multiple: int) -> list[torch.Tensor]:
    """The same as wide as the widest, filled up to a multiple: rows of all calls stand in one batch."""
    width = -(-max(call.shape[1] for call in calls) // multiple) * multiple
    return [filled(call, width) for call in calls]


def filled(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Token numbers [rows, tokens] with as many places more as make them so wide, in which no token is."""
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=_NONE)


@contextmanager
def received_by(pipe: Any, parts: Sequence[TextPart] = ()) -> Iterator[_Received]:
    """What the pipeline's text encoders receive in a block.

    Args:
        pipe: the pipeline.
        parts: of the text tokens of its transformer, which say of what is called in an encoder's stead.
    """
    reads = {name: part.reads for part in parts for name in part.encoders if part.reads}
    received = _Received()
    handles = []
    for name in dict.fromkeys((*_ENCODERS, *(name for part in parts for name in part.encoders))):
        encoder = getattr(pipe, name, None)
        if isinstance(encoder, torch.nn.Module):
            kept = received.tokens.setdefault(name, []), received.masks.setdefault(name, [])
            keep = functools.partial(_keep_begun if name in reads else _keep_input, *kept)
            reader = encoder.get_submodule(reads.get(name, ""))
            handles.append(reader.register_forward_pre_hook(torch.compiler.disable(keep), with_kwargs=True))
    try:
        yield received
    finally:
        for handle in handles:
            handle.remove()


def _keep_begun(
    batches: list[torch.Tensor],
    masks: list[torch.Tensor | None],
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Of what has no mask beside its numbers, the first of which that is not 0 begins the text."""
    given = args[0] if args else kwargs["input"]
    batches.append(given.detach())
    masks.append(((given != 0).cumsum(1) > 0).to(given.dtype))


def _keep_input(
    batches: list[torch.Tensor],
    masks: list[torch.Tensor | None],
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if _TARGETS[0] in kwargs:
        args, kwargs = (), dict(zip(("input_ids", "attention_mask"), map(kwargs.get, _TARGETS), strict=True))
    given = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(given, torch.Tensor) and given.ndim == 2 and not given.is_floating_point():
        batches.append(given.detach())
        masks.append(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
