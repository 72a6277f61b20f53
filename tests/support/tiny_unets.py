"""Tiny UNets with random weights, shaped like those that people run."""

import torch
from diffusers import UNet2DConditionModel

COMMON = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}

SHAPES = {
    # One transformer block a layer, heads fixed, convolutional projections.
    "sd1": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    },
    # Heads a level, linear projections, upcast attention.
    "sd2": {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    # No attention at the latent's resolution, several transformer blocks, text and size embeddings.
    "sdxl": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    },
    # Attention without transformer blocks: four-dimensional inputs, a group norm and a residual of its own.
    "simple": {
        "block_out_channels": (8, 16),
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": 4,
    },
}


def tiny_unet(shape, dtype=torch.float64, **config):
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**COMMON, **SHAPES[shape], **config}).to(dtype).eval()


def unet_inputs(unet, rows, height=8, width=8, seed=0):
    """Positional and keyword arguments of a UNet call."""
    dtype = unet.dtype
    noise = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype)

    kwargs = {"encoder_hidden_states": random(rows, 5, 16)}
    if unet.config.addition_embed_type == "text_time":
        kwargs["added_cond_kwargs"] = {"text_embeds": random(rows, 8), "time_ids": random(rows, 6)}
    return (random(rows, 4, height, width), 7), kwargs
