"""Loading `FreePromptPipeline`, and only when a run comes to it: its import takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..models.loading import load
from ..models.quiet import quiet_libraries
from ..models.sources import ModelSource

if TYPE_CHECKING:
    import torch

    from ..pipelines.free_prompt import FreePromptPipeline

__all__ = ["load_pipeline", "pipeline_class"]


def load_pipeline(source: ModelSource, *, dtype: torch.dtype, device: str, pipeline: Any = None) -> Any:
    """Load a `FreePromptPipeline` in one dtype onto one device, with the scheduler that the model names.

    Args:
        source, dtype, device: as for :func:`~fpe_pipeline.models.loading.load`.
        pipeline: another class of diffusers' to load.

    Raises:
        InputError: the hub does not provide it, or the weights cannot be read.
    """
    return load(source, pipeline or pipeline_class(), dtype=dtype, device=device)


def pipeline_class() -> type[FreePromptPipeline]:
    """`FreePromptPipeline`, whose import takes seconds where diffusers is not loaded yet."""
    with quiet_libraries():
        from ..pipelines.free_prompt import FreePromptPipeline
    return FreePromptPipeline
