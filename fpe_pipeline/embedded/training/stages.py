"""The stages of a training, in order; see :mod:`fpe_pipeline.embedded.training.train`."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from ..judge import Judge
from . import autoencoder, judge
from .captions import Captions
from .data import Rendering
from .diffusion import Denoiser, build_text_encoder, build_unet, train_diffusion, warm_text_encoder
from .export import check_size, export, write_measurements
from .images import Images
from .loop import Fitted
from .presets import Preset
from .review import review
from .step import Weights
from .timebox import TimeBox
from .tokenizer import build_tokenizer

__all__ = ["Stages"]

log = logging.getLogger(__name__)

_EARLY = 0.6  # of the diffusion: by then there is something to show, and a run that is cut later leaves it
_ENCODED = {"cpu": 32, "cuda": 256}  # pictures at a time
_FIRST, _ENOUGH = 1024, 16_000  # scenes that training against the clock begins with, and does without the rest


@dataclass
class Stages:
    """One run; arguments as of :func:`~.train.train`."""

    preset: Preset
    work: Path
    output: Path
    report: Path | None
    seed: int
    device: str
    box: TimeBox
    stop_after: int | None
    speeds: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, drawn: Rendering, held: Rendering) -> dict[str, object] | None:
        """Everything that is not finished yet; ``None`` where it left early."""
        if self.device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")
            # cuDNN's attention is built at first use, for longer than it would serve here.
            torch.backends.cuda.enable_cudnn_sdp(False)
        tokenizer, vae, denoiser, referee = self._networks()
        images = self._images(drawn)
        fitted = autoencoder.train_autoencoder(
            vae,
            images,
            self.preset.autoencoder,
            self._checkpoint("autoencoder"),
            crop=self.preset.crop,
            **self._options("autoencoder"),
        )
        if not self._done("autoencoder", fitted, self.preset.autoencoder.batch):
            return None
        if self.box.limited:
            # What is not drawn by now stays undrawn, unless it is very little that is drawn.
            drawn.wait(_ENOUGH, seconds=0.1 * self.box.left)
            drawn.stop()
            images.refresh()
        fitted = judge.train_judge(
            referee, images, self.preset.judge, self._checkpoint("judge"), **self._options("judge")
        )
        if not self._done("judge", fitted, self.preset.judge.batch):
            return None
        autoencoder.standardise(vae, images.pixels[:512])
        latents = self._latents(vae, images)
        held.wait()
        figures: dict[str, Any] = {
            "training": self._record(latents),
            "autoencoder": autoencoder.measure_autoencoder(vae, held.cache.images),
            "judge": judge.measure_judge(referee, held.cache),
        }
        log.info("on held-out renders: %s; %s", figures["autoencoder"], figures["judge"])
        self.box.mark("latents")

        captions = Captions(tokenizer, self.device)
        if not self._checkpoint("diffusion").exists():
            text = denoiser.text_encoder
            warm = warm_text_encoder(text, captions, self.preset.text, seed=self.seed, deadline=self._until("text"))
            self._done("text", warm, self.preset.text.batch)
        parts = {"vae": vae, "tokenizer": tokenizer, "judge": referee}
        fitted = train_diffusion(
            denoiser,
            latents,
            images.labels[: len(latents)],
            captions,
            self.preset.diffusion,
            self._checkpoint("diffusion"),
            on_progress=self._early_export(parts, figures),
            **self._options("diffusion"),
        )
        if not self._done("diffusion", fitted, self.preset.diffusion.batch):
            return None
        figures["training"] = self._record(latents)
        size = export(self.output, **parts, denoiser=denoiser, measurements=figures)
        log.info("wrote %s: %s bytes", self.output, f"{size:,}")
        self.box.mark("export")
        return self._review(figures, held)

    def _networks(self) -> tuple[CLIPTokenizer, AutoencoderKL, Denoiser, Judge]:
        preset = self.preset
        tokenizer = build_tokenizer(self.work / "tokenizer")
        torch.manual_seed(self.seed)
        vae = autoencoder.build_autoencoder(preset.size, preset.vae_channels)
        text_encoder = build_text_encoder(tokenizer)
        factor = 2 ** (len(preset.vae_channels) - 1)
        unet = build_unet(preset.size // factor, preset.channels, context=text_encoder.config.hidden_size)
        denoiser, referee = Denoiser(unet, text_encoder), Judge(preset.size)
        check_size(vae, denoiser, referee)
        return tokenizer, vae.to(self.device), denoiser.to(self.device), referee.to(self.device)

    def _images(self, drawn: Rendering) -> Images:
        """The renders: all of them, or, against the clock, those that there are and whatever comes."""
        growing = self.box.limited
        if growing:
            drawn.wait(_FIRST)
        images = Images(drawn, self.device, growing=growing)
        self.box.mark("first scenes")
        return images

    def _latents(self, vae: AutoencoderKL, images: Images) -> torch.Tensor:
        log.info("encoding %d scenes", images.count)
        return autoencoder.encode_all(vae, images.pixels, _ENCODED[torch.device(self.device).type])

    def _checkpoint(self, stage: str) -> Path:
        return self.work / f"{stage}.pt"

    def _until(self, stage: str) -> float:
        """When a stage has to be over."""
        if not self.box.limited:
            return math.inf
        if stage == "diffusion":
            return self.box.end - self.preset.shares.review * self.box.total
        return self.box.share(getattr(self.preset.shares, stage))

    def _options(self, stage: str) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        return {"seed": self.seed, "stop_after": self.stop_after, "deadline": self._until(stage)}

    def _done(self, stage: str, fitted: Fitted, batch: int) -> bool:
        self.box.mark(stage)
        self.speeds[stage] = {
            "steps": fitted.steps,
            "batch": batch,
            "minutes": round(fitted.minutes, 3),
            "samples_per_second": round(fitted.samples_per_second, 1),
            "cuda_graph": fitted.graphed,
            **{name: round(value, 4) for name, value in fitted.figures.items()},
        }
        return bool(fitted)

    def _record(self, latents: torch.Tensor) -> dict[str, Any]:
        preset = self.preset
        steps = {name: speed["steps"] for name, speed in self.speeds.items()}
        record: dict[str, Any] = {
            "preset": preset.name,
            "scenes": len(latents),
            "latents": len(latents),
            "autoencoder_steps": steps["autoencoder"],
            "autoencoder_renders": [{"pixels": preset.size, "steps": steps["autoencoder"]}],
            "diffusion_steps": steps.get("diffusion", 0),
            "diffusion_batch": preset.diffusion.batch,
        }
        if self.box.limited:
            record["max_minutes"] = round(self.box.total / 60, 3)
        return record

    def _early_export(self, parts: dict[str, Any], figures: dict[str, Any]) -> Any:
        """For a run with an end: writes the model once before it is done."""
        written = not self.box.limited

        def on_progress(progress: float, weights: Weights) -> None:
            nonlocal written
            if not written and progress >= _EARLY:
                written = True
                export(self.output, **parts, denoiser=weights.averaged(), measurements=figures)
                log.info("wrote %s as it is at %.0f %%", self.output, 100 * progress)

        return on_progress

    def _review(self, figures: dict[str, Any], held: Rendering) -> dict[str, object]:
        """Measured on what was written, so that the figures are those of the shipped float16 weights."""

        def keep(edits: dict[str, Any]) -> None:
            write_measurements(self.output, figures)
            if self.report is not None:
                metrics = {**figures, "edits": edits, "networks": self.speeds, "seconds": self.box.stages}
                metrics["device"] = torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu"
                self.report.mkdir(parents=True, exist_ok=True)
                (self.report / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

        keep({})
        options: dict[str, Any] = {"device": self.device, "seed": self.seed, "box": self.box, "keep": keep}
        review(self.output, self.report, self.preset, figures, **options)
        return figures
