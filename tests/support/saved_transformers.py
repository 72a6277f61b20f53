"""Tiny transformers as folders, as the command, batches and the page load them."""

import functools

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from tests.support.tiny_transformers import tiny_flux_pipeline, tiny_sd3_pipeline

_MADE = {"sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline}


def saved_transformer(pipe, family, folder):
    """Save a pipeline of a family, "sd3" or "flux", with a scheduler that diffusers loads; its folder."""
    stock = _MADE[family](pipe, dtype=torch.float32)
    stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.save_pretrained(folder)
    return folder


def make_flux_small(monkeypatch):
    """FLUX.1's pipeline makes images of 1024 px by default, whatever its transformer says; here of 64."""
    make = FluxPipeline.__init__

    @functools.wraps(make)  # diffusers reads the components off the signature
    def smaller(self, *arguments, **options):
        make(self, *arguments, **options)
        self.default_sample_size = 8

    monkeypatch.setattr(FluxPipeline, "__init__", smaller)
