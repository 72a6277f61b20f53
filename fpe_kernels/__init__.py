"""Exact attention-map editing at fused-attention speed: the map is an operator, never a matrix."""

from .attention_map import AttentionMap, shared_attention
from .combining import beside, blend, concatenate, stack
from .composition import LinearMap
from .dispatch import backends
from .joined_map import join
from .known_columns import known_columns

__version__ = "0.1.0"
__all__ = [
    "AttentionMap",
    "LinearMap",
    "backends",
    "beside",
    "blend",
    "concatenate",
    "join",
    "known_columns",
    "shared_attention",
    "stack",
]
