"""Transformers with joint attention to edit, of SD3's and FLUX.1's shape; random weights cost what trained ones do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["JointCase", "build", "model_inputs"]


@dataclass(frozen=True)
class JointCase:
    """One transformer at one length with one edit's batch.

    Args:
        family: whose layers.
        side: image tokens a side.
        texts: text tokens.
        images: pictures of so many tokens in a row: FLUX.1 Kontext has its reference beside the latents.
        targets: of the edit, beside its source.
        heads, layers: of the transformer; FLUX.1 has as many dual as single blocks.
    """

    family: Literal["sd3", "flux"]
    side: int
    texts: int
    targets: int = 1
    heads: int = 4
    layers: int = 1
    images: int = 1

    @property
    def name(self) -> str:
        return f"{self.family}/{self.tokens}+{self.texts}/{self.heads} heads, {self.layers} layers/{self.targets}"

    @property
    def tokens(self) -> int:
        """Of the pictures."""
        return self.images * self.side**2

    @property
    def rows(self) -> int:
        """Of the batch, which SD3's guidance doubles."""
        return (1 + self.targets) * (2 if self.family == "sd3" else 1)


def build(case: JointCase, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The transformer with random weights, drawn on the CPU: the same for the same PyTorch version."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(0)
    model: Any
    if case.family == "sd3":
        model = SD3Transformer2DModel(
            sample_size=2 * case.side,
            num_layers=case.layers,
            num_attention_heads=case.heads,
            attention_head_dim=64,
            joint_attention_dim=64,
            caption_projection_dim=64 * case.heads,
            pooled_projection_dim=64,
            pos_embed_max_size=case.side,
        )
    else:
        model = FluxTransformer2DModel(
            num_layers=case.layers,
            num_single_layers=case.layers,
            num_attention_heads=case.heads,
            attention_head_dim=128,
            joint_attention_dim=64,
            pooled_projection_dim=64,
        )
    # PyTorch's own conversion: diffusers' warns of modules that it would keep in float32, of which there are none.
    return torch.nn.Module.to(model, device, dtype).eval().requires_grad_(False)


def model_inputs(case: JointCase, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Arguments of one call: every row starts from the same noise and has a prompt of its own."""
    return {name: value.to(device) for name, value in _drawn(case, dtype).items()}


def _drawn(case: JointCase, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows = case.rows
    inputs: dict[str, Tensor] = {
        "encoder_hidden_states": draw(rows, case.texts, 64),
        "pooled_projections": draw(rows, 64),
    }
    if case.family == "sd3":
        latents = draw(1, 16, 2 * case.side, 2 * case.side)
        return {**inputs, "hidden_states": latents.expand(rows, -1, -1, -1), "timestep": torch.full((rows,), 500.0)}
    places = torch.zeros(case.images, case.side, case.side, 3)
    places[..., 0] += torch.arange(case.images)[:, None, None]
    places[..., 1] += torch.arange(case.side)[:, None]
    places[..., 2] += torch.arange(case.side)[None]
    return {
        **inputs,
        "hidden_states": draw(1, case.tokens, 64).expand(rows, -1, -1),
        "timestep": torch.full((rows,), 0.5, dtype=dtype),
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(case.texts, 3),
    }
