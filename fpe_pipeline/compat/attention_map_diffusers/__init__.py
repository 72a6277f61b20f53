"""attention-map-diffusers: every map from the image to the text, by timestep and layer.

``from attention_map_diffusers import …`` becomes ``from fpe_pipeline.compat.attention_map_diffusers import …``.
"""

from __future__ import annotations

from ..names import unknown_name
from .images import save_attention_maps
from .pipelines import attn_maps, init_pipeline, restore_pipeline, watched_pipeline

__all__ = ["attn_maps", "init_pipeline", "restore_pipeline", "save_attention_maps", "watched_pipeline"]

_HOOKS = "it patches classes of diffusers; init_pipeline(pipe) reads the maps of one pipeline"

__getattr__ = unknown_name(
    __name__,
    "attention_map_diffusers",
    __all__,
    dict.fromkeys(("cross_attn_init", "hook_function", "register_cross_attention_hook"), _HOOKS),
)
