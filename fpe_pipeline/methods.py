"""The methods by name, as a command line and an evaluation ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .edits import Edit, FreePromptEdit, MasaCtrlEdit, PlugAndPlayEdit, PromptToPromptEdit, StyleAlignedEdit

__all__ = ["ALIGNING", "METHODS", "TITLES", "make_edit"]

#: For each name, a function of the prompts (the source's first), the tokenizer and options that gives an edit.
METHODS: dict[str, Callable[..., Edit]] = {
    "fpe": lambda prompts, tokenizer, **options: FreePromptEdit(**options),
    "p2p-replace": lambda prompts, tokenizer, **options: PromptToPromptEdit(prompts, tokenizer, "replace", **options),
    "p2p-refine": lambda prompts, tokenizer, **options: PromptToPromptEdit(prompts, tokenizer, "refine", **options),
    "masactrl": lambda prompts, tokenizer, **options: MasaCtrlEdit(**options),
    "pnp": lambda prompts, tokenizer, **options: PlugAndPlayEdit(**options),
    "style-aligned": lambda prompts, tokenizer, **options: StyleAlignedEdit(**options),
}

#: Their names in pictures.
TITLES = {
    "fpe": "Free-Prompt-Editing",
    "p2p-replace": "Prompt-to-Prompt (replace)",
    "p2p-refine": "Prompt-to-Prompt (refine)",
    "masactrl": "MasaCtrl",
    "pnp": "Plug-and-Play",
    "style-aligned": "StyleAligned",
}

#: The methods that align the prompts' words, and so cannot do without the tokenizer.
ALIGNING = ("p2p-replace", "p2p-refine")


def make_edit(method: str, prompts: Sequence[str], tokenizer: Any, **options: Any) -> Edit:
    """The edit of a method.

    Args:
        method: a key of :data:`METHODS`.
        prompts: the source prompt and its targets.
        tokenizer: the pipeline's; only methods that align words use it.
        **options: of the method's edit.

    Raises:
        ValueError: an unknown method, or prompts or options that it cannot serve.
        TypeError: an option that the method's edit does not have.
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method](prompts, tokenizer, **options)
