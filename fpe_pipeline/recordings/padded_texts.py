"""Texts that end where they end, made as long as those of a run of source and targets together would be.

Nobody attends to the padding behind them, but an edit may: a source's map, or its queries and values, reach as far as
its own text does, and the places of words are counted in texts of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..models.adapters.adapter import ModelAdapter

__all__ = ["pad_texts"]


def pad_texts(adapter: ModelAdapter, tokens: Mapping[bool, int]) -> Callable[[], None]:
    """Pad the texts of all calls of a model that follow; what is returned ends it.

    Args:
        adapter: of the model.
        tokens: how long texts are at least, of the calls that see their prompts (True) and of those that do not; in
            models of which every text has as many tokens nothing is done.
    """
    model = adapter.model
    # By the text's own tensor, which a pipeline passes at every step: a mask of one's own is read once as well.
    made: dict[int, tuple[Any, dict[str, Any]]] = {}

    def first(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module is not model:
            return args, kwargs
        texts = kwargs.get("encoder_hidden_states")
        if id(texts) not in made:
            made[id(texts)] = texts, adapter.longer_texts(kwargs, tokens)
        return args, kwargs | made[id(texts)][1]

    # Before the session, which is shown the call as the model gets it.
    handle = model.register_forward_pre_hook(torch.compiler.disable(first), with_kwargs=True, prepend=True)
    remove: Callable[[], None] = handle.remove
    return remove
