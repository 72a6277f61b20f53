"""In which precision a module of a model computes, and in which it keeps its weights."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["check_precision", "stored_in_float8"]


def check_precision(name: str, module: Any) -> None:
    """Raise ValueError for a module that would compute in float8, which no layer does."""
    dtype = getattr(module, "dtype", None)
    if isinstance(dtype, torch.dtype) and _is_float8(dtype):
        raise ValueError(
            f"the {name} was cast to {dtype}, in which its layers cannot compute: load it in float32, float16 or "
            "bfloat16, and keep the model's weights small with "
            f"pipe.{name}.enable_layerwise_casting(storage_dtype={dtype}, compute_dtype=torch.bfloat16)"
        )


def stored_in_float8(module: torch.nn.Module) -> bool:
    """Whether weights are kept in float8, and cast to another dtype for each computation (layerwise casting)."""
    return any(_is_float8(parameter.dtype) for parameter in module.parameters())


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
