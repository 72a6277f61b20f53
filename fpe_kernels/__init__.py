"""Exact attention-map editing at fused-attention speed: the map is an operator, never a matrix."""

from .attention_map import AttentionMap, shared_attention
from .composition import LinearMap, blend, concatenate
from .dispatch import backends

__version__ = "0.1.0"
__all__ = ["AttentionMap", "LinearMap", "backends", "blend", "concatenate", "shared_attention"]
