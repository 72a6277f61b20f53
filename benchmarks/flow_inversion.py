"""How far a picture comes back from its inversion along a flow, by each solver at as many calls of the model.

    python -m benchmarks.flow_inversion --output benchmarks/results/cpu-flow-inversion.json
    python -m benchmarks.flow_inversion --model embedded-sd3 --output benchmarks/results/cpu-flow-inversion.json

A picture is inverted and denoised again, with its prompt, without guidance and with nothing that holds it to its
trajectory. A row's error is that of its latents, as a share of their norm; its time is that of the way there and back.
Without ``--model`` the model is a Stable Diffusion 3 of random weights, which tells solvers apart by their order and
nothing of pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .measure import QUICK, THOROUGH, Effort, interleaved
from .rows import Environment, Row, read, replaced, write

__all__ = ["random_sd3", "run", "steps_of"]

PROMPT = "a photo of a red car on the beach"


def steps_of(solver: str, calls: int) -> int:
    """Steps in which a solver calls the model so many times, or once less."""
    return {"euler": calls, "rf-solver": calls // 2, "fireflow": calls - 1}[solver]


def random_sd3(seed: int = 0) -> Any:
    """A `FreePromptSD3Pipeline` of random weights for 128 × 128 pixels, in float32; made here, without a download."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from fpe_pipeline import FreePromptSD3Pipeline
    from fpe_pipeline.testing.models import words_tokenizer

    tokenizer = words_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=32, **sizes, **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = [CLIPTextModelWithProjection(text).eval() for _ in range(2)]
        transformer = SD3Transformer2DModel(
            sample_size=16,
            num_layers=4,
            num_attention_heads=2,
            attention_head_dim=32,
            joint_attention_dim=64,
            caption_projection_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
        ).eval()
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=16,
            shift_factor=0.0,
        ).eval()
    pipe = FreePromptSD3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, name: str, calls: int, effort: Effort, picture: Any = None) -> list[Row]:
    """A row a solver.

    Args:
        pipe: what `FreePromptPipeline.from_pipe` gives for a transformer; its scheduler is changed.
        name: of the model, for the case.
        calls: of the model on the way there, and as many back.
        effort: how long to measure.
        picture: what is inverted; default: one that is drawn here.
    """
    from fpe_pipeline import flow_scheduler
    from fpe_pipeline.models.flow_solvers import SOLVERS

    height, width = pipe.native_size
    picture = _drawn(height, width) if picture is None else picture
    device, dtype = str(pipe.device), pipe.transformer.dtype
    case = f"{name}/{width}x{height}/{calls} calls"
    about = {"suite": "flow-inversion", "case": case, "dtype": str(dtype).removeprefix("torch.")}

    def there_and_back(solver: str) -> float:
        pipe.scheduler = flow_scheduler(pipe.scheduler, solver)  # type: ignore[arg-type]
        inversion = pipe.invert(picture, PROMPT, num_inference_steps=steps_of(solver, calls), method="free")
        back = pipe(inversion=inversion, guidance_scale=1.0, output_type="latent").images
        first = inversion.latents[0]
        return float((back.to(first) - first).norm() / first.norm())

    errors = {solver: there_and_back(solver) for solver in SOLVERS}
    ways: dict[str, Callable[[], object]] = {solver: partial(there_and_back, solver) for solver in SOLVERS}
    samples = interleaved(ways, device, effort, wall=True)
    environment = Environment.read(device)
    return [
        Row.new(environment, **about, provider=solver, status="ok", samples_ms=samples[solver], error=errors[solver])
        for solver in SOLVERS
    ]


def _drawn(height: int, width: int) -> np.ndarray:
    """A red square on a sky that grows darker towards the ground: [H, W, 3] in [0, 1]."""
    picture = np.linspace((0.6, 0.8, 1.0), (0.2, 0.3, 0.2), height)[:, None].repeat(width, axis=1)
    picture[height // 3 : 2 * height // 3, width // 4 : 3 * width // 4] = (0.8, 0.1, 0.1)
    return picture


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow_inversion", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a saved pipeline (default: Stable Diffusion 3 of random weights)")
    parser.add_argument("--image", type=Path, help="a picture (default: one that is drawn)")
    parser.add_argument("--calls", type=int, nargs="+", default=[8, 16, 32, 64], help="(default: 8 16 32 64)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--output", type=Path, help="file for the rows; those of other cases stay in it")
    options = parser.parse_args(argv)
    if options.model is None:
        pipe, name = random_sd3(), "sd3-random"
    else:
        from fpe_pipeline import FreePromptPipeline

        pipe, name = FreePromptPipeline.from_pretrained(options.model), Path(options.model).name
        pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(options.device)
    rows: list[Row] = []
    for calls in options.calls:
        measured = run(pipe, name, calls, QUICK if options.quick else THOROUGH, options.image)
        print(f"{measured[0].case}, {measured[0].machine}")
        for row in measured:
            print(f"  {row.provider:<12}error {row.error:9.2e}{row.median_ms or float('nan'):>10.1f} ms", flush=True)
        rows += measured
    if options.output is not None:
        before = read(options.output) if options.output.exists() else []
        write(options.output, replaced(before, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
