"""UNets to edit: true sizes for GPUs, narrow ones for CPUs; random weights, which cost what trained ones cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,  # diffusers reads this as the number of heads
    "cross_attention_dim": 768,
}
_SD21 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# SD 1.5's layers and head dimensions with a quarter of its heads: what a CPU can step in seconds. Attention
# weighs about four times more against the convolutions than in SD 1.5.
_NARROW = {
    "block_out_channels": (80, 160, 320, 320),
    "attention_head_dim": 2,
    "cross_attention_dim": 64,
    "norm_num_groups": 16,
}
# SDXL's layers and head dimension with a fifth of its heads.
_SLIM_SDXL = {
    **_SDXL,
    "block_out_channels": (64, 128, 256),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
}
# Two levels, one layer each: for tests and for edits of many steps.
_TINY = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 1,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "sd21": _SD21,
    "sdxl": _SDXL,
    "narrow": _NARROW,
    "slimxl": _SLIM_SDXL,
    "tiny": _TINY,
}

GRAPH = "-graph"  # ends the name of an editor whose step is replayed as a CUDA graph
COMPILED = "-compiled"  # ends that of one whose step torch.compile made

WORDS = {
    "sd15": "SD 1.5",
    "sd21": "SD 2.1",
    "sdxl": "SDXL",
    "narrow": "SD 1.5's layers with 2 heads instead of 8",
    "slimxl": "SDXL's layers with 2 and 4 heads instead of 10 and 20",
    "tiny": "two levels, one layer each, 1 head",
}


@dataclass(frozen=True)
class UNetCase:
    """One UNet at one image size with one edit's batch.

    `selection` says which self-attention layers are edited: "default" (all but the finest level, the method's
    own choice) or "all". `steps` is 1, or the length of a whole edit.
    """

    model: str
    pixels: int
    targets: int = 1
    selection: str = "default"
    steps: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}-{self.pixels}/guided-{self.targets}/{self.selection}/{self.steps}"

    @classmethod
    def parse(cls, name: str) -> UNetCase:
        model_pixels, guided, selection, steps = name.split("/")
        model, pixels = model_pixels.rsplit("-", 1)
        return cls(model, int(pixels), int(guided.rsplit("-", 1)[1]), selection, int(steps))

    @property
    def side(self) -> int:
        return self.pixels // 8

    @property
    def rows(self) -> int:
        """Unconditional and conditional rows of the source and every target."""
        return 2 * (1 + self.targets)


def build(model: str, device: str, dtype: torch.dtype) -> Any:
    """The UNet with random weights, the same for the same PyTorch version."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    # A GPU draws large weights in no time, a CPU takes seconds for SDXL's.
    with torch.device(device):
        unet: Any = UNet2DConditionModel(sample_size=64, **CONFIGS[model])
    # PyTorch's own conversion: diffusers' warns of modules that it would keep in float32, of which there are none.
    return torch.nn.Module.to(unet, dtype).eval().requires_grad_(False)


def twin(unet: Any) -> Any:
    """Another module over the same weights, so that processors can differ between calls of one round."""
    with torch.device("meta"):
        other = type(unet).from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def unet_inputs(case: UNetCase, unet: Any, device: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one UNet call: every row starts from the same noise and has a prompt of its own."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rows = case.rows
    latents = draw(1, 4, case.side, case.side).expand(rows, -1, -1, -1)
    prompts = draw(1 + case.targets, 77, unet.config.cross_attention_dim)
    empty = draw(1, 77, unet.config.cross_attention_dim).expand(1 + case.targets, -1, -1)
    keywords: dict[str, Any] = {"encoder_hidden_states": torch.cat([empty, prompts])}
    if unet.config.addition_embed_type == "text_time":
        keywords["added_cond_kwargs"] = {
            "text_embeds": draw(rows, 1280),
            "time_ids": torch.tensor([case.pixels, case.pixels, 0, 0] + 2 * [case.pixels]).to(device).expand(rows, -1),
        }
    return (latents, torch.tensor(501, device=device)), keywords
