"""The denoiser and its text encoder, trained jointly on cached latents."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .loop import Fit, fit
from .tokenizer import MAX_LENGTH

__all__ = ["Denoiser", "build_scheduler", "build_text_encoder", "build_unet", "train_diffusion", "warm_text_encoder"]

_CAPTION_DROP = 0.1
_SNR_FLOOR, _SNR_CEILING = 1.0, 5.0


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


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 96, layers: int = 2) -> CLIPTextModel:
    """An untrained CLIP text model over the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
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
    )


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


def warm_text_encoder(
    encoder: CLIPTextModel, tokens: torch.Tensor, labels: torch.Tensor, steps: int = 300, batch: int = 64, seed: int = 0
) -> float:
    """Teach the text encoder to tell captions apart before it meets the UNet.

    Linear heads, thrown away afterwards, read object, colour and background off the states that follow the caption, so
    the first cross-attention keys the UNet sees already separate them.

    Args:
        encoder: trained in place.
        tokens: int64 ``[n, k, length]``, ``k`` captions of each scene.
        labels: int64 ``[n, 3]``, indices of object, colour and background.
        steps, batch, seed: of this training.

    Returns:
        The last step's loss in nats, summed over the three heads.
    """
    device = next(encoder.parameters()).device
    width = encoder.config.hidden_size
    counts = (labels.amax(dim=0) + 1).tolist()
    heads = nn.ModuleList(nn.Linear(width, count) for count in counts).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(tokens), (batch,), generator=generator)
        wording = torch.randint(tokens.shape[1], (batch,), generator=generator)
        states = encoder(tokens[rows, wording].to(device)).last_hidden_state  # [n, length, width]
        after = states[:, -1]
        target = labels[rows].to(device)
        loss = torch.stack([F.cross_entropy(head(after), target[:, i]) for i, head in enumerate(heads)]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return loss.item()


def train_diffusion(
    denoiser: Denoiser,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    empty: torch.Tensor,
    settings: Fit,
    checkpoint: Path,
    *,
    seed: int = 0,
    **options: object,
) -> bool:
    """Train on cached posteriors; returns whether it finished (see :func:`~.loop.fit`).

    Args:
        denoiser: trained in place.
        latents: float16 ``[n, 2, 4, h, w]``, posterior means and deviations.
        tokens: int64 ``[n, k, length]``, ``k`` wordings of each image.
        empty: int64 ``[length]``, tokens of the empty caption, which replaces one caption in ten.
        settings, checkpoint, seed, options: of :func:`~.loop.fit`.
    """
    device = next(denoiser.parameters()).device
    scheduler = build_scheduler()
    kept = scheduler.alphas_cumprod.to(device)
    levels = len(kept)
    if device.type == "cpu":
        # At a hundred tokens and small heads, the backward pass of the CPU's fused attention costs more than all of the
        # convolutions; plain matrix products take a third off the step.
        denoiser.unet.set_attn_processor(AttnProcessor())

    def loss(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        count = settings.batch
        rows = torch.randint(len(latents), (count,), generator=generator)
        wording = torch.randint(tokens.shape[1], (count,), generator=generator)
        text = tokens[rows, wording]
        text[torch.rand(count, generator=generator) < _CAPTION_DROP] = empty
        mean, deviation = latents[rows].float().unbind(dim=1)
        clean = (mean + deviation * torch.randn(mean.shape, generator=generator)).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        # Stratified: every batch covers all noise levels evenly.
        position = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        timesteps = (position * levels).long().clamp(max=levels - 1).to(device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = denoiser(noisy, timesteps, text.to(device))
        error = (velocity.float() - scheduler.get_velocity(clean, noise, timesteps)).square().mean(dim=(1, 2, 3))
        signal = kept[timesteps] / (1 - kept[timesteps])
        # In terms of the clean latent's error the weight is the signal-to-noise ratio, kept within bounds.
        weight = signal.clamp(_SNR_FLOOR, _SNR_CEILING) / (1 + signal)
        high = error[count // 2 :].mean().item()
        value = (weight * error).mean()
        return value, {"loss": value.item(), "noisy half": high}

    return fit(denoiser, loss, settings, checkpoint, seed=seed, **options)  # type: ignore[arg-type]
