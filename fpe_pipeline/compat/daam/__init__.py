"""DAAM (PyPI ``daam``): where the words of a prompt act, head by head and layer by layer.

``import daam`` becomes ``from fpe_pipeline.compat import daam``, and ``from daam import trace`` becomes
``from fpe_pipeline.compat.daam import trace``.

Reference: Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", ACL 2023.
"""

from __future__ import annotations

from ..names import unknown_name
from .heatmap import GlobalHeatMap, RawHeatMapCollection, WordHeatMap
from .trace import DiffusionHeatMapHooker, set_seed, trace

__all__ = ["DiffusionHeatMapHooker", "GlobalHeatMap", "RawHeatMapCollection", "WordHeatMap", "set_seed", "trace"]

_PARSES = "it parses prompts with spaCy, which is no part of attention; ask compute_word_heat_map for each word"
_STORES = "keep heat maps with torch.save(tc.compute_global_heat_map().heat_maps, path)"

__getattr__ = unknown_name(
    __name__,
    "daam",
    __all__,
    {
        "ParsedHeatMap": _PARSES,
        "SyntacticHeatMapPair": _PARSES,
        "GenerationExperiment": _STORES,
        "build_word_list_coco80": _STORES,
    },
)
