"""From what users pass to the model that is edited, and to the adapter of its family."""

from __future__ import annotations

from typing import Any

import torch

from .adapter import ModelAdapter, identity
from .flux import FluxAdapter
from .hunyuan_dit import HunyuanDiTAdapter
from .ltx import LTXAdapter
from .lumina2 import Lumina2Adapter
from .pixart import PixArtAdapter
from .qwen import QwenImageAdapter
from .sd3 import SD3Adapter
from .unet import UNetAdapter
from .wan import WanAdapter

__all__ = ["adapter_of", "edited_model"]

#: By the name of the class, the adapters of transformers; UNets are told by their blocks.
_TRANSFORMERS: dict[str, type[ModelAdapter]] = {
    "FluxTransformer2DModel": FluxAdapter,
    "HunyuanDiT2DModel": HunyuanDiTAdapter,
    "LTXVideoTransformer3DModel": LTXAdapter,
    "Lumina2Transformer2DModel": Lumina2Adapter,
    "PixArtTransformer2DModel": PixArtAdapter,
    "QwenImageTransformer2DModel": QwenImageAdapter,
    "SD3Transformer2DModel": SD3Adapter,
    "WanTransformer3DModel": WanAdapter,
}


def edited_model(pipe: Any) -> tuple[Any, Any]:
    """A pipeline and its UNet or transformer; (None, model) for a model alone; TypeError for anything else."""
    if hasattr(pipe, "attn_processors") or isinstance(pipe, torch.nn.Module):
        return None, pipe
    for name in ("unet", "transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is not None:
            return pipe, model
    raise TypeError(
        f"expected a diffusers pipeline with a unet or a transformer, or one of those alone, got {type(pipe).__name__}"
    )


def adapter_of(pipe: Any) -> ModelAdapter:
    """The adapter of a pipeline's model, or of a model.

    Raises:
        TypeError: there is no model, or it is a transformer of a family that has no adapter.
    """
    around, model = edited_model(pipe)
    module = identity(model)
    family = _family(module)
    if family is not None:
        return family(around, model)
    if (around is not None and getattr(around, "unet", None) is None) or _is_transformer(module):
        raise TypeError(
            f"{type(module).__name__} is a transformer that no adapter describes yet; there are adapters of UNets, "
            f"{', '.join(_TRANSFORMERS)}. One says which modules attend and to which tokens (find_sites), which rows a "
            "call holds, at which step and of which size (read), and needs a processor for its kind of layers: see "
            "fpe_pipeline/models/adapter.py and fpe_pipeline/models/sd3.py"
        )
    return UNetAdapter(around, model)


def _family(module: torch.nn.Module) -> type[ModelAdapter] | None:
    for kind in type(module).__mro__:
        if kind.__name__ in _TRANSFORMERS:
            return _TRANSFORMERS[kind.__name__]
    return None


def _is_transformer(module: Any) -> bool:
    return "Transformer" in type(module).__name__ and not hasattr(module, "down_blocks")
