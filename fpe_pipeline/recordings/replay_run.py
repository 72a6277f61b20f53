"""Editing a recorded source: its rows are replayed, and only the targets are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..edits import Edit, FreePromptEdit
from ..edits.base import check_prompts
from ..edits.registry import require_edit
from ..embedded import EARLIER, EMBEDDED
from ..errors import InputError
from ..models.loading import find_model, load
from ..models.steps import StepWindow
from ..prompts.words import warn_of_unknown_words
from ..sampling.output import FreePromptPipelineOutput
from ..sampling.pipeline import SamplingPipeline
from ..sampling.served_models import check_pipeline, check_without_image_prompts
from ..sampling.step_end import Call, FollowEmbeddings, Task
from ..texts import check_text
from .contents import describe_lack
from .fingerprint import fingerprint
from .recording import Recording
from .replay import Replay
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
    targets = _target_list(target_prompt)
    recording = _loaded(recording)
    _check_run(pipe, recording)
    chosen = _recorded_edit(recording, self_replace_steps) if edit is None else require_edit(edit)
    if edit is not None and self_replace_steps is not None:
        raise ValueError("self_replace_steps belongs to the edit; pass it there")
    check_prompts(chosen, [recording.prompt, *targets], pipe.tokenizer)
    warn_of_unknown_words(targets, pipe.tokenizer)
    guided = is_guided(pipe, recording.guidance_scale)
    replay = Replay(pipe, chosen, recording.store, recording.latents, len(targets), guided, backend)
    lack = describe_lack(replay.needed, recording.contents)
    if lack:
        raise ValueError(
            f"the recording lacks what {type(chosen).__name__} needs of the source: {lack}. Record it for this edit "
            "(pipe.record(…, edit=…) takes several), or give the edit fewer steps or layers"
        )
    images, nsfw = _denoise(pipe, recording, targets, replay, output_type)
    return FreePromptPipelineOutput(
        images=images,
        nsfw_content_detected=nsfw,
        source_kept=False,
        report=replay.report(),
        prompts=(recording.prompt, *targets),
    )


def _target_list(target_prompt: Any) -> list[str]:
    """The targets; TypeError or ValueError for what is no text."""
    targets = [target_prompt] if isinstance(target_prompt, str) else list(target_prompt)
    if not targets or not all(isinstance(target, str) for target in targets):
        raise TypeError(f"expected one or more target prompts, got {target_prompt!r}")
    for target in targets:
        check_text("a target prompt", target)
    return targets


def _loaded(recording: Any) -> Recording:
    """The recording, read where a folder was passed."""
    if isinstance(recording, str | Path):
        return Recording.load(recording)
    if not isinstance(recording, Recording):
        raise TypeError(f"expected what record returned, or its folder, got {type(recording).__name__}")
    return recording


def _check_run(pipe: SamplingPipeline, recording: Recording) -> None:
    """Set the scheduler to the recorded run; ValueError where model or schedule are others."""
    check_pipeline(pipe)
    check_without_image_prompts(pipe, "a recording")
    here = fingerprint(pipe)
    if here != recording.model:
        raise ValueError(
            f"the recording is of another model: {recording.model[:12]}… there and {here[:12]}… here; "
            + _which_model(recording.model, type(pipe), pipe.unet.dtype)
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
        options["negative_prompt_embeds"] = recording.unconditional[0].to(pipe.unet.dtype).expand(len(targets), -1, -1)
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


def _recorded_edit(recording: Recording, self_replace_steps: Any) -> FreePromptEdit:
    """The plain Free-Prompt-Editing that a recording was made for, in fewer steps where that is asked."""
    if recording.window is None:
        raise ValueError(
            "the recording was not made for plain Free-Prompt-Editing: say with edit= what to do, as it was said to "
            "record"
        )
    steps = recording.steps
    recorded = StepWindow(*recording.window)
    asked = recorded if self_replace_steps is None else StepWindow.parse(self_replace_steps)
    held, window = recorded.steps(steps), asked.steps(steps)
    if window and (window.start < held.start or window.stop > held.stop):
        raise ValueError(
            f"self_replace_steps={self_replace_steps} asks for steps {window.start} to {window.stop - 1}; the "
            f"recording holds {held.start} to {held.stop - 1}: record a wider window, or pass a narrower one"
        )
    return FreePromptEdit(asked, layers=recording.paths)
