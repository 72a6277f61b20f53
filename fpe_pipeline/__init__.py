"""Text-guided image editing on diffusers pipelines, with fused attention-map replacement."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .extras import PIPELINE, hint

if TYPE_CHECKING:
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
    from .heatmaps.concept_maps import ConceptMaps, concept_maps
    from .heatmaps.heat_maps import HeatMaps, heat_maps
    from .inversion.null_text import NullText
    from .inversion.trajectory import Inversion
    from .models.adapters.adapter import ModelCall
    from .models.adapters.families import register_adapter
    from .models.adapters.transformer import TransformerAdapter
    from .models.flow_solvers import FireFlowScheduler, RFSolverScheduler, flow_scheduler
    from .models.roles import BatchRoles
    from .models.sites import Site, attention_sites
    from .models.steps import Step, StepWindow
    from .pipelines.aura_flow import FreePromptAuraFlowPipeline
    from .pipelines.bria_fibo import FreePromptBriaFiboPipeline
    from .pipelines.cogview import FreePromptCogView4Pipeline
    from .pipelines.cogview3 import FreePromptCogView3PlusPipeline
    from .pipelines.flow import (
        FreePromptChromaPipeline,
        FreePromptFluxPipeline,
        FreePromptLumina2Pipeline,
        FreePromptQwenImagePipeline,
        FreePromptSD3Pipeline,
        FreePromptZImagePipeline,
    )
    from .pipelines.flux2 import FreePromptFlux2KleinPipeline, FreePromptFlux2Pipeline
    from .pipelines.flux_kin import (
        FreePromptBriaPipeline,
        FreePromptLongCatImagePipeline,
        FreePromptOvisImagePipeline,
    )
    from .pipelines.free_prompt import FreePromptPipeline
    from .pipelines.hunyuan_image import FreePromptHunyuanImagePipeline
    from .pipelines.ideogram4 import FreePromptIdeogram4Pipeline
    from .pipelines.kandinsky5 import FreePromptKandinsky5T2IPipeline
    from .pipelines.krea2 import FreePromptKrea2Pipeline
    from .pipelines.nucleus import FreePromptNucleusMoEImagePipeline
    from .pipelines.pixart import FreePromptPixArtAlphaPipeline, FreePromptPixArtSigmaPipeline
    from .pipelines.qwen21 import FreePromptQwenImage21Pipeline
    from .prompts.encoding import Encoding
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
    "FreePromptBriaFiboPipeline": "pipelines.bria_fibo",
    "FreePromptBriaPipeline": "pipelines.flux_kin",
    "FreePromptAuraFlowPipeline": "pipelines.aura_flow",
    "FreePromptChromaPipeline": "pipelines.flow",
    "FreePromptCogView3PlusPipeline": "pipelines.cogview3",
    "FreePromptCogView4Pipeline": "pipelines.cogview",
    "FreePromptFlux2KleinPipeline": "pipelines.flux2",
    "FreePromptFlux2Pipeline": "pipelines.flux2",
    "FreePromptFluxPipeline": "pipelines.flow",
    "FreePromptHunyuanImagePipeline": "pipelines.hunyuan_image",
    "FreePromptIdeogram4Pipeline": "pipelines.ideogram4",
    "FreePromptKandinsky5T2IPipeline": "pipelines.kandinsky5",
    "FreePromptKrea2Pipeline": "pipelines.krea2",
    "FreePromptLongCatImagePipeline": "pipelines.flux_kin",
    "FreePromptLumina2Pipeline": "pipelines.flow",
    "FreePromptNucleusMoEImagePipeline": "pipelines.nucleus",
    "FreePromptOvisImagePipeline": "pipelines.flux_kin",
    "FreePromptPipeline": "pipelines.free_prompt",
    "FreePromptPipelineOutput": "sampling.output",
    "FreePromptPixArtAlphaPipeline": "pipelines.pixart",
    "FreePromptPixArtSigmaPipeline": "pipelines.pixart",
    "FreePromptQwenImage21Pipeline": "pipelines.qwen21",
    "FreePromptQwenImagePipeline": "pipelines.flow",
    "FreePromptSD3Pipeline": "pipelines.flow",
    "FreePromptXLPipeline": "pipelines.xl",
    "FreePromptZImagePipeline": "pipelines.flow",
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
    "FreePromptBriaFiboPipeline",
    "FreePromptBriaPipeline",
    "FreePromptChromaPipeline",
    "FreePromptCogView3PlusPipeline",
    "FreePromptCogView4Pipeline",
    "FreePromptEdit",
    "FreePromptFlux2KleinPipeline",
    "FreePromptFlux2Pipeline",
    "FreePromptFluxPipeline",
    "FreePromptHunyuanImagePipeline",
    "FreePromptIdeogram4Pipeline",
    "FreePromptKandinsky5T2IPipeline",
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
