"""Flow models alone, by family, and which pipelines are served.

Stable Diffusion 3, described here, takes latents [B, C, h, w] and guides by a batch of both halves.
"""

from __future__ import annotations

from typing import Any

import torch

from ..models.adapters.families import adapter_of
from ..models.served_families import titles
from .aura_flow_model import AuraFlow
from .bria_fibo_model import BriaFibo
from .caption_models import Lumina2, ZImage
from .cogview_model import CogView4
from .flow_model import FlowModel, Latents, Velocity, shift_of
from .hunyuan_image_model import HunyuanImage
from .ideogram4_model import Ideogram4
from .kandinsky5_model import Kandinsky5
from .kin_models import Bria, LongCat, Ovis
from .krea2_model import Krea2
from .nucleus_model import NucleusImage
from .packed_models import Chroma, Flux, Flux2, Qwen, Qwen21

__all__ = ["FlowModel", "Velocity", "check_served", "flow_model", "is_flow_model"]


class _SD3Velocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0])


class _SD3(FlowModel):
    def text_tokens(self, text_length: int) -> int:
        return self.pipe.tokenizer_max_length + text_length

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    @property
    def longest(self) -> int | None:
        places = self.pipe.transformer.config.pos_embed_max_size
        return None if places is None else places * self.multiple

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        scheduler, options = self.pipe.scheduler, {}
        if scheduler.config.use_dynamic_shifting:
            options["mu"] = shift_of(scheduler, (size[0] // self.multiple) * (size[1] // self.multiple))
        scheduler.set_timesteps(steps, device=self.pipe._execution_device, **options)

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        guided = guidance_scale > 1
        texts, away, pooled, pooled_away = self.pipe.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            device=self.pipe._execution_device,
            do_classifier_free_guidance=guided,
            max_sequence_length=text_length,
        )
        if guided:
            texts, pooled = torch.cat([away, texts]), torch.cat([pooled_away, pooled])
        conditions = {"encoder_hidden_states": texts, "pooled_projections": pooled}
        return _SD3Velocity(self.pipe, conditions, guidance_scale if guided else None)


_FAMILIES: dict[str, type[FlowModel]] = {
    "sd3": _SD3,
    "flux": Flux,
    "flux2": Flux2,
    "ovis": Ovis,
    "longcat": LongCat,
    "bria": Bria,
    "qwen": Qwen,
    "qwen21": Qwen21,
    "chroma": Chroma,
    "lumina2": Lumina2,
    "z_image": ZImage,
    "cogview4": CogView4,
    "krea2": Krea2,
    "ideogram4": Ideogram4,
    "nucleus": NucleusImage,
    "aura_flow": AuraFlow,
    "hunyuan_image": HunyuanImage,
    "kandinsky5": Kandinsky5,
    "bria_fibo": BriaFibo,
}
#: Pipelines whose models are shown pictures, by what their names begin with.
_SHOWN = {
    "BriaFiboEdit": "Bria FIBO Edit",
    "FluxKontext": "FLUX.1 Kontext",
    "HunyuanImageRefiner": "HunyuanImage's refiner",
    "LongCatImageEdit": "LongCat-Image-Edit",
    "QwenImageEdit": "Qwen-Image-Edit",
    "QwenImageLayered": "Qwen-Image-Layered",
}


def is_flow_model(pipe: Any) -> bool:
    """Whether a pipeline's model is one of those that are described here."""
    return getattr(pipe, "transformer", None) is not None and adapter_of(pipe).kind in _FAMILIES


def flow_model(pipe: Any) -> FlowModel:
    """The flow model of a pipeline.

    Raises:
        TypeError: a pipeline without one, with one of a family that no adapter describes, or that is not served here.
    """
    family = adapter_of(pipe).kind
    if getattr(pipe, "transformer", None) is None:
        raise TypeError(
            f"expected a pipeline of Kandinsky 5, {titles('transformer')}, got {type(pipe).__name__} with its "
            f"{type(pipe.unet).__name__}, whose steps are no flow: use FreePromptPipeline"
        )
    check_served(pipe, family)
    return _FAMILIES[family](pipe)


def check_served(pipe: Any, family: str) -> None:
    """Raise TypeError for a pipeline around a transformer of which this package has no convenience.

    Args:
        pipe: of diffusers.
        family: of its transformer.
    """
    where = "; put `with editing(pipe, edit):` around its calls, which edits what they generate"
    if family not in _FAMILIES:
        raise TypeError(
            f"real images, recordings and FreePromptPipeline are for PixArt, Kandinsky 5, {titles('transformer')}, got "
            f"{type(pipe).__name__}{where}"
        )
    for name, said in _SHOWN.items():
        if any(kind.__name__.startswith(name) for kind in type(pipe).__mro__):
            raise TypeError(
                "real images, recordings and FreePromptPipeline hold no reference picture, which is part of every call "
                f"of {said}, got {type(pipe).__name__}{where}"
            )
