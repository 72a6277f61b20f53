"""How a transformer's pipeline makes the text tokens that its layers see, one part of them after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = ["Template", "TextPart", "conversation", "inner_blocks", "plain_tokenizer", "said"]


class Template(NamedTuple):
    """A text of the pipeline's own around every prompt that it encodes.

    Args:
        before, after: the text on either side.
        dropped: how many tokens, the first ones, the model does not receive.
        shows: whether pictures stand before the prompt, each of which becomes many tokens.
        replaced: the number of a token that pictures become, in whose place the model has tokens of its own.
        received: of the tokens [rows, tokens] that the encoder receives, those that the model does; default: all but
            the dropped ones.
        lowers: whether prompts are encoded in small letters, without blanks around them.
        at_least: tokens to which shorter texts are padded, where they end where they end.
    """

    before: str
    after: str = ""
    dropped: int = 0
    shows: bool = False
    replaced: int | None = None
    received: Callable[[torch.Tensor], torch.Tensor] | None = None
    lowers: bool = False
    at_least: int = 0


class TextPart(NamedTuple):
    """One part of a transformer's text tokens.

    Args:
        tokenizer: its name in a pipeline.
        encoders: the names of the encoders that share its tokens.
        template: gives, from a pipeline and the named arguments of its ``encode_prompt``, the text around the prompts;
            None where prompts stand alone.
        is_padded: whether the model receives as many tokens of every prompt, with padding behind the shorter ones.
            Where it does not, its padding ends with the longest prompt of a call.
        multiple: tokens of every text are filled up to a multiple of this number.
        in_one_batch: whether the texts of all calls of an encoder stand in one batch, in which shorter ones are filled
            up to the longest; so they do where there is a multiple.
        one_at_a_time: whether its encoders are called for one text after the other, each of which is then filled up to
            the length that the pipeline is told.
        keeps_length: whether such texts keep the length that their encoder receives.
        registers: tokens of the model's own, which it puts before every text.
        quotes: the encoder that reads what prompts quote, whose tokens then stand before these.
        reads: the path of what of an encoder receives the numbers of its tokens, where a pipeline calls parts of it
            one by one; padding, of number 0, then stands before texts.
    """

    tokenizer: str
    encoders: tuple[str, ...] = ()
    template: Callable[[Any, Mapping[str, Any]], Template] | None = None
    is_padded: bool = False
    multiple: int = 1
    in_one_batch: bool = False
    one_at_a_time: bool = False
    keeps_length: bool = False
    registers: int = 0
    quotes: str | None = None
    reads: str = ""


def said(pipe: Any, name: str) -> Any:
    """What a pipeline says of the text around its prompts: it itself, or a block of it where it is modular.

    Args:
        pipe: the pipeline.
        name: of an attribute.

    Raises:
        AttributeError: nothing of the pipeline has it.
    """
    for place in (pipe, *inner_blocks(pipe)):
        if hasattr(place, name):
            return getattr(place, name)
    raise AttributeError(f"nothing of {type(pipe).__name__} says {name}")


def inner_blocks(pipe: Any) -> Iterator[Any]:
    """The blocks of a modular pipeline, those inside of others too; none of an ordinary one."""
    return _with_inner(getattr(pipe, "_blocks", None) or getattr(pipe, "blocks", None))


def _with_inner(blocks: Any) -> Iterator[Any]:
    """Blocks and those inside of them."""
    yield from () if blocks is None else (blocks,)
    for inner in getattr(blocks, "sub_blocks", {}).values():
        yield from _with_inner(inner)


def plain_tokenizer(found: Any) -> Any:
    """A pipeline's tokenizer; the one inside of it where it is a processor, which reads pictures too."""
    return found.tokenizer if hasattr(found, "image_processor") and hasattr(found, "tokenizer") else found


def conversation(tokenizer: Any, *, instruction: str = "", **options: Any) -> Template:
    """What a chat template writes around an instruction and a prompt that a user says; nothing without a tokenizer.

    Args:
        tokenizer: of the pipeline.
        instruction: said before the prompt.
        options: of the chat template, such as ``enable_thinking``.
    """
    if tokenizer is None:
        return Template("")
    said = [{"role": "user", "content": instruction + "{}"}]
    written = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **options)
    before, _, after = written.partition("{}")
    return Template(before, after)
