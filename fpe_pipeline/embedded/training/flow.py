"""The embedded transformer and its text encoders, trained jointly by flow matching on cached latents.

Its third text encoder is absent, as in Stable Diffusion 3 without T5: diffusers puts zeros in the place of that
encoder's states, ``max_sequence_length`` of them. Text has no positions in such a transformer, so that these tokens are
alike in every layer, and training computes one in the place of ``L``: as a key its score is raised by
:math:`\\log L`, which is what ``L`` equal keys with equal values come to.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .captions import Captions
from .diffusion import text_config
from .loop import Fit, Fitted, fit

__all__ = [
    "FlowDenoiser",
    "StandInAttention",
    "build_flow_scheduler",
    "build_projecting_encoder",
    "build_transformer",
    "train_flow",
]

_CAPTION_DROP = 0.1
_LONGEST = 256  # tokens of zeros that diffusers puts in the place of T5's, unless told otherwise
_TRAINED = 1000  # the scheduler's time steps: what the network is told is the time in these

Figures = dict[str, torch.Tensor]


def build_flow_scheduler(shift: float = 1.0) -> FlowMatchEulerDiscreteScheduler:
    """Straight paths from noise to latents; small pictures need no shift towards noise."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TRAINED, shift=shift)


def build_projecting_encoder(tokenizer: CLIPTokenizer, width: int, layers: int = 2) -> CLIPTextModelWithProjection:
    """An untrained CLIP text model with a projection, over the tokenizer's vocabulary."""
    return CLIPTextModelWithProjection(text_config(tokenizer, width, layers))


def build_transformer(
    latent_size: int, text_width: int, *, layers: int = 5, heads: int = 4, head_dim: int = 32, largest: int = 16
) -> SD3Transformer2DModel:
    """An untrained transformer of Stable Diffusion 3.5's kind, whose blocks begin as the identity.

    Args:
        latent_size: width and height of latents; tokens are 2 × 2 of them.
        text_width: of the text encoders' states beside each other, and of their pooled states.
        layers, heads, head_dim: of the blocks.
        largest: tokens a side that positions reach to.
    """
    transformer = SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=text_width,
        pos_embed_max_size=largest,
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for linear in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


class StandInAttention:
    """Joint attention of images and texts in which the last text token stands for several.

    Plain matrix products: at a hundred tokens and small heads, the backward pass of the CPU's fused attention costs
    more than the rest.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stands_for: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention's outputs of image ``[n, N, C]`` and text ``[n, T, C]``.

        Args:
            attn: the layer.
            hidden_states, encoder_hidden_states: of image and text.
            attention_mask: unused.
            stands_for: logarithm of how many tokens the last one stands for, ``[n]``; one without it.
        """
        image = [
            self._heads(attn, part, norm)
            for part, norm in zip(
                (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)),
                (attn.norm_q, attn.norm_k, None),
                strict=True,
            )
        ]
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [
            self._heads(attn, project(encoder_hidden_states), norm)
            for project, norm in zip(projections, (attn.norm_added_q, attn.norm_added_k, None), strict=True)
        ]
        q, k, v = (torch.cat(both, dim=2) for both in zip(image, text, strict=True))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if stands_for is not None:
            raised = torch.zeros(len(q), 1, 1, k.shape[2], dtype=scores.dtype, device=q.device)
            raised[..., -1] = stands_for[:, None, None].to(scores.dtype)
            scores = scores + raised
        mixed = (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        count = hidden_states.shape[1]
        seen, read = attn.to_out[0](mixed[:, :count]), mixed[:, count:]
        return seen, read if attn.context_pre_only else attn.to_add_out(read)

    @staticmethod
    def _heads(attn: Any, states: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        split = states.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        return split if norm is None else norm(split)


class FlowDenoiser(nn.Module):
    """Transformer and text encoders as one module: what is optimised, averaged and checkpointed together."""

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
    ) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2

    def forward(
        self, latents: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor, stands_for: torch.Tensor
    ) -> torch.Tensor:
        """Velocity ``[n, 4, h, w]``, from latent to noise.

        Args:
            latents: ``[n, 4, h, w]``, on the way.
            times: float32 ``[n]`` in [0, 1], 1 for noise.
            tokens: ids ``[n, length]``.
            stands_for: see :class:`StandInAttention`, which has to be installed.
        """
        read = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        states = torch.cat([each.hidden_states[-2] for each in read], dim=2)
        absent = torch.zeros_like(states[:, :1])
        return self.transformer(
            latents,
            encoder_hidden_states=torch.cat([states, absent], dim=1),
            pooled_projections=torch.cat([each.text_embeds for each in read], dim=1),
            timestep=_TRAINED * times,
            joint_attention_kwargs={"stands_for": stands_for},
        ).sample


def train_flow(
    denoiser: FlowDenoiser,
    latents: torch.Tensor,
    labels: torch.Tensor,
    captions: Captions,
    settings: Fit,
    checkpoint: Path,
    *,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Train on cached posteriors (see :func:`~.loop.fit`).

    Times are logit-normal (Esser et al., "Scaling Rectified Flow Transformers"), stratified in every batch. The number
    of absent tokens is log-uniform, so that pictures do not depend on ``max_sequence_length``.

    Args:
        denoiser: trained in place.
        latents: float16 ``[n, 2, 4, h, w]``, posterior means and deviations, on the denoiser's device.
        labels: int64 ``[n, 3]``, what each of them shows.
        captions: its wordings; the empty one replaces one caption in ten.
        settings, checkpoint, seed, options: of :func:`~.loop.fit`.
    """
    device, count = next(denoiser.parameters()).device, settings.batch
    denoiser.transformer.set_attn_processor(StandInAttention())
    even = torch.arange(count, device=device)

    def draw(step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        rows = torch.randint(len(latents), (count,), generator=generator, device=device)
        tokens = captions.draw(labels[rows], generator, drop=_CAPTION_DROP)
        noises = torch.randn(2, count, *latents.shape[2:], generator=generator, device=device)
        position, length = torch.rand(2, count, generator=generator, device=device)
        place = ((even + position) / count).clamp(1e-4, 1 - 1e-4)
        times = torch.special.ndtri(place).sigmoid()
        return latents[rows], noises, times, tokens, length * math.log(_LONGEST)

    def loss(
        network: FlowDenoiser,
        chosen: torch.Tensor,
        noises: torch.Tensor,
        times: torch.Tensor,
        tokens: torch.Tensor,
        stands_for: torch.Tensor,
    ) -> tuple[torch.Tensor, Figures]:
        mean, deviation = chosen.float().unbind(dim=1)
        clean, noise = mean + deviation * noises[0], noises[1]
        t = times[:, None, None, None]
        entering = ((1 - t) * clean + t * noise).to(next(network.parameters()).dtype)
        velocity = network(entering, times, tokens, stands_for)
        error = (velocity.float() - (noise - clean)).square().mean(dim=(1, 2, 3))
        return error.mean(), {"noisy half": error[count // 2 :].mean()}

    return fit(denoiser, draw, loss, settings, checkpoint, seed=seed, **options)
