"""The autoencoder: 4 latent channels at a quarter of the image's width and height."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .data import SceneCache
from .loop import Fit, fit

__all__ = ["build_autoencoder", "encode_all", "measure_autoencoder", "standardise", "to_tensor", "train_autoencoder"]

_KL_WEIGHT = 3e-5
# Crops hold as much to learn from for each pixel, and a batch of them shows more scenes in the same time.
_CROP = 48


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
    vae: AutoencoderKL, cache: SceneCache, settings: Fit, checkpoint: Path, *, seed: int = 0, **options: object
) -> bool:
    """Train on random crops; returns whether it finished (see :func:`~.loop.fit`)."""
    device = next(vae.parameters()).device
    count, room = settings.batch, max(0, cache.images.shape[1] - _CROP)

    def loss(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        images = cache.images[torch.randint(len(cache), (count,), generator=generator).sort().values.numpy()]
        x, y = torch.randint(room + 1, (2, count), generator=generator).tolist()
        crops = [image[j : j + _CROP, i : i + _CROP] for image, i, j in zip(images, x, y, strict=True)]
        pixels = to_tensor(np.stack(crops), device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = F.mse_loss(decoded.float(), pixels)
        edges = F.l1_loss(decoded.float(), pixels)
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        psnr = 10 * math.log10(4 / error.item())
        return error + 0.05 * edges + _KL_WEIGHT * divergence, {"psnr": psnr, "kl": divergence.item()}

    return fit(vae, loss, settings, checkpoint, seed=seed, **options)  # type: ignore[arg-type]


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray, batch: int = 32) -> torch.Tensor:
    """Posterior means and standard deviations of all images: float16 ``[n, 2, 4, h, w]`` on the CPU."""
    device = next(vae.parameters()).device
    result = []
    for block in _batches(images, batch):
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(to_tensor(block, device)).latent_dist
        result.append(torch.stack([posterior.mean, posterior.std], dim=1).half().cpu())
    return torch.cat(result)


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold the latents' mean and deviation into the two 1×1 convolutions around them.

    Afterwards each latent channel has mean 0 and variance 1 over ``images``, decoded pictures are the same, and the
    pipeline's single ``scaling_factor`` of 1 is right for every channel.
    """
    latents = encode_all(vae, images).float()
    mean = latents[:, 0].mean(dim=(0, 2, 3)).to(vae.device)  # [4]
    deviation = (latents[:, 0].var(dim=(0, 2, 3)) + latents[:, 1].square().mean(dim=(0, 2, 3))).sqrt().to(vae.device)
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
    for block in _batches(images, batch):
        pixels = to_tensor(block, vae.device)
        decoded = vae.decode(vae.encode(pixels.to(vae.dtype)).latent_dist.mode()).sample.float().clamp(-1, 1)
        psnr.append(-10 * torch.log10((decoded - pixels).square().mean(dim=(1, 2, 3)) / 4))
    values = torch.cat(psnr).cpu()
    return {"psnr": values.mean().item(), "psnr_5_percent": values.quantile(0.05).item(), "images": len(values)}
