"""What a map keeps of a product, and when that still holds."""

from __future__ import annotations

import torch
from torch import Tensor

Parts = tuple[Tensor | None, ...]


class KeptLogsumexp:
    """The log-sum-exp of ``parts``, query, key and bias, by ``settings``, the scale and how many keys there are.

    It holds until one of them is another or changed in place, or it itself, which is given to whoever asks for it; and
    in a CUDA graph, for this capture only: outside, its memory holds what the graph computed last, and what was
    computed outside would be a constant of the graph.
    """

    def __init__(self, logsumexp: Tensor, parts: Parts, settings: object) -> None:
        self._logsumexp, self._state, self._settings = logsumexp, _state((*parts, logsumexp)), settings
        # While they live nothing else has their ids, which a tensor that is assigned later might be given.
        self._parts = parts

    def of(self, parts: Parts, settings: object) -> Tensor | None:
        """The log-sum-exp, if it is that of ``parts`` as they are now."""
        if self._settings != settings or self._state != _state((*parts, self._logsumexp)):
            return None
        own = usable(self._logsumexp)
        if own is not self._logsumexp:
            self._logsumexp, self._state = own, _state((*parts, own))
        return own


def usable(tensor: Tensor) -> Tensor:
    """``tensor``, or outside inference mode a copy of one that was made in it, which no gradient may need."""
    if torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()


def _state(parts: Parts) -> tuple[object, ...]:
    """Equal as long as ``parts`` are the same and unchanged; inference tensors do not count their changes."""
    if torch.compiler.is_compiling():
        return ("traced",)
    captured = any(part is not None and part.is_cuda for part in parts) and torch.cuda.is_current_stream_capturing()
    counts = [0 if part is None or part.is_inference() else part._version for part in parts]
    return captured, *map(id, parts), *counts
