"""`FreePromptPipeline` for HunyuanImage 2.1, whose pipeline is guided by guiders."""

from __future__ import annotations

from typing import Any

from diffusers import HunyuanImagePipeline

from ..sampling.hunyuan_image_model import guided_by
from ..sampling.kin_models import reading
from ..sampling.text_masks import with_masks_in_order
from .flow import FlowEditing

__all__ = ["FreePromptHunyuanImagePipeline"]


class FreePromptHunyuanImagePipeline(FlowEditing, HunyuanImagePipeline):
    """Edit an image, generated or real, into target prompts, on HunyuanImage 2.1.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`, with what the pipeline of diffusers lacks: ``guidance_scale``, by default its
    guider's own, which becomes the scale of ``guider`` and ``ocr_guider``; of a distilled model, without guiders, it is
    what the model is told (``distilled_guidance_scale``). And ``max_sequence_length``, by default its
    ``tokenizer_max_length``. An inversion is guided by the empty prompt where the guider is `ClassifierFreeGuidance`,
    and refused by others, and by models that were distilled to mean velocities. Recordings serve edits of words too.
    """

    parent = HunyuanImagePipeline
    kept_in_loop = "masks of padding"
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    told = (
        "tokenizer_max_length",
        "tokenizer_2_max_length",
        "prompt_template_encode",
        "prompt_template_encode_start_idx",
        "default_sample_size",
    )
    encode_prompt = with_masks_in_order(HunyuanImagePipeline.encode_prompt)

    @classmethod
    def parent_options(cls) -> frozenset[str]:
        """The arguments of a call in diffusers, of which one has another name here, and those that are made up."""
        made_up = {"guidance_scale", "max_sequence_length"}
        return (super().parent_options() - {"distilled_guidance_scale"}) | made_up

    def default_of(self, name: str) -> Any:
        """As of others; of the guidance that of the guider, or what a distilled model is told."""
        if name != "guidance_scale":
            return super().default_of(name)
        if self._has_guider:
            return self.guider.guidance_scale
        return super().default_of("distilled_guidance_scale") if self._is_told else self.unguided

    def is_guided_at(self, scale: float) -> bool:
        """Whether calls with this ``guidance_scale`` have rows that do not see their prompts."""
        return self._has_guider and super().is_guided_at(scale)

    @property
    def _has_guider(self) -> bool:
        return self.guider is not None and self.guider._enabled

    @property
    def _is_told(self) -> bool:
        return bool(self.transformer.config.guidance_embeds)

    def _loop(self, arguments: dict[str, Any]) -> Any:
        told = dict(arguments)
        scale = told.pop("guidance_scale", None)
        if not self._has_guider and scale is not None:
            if self._is_told:
                told["distilled_guidance_scale"] = scale
            elif scale > self.unguided:
                raise ValueError(
                    f"expected a pipeline with a guider that is enabled for guidance_scale={scale:g}, got guider="
                    f"{self.guider if self.guider is None else type(self.guider).__name__}: pass one to from_pipe, "
                    "guider=, or leave guidance_scale out"
                )
        with guided_by(self, scale), reading(self, told.pop("max_sequence_length", None)):
            return super()._loop(told)
