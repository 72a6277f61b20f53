"""Pipelines of diffusers that keep attention maps, tiny and with random weights, and a call of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    LEditsPPPipelineStableDiffusionXL,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
)
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_pix2pix_zero import (
    StableDiffusionPix2PixZeroPipeline,
)
from PIL import Image

from tests.support.dropin import DDIM

__all__ = ["MAP_USERS", "P2PCrossAttnProcessor", "Prompt2PromptPipeline", "generator", "made"]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PIXELS = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
SIZE = {"height": 128, "width": 128}


class P2PCrossAttnProcessor:
    """As the community's pipeline, which no package holds, has it: the map is shown to a controller, then used."""

    def __init__(self, controller: Any, place_in_unet: str) -> None:
        self.controller, self.place_in_unet = controller, place_in_unet

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Any:
        mask = attn.prepare_attention_mask(attention_mask, hidden_states.shape[1], hidden_states.shape[0])
        is_cross = encoder_hidden_states is not None
        context = encoder_hidden_states if is_cross else hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = map(attn.head_to_batch_dim, projected)
        probabilities = attn.get_attention_scores(query, key, mask)
        self.controller(probabilities, is_cross, self.place_in_unet)
        out = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[1](attn.to_out[0](out))


class HalfOfTheSource:
    """A controller of a user's: targets' maps are half their source's; it sums the small ones over steps."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, str], Any] = {}

    def __call__(self, attn: Any, is_cross: bool, place: str) -> None:
        rows = attn.shape[0]
        half = attn[rows // 2 :]
        by_prompt = half.reshape(2, -1, *attn.shape[1:])
        by_prompt[1:] = 0.5 * by_prompt[0][None] + 0.5 * by_prompt[1:]
        if is_cross and attn.shape[1] <= 64:
            before = self.sums.get((attn.shape[1], place))
            mean = half.reshape(2, -1, *attn.shape[1:])[1].mean(0)
            self.sums[attn.shape[1], place] = mean if before is None else before + mean


class Prompt2PromptPipeline(StableDiffusionPipeline):
    """A stand-in for the community's: it sets its processors in its calls."""

    controller: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.controller, before = HalfOfTheSource(), self.unet.attn_processors
        places = {name: "up" if name.startswith("up") else "down" for name in before}
        self.unet.set_attn_processor(
            {name: P2PCrossAttnProcessor(self.controller, place) for name, place in places.items()}
        )
        try:
            return super().__call__(*arguments, **options)
        finally:
            self.unet.set_attn_processor(before)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(kind: Any, pipe: Any, **parts: Any) -> Any:
    """A pipeline of a class, of another one's parts."""
    components = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    if not hasattr(pipe, "text_encoder_2"):
        parts["requires_safety_checker"] = False
    tiny = kind(**{**components, **parts})
    tiny.set_progress_bar_config(disable=True)
    return tiny


def _sag(pipe: Any, **options: Any) -> Any:
    call = {"num_inference_steps": 3, "sag_scale": 0.8, "output_type": "latent", **SIZE, **options}
    return made(StableDiffusionSAGPipeline, pipe), lambda tiny: tiny("a red car", generator=generator(), **call)


def _excite(pipe: Any, **options: Any) -> Any:
    call = {
        "token_indices": [2, 3],
        "num_inference_steps": 3,
        "max_iter_to_alter": 2,
        "thresholds": {},
        "attn_res": (4, 4),
        "output_type": "latent",
        **SIZE,
        **options,
    }
    tiny = made(StableDiffusionAttendAndExcitePipeline, pipe)
    return tiny, lambda tiny: tiny("a red car", generator=generator(), **call)


def _ledits(kind: Any) -> Any:
    def make(pipe: Any, **options: Any) -> Any:
        scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2, **BETAS)
        call = {
            "editing_prompt": ["a dog", "a cat"],
            "edit_guidance_scale": [5.0, 4.0],
            "edit_threshold": [0.6, 0.7],
            "use_cross_attn_mask": True,
            "use_intersect_mask": True,
            "output_type": "latent",
            **options,
        }

        def run(tiny: Any) -> Any:
            image = Image.fromarray(PIXELS)
            tiny.invert(image, num_inversion_steps=4, skip=0.1, source_prompt="a red car", generator=generator())
            return tiny(generator=generator(), **call)

        return made(kind, pipe, scheduler=scheduler), run

    return make


def _zero(pipe: Any, **options: Any) -> Any:
    parts = dict.fromkeys(("inverse_scheduler", "caption_generator", "caption_processor"))
    tiny = made(StableDiffusionPix2PixZeroPipeline, pipe, scheduler=DDIMScheduler(**DDIM), **parts)
    embeds = torch.randn(3, 77, pipe.text_encoder.config.hidden_size, generator=generator()).to(pipe.unet.dtype)
    call = {
        "source_embeds": embeds,
        "target_embeds": embeds + 0.1 * embeds.flip(1),
        "num_inference_steps": 3,
        "cross_attention_guidance_amount": 0.15,
        "output_type": "latent",
        **SIZE,
        **options,
    }
    return tiny, lambda tiny: tiny("a red car", generator=generator(), **call)


def _p2p(pipe: Any, **options: Any) -> Any:
    call = {"num_inference_steps": 3, "output_type": "latent", **SIZE, **options}
    prompts = ["a red car", "a blue car"]
    return made(Prompt2PromptPipeline, pipe), lambda tiny: tiny(prompts, generator=generator(), **call)


#: By name, what makes a pipeline of another one's parts and gives it with its call.
MAP_USERS = {
    "SAG": _sag,
    "Attend-and-Excite": _excite,
    "LEDITS++": _ledits(LEditsPPPipelineStableDiffusion),
    "LEDITS++ XL": _ledits(LEditsPPPipelineStableDiffusionXL),
    "pix2pix-zero": _zero,
    "Prompt-to-Prompt": _p2p,
}
