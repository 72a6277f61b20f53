"""One step of each of diffusers' own pipelines that keep attention maps, with their processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["excite", "forward", "gradient", "ledits", "sag", "zero"]


@torch.no_grad()
def forward(unet: Any, latents: Any, texts: Any) -> torch.Tensor:
    """What a step of LEDITS++ or SAG is without its guidance: diffusers' fused processors, no map."""
    out: torch.Tensor = unet(latents, 10, texts).sample
    return out


def gradient(unet: Any, latents: Any, texts: Any) -> torch.Tensor:
    """What one of Attend-and-Excite is, and the second half of pix2pix-zero's, of a loss that asks for no map."""
    latents = latents.clone().requires_grad_(True)
    (of_latents,) = torch.autograd.grad(unet(latents, 10, texts).sample.square().mean(), [latents])
    return of_latents


def excite(unet: Any) -> Callable[[Any, Any, Any], torch.Tensor]:
    """The gradient of one of Attend-and-Excite's refinements: of words' heat, through every layer before."""
    from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
        pipeline_stable_diffusion_attend_and_excite as theirs,
    )

    def step(unet: Any, latents: Any, texts: Any) -> torch.Tensor:
        side = latents.shape[-1] // 2
        store = theirs.AttentionStore((side, side))
        names = unet.attn_processors
        places = {name: name.split("_")[0] for name in names}
        unet.set_attn_processor({name: theirs.AttendExciteAttnProcessor(store, places[name]) for name in names})
        store.num_att_layers = len(names)
        latents = latents.clone().requires_grad_(True)
        unet(latents, 10, texts)
        maps = store.aggregate_attention(("up", "down", "mid"))
        loss = 1 - maps[:, :, 3].max()
        (gradient,) = torch.autograd.grad(loss, [latents])
        return gradient

    return step


def zero(unet: Any) -> Callable[[Any, Any, Any], torch.Tensor]:
    """The gradient of pix2pix-zero's step: of the distance of cross-attention from an earlier one's."""
    from diffusers.pipelines.deprecated.stable_diffusion_variants import (
        pipeline_stable_diffusion_pix2pix_zero as theirs,
    )

    theirs.prepare_unet(unet)
    t = torch.tensor(10)

    def step(unet: Any, latents: Any, texts: Any) -> torch.Tensor:
        with torch.no_grad():
            unet(latents, t, texts, cross_attention_kwargs={"timestep": t})
        loss, latents = theirs.Pix2PixZeroL2Loss(), latents.clone().requires_grad_(True)
        unet(latents, t, 1.1 * texts, cross_attention_kwargs={"timestep": t, "loss": loss})
        (gradient,) = torch.autograd.grad(loss.loss, [latents])
        return gradient

    return step


def ledits(unet: Any) -> Callable[[Any, Any, Any], torch.Tensor]:
    """A step of LEDITS++ with one concept: after ``invert``, whose plain processors stay in self-attention."""
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.pipelines.ledits_pp import pipeline_leditspp_stable_diffusion as theirs

    @torch.no_grad()
    def step(unet: Any, latents: Any, texts: Any) -> torch.Tensor:
        side = latents.shape[-1] // 2
        store = theirs.LeditsAttentionStore(average=False, max_size=side**2, max_resolution=None)
        unet.set_attn_processor(
            {
                name: theirs.LEDITSCrossAttnProcessor(store, name.split("_")[0], False, 1)
                if "attn2" in name and not name.startswith("mid")
                else AttnProcessor()
                for name in unet.attn_processors
            }
        )
        out: torch.Tensor = unet(latents, 10, texts).sample
        heat = store.aggregate_attention(store.step_store, ["one"], (side, side), ["up", "down"], True, 0)
        return out + torch.sum(heat[..., 1:4], dim=3).mean()

    return step


def sag(unet: Any) -> Callable[[Any, Any, Any], torch.Tensor]:
    """A step of SAG: the column sums of the middle layer's map, of the unconditional half."""
    from diffusers.pipelines.deprecated.stable_diffusion_sag import pipeline_stable_diffusion_sag as theirs

    @torch.no_grad()
    def step(unet: Any, latents: Any, texts: Any) -> torch.Tensor:
        processor = theirs.CrossAttnStoreProcessor()
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = processor
        out: torch.Tensor = unet(latents, 10, texts).sample
        attention, _ = processor.attention_probs.chunk(2)
        sums = attention.reshape(1, -1, *attention.shape[1:]).mean(1).sum(1)
        return out + sums.std()

    return step
