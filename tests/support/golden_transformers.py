"""The tiny Stable Diffusion 3 and FLUX.1 of tests/golden, and the cases that other tools' own code computed on them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from .golden_cases import GOLDEN, GoldenCase
from .tiny_transformers import tiny_vae

__all__ = ["golden_flux", "golden_sd3", "load_dropin"]

#: The whole data, of which tests/golden holds a part: FPE_GOLDEN names its folder.
_WHOLE = Path(os.environ["FPE_GOLDEN"]) if "FPE_GOLDEN" in os.environ else GOLDEN


def load_dropin(name: str) -> GoldenCase:
    """A case by its name without ``dropin_``."""
    folder = _WHOLE / "cases"
    settings = json.loads((folder / f"dropin_{name}.json").read_text())
    return GoldenCase(name, settings, load_file(folder / f"dropin_{name}.safetensors"))


def golden_flux() -> FluxPipeline:
    """3 dual and 5 single blocks. Every tokenizer is the tiny CLIP's, and the VAE, which no case uses, a tiny one."""
    folder, tokenizer = _WHOLE / "models" / "tiny-flux", _tokenizer()
    return _quiet(
        FluxPipeline(
            vae=tiny_vae(),
            text_encoder=_part(CLIPTextModel, folder / "text_encoder"),
            text_encoder_2=_part(T5EncoderModel, folder / "text_encoder_2"),
            transformer=_part(FluxTransformer2DModel, folder / "transformer"),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
        )
    )


def golden_sd3() -> StableDiffusion3Pipeline:
    """4 joint blocks, the last of which drops its text."""
    folder, tokenizer = _WHOLE / "models" / "tiny-sd3", _tokenizer()
    return _quiet(
        StableDiffusion3Pipeline(
            vae=tiny_vae(),
            text_encoder=_part(CLIPTextModelWithProjection, folder / "text_encoder"),
            text_encoder_2=_part(CLIPTextModelWithProjection, folder / "text_encoder_2"),
            text_encoder_3=_part(T5EncoderModel, folder / "text_encoder_3"),
            transformer=_part(SD3Transformer2DModel, folder / "transformer"),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=tokenizer,
        )
    )


def _part(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder).float().eval()


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(GOLDEN / "models" / "tiny-sd15" / "tokenizer")


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
