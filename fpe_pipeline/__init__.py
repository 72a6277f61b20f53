"""Text-guided image editing on diffusers pipelines, with fused attention-map replacement."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .extras import PIPELINE, hint

if TYPE_CHECKING:
    from .aura_flow_pipeline import FreePromptAuraFlowPipeline
    from .cogview_pipeline import FreePromptCogView4Pipeline
    from .edits import (
        CombinedEdit,
        ConsistEdit,
        Edit,
        FreeFluxEdit,
        FreePromptEdit,
        KVEdit,
        LocalBlend,
        MasaCtrlEdit,
        PlugAndPlayEdit,
        PromptToPromptEdit,
        ReFlexEdit,
        SelfAttentionEdit,
        StableFlowEdit,
        StyleAlignedEdit,
        ValueInjectionEdit,
        WordMask,
    )
    from .edits.base import Injecting, Prompted, Remembering, Watching
    from .edits.joint_products import JointProduct, MixedRows
    from .edits.products import Product
    from .edits.registry import make_edit
    from .edits.selection import LayerSelection
    from .edits.watchers import Watcher
    from .flow_pipeline import (
        FreePromptChromaPipeline,
        FreePromptFluxPipeline,
        FreePromptLumina2Pipeline,
        FreePromptQwenImagePipeline,
        FreePromptSD3Pipeline,
        FreePromptZImagePipeline,
    )
    from .flux2_pipeline import FreePromptFlux2KleinPipeline, FreePromptFlux2Pipeline
    from .flux_kin_pipeline import (
        FreePromptBriaPipeline,
        FreePromptLongCatImagePipeline,
        FreePromptOvisImagePipeline,
    )
    from .heatmaps.concept_maps import ConceptMaps, concept_maps
    from .heatmaps.heat_maps import HeatMaps, heat_maps
    from .ideogram4_pipeline import FreePromptIdeogram4Pipeline
    from .inversion.null_text import NullText
    from .inversion.trajectory import Inversion
    from .krea2_pipeline import FreePromptKrea2Pipeline
    from .models.adapters.adapter import ModelCall
    from .models.adapters.families import register_adapter
    from .models.adapters.transformer import TransformerAdapter
    from .models.flow_solvers import FireFlowScheduler, RFSolverScheduler, flow_scheduler
    from .models.roles import BatchRoles
    from .models.sites import Site, attention_sites
    from .models.steps import Step, StepWindow
    from .nucleus_pipeline import FreePromptNucleusMoEImagePipeline
    from .pipeline import FreePromptPipeline
    from .pixart_pipeline import FreePromptPixArtAlphaPipeline, FreePromptPixArtSigmaPipeline
    from .prompts.encoding import Encoding
    from .qwen21_pipeline import FreePromptQwenImage21Pipeline
    from .recordings.recording import Recording
    from .sampling.noise_schedule import ddim_scheduler
    from .sampling.output import FreePromptPipelineOutput
    from .session.session import EditingSession, editing

# Imported on first use: the session pulls in diffusers, which takes seconds that `fpe --help` need not spend.
_HOME = {
    "BatchRoles": "models.roles",
    "CombinedEdit": "edits",
    "ConceptMaps": "heatmaps.concept_maps",
    "ConsistEdit": "edits",
    "Edit": "edits",
    "EditingSession": "session.session",
    "Encoding": "prompts.encoding",
    "FireFlowScheduler": "models.flow_solvers",
    "FreeFluxEdit": "edits",
    "FreePromptEdit": "edits",
    "FreePromptBriaPipeline": "flux_kin_pipeline",
    "FreePromptAuraFlowPipeline": "aura_flow_pipeline",
    "FreePromptChromaPipeline": "flow_pipeline",
    "FreePromptCogView4Pipeline": "cogview_pipeline",
    "FreePromptFlux2KleinPipeline": "flux2_pipeline",
    "FreePromptFlux2Pipeline": "flux2_pipeline",
    "FreePromptFluxPipeline": "flow_pipeline",
    "FreePromptIdeogram4Pipeline": "ideogram4_pipeline",
    "FreePromptKrea2Pipeline": "krea2_pipeline",
    "FreePromptLongCatImagePipeline": "flux_kin_pipeline",
    "FreePromptLumina2Pipeline": "flow_pipeline",
    "FreePromptNucleusMoEImagePipeline": "nucleus_pipeline",
    "FreePromptOvisImagePipeline": "flux_kin_pipeline",
    "FreePromptPipeline": "pipeline",
    "FreePromptPipelineOutput": "sampling.output",
    "FreePromptPixArtAlphaPipeline": "pixart_pipeline",
    "FreePromptPixArtSigmaPipeline": "pixart_pipeline",
    "FreePromptQwenImage21Pipeline": "qwen21_pipeline",
    "FreePromptQwenImagePipeline": "flow_pipeline",
    "FreePromptSD3Pipeline": "flow_pipeline",
    "FreePromptXLPipeline": "xl_pipeline",
    "FreePromptZImagePipeline": "flow_pipeline",
    "HeatMaps": "heatmaps.heat_maps",
    "Injecting": "edits.base",
    "Inversion": "inversion.trajectory",
    "JointProduct": "edits.joint_products",
    "KVEdit": "edits",
    "LayerSelection": "edits.selection",
    "LocalBlend": "edits",
    "MasaCtrlEdit": "edits",
    "MixedRows": "edits.joint_products",
    "ModelCall": "models.adapters.adapter",
    "NullText": "inversion.null_text",
    "PlugAndPlayEdit": "edits",
    "Product": "edits.products",
    "PromptToPromptEdit": "edits",
    "Prompted": "edits.base",
    "RFSolverScheduler": "models.flow_solvers",
    "ReFlexEdit": "edits",
    "Recording": "recordings.recording",
    "Remembering": "edits.base",
    "SelfAttentionEdit": "edits",
    "Site": "models.sites",
    "StableFlowEdit": "edits",
    "Step": "models.steps",
    "StepWindow": "models.steps",
    "StyleAlignedEdit": "edits",
    "TransformerAdapter": "models.adapters.transformer",
    "ValueInjectionEdit": "edits",
    "Watcher": "edits.watchers",
    "Watching": "edits.base",
    "WordMask": "edits",
    "attention_sites": "models.sites",
    "concept_maps": "heatmaps.concept_maps",
    "ddim_scheduler": "sampling.noise_schedule",
    "editing": "session.session",
    "flow_scheduler": "models.flow_solvers",
    "heat_maps": "heatmaps.heat_maps",
    "make_edit": "edits.registry",
    "register_adapter": "models.adapters.families",
}

__all__ = [
    "BatchRoles",
    "CombinedEdit",
    "ConceptMaps",
    "ConsistEdit",
    "Edit",
    "EditingSession",
    "Encoding",
    "FireFlowScheduler",
    "FreeFluxEdit",
    "FreePromptAuraFlowPipeline",
    "FreePromptBriaPipeline",
    "FreePromptChromaPipeline",
    "FreePromptCogView4Pipeline",
    "FreePromptEdit",
    "FreePromptFlux2KleinPipeline",
    "FreePromptFlux2Pipeline",
    "FreePromptFluxPipeline",
    "FreePromptIdeogram4Pipeline",
    "FreePromptKrea2Pipeline",
    "FreePromptLongCatImagePipeline",
    "FreePromptLumina2Pipeline",
    "FreePromptNucleusMoEImagePipeline",
    "FreePromptOvisImagePipeline",
    "FreePromptPipeline",
    "FreePromptPipelineOutput",
    "FreePromptPixArtAlphaPipeline",
    "FreePromptPixArtSigmaPipeline",
    "FreePromptQwenImage21Pipeline",
    "FreePromptQwenImagePipeline",
    "FreePromptSD3Pipeline",
    "FreePromptXLPipeline",
    "FreePromptZImagePipeline",
    "HeatMaps",
    "Injecting",
    "Inversion",
    "JointProduct",
    "KVEdit",
    "LayerSelection",
    "LocalBlend",
    "MasaCtrlEdit",
    "MixedRows",
    "ModelCall",
    "NullText",
    "PlugAndPlayEdit",
    "Product",
    "PromptToPromptEdit",
    "Prompted",
    "RFSolverScheduler",
    "ReFlexEdit",
    "Recording",
    "Remembering",
    "SelfAttentionEdit",
    "Site",
    "StableFlowEdit",
    "Step",
    "StepWindow",
    "StyleAlignedEdit",
    "TransformerAdapter",
    "ValueInjectionEdit",
    "Watcher",
    "Watching",
    "WordMask",
    "attention_sites",
    "concept_maps",
    "ddim_scheduler",
    "editing",
    "flow_scheduler",
    "heat_maps",
    "make_edit",
    "register_adapter",
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
