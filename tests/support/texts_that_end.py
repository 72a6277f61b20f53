"""Pipelines of models whose texts end where they end or are masked there, and the options of their runs."""

import diffusers
import torch

from fpe_pipeline import FreePromptPipeline
from tests.support.flow_pipelines import solving
from tests.support.slow_cases import few
from tests.support.tiny_aura_flow import tiny_aura_flow_that_encodes
from tests.support.tiny_chroma import tiny_chroma_pipeline
from tests.support.tiny_cogview import tiny_cogview4_that_reads
from tests.support.tiny_language import tiny_lumina_that_reads, tiny_qwen_that_reads
from tests.support.tiny_transformers import tiny_vae
from tests.support.tiny_z_image import tiny_z_image_that_reads

__all__ = ["CASES", "EXACT", "FAMILIES", "GUIDED", "SIZE", "UNGUIDED", "made", "run"]

SIZE = {"height": 48, "width": 80}
# diffusers turns queries and keys of Chroma in float32.
EXACT = {"Qwen-Image": 1e-8, "Chroma": 1e-6, "Lumina 2": 1e-8, "Z-Image": 1e-8, "CogView 4": 1e-8, "AuraFlow": 1e-8}
if hasattr(diffusers, "Krea2Pipeline"):
    EXACT["Krea 2"] = 1e-8
FAMILIES = list(EXACT)
#: Of tests of which few run by default.
CASES = few(FAMILIES, "Qwen-Image", "Chroma", "Lumina 2", "Z-Image")
GUIDED = {
    "Qwen-Image": {"negative_prompt": "a drawing", "true_cfg_scale": 3.0},
    "Chroma": {"negative_prompt": "a drawing", "guidance_scale": 3.0},
    "Lumina 2": {"negative_prompt": "a drawing", "guidance_scale": 3.0},
    "Z-Image": {"negative_prompt": "a drawing", "guidance_scale": 3.0},
    "CogView 4": {"negative_prompt": "a drawing", "guidance_scale": 3.0},
    "AuraFlow": {"negative_prompt": "a drawing", "guidance_scale": 3.0},
    "Krea 2": {"negative_prompt": "a drawing", "guidance_scale": 3.0},
}
UNGUIDED = {
    "Qwen-Image": {},
    "Chroma": {"guidance_scale": 1.0},
    "Lumina 2": {"guidance_scale": 1.0},
    "Z-Image": {"guidance_scale": 0.0},
    "CogView 4": {"guidance_scale": 1.0},
    "AuraFlow": {"guidance_scale": 1.0},
    "Krea 2": {"guidance_scale": 0.0},
}


def made(family, pipe):
    """Our pipeline of a family; ``pipe`` has the tokenizer that Chroma's and AuraFlow's use."""
    stocks = {
        "Qwen-Image": tiny_qwen_that_reads,
        "Chroma": lambda: tiny_chroma_pipeline(pipe),
        "Lumina 2": tiny_lumina_that_reads,
        "Z-Image": lambda: tiny_z_image_that_reads(vae=tiny_vae().double()),
        "CogView 4": tiny_cogview4_that_reads,
        "AuraFlow": lambda: tiny_aura_flow_that_encodes(pipe),
        "Krea 2": _krea2,
    }
    stock = stocks[family]()
    tiny = FreePromptPipeline.from_pipe(stock)
    if family == "Qwen-Image":  # of the tiny tokenizer
        tiny.prompt_template_encode_start_idx = stock.prompt_template_encode_start_idx
    tiny.set_progress_bar_config(disable=True)
    return solving(tiny, "euler")


def _krea2():
    from tests.support.tiny_krea2 import tiny_krea2_pipeline  # of a transformers that has its encoder

    return tiny_krea2_pipeline()


def run(**options):
    return {
        "num_inference_steps": 3,
        "max_sequence_length": 80,
        "generator": torch.Generator().manual_seed(2),
        **SIZE,
        **options,
    }
