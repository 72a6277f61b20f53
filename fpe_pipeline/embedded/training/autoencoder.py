"""The autoencoder: 4 latent channels at a quarter of the image's width and height."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .images import Images
from .loop import Fit, Fitted, fit
from .step import compute, entering

__all__ = ["build_autoencoder", "encode_all", "measure_autoencoder", "standardise", "to_tensor", "train_autoencoder"]

_KL_WEIGHT, _EDGE_WEIGHT = 3e-5, 0.1
_ENCODING = {"cpu": torch.bfloat16, "cuda": torch.float16}

Figures = dict[str, torch.Tensor]


def build_autoencoder(size: int, channels: tuple[int, ...] = (16, 32, 64)) -> AutoencoderKL:
    """An untrained autoencoder for images of ``size`` pixels; no attention, so that it serves any size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=size,
        scaling_factor=1.0,
    )


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 ``[n, h, w, 3]`` to float32 ``[n, 3, h, w]`` in [-1, 1]."""
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(
    vae: AutoencoderKL, images: Images, settings: Fit, checkpoint: Path, *, crop: int, seed: int = 0, **options: Any
) -> Fitted:
    """Train on random crops of ``crop`` pixels a side, or on whole pictures (see :func:`~.loop.fit`)."""
    crop = min(crop, images.size)

    def draw(step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        if step % 64 == 0:
            images.refresh()
        pixels = images.crops(settings.batch, crop, generator)
        shape = (settings.batch, vae.config.latent_channels, crop // factor, crop // factor)
        return pixels, torch.randn(shape, generator=generator, device=generator.device)

    factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def loss(network: AutoencoderKL, crops: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, Figures]:
        pixels = crops.float() / 127.5 - 1
        with compute(network):
            posterior = network.encode(entering(network, pixels)).latent_dist
            decoded = network.decode(posterior.mean + posterior.std * noise.to(posterior.mean.dtype)).sample.float()
        error = F.mse_loss(decoded, pixels)
        edges = _steps(decoded, 2) - _steps(pixels, 2), _steps(decoded, 3) - _steps(pixels, 3)
        sharpness = F.l1_loss(decoded, pixels) + sum(edge.abs().mean() for edge in edges)
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        psnr = 10 * torch.log10(4 / error.detach())
        return error + _EDGE_WEIGHT * sharpness + _KL_WEIGHT * divergence, {"psnr": psnr, "kl": divergence}

    return fit(vae, draw, loss, settings, checkpoint, seed=seed, **options)


def _steps(pixels: torch.Tensor, axis: int) -> torch.Tensor:
    """Differences of neighbours along an axis: what a blurred edge has too little of."""
    return pixels.diff(dim=axis)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Posterior means and standard deviations of pictures, uint8 ``[n, 3, h, w]``: float16 ``[n, 2, 4, h, w]``."""
    result = []
    for block in images.split(batch):
        pixels = block.to(vae.device).float() / 127.5 - 1
        with torch.autocast(vae.device.type, _ENCODING[vae.device.type]):
            posterior = vae.encode(pixels).latent_dist
        result.append(torch.stack([posterior.mean, posterior.std], dim=1).half())
    return torch.cat(result)


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold the latents' mean and deviation into the two 1×1 convolutions around them.

    Afterwards each latent channel has mean 0 and variance 1 over ``images``, decoded pictures are the same, and the
    pipeline's single ``scaling_factor`` of 1 is right for every channel.
    """
    latents = encode_all(vae, images).float()
    mean = latents[:, 0].mean(dim=(0, 2, 3))  # [4]
    deviation = (latents[:, 0].var(dim=(0, 2, 3)) + latents[:, 1].square().mean(dim=(0, 2, 3))).sqrt()
    enter, leave = vae.quant_conv, vae.post_quant_conv
    enter.weight[:4] /= deviation[:, None, None, None]
    enter.bias[:4] = (enter.bias[:4] - mean) / deviation
    enter.bias[4:] -= 2 * deviation.log()
    leave.bias += torch.einsum("oi,i->o", leave.weight[:, :, 0, 0], mean)
    leave.weight *= deviation[None, :, None, None]


@torch.no_grad()
def measure_autoencoder(vae: AutoencoderKL, images: np.ndarray, batch: int = 32) -> dict[str, float]:
    """Reconstruction quality in the weights' own precision: mean PSNR in dB over images, and its 5 % quantile."""
    psnr = []
    for start in range(0, len(images), batch):
        pixels = to_tensor(images[start : start + batch], vae.device)
        decoded = vae.decode(vae.encode(pixels.to(vae.dtype)).latent_dist.mode()).sample.float().clamp(-1, 1)
        psnr.append(-10 * torch.log10((decoded - pixels).square().mean(dim=(1, 2, 3)) / 4))
    values = torch.cat(psnr).cpu()
    return {"psnr": values.mean().item(), "psnr_5_percent": values.quantile(0.05).item(), "images": len(values)}
