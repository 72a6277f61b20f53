"""Editing a recorded source: its rows are replayed, and only the targets are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..edits import Edit
from ..embedded import EARLIER, EMBEDDED
from ..errors import InputError
from ..models.loading import load
from ..models.sources import find_model
from ..sampling.output import FreePromptPipelineOutput
from ..sampling.pipeline import SamplingPipeline
from ..sampling.served_models import check_pipeline, check_without_image_prompts
from ..sampling.step_end import Call, FollowEmbeddings, Task
from .fingerprint import fingerprint
from .recording import Recording
from .replay import Replay
from .replay_request import loaded_recording, replayed_edit, replayed_output, target_list
from .requirements import check_deterministic, is_guided

__all__ = ["edit"]


@torch.no_grad()
def edit(
    pipe: SamplingPipeline,
    recording: Recording | str | Path,
    target_prompt: str | Sequence[str],
    *,
    edit: Edit | None = None,
    self_replace_steps: Any = None,
    output_type: str = "pil",
    backend: str = "auto",
) -> FreePromptPipelineOutput:
    """Edit a recorded source into target prompts; the source itself is not denoised again.

    Args:
        recording: from `record` or `Recording.load`, or the folder that it is in; made with this model, scheduler and
            dtype.
        target_prompt: one or more prompts.
        edit: any that needs no more of the source than was recorded; default: Free-Prompt-Editing as recorded. Edits
            that align words are written for `[recording.prompt, *targets]`.
        self_replace_steps: of the default edit; fewer steps than were recorded.
        output_type: "pil", "np", "pt" or "latent".
        backend: attention backend.

    Returns:
        The targets' images, to rounding those of ``pipe(source, targets, edit=edit)`` (where the recording is exact);
        ``.report.explain()`` says what was replayed.

    Raises:
        ValueError: a recording of another model or schedule, one that lacks what the edit needs, an edit that is
            written for other prompts, or an IP-Adapter; before any denoising.
        InputError: a folder, or a file of it, that is not what was recorded.
    """
    targets, recording = target_list(target_prompt), loaded_recording(recording)
    _check_run(pipe, recording)
    chosen = replayed_edit(recording, edit, self_replace_steps, targets, pipe.tokenizer)
    guided = is_guided(pipe, recording.guidance_scale)
    replay = Replay(pipe, chosen, recording, len(targets), guided, backend)
    images, nsfw = _denoise(pipe, recording, targets, replay, output_type)
    return replayed_output(images, nsfw, replay, recording, targets)


def _check_run(pipe: SamplingPipeline, recording: Recording) -> None:
    """Set the scheduler to the recorded run; ValueError where model or schedule are others."""
    check_pipeline(pipe)
    check_without_image_prompts(pipe, "a recording")
    here = fingerprint(pipe)
    if here != recording.model:
        raise ValueError(
            f"the recording is of another model: {recording.model[:12]}… there and {here[:12]}… here; "
            + _which_model(recording.model, type(pipe), pipe.denoiser.dtype)
        )
    check_deterministic(pipe.scheduler)
    pipe.scheduler.set_timesteps(recording.steps)
    recording.schedule.check(pipe.scheduler, "recording")


def _denoise(
    pipe: SamplingPipeline, recording: Recording, targets: list[str], replay: Replay, output_type: str
) -> tuple[Any, Any]:
    """The targets' images beside the replayed source, and whether each was censored."""
    noise = recording.latents[0]
    tasks: list[Task] = []
    options: dict[str, Any] = {}
    if recording.negative_prompt is not None:
        options["negative_prompt"] = [recording.negative_prompt] * len(targets)
    if recording.unconditional is not None:
        tasks.append(FollowEmbeddings(recording.unconditional))
        options |= pipe.unconditional_options(recording.unconditional[0].expand(len(targets), -1, -1))
    factor = pipe.vae_scale_factor
    return pipe._sample(
        Call(len(targets), 1),
        replay,
        tasks,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=["latents"],
        prompt=targets,
        height=noise.shape[-2] * factor,
        width=noise.shape[-1] * factor,
        num_inference_steps=recording.steps,
        guidance_scale=recording.guidance_scale,
        latents=noise,
        output_type=output_type,
        **options,
    )


def _which_model(recorded: str, pipeline: type[SamplingPipeline], dtype: torch.dtype) -> str:
    """What to do about a recording of another model: one in this package is named."""
    for name in (EMBEDDED, *EARLIER):
        try:
            candidate = load(find_model(name), pipeline, dtype=dtype, device="cpu")
        except InputError:  # an installation without those weights
            continue
        if fingerprint(candidate) == recorded:
            return (
                f"it was made with the model {name!r} of this package: edit it with "
                f'FreePromptPipeline.from_pretrained(fpe_pipeline.models.embedded_path("{name}"))'
            )
    return "weights, adapters and their strengths, FreeU, dtype and configurations must be those that it was made with"
