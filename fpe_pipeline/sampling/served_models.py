"""Which models `FreePromptPipeline` serves, and which of them have real images and recordings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..callers import warn
from ..errors import EditWarning
from ..models.precision import check_precision

__all__ = [
    "check_guided_inversion",
    "check_image_prompts",
    "check_model",
    "check_negative_sizes",
    "check_options",
    "check_pipeline",
    "check_second_negative",
    "check_skipped_layers",
    "check_without_image_prompts",
    "final_norm",
]


def check_model(unet: Any, vae: Any, added: str | None = None) -> None:
    """Raise ValueError for a UNet that takes more than latents of this autoencoder, a timestep, text and what its
    pipeline tells it.

    Args:
        unet, vae: of the pipeline.
        added: the ``addition_embed_type`` of its UNets.
    """
    hint = (
        "FreePromptPipeline, with real images and recordings, is for text-to-image models of the kind of Stable "
        "Diffusion 1.x, 2.x and XL; put `with editing(pipe, edit):` around this model's own diffusers pipeline"
    )
    served: dict[str, list[Any]] = {name: [None] for name in ("class_embed_type", "num_class_embeds")}
    served["addition_embed_type"] = [added]
    if added is not None:  # Kolors' UNet is told what SDXL's is, and projects another encoder's embeddings
        served["encoder_hid_dim_type"] = [None, "ip_image_proj"]
    found = {name: unet.config.get(name) for name in served}
    further = [f"{name}={value!r}" for name, value in found.items() if value not in served[name]]
    if further:
        taken = "a timestep and text" if added is None else "a timestep, text and sizes, as SDXL's are"
        if added is None and unet.config.get("addition_embed_type") == "text_time":
            hint = "SDXL is edited by FreePromptXLPipeline, which FreePromptPipeline.from_pipe and from_pretrained make"
        raise ValueError(f"expected a UNet whose conditions are {taken}, got one with {', '.join(further)}: {hint}")
    if unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"expected a model that takes the {vae.config.latent_channels} channels of the autoencoder's latents, "
            f"got one that takes {unet.config.in_channels}, as inpainting (9) and InstructPix2Pix (8) do: {hint}"
        )


def check_without_image_prompts(pipe: Any, what: str) -> None:
    """Raise ValueError where an IP-Adapter is loaded; ``what`` cannot take its image prompts."""
    # `load_ip_adapter` sets the attribute and leaves the entry of the same name as it was.
    if getattr(pipe.denoiser.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ValueError(
            f"{what} takes no image prompts, and the UNet has an IP-Adapter: take it off with "
            "pipe.unload_ip_adapter(), or edit generated images with pipe(source, targets, ip_adapter_image=…)"
        )


def check_pipeline(pipe: Any) -> None:
    """Raise ValueError for a pipeline whose parts `FreePromptPipeline` cannot serve."""
    check_model(pipe.denoiser, pipe.vae, pipe.added_conditions)
    for name in pipe.parts:
        check_precision(name, getattr(pipe, name, None))


def check_guided_inversion(pipe: Any, method: str) -> None:
    """Raise ValueError where a method of inversion lives in an unconditional half that the model does not have, or that
    its pipeline gives no access to."""
    if method == "null-text" and pipe.kept_in_loop is not None:
        raise ValueError(
            f"null-text inversion gives every step an unconditional embedding of its own, and {pipe.parent.__name__}'s "
            f"loop keeps {pipe.kept_in_loop} to itself: invert by 'direct', 'ddim' or 'negative-prompt'"
        )
    unet = pipe.denoiser
    if method in ("negative-prompt", "null-text") and unet.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{method} inversion lives in the unconditional half of classifier-free guidance, and this UNet has none: "
            f"it was distilled to take the guidance scale itself (time_cond_proj_dim={unet.config.time_cond_proj_dim}, "
            "as latent consistency models); invert by 'ddim' or 'direct'"
        )


def check_options(pipe: Any, guidance_scale: float, negative: bool, options: dict[str, Any]) -> None:
    """Refuse options of a call that would do nothing or fail inside, with the reason.

    Args:
        pipe: the pipeline.
        guidance_scale: of the call.
        negative: whether a negative prompt was passed.
        options: what is handed on to the pipeline of diffusers.

    Raises:
        ValueError: an option that this pipeline cannot serve.
    """
    if negative and pipe.denoiser.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "a negative prompt acts in the unconditional half of classifier-free guidance, and this UNet has none: it "
            "was distilled to take the guidance scale itself; leave negative_prompt out"
        )
    if negative and guidance_scale <= 1:
        warn(
            f"the negative prompt does nothing at guidance_scale={guidance_scale:g}, which switches guidance off",
            EditWarning,
        )
    takes_eta = "eta" in inspect.signature(pipe.scheduler.step).parameters
    if options.get("eta") and not takes_eta:
        raise ValueError(
            f"eta={options['eta']} is DDIM's, and {type(pipe.scheduler).__name__} takes none: leave it out, or set a "
            "scheduler that takes it"
        )
    check_image_prompts(options, getattr(pipe.denoiser.config, "encoder_hid_dim_type", None) == "ip_image_proj")
    if options.get("clip_skip") is not None:
        _check_clip_skip(pipe, options["clip_skip"])


def check_image_prompts(options: Mapping[str, Any], adapted: bool) -> None:
    """Raise ValueError for image prompts among the options of a call, where no adapter of the model takes them."""
    images = [name for name, given in options.items() if "ip_adapter_image" in name and given is not None]
    if images and not adapted:
        raise ValueError(f"{images[0]} was passed, and no IP-Adapter is loaded: call pipe.load_ip_adapter(…) first")


def check_second_negative(pipe: Any, negative_prompt: Any, options: dict[str, Any]) -> None:
    """Raise ValueError for a negative prompt of SDXL's second encoder alone, which diffusers drops without a word."""
    alone = negative_prompt is None and options.get("negative_prompt_2") is not None
    if alone and pipe.config.get("force_zeros_for_empty_prompt"):
        raise ValueError(
            "negative_prompt_2 does nothing without negative_prompt, in whose place this model has zeros: pass both"
        )


def check_negative_sizes(options: dict[str, Any], rows: int) -> None:
    """Raise ValueError for sizes of SDXL's unconditional half of which diffusers takes no notice, as without both of
    two, and in a batch of several rows: there it repeats the pair of its halves, so that every other row of either half
    would be told the other's."""
    both = ("negative_original_size", "negative_target_size")
    given = [name for name in (*both, "negative_crops_coords_top_left") if options.get(name) not in (None, (0, 0))]
    missing = [name for name in both if name not in given]
    if given and missing:
        raise ValueError(f"{given[0]} does nothing without {' and '.join(missing)}: pass them too, or leave it out")
    if given and rows > 1:
        raise ValueError(
            f"{given[0]} in a batch of {rows} images would reach every other row of both halves, as diffusers lays "
            "them out: leave it out, or make one image at a time"
        )


def check_skipped_layers(pipe: Any, skipped: Any) -> None:
    """Raise ValueError for a ``clip_skip`` of SDXL or Stable Diffusion 3, which count from the layer before the last of
    both CLIP encoders and norm nothing, that is no number of their layers."""
    encoders = [encoder for encoder in (pipe.text_encoder, pipe.text_encoder_2) if encoder is not None]
    most = min((encoder.config.num_hidden_layers - 1 for encoder in encoders), default=0)
    if isinstance(skipped, bool) or not isinstance(skipped, int) or not 0 <= skipped <= most:
        raise ValueError(
            "clip_skip must be a whole number of layers to skip before the last but one of both text encoders, "
            f"from 0 to {most}, got {skipped!r}"
        )


def _check_clip_skip(pipe: Any, skipped: Any) -> None:
    if pipe.added_conditions is not None:
        check_skipped_layers(pipe, skipped)
        return
    encoder = pipe.text_encoder
    layers = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    if isinstance(skipped, bool) or not isinstance(skipped, int) or layers is None or not 0 <= skipped <= layers:
        raise ValueError(
            f"clip_skip must be a whole number of the text encoder's last layers to skip, from 0 to {layers}, got "
            f"{skipped!r}"
        )
    if final_norm(encoder) is None:
        raise ValueError(
            f"clip_skip needs the final layer norm of a CLIP text encoder, which {type(encoder).__name__} does not "
            "have; leave it out, or pass prompt_embeds"
        )


def final_norm(encoder: Any) -> Any:
    """A CLIP text encoder's final layer norm, wherever its version of transformers keeps it; None without one."""
    return getattr(getattr(encoder, "text_model", encoder), "final_layer_norm", None)
