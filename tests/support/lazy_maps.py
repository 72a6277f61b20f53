"""Lazy maps of drawn queries and keys, in float64, and what they come to as tensors."""

import warnings

import torch

from fpe_kernels import AttentionMap
from fpe_pipeline.compat.lazy import LazyMap, MapNumbersWarning


def lazy_map(queries, keys):
    """Of two rows with two heads each: [4, queries, keys]."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 2, tokens, 4, generator=generator, dtype=torch.float64) for tokens in (queries, keys)]
    return LazyMap(AttentionMap(*parts, backend="reference"))


def plain(result):
    """The numbers of a lazy map, of which no warning is wanted; anything else as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapNumbersWarning)
        return result.numbers() if isinstance(result, LazyMap) else result
