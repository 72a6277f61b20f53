"""Which models `FreePromptPipeline` serves, and which of them have real images and recordings."""

from __future__ import annotations

from typing import Any

__all__ = ["check_model", "check_without_image_prompts"]


def check_model(unet: Any, vae: Any) -> None:
    """Raise ValueError for a UNet that takes more than latents of this autoencoder, a timestep and text."""
    hint = (
        "FreePromptPipeline, with real images and recordings, is for text-to-image models of the kind of Stable "
        "Diffusion 1.x and 2.x; put `with editing(pipe, edit):` around this model's own diffusers pipeline"
    )
    conditions = ("addition_embed_type", "class_embed_type", "num_class_embeds")
    further = [f"{name}={unet.config[name]!r}" for name in conditions if unet.config.get(name) is not None]
    if further:
        raise ValueError(
            f"expected a UNet whose conditions are a timestep and text, received one with {', '.join(further)}, as "
            f"SDXL has: {hint}"
        )
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"expected a UNet that takes the {vae.config.latent_channels} channels of the autoencoder's latents, "
            f"received one that takes {unet.config.in_channels}, as inpainting (9) and InstructPix2Pix (8) do: {hint}"
        )


def check_without_image_prompts(pipe: Any, what: str) -> None:
    """Raise ValueError where an IP-Adapter is loaded; ``what`` cannot take its image prompts."""
    # `load_ip_adapter` sets the attribute and leaves the entry of the same name as it was.
    if getattr(pipe.unet.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ValueError(
            f"{what} takes no image prompts, and the UNet has an IP-Adapter: take it off with "
            "pipe.unload_ip_adapter(), or edit generated images with pipe(source, targets, ip_adapter_image=…)"
        )
