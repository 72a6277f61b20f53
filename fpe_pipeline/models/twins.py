"""Pipelines and modules made of the same weights: what is hung on the one is not on the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

__all__ = ["shape_of", "twin"]


def twin(pipe: Any) -> Any:
    """A pipeline with modules, hooks, processors and a scheduler of its own, and the weights of another.

    A run that stands still may keep its twin, with an edit in its layers, while others use the pipeline itself.

    Args:
        pipe: a diffusers pipeline; it is left as it is.

    Returns:
        A pipeline of the same class. Its parameters and buffers are those of ``pipe``, not copies.
    """
    other = copy.copy(pipe)
    for name, part in pipe.components.items():
        # By the instance's dictionary: diffusers' own assignment would register the part anew.
        if isinstance(part, torch.nn.Module):
            vars(other)[name] = _rebuilt(part, lambda tensor: tensor)
        elif name == "scheduler":
            vars(other)[name] = copy.deepcopy(part)
    return other


def shape_of(module: torch.nn.Module) -> torch.nn.Module:
    """A module on the ``meta`` device, which computes shapes and holds no numbers; the given one is left as it is."""

    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        shape = tensor.detach().to("meta")
        return torch.nn.Parameter(shape, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else shape

    return _rebuilt(module, on_meta)


def _rebuilt(module: torch.nn.Module, tensor_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """A deep copy of a module but for its tensors, which are what ``tensor_of`` makes of the module's."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor_of(tensor) for tensor in tensors})
