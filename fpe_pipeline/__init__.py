"""Text-guided image editing on diffusers pipelines, with fused attention-map replacement."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .edits import Edit, FreePromptEdit
    from .inversion import Inversion
    from .noise_schedule import ddim_scheduler
    from .null_text import NullText
    from .output import FreePromptPipelineOutput
    from .pipeline import FreePromptPipeline
    from .products import Product
    from .recording import Recording
    from .roles import BatchRoles
    from .session import EditingSession, editing
    from .sites import Site

# Imported on first use: the session pulls in diffusers, which takes seconds that `fpe --help` need not spend.
_HOME = {
    "BatchRoles": "roles",
    "Edit": "edits",
    "EditingSession": "session",
    "FreePromptEdit": "edits",
    "FreePromptPipeline": "pipeline",
    "FreePromptPipelineOutput": "output",
    "Inversion": "inversion",
    "NullText": "null_text",
    "Product": "products",
    "Recording": "recording",
    "Site": "sites",
    "ddim_scheduler": "noise_schedule",
    "editing": "session",
}

__all__ = [
    "BatchRoles",
    "Edit",
    "EditingSession",
    "FreePromptEdit",
    "FreePromptPipeline",
    "FreePromptPipelineOutput",
    "Inversion",
    "NullText",
    "Product",
    "Recording",
    "Site",
    "ddim_scheduler",
    "editing",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
