"""Editing a source that was recorded on a transformer: its tokens are replayed, and only the targets are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..edits import Edit
from ..models.flow_solvers import require_flow
from ..prompts.encoding import encoding_tokenizer
from ..sampling.flow_models import FlowModel
from ..sampling.flow_sampling import FlowSampling, guidance_of_rows
from ..sampling.output import FreePromptPipelineOutput
from ..sampling.step_end import Call
from .fingerprint import fingerprint
from .recording import Recording
from .replay import Replay
from .replay_request import loaded_recording, replayed_edit, replayed_output, target_list

__all__ = ["edit_flow"]


@torch.no_grad()
def edit_flow(
    pipe: FlowSampling,
    recording: Recording | str | Path,
    target_prompt: str | Sequence[str],
    *,
    edit: Edit | None = None,
    self_replace_steps: Any = None,
    guidance_scale: float | Sequence[float] | None = None,
    output_type: str = "pil",
    backend: str = "auto",
) -> FreePromptPipelineOutput:
    """Edit a recorded source into target prompts; the source itself is not denoised again.

    Args:
        recording: from `record` or `Recording.load`, or the folder that it is in; made with this model, scheduler and
            dtype.
        target_prompt: one or more prompts.
        edit: any that needs no more of the source than was recorded; default: Free-Prompt-Editing as recorded.
        self_replace_steps: of the default edit; fewer steps than were recorded.
        guidance_scale: of the targets on models that are told it, such as FLUX.1 dev, one for all or a list with one
            for each; default: the recording's.
        output_type: "pil", "np", "pt" or "latent".
        backend: attention backend.

    Returns:
        The targets' images, to rounding those of ``pipe(source, targets, edit=edit)`` (where the recording is exact);
        ``.report.explain()`` says what was replayed.

    Raises:
        ValueError: a recording of another model or schedule, one that lacks what the edit needs, an edit that is
            written for other prompts, a guidance that the model is not told (those but FLUX.1 dev and the like), maps
            over texts of other lengths where a run of source and targets together refuses them, targets beside which
            the source's text would be padded further (CogView 4); before any denoising.
        InputError: a folder, or a file of it, that is not what was recorded.
    """
    targets, recording = target_list(target_prompt), loaded_recording(recording)
    model = pipe.flow()
    guided_rows = _guided(pipe, model, guidance_scale, len(targets))
    size, text_length = _check_recording(model, recording)
    chosen = replayed_edit(recording, edit, self_replace_steps, targets, encoding_tokenizer(pipe))
    is_guided = pipe.is_guided_at(recording.guidance_scale)
    if pipe.takes_true_guidance():
        is_guided = (recording.true_cfg_scale or 0.0) > 1
    grid = model.latent_size(size)
    replay = Replay(pipe, chosen, recording, len(targets), is_guided, backend, grid, bool(recording.source_text))
    noise = model.taken(recording.latents[0], size)
    arguments = {
        "prompt": list(targets),  # Z-Image's pipeline writes into the list
        "height": size[0],
        "width": size[1],
        "num_inference_steps": recording.steps,
        "max_sequence_length": text_length,
        "latents": torch.cat([noise] * len(targets)),
        "output_type": output_type,
    }
    if model.takes_guidance:
        arguments["guidance_scale"] = recording.guidance_scale
    if recording.negative_prompt is not None:
        arguments["negative_prompt"] = [recording.negative_prompt] * len(targets)
    if recording.true_cfg_scale is not None:
        arguments["true_cfg_scale"] = recording.true_cfg_scale
    with guided_rows, model.beside(recording.prompt, targets, text_length):
        images = pipe._sample(Call(len(targets), 1), replay, (), arguments)
    return replayed_output(images, None, replay, recording, targets)


def _guided(
    pipe: FlowSampling, model: FlowModel, scales: float | Sequence[float] | None, targets: int
) -> AbstractContextManager[None]:
    """What tells the model the guidance of each target's row."""
    if scales is None:
        return nullcontext()
    if not model.pipe.transformer.config.get("guidance_embeds"):
        raise ValueError(
            "the guidance of an edit from a recording is the recording's, of both halves of the batch: leave "
            "guidance_scale out, or record with another one"
        )
    given = list(scales) if isinstance(scales, Sequence) else [scales] * targets
    if len(given) != targets:
        raise ValueError(f"expected one guidance_scale, or one for each of the {targets} targets, got {len(given)}")
    return guidance_of_rows(pipe, given, 1)


def _check_recording(model: FlowModel, recording: Recording) -> tuple[tuple[int, int], int]:
    """Set the scheduler to a recording's run: its size in pixels and its T5 tokens; ValueError where it is not ours."""
    if recording.size is None or recording.text_length is None:
        raise ValueError("the recording is of a UNet, and this pipeline has a transformer: record the source with it")
    here = fingerprint(model.pipe)
    if here != recording.model:
        raise ValueError(
            f"the recording is of another model: {recording.model[:12]}… there and {here[:12]}… here; weights, "
            "adapters and their strengths, dtype and configurations must be those that it was made with"
        )
    require_flow(model.pipe.scheduler, "a recording")
    model.set_timesteps(recording.steps, recording.size)
    recording.schedule.check(model.pipe.scheduler, "recording")
    return recording.size, recording.text_length
