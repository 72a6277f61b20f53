"""A UNet of random weights and a tokenizer, both made here: a check needs no download."""

from __future__ import annotations

from typing import Any

import torch

from ..embedded import embedded_path

__all__ = ["guests_of", "tiny_unet", "words_tokenizer"]


def tiny_unet(*, seed: int = 0, **config: Any) -> Any:
    """A ``UNet2DConditionModel`` shaped like Stable Diffusion's, in float64: 7 layers of self- and 7 of cross-attention
    on three levels, of weights at which attention matters.

    Args:
        seed: of its weights.
        **config: in place of its own configuration.
    """
    from diffusers import UNet2DConditionModel

    shape = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**shape, **config}).double().eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():  # as they are drawn, every map would be nearly uniform
        if ".attn" in name and name.endswith("weight") and parameter.ndim == 2:
            parameter.mul_(3.0)
    return unet


def words_tokenizer() -> Any:
    """The embedded model's tokenizer, for edits that look for words."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(embedded_path() / "tokenizer")


def guests_of(unet: Any, rows: int, tokens: int, random: torch.Generator) -> dict[str, Any]:
    """What a UNet is called with beside latents and timestep, at random: each row a text of its own, of so many
    tokens."""
    config, device = unet.config, unet.device

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(device)

    width = config.encoder_hid_dim or config.cross_attention_dim
    width = max(width) if isinstance(width, list | tuple) else width
    given: dict[str, Any] = {"encoder_hidden_states": draw(rows, tokens, width)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": draw(rows, pooled), "time_ids": draw(rows, 6)}
    return given
