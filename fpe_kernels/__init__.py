"""Exact attention-map editing at fused-attention speed: the map is an operator, never a matrix."""

__version__ = "0.1.0"
