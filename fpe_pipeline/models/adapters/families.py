"""From what users pass to the model that is edited, and to the adapter of its family."""

from __future__ import annotations

from typing import Any

import torch

from .adapter import ModelAdapter, identity
from .allegro import AllegroAdapter
from .aura_flow import AuraFlowAdapter
from .bria_fibo2 import BriaFibo2Adapter
from .chroma import ChromaAdapter
from .cogvideox import CogVideoXAdapter
from .cogview import CogView3PlusAdapter, CogView4Adapter, GlmImageAdapter
from .cosmos import CosmosAdapter
from .easyanimate import EasyAnimateAdapter
from .flux import FluxAdapter
from .flux2 import Flux2Adapter
from .flux3 import Flux3Adapter
from .flux_kin import BriaAdapter, BriaFiboAdapter, LongCatImageAdapter, OvisImageAdapter
from .hidream import HiDreamImageAdapter
from .hunyuan_dit import HunyuanDiTAdapter
from .hunyuan_guided import HunyuanImageAdapter, HunyuanVideo15Adapter
from .hunyuan_video import HunyuanVideoAdapter
from .ideogram4 import Ideogram4Adapter
from .joyimage import JoyImageAdapter
from .kandinsky5 import Kandinsky5Adapter
from .kandinsky6 import Kandinsky6Adapter
from .krea2 import Krea2Adapter
from .ltx import LTXAdapter
from .ltx2 import LTX2Adapter
from .lumina2 import Lumina2Adapter
from .mochi import MochiAdapter
from .modular import by_guider, is_modular
from .motif_video import MotifVideoAdapter
from .nucleus import NucleusImageAdapter
from .pixart import PixArtAdapter
from .qwen import QwenImageAdapter
from .qwen21 import QwenImage21Adapter
from .sana import SanaAdapter, SanaVideoAdapter
from .sd3 import SD3Adapter
from .unet import UNetAdapter
from .wan import WanAdapter
from .z_image import ZImageAdapter

__all__ = ["adapter_of", "edited_model", "register_adapter"]

#: By the name of the class, the adapters of transformers; UNets are told by their blocks.
_TRANSFORMERS: dict[str, type[ModelAdapter]] = {
    "AllegroTransformer3DModel": AllegroAdapter,
    "AuraFlowTransformer2DModel": AuraFlowAdapter,
    "BriaFibo2Transformer2DModel": BriaFibo2Adapter,
    "BriaFiboTransformer2DModel": BriaFiboAdapter,
    "BriaTransformer2DModel": BriaAdapter,
    "ChromaTransformer2DModel": ChromaAdapter,
    "ChronoEditTransformer3DModel": WanAdapter,
    "CogVideoXTransformer3DModel": CogVideoXAdapter,
    "CogView3PlusTransformer2DModel": CogView3PlusAdapter,
    "CogView4Transformer2DModel": CogView4Adapter,
    "CosmosTransformer3DModel": CosmosAdapter,
    "EasyAnimateTransformer3DModel": EasyAnimateAdapter,
    "Flux2Transformer2DModel": Flux2Adapter,
    "Flux3Transformer2DModel": Flux3Adapter,
    "FluxTransformer2DModel": FluxAdapter,
    "GlmImageTransformer2DModel": GlmImageAdapter,
    "HiDreamImageTransformer2DModel": HiDreamImageAdapter,
    "HunyuanDiT2DModel": HunyuanDiTAdapter,
    "HunyuanImageTransformer2DModel": HunyuanImageAdapter,
    "HunyuanVideo15Transformer3DModel": HunyuanVideo15Adapter,
    "HunyuanVideoTransformer3DModel": HunyuanVideoAdapter,
    "Ideogram4Transformer2DModel": Ideogram4Adapter,
    "JoyImageEditTransformer3DModel": JoyImageAdapter,
    "Kandinsky5Transformer3DModel": Kandinsky5Adapter,
    "Kandinsky6Transformer3DModel": Kandinsky6Adapter,
    "Krea2Transformer2DModel": Krea2Adapter,
    "LTX2VideoTransformer3DModel": LTX2Adapter,
    "LTXVideoTransformer3DModel": LTXAdapter,
    "LongCatImageTransformer2DModel": LongCatImageAdapter,
    "Lumina2Transformer2DModel": Lumina2Adapter,
    "MochiTransformer3DModel": MochiAdapter,
    "MotifVideoTransformer3DModel": MotifVideoAdapter,
    "NucleusMoEImageTransformer2DModel": NucleusImageAdapter,
    "OvisImageTransformer2DModel": OvisImageAdapter,
    "PixArtTransformer2DModel": PixArtAdapter,
    "QwenImage21Transformer2DModel": QwenImage21Adapter,
    "QwenImageTransformer2DModel": QwenImageAdapter,
    "SD3Transformer2DModel": SD3Adapter,
    "SanaTransformer2DModel": SanaAdapter,
    "SanaVideoTransformer3DModel": SanaVideoAdapter,
    "SkyReelsV2Transformer3DModel": WanAdapter,
    "WanTransformer3DModel": WanAdapter,
    "WanVACETransformer3DModel": WanAdapter,
    "ZImageTransformer2DModel": ZImageAdapter,
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
        return _called_by(around, family)(around, model)
    if (around is not None and getattr(around, "unet", None) is None) or _is_transformer(module):
        raise TypeError(
            f"{type(module).__name__} is a transformer that no adapter describes yet; there are adapters of UNets, "
            f"{', '.join(_TRANSFORMERS)}. One is a fpe_pipeline.TransformerAdapter, which says which modules attend "
            "and to which tokens (find_sites), which rows a call holds, at which step and of which size (read), and "
            f"whose processors compute the layers (family); register_adapter({type(module).__name__!r}, …) makes it "
            "known: see docs/write-an-adapter.md"
        )
    return _called_by(around, UNetAdapter)(around, model)


def register_adapter(model: str, adapter: type[ModelAdapter]) -> type[ModelAdapter]:
    """Let sessions edit models of another class.

    Args:
        model: the name of the models' class; classes that inherit from it are edited too.
        adapter: a :class:`TransformerAdapter` with a ``family``, ``find_sites`` and ``read``.

    Returns:
        The adapter.

    Raises:
        TypeError: no class of adapters.
        ValueError: methods that it still lacks, or a class of models that has another adapter.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, ModelAdapter)):
        raise TypeError(f"expected a class of adapters, such as one that inherits TransformerAdapter, got {adapter!r}")
    lacks = sorted({*adapter.__abstractmethods__, *(name for name in ("family", "word") if not hasattr(adapter, name))})
    if lacks:
        raise ValueError(f"{adapter.__name__} lacks {', '.join(lacks)}: see docs/write-an-adapter.md")
    if _TRANSFORMERS.get(model, adapter) is not adapter:
        raise ValueError(
            f"{model} has an adapter already, {_TRANSFORMERS[model].__name__}: inherit from the model's class, and "
            "register that class's name"
        )
    _TRANSFORMERS[model] = adapter
    return adapter


def _called_by(pipe: Any, family: type[ModelAdapter]) -> type[ModelAdapter]:
    return by_guider(family) if is_modular(pipe) else family


def _family(module: torch.nn.Module) -> type[ModelAdapter] | None:
    for kind in type(module).__mro__:
        if kind.__name__ in _TRANSFORMERS:
            return _TRANSFORMERS[kind.__name__]
    return None


def _is_transformer(module: Any) -> bool:
    return "Transformer" in type(module).__name__ and not hasattr(module, "down_blocks")
