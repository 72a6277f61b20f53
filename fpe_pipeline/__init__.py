"""Text-guided image editing on diffusers pipelines, with fused attention-map replacement."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .extras import PIPELINE, hint

if TYPE_CHECKING:
    from .edits import (
        CombinedEdit,
        Edit,
        FreePromptEdit,
        LocalBlend,
        MasaCtrlEdit,
        PlugAndPlayEdit,
        PromptToPromptEdit,
        StyleAlignedEdit,
        WordMask,
    )
    from .edits.registry import make_edit
    from .heat import HeatMaps, heat_maps
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
    "CombinedEdit": "edits",
    "Edit": "edits",
    "EditingSession": "session",
    "FreePromptEdit": "edits",
    "FreePromptPipeline": "pipeline",
    "FreePromptPipelineOutput": "output",
    "HeatMaps": "heat",
    "Inversion": "inversion",
    "LocalBlend": "edits",
    "MasaCtrlEdit": "edits",
    "NullText": "null_text",
    "PlugAndPlayEdit": "edits",
    "Product": "products",
    "PromptToPromptEdit": "edits",
    "Recording": "recording",
    "Site": "sites",
    "StyleAlignedEdit": "edits",
    "WordMask": "edits",
    "ddim_scheduler": "noise_schedule",
    "editing": "session",
    "heat_maps": "heat",
    "make_edit": "edits.registry",
}

__all__ = [
    "BatchRoles",
    "CombinedEdit",
    "Edit",
    "EditingSession",
    "FreePromptEdit",
    "FreePromptPipeline",
    "FreePromptPipelineOutput",
    "HeatMaps",
    "Inversion",
    "LocalBlend",
    "MasaCtrlEdit",
    "NullText",
    "PlugAndPlayEdit",
    "Product",
    "PromptToPromptEdit",
    "Recording",
    "Site",
    "StyleAlignedEdit",
    "WordMask",
    "ddim_scheduler",
    "editing",
    "heat_maps",
    "make_edit",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from fpe_kernels import __version__

        return __version__
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in PIPELINE:
            raise
        raise ModuleNotFoundError(hint([error.name]), name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What completion offers: the public names, and no helper modules."""
    return [*__all__, "__version__"]
