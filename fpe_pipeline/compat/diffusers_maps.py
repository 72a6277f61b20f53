"""diffusers' own users of attention maps, in place: their processors get lazy maps, and compute as they did.

LEDITS++, SAG, Attend-and-Excite, pix2pix-zero and the community's Prompt-to-Prompt all ask an ``Attention`` layer for
its map, ``attn.get_attention_scores(query, key, mask)``, keep it and multiply it with the values. Here the layer
answers with a :class:`.LazyMap`: the product is fused attention, and what is kept are queries and keys, of which sums,
slices and means are computed when they are asked for, with gradients. Processors are not touched: pipelines set theirs
in each call.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import Attention

from fpe_kernels import AttentionMap

from ..callers import warn
from ..models.adapters.adapter import identity
from ..models.adapters.families import edited_model
from ..session.entry import check_backend
from ..session.layers.around import ProcessorAround
from .lazy import LazyMap
from .lazy.numbers import MapNumbersWarning

__all__ = ["Acceleration", "accelerate"]

#: Processors that keep their maps, by what of diffusers sets them.
_KEEPING = {
    "LEDITSCrossAttnProcessor": "LEDITS++",
    "CrossAttnStoreProcessor": "self-attention guidance (SAG)",
    "AttendExciteAttnProcessor": "Attend-and-Excite",
    "Pix2PixZeroAttnProcessor": "pix2pix-zero",
    "P2PCrossAttnProcessor": "the community's Prompt-to-Prompt",
}
#: Processors of diffusers that multiply their maps with values and no more.
_PLAIN = (
    "AttnProcessor",
    "AttnAddedKVProcessor",
    "CustomDiffusionAttnProcessor",
    "IPAdapterAttnProcessor",
    "CrossFrameAttnProcessor",
)
#: Pipelines that set one of the above in their calls.
_PIPELINES = {
    "LEditsPPPipelineStableDiffusion": "LEDITSCrossAttnProcessor",
    "LEditsPPPipelineStableDiffusionXL": "LEDITSCrossAttnProcessor",
    "StableDiffusionSAGPipeline": "CrossAttnStoreProcessor",
    "StableDiffusionAttendAndExcitePipeline": "AttendExciteAttnProcessor",
    "StableDiffusionPix2PixZeroPipeline": "Pix2PixZeroAttnProcessor",
    "Prompt2PromptPipeline": "P2PCrossAttnProcessor",
}
# Of the community's pipeline, which lies in no package, the name alone is known.
_ANYWHERE = ("P2PCrossAttnProcessor",)


class _KeptMap(LazyMap):
    """A map that a processor of diffusers keeps: small averages of it are written out without a word."""

    def numbers(self, operation: str = "numbers()") -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MapNumbersWarning)
            return super().numbers(operation)

    def to(self, *args: Any, **kwargs: Any) -> _KeptMap:
        """Moved with what it is made from: a map that is kept on the host holds nothing on a GPU."""
        moved = super().to(*args, **kwargs)
        rows = self.operator
        if moved.device == self._storage.device or not isinstance(rows, AttentionMap):
            return moved
        there = self._made(rows.to(moved.device), tuple(self._index.shape))
        there._place = moved._place
        return there


@dataclass
class _Seen:
    """What a processor's class asked for since :func:`accelerate`."""

    layers: set[str] = field(default_factory=set)
    calls: int = 0


class Acceleration(AbstractContextManager["Acceleration"]):
    """What :func:`accelerate` did, until :meth:`restore` or the end of a ``with`` block; printed, it says what.

    Args:
        pipe: a diffusers pipeline, or its model.
        backend: of ``fpe_kernels``.
    """

    def __init__(self, pipe: Any, backend: str = "auto") -> None:
        check_backend(backend)
        around, model = edited_model(pipe)
        self._model, self._backend = identity(model), backend
        self._pipeline = type(around).__name__ if around is not None else ""
        self._layers = {path: module for path, module in self._model.named_modules() if isinstance(module, Attention)}
        if not self._layers:
            raise TypeError(
                f"expected a model with diffusers' Attention layers, got {type(self._model).__name__}, whose layers "
                "give none of their maps: there is nothing to accelerate"
            )
        if self._model in _ACCELERATED:
            raise RuntimeError("this model is accelerated already: restore() that first")
        self._served: dict[str, _Seen] = {}
        self._left: dict[str, _Seen] = {}
        for path, layer in self._layers.items():
            layer.get_attention_scores = _Scores(self, path, layer)
        _ACCELERATED[self._model] = self

    @property
    def served(self) -> dict[str, int]:
        """By class of processors, how many layers were given lazy maps so far."""
        return {name: len(seen.layers) for name, seen in self._served.items()}

    @property
    def left_alone(self) -> dict[str, int]:
        """By class of processors that are not known, how many layers were given matrices so far."""
        return {name: len(seen.layers) for name, seen in self._left.items()}

    def restore(self) -> None:
        """Leave the model as it was found; a second time does nothing."""
        if _ACCELERATED.get(self._model) is self:
            for layer in self._layers.values():
                vars(layer).pop("get_attention_scores", None)
            del _ACCELERATED[self._model]

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def __str__(self) -> str:
        state = "gives" if _ACCELERATED.get(self._model) is self else "gave"
        count = len(self._layers)
        lines = [
            f"{type(self._model).__name__}: each of {count} layers {state} a lazy map where a processor asks for one"
        ]
        expected = _PIPELINES.get(self._pipeline)
        if expected is not None:
            lines.append(f"  {self._pipeline} sets {expected} in its calls ({_KEEPING[expected]}), which keeps maps")
        now = {type(_inner(layer.processor)).__name__ for layer in self._layers.values()}
        silent = sorted(name for name in now if name not in (*self._served, *self._left) and not _known_by_name(name))
        lines += [
            f"  {name}: {len(seen.layers)} layers, {seen.calls} maps as products" for name, seen in self._served.items()
        ]
        lines += [
            f"  {name}: not known; {len(seen.layers)} layers were given {seen.calls} matrices, as without acceleration"
            for name, seen in self._left.items()
        ]
        lines += [f"  {name}: asks for no map, and is left alone" for name in silent]
        return "\n".join(lines)

    def scores(
        self, path: str, layer: Any, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> Any:
        """What a layer answers to its processor: a lazy map [B·H, N, M]; to one that is not known, the matrix."""
        processor = _inner(layer.processor)
        name = type(processor).__name__
        if not _is_known(processor) or query.shape[0] % layer.heads:
            if name not in self._left:
                warn(
                    f"{name} asks for attention maps and is not known: its maps are written out, as without "
                    "acceleration. What it does with them can be done by a Watcher or an Edit: see "
                    "docs/write-an-edit.md",
                    RuntimeWarning,
                )
            self._note(self._left, name, path)
            return type(layer).get_attention_scores(layer, query, key, attention_mask)
        self._note(self._served, name, path)
        dtype = query.dtype
        if layer.upcast_attention:
            query, key = query.float(), key.float()
        parts = [part.unflatten(0, (-1, layer.heads)) for part in (query, key)]
        bias = None if attention_mask is None else attention_mask.unflatten(0, (-1, layer.heads))
        view = _KeptMap(AttentionMap(*parts, scale=layer.scale, bias=bias, backend=self._backend))
        return view if dtype == query.dtype else view.to(dtype)

    @staticmethod
    def _note(where: dict[str, _Seen], name: str, path: str) -> None:
        seen = where.setdefault(name, _Seen())
        seen.layers.add(path)
        seen.calls += 1


class _Scores:
    """A layer's ``get_attention_scores`` while it is accelerated."""

    def __init__(self, acceleration: Acceleration, path: str, layer: Any) -> None:
        self._acceleration, self._path, self._layer = acceleration, path, layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return self._acceleration.scores(self._path, self._layer, query, key, attention_mask)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("this model is accelerated and cannot be copied: restore() it first")


_ACCELERATED: WeakKeyDictionary[Any, Acceleration] = WeakKeyDictionary()


def accelerate(pipe: Any, *, backend: str = "auto") -> Acceleration:
    """Let a pipeline of diffusers that keeps or edits attention maps do so without the matrices, from here on::

        with accelerate(pipe) as accelerated:
            image = pipe(prompt, token_indices=[2, 5]).images[0]
        print(accelerated)

    Known are LEDITS++ (SD and SDXL), SAG, Attend-and-Excite, pix2pix-zero, the community's Prompt-to-Prompt
    (``P2PCrossAttnProcessor``), and the processors of diffusers that multiply a map with values and no more. Gradients
    go through. A processor that is not known is warned of, once, and gets its matrices.

    Args:
        pipe: a diffusers pipeline with a UNet, or the UNet.
        backend: of ``fpe_kernels``.

    Returns:
        What restores the model, ``.restore()`` or a ``with`` block; it says what was changed and what was left alone.

    Raises:
        TypeError: a model whose layers give no maps.
        RuntimeError: one that is accelerated already.
        ValueError: an unknown backend.
    """
    return Acceleration(pipe, backend)


def _inner(processor: Any) -> Any:
    """A processor, without one of an editing session around it."""
    return processor.inner if isinstance(processor, ProcessorAround) else processor


def _known_by_name(name: str) -> bool:
    return name in _KEEPING or name in _PLAIN


def _is_known(processor: Any) -> bool:
    """Whether a processor is one of diffusers' that are known, or one of the community's; not a user's subclass."""
    kind = type(processor)
    return _known_by_name(kind.__name__) and (kind.__module__.startswith("diffusers.") or kind.__name__ in _ANYWHERE)
