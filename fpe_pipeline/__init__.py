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
    from .edits.joint_products import JointProduct
    from .edits.products import Product
    from .edits.registry import make_edit
    from .heatmaps.heat_maps import HeatMaps, heat_maps
    from .inversion.null_text import NullText
    from .inversion.trajectory import Inversion
    from .models.roles import BatchRoles
    from .models.sites import Site
    from .pipeline import FreePromptPipeline
    from .recordings.recording import Recording
    from .sampling.noise_schedule import ddim_scheduler
    from .sampling.output import FreePromptPipelineOutput
    from .session.session import EditingSession, editing

# Imported on first use: the session pulls in diffusers, which takes seconds that `fpe --help` need not spend.
_HOME = {
    "BatchRoles": "models.roles",
    "CombinedEdit": "edits",
    "Edit": "edits",
    "EditingSession": "session.session",
    "FreePromptEdit": "edits",
    "FreePromptPipeline": "pipeline",
    "FreePromptPipelineOutput": "sampling.output",
    "HeatMaps": "heatmaps.heat_maps",
    "Inversion": "inversion.trajectory",
    "JointProduct": "edits.joint_products",
    "LocalBlend": "edits",
    "MasaCtrlEdit": "edits",
    "NullText": "inversion.null_text",
    "PlugAndPlayEdit": "edits",
    "Product": "edits.products",
    "PromptToPromptEdit": "edits",
    "Recording": "recordings.recording",
    "Site": "models.sites",
    "StyleAlignedEdit": "edits",
    "WordMask": "edits",
    "ddim_scheduler": "sampling.noise_schedule",
    "editing": "session.session",
    "heat_maps": "heatmaps.heat_maps",
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
    "JointProduct",
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
