"""`FreePromptPipeline`: diffusers' `StableDiffusionPipeline` with an edit from one source prompt to many targets, and
the way to the classes that are the same around other models."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, cast

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from ..embedded import embedded_path
from ..models.adapters.families import adapter_of
from ..models.adapters.flux2 import is_klein
from ..models.served_families import FAMILIES, FAMILY_OF, Family
from ..models.sources import holds_sdxl, is_embedded
from ..sampling.arguments import check_size
from ..sampling.output import FreePromptPipelineOutput
from ..sampling.unet_conditions import UNetConditions
from .unet_editing import UNetEditing

__all__ = ["FreePromptPipeline", "FreePromptPipelineOutput"]

#: Modules beside this one in which families' classes are, where that is not the one of most transformers.
_MODULES = {
    "sdxl": "xl",
    "pixart_alpha": "pixart",
    "pixart_sigma": "pixart",
    "flux2": "flux2",
    "flux2_klein": "flux2",
    "ovis": "flux_kin",
    "longcat": "flux_kin",
    "bria": "flux_kin",
    "qwen21": "qwen21",
    "cogview3": "cogview3",
    "cogview4": "cogview",
    "krea2": "krea2",
    "ideogram4": "ideogram4",
    "nucleus": "nucleus",
    "aura_flow": "aura_flow",
    "hunyuan_image": "hunyuan_image",
    "kandinsky5": "kandinsky5",
    "bria_fibo": "bria_fibo",
}


class FreePromptPipeline(UNetEditing, StableDiffusionPipeline):
    """Edit an image, generated or real, into target prompts, by Free-Prompt-Editing or another edit.

    Loads, saves and offloads as any diffusers pipeline does: `from_pretrained`, `from_single_file`, `from_pipe`,
    `load_lora_weights`, `enable_model_cpu_offload`. What it saves, plain diffusers loads.

    Example:
        >>> pipe = FreePromptPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> out = pipe("a photo of a red car on the beach", ["a photo of a blue car on the beach"])
        >>> out.source.size == out.targets[0].size
        True

    A real image is inverted first:
        >>> from fpe_pipeline import ddim_scheduler
        >>> pipe.scheduler = ddim_scheduler(pipe.scheduler)
        >>> inversion = pipe.invert("beach.jpg", "a photo of a red car on the beach", method="direct")
        >>> out = pipe(inversion=inversion, target_prompt="a photo of a blue car on the beach")
    """

    parent: ClassVar[type] = StableDiffusionPipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Any:
        """As in diffusers, but modules keep their dtypes; a model that this class does not serve is refused with the
        way to edit it. Around SDXL that is a `FreePromptXLPipeline`, and around a transformer a
        `FreePromptSD3Pipeline`, `FreePromptFluxPipeline` or `FreePromptQwenImagePipeline`, and so on."""
        serving: Any = _class_of(pipeline)
        return serving.from_pipe(pipeline, **components) if serving else super().from_pipe(pipeline, **components)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As in diffusers; "embedded" and "embedded-sd3" are the models that come with this package. A saved pipeline
        of SDXL, or of a transformer that is served, is loaded as the class that edits with it."""
        if isinstance(pretrained_model_name_or_path, str) and is_embedded(pretrained_model_name_or_path):
            pretrained_model_name_or_path = embedded_path(pretrained_model_name_or_path)
        serving: Any = _saved_class(pretrained_model_name_or_path, options)
        if serving is not None:
            return serving.from_pretrained(pretrained_model_name_or_path, **options)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: Any, **options: Any) -> Any:
        """As in diffusers; a checkpoint of SDXL that lies here is loaded as a `FreePromptXLPipeline`."""
        if holds_sdxl(pretrained_model_link_or_path):
            serving: Any = _class_for("sdxl")
            return serving.from_single_file(pretrained_model_link_or_path, **options)
        return super().from_single_file(pretrained_model_link_or_path, **options)

    @torch.no_grad()
    def conditions(self, prompt: str, guided: bool, size: tuple[int, int]) -> UNetConditions:
        """The prompt's embeddings [1, tokens, channels], behind the empty one's where it is guided."""
        conditional, unconditional = self.encode_prompt(prompt, self._execution_device, 1, guided)
        return UNetConditions(torch.cat([unconditional, conditional]) if guided else conditional)

    def check_inputs(self, prompt: Any, height: int, width: int, *args: Any, **kwargs: Any) -> None:
        """The parent's checks, with the size measured against this autoencoder rather than against 8 pixels."""
        check_size(height, width, self.vae_scale_factor)
        super().check_inputs(prompt, 8, 8, *args, **kwargs)


def _class_for(family: str) -> type:
    """The class that edits with a family's models; its module, a second's import, is imported with the first."""
    module = import_module(f".{_MODULES.get(family, 'flow')}", __package__)
    made: type = getattr(module, FAMILIES[cast(Family, family)].public_name)
    return made


def _class_of(pipeline: Any) -> type | None:
    """The class that edits with a pipeline's model; None for Stable Diffusion's.

    Raises:
        TypeError: a transformer of a family that has no adapter, or a pipeline that is not served.
    """
    unet = getattr(pipeline, "unet", None)
    if unet is not None:
        return _class_for("sdxl") if unet.config.get("addition_embed_type") == "text_time" else None
    if getattr(pipeline, "transformer", None) is None:
        return None
    family = adapter_of(pipeline).kind
    named = (FAMILY_OF[kind.__name__] for kind in type(pipeline).__mro__ if kind.__name__ in FAMILY_OF)
    by_ddim = next((name for name in named if not FAMILIES[name].is_flow), None)
    if by_ddim is not None:
        return _class_for(by_ddim)
    from ..sampling.flow_models import check_served

    check_served(pipeline, family)
    return _class_for("flux2_klein" if is_klein(pipeline) else family)


def _saved_class(pretrained: Any, options: Mapping[str, Any]) -> type | None:
    """The class that edits with a saved pipeline; None for Stable Diffusion's, or where none is found.

    Args:
        pretrained: as ``from_pretrained`` takes it.
        options: of that call.
    """
    hub = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
    try:
        config = StableDiffusionPipeline.load_config(
            pretrained, **{name: options[name] for name in hub if name in options}
        )
    except (OSError, ValueError):
        return None  # which from_pretrained says better
    family = FAMILY_OF.get(str(config.get("_class_name", "")), "unet")
    return None if family == "unet" else _class_for(family)
