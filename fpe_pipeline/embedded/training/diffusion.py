"""The denoiser and its text encoder, trained jointly on cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import Captions
from .loop import Fit, Fitted, fit
from .step import compute, entering
from .tokenizer import MAX_LENGTH

__all__ = ["Denoiser", "build_scheduler", "build_text_encoder", "build_unet", "train_diffusion", "warm_text_encoder"]

_CAPTION_DROP = 0.1
_SNR_FLOOR, _SNR_CEILING = 1.0, 5.0

Figures = dict[str, torch.Tensor]


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; the network predicts the velocity, which stays informative in pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """A CLIP text model over the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 96, layers: int = 2) -> CLIPTextModel:
    """An untrained CLIP text model over the tokenizer's vocabulary."""
    return CLIPTextModel(text_config(tokenizer, width, layers))


def build_unet(
    latent_size: int, channels: tuple[int, ...] = (64, 128), head_dim: int = 32, context: int = 96
) -> UNet2DConditionModel:
    """An untrained UNet with self- and cross-attention at every level.

    Few levels and attention at all of them: what the convolutions cannot reach, self-attention has to carry, and with
    it the layout that edits of its maps keep.

    diffusers reads ``attention_head_dim`` as the *number* of heads where ``num_attention_heads`` is absent.
    """
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=tuple(width // head_dim for width in channels),
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """UNet and text encoder as one module: what is optimised, averaged and checkpointed together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Velocity ``[n, 4, h, w]`` for noisy latents, integer timesteps ``[n]`` and token ids ``[n, length]``."""
        context = self.text_encoder(tokens).last_hidden_state
        return self.unet(latents, timesteps, context).sample


class _Reader(nn.Module):
    """A text encoder with linear heads that read a caption's attributes off the state after it."""

    def __init__(self, encoder: CLIPTextModel, counts: list[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.hidden_size, count) for count in counts)

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        after = self.encoder(tokens).last_hidden_state[:, -1]  # [n, length, width]
        return [head(after) for head in self.heads]


def warm_text_encoder(
    encoder: CLIPTextModel, captions: Captions, settings: Fit, *, seed: int = 0, **options: Any
) -> Fitted:
    """Teach the text encoder to tell captions apart before it meets the UNet.

    Linear heads, thrown away afterwards, read object, colour and background off the states that follow the caption, so
    the first cross-attention keys the UNet sees already separate them.

    Args:
        encoder: trained in place.
        captions: of all triples.
        settings, seed, options: of :func:`~.loop.fit`; the figure is the loss in nats, summed over the three heads.
    """
    device = next(encoder.parameters()).device
    reader = _Reader(encoder, captions.counts).to(device)

    def draw(step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        labels = captions.labels(settings.batch, generator)
        return captions.draw(labels, generator), labels

    def loss(network: _Reader, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, Figures]:
        with compute(network):
            logits = network(tokens)
        nats = [F.cross_entropy(logit.float(), labels[:, i]) for i, logit in enumerate(logits)]
        return torch.stack(nats).sum(), {}

    return fit(reader, draw, loss, settings, None, seed=seed, **options)


def train_diffusion(
    denoiser: Denoiser,
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

    Args:
        denoiser: trained in place.
        latents: float16 ``[n, 2, 4, h, w]``, posterior means and deviations, on the denoiser's device.
        labels: int64 ``[n, 3]``, what each of them shows.
        captions: its wordings; the empty one replaces one caption in ten.
        settings, checkpoint, seed, options: of :func:`~.loop.fit`.
    """
    device, count = next(denoiser.parameters()).device, settings.batch
    kept = build_scheduler().alphas_cumprod.to(device)
    if device.type == "cpu":
        # At a hundred tokens and small heads, the backward pass of the CPU's fused attention costs more than all of the
        # convolutions; plain matrix products take a third off the step.
        denoiser.unet.set_attn_processor(AttnProcessor())
    even = torch.arange(count, device=device)

    def draw(step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        rows = torch.randint(len(latents), (count,), generator=generator, device=device)
        tokens = captions.draw(labels[rows], generator, drop=_CAPTION_DROP)
        chosen = latents[rows]
        noises = torch.randn(2, count, *latents.shape[2:], generator=generator, device=device)
        # Stratified: every batch covers all noise levels evenly.
        position = (even + torch.rand(count, generator=generator, device=device)) / count
        return chosen, noises, (position * len(kept)).long().clamp(max=len(kept) - 1), tokens

    def loss(
        network: Denoiser, chosen: torch.Tensor, noises: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, Figures]:
        mean, deviation = chosen.float().unbind(dim=1)
        clean, noise = mean + deviation * noises[0], noises[1]
        level = kept[timesteps]
        signal, spread = (part.sqrt()[:, None, None, None] for part in (level, 1 - level))
        with compute(network):
            velocity = network(entering(network, signal * clean + spread * noise), timesteps, tokens)
        error = (velocity.float() - (signal * noise - spread * clean)).square().mean(dim=(1, 2, 3))
        ratio = level / (1 - level)
        # In terms of the clean latent's error the weight is the signal-to-noise ratio, kept within bounds.
        weight = ratio.clamp(_SNR_FLOOR, _SNR_CEILING) / (1 + ratio)
        return (weight * error).mean(), {"noisy half": error[count // 2 :].mean()}

    return fit(denoiser, draw, loss, settings, checkpoint, seed=seed, **options)
