"""The tiny pipeline's weights under the names of a single-file Stable Diffusion 1.x checkpoint."""

from __future__ import annotations

import re
from typing import Any

import torch

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out\.0", "proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def original_checkpoint(pipe: Any) -> dict[str, torch.Tensor]:
    """State dict as in the original Stable Diffusion 1.x files, of a pipeline laid out like SD 1.5."""
    state = {f"model.diffusion_model.{_unet_name(k)}": v for k, v in pipe.unet.state_dict().items()}
    for name, tensor in pipe.vae.state_dict().items():
        attention = ".attentions." in name and "group_norm" not in name and name.endswith("weight")
        state[f"first_stage_model.{_vae_name(name)}"] = tensor[..., None, None] if attention else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        state[f"cond_stage_model.transformer.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _unet_name(name: str) -> str:
    for ours, theirs in _UNET.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if match := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        way, block, kind, layer, rest = match.groups()
        index = 3 * int(block) + int(layer) + (way == "down")
        place = f"{'input' if way == 'down' else 'output'}_blocks.{index}.{int(kind == 'attentions')}"
    elif match := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{3 * (int(match[1]) + 1)}.0.op.{match[2]}"
    elif match := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.(.*)", name):
        return f"output_blocks.{3 * int(match[1]) + 2}.{1 if match[1] == '0' else 2}.{match[2]}"
    else:
        match = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
        kind, layer, rest = match.groups()
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}"
    if kind == "resnets":
        part, _, end = rest.partition(".")
        rest = f"{_RESNET[part]}.{end}"
    return f"{place}.{rest}"


def _vae_name(name: str) -> str:
    if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", name):
        level = 3 - int(match[1])
        place = f"block.{match[3]}" if match[2] == "resnets" else "upsample"
        name = f"decoder.up.{level}.{place}.{match[4]}"
    for ours, theirs in _VAE:
        name = re.sub(ours, theirs, name)
    return name
