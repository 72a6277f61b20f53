"""What is asked of a recording: targets, an edit, and whether the recording holds what that needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..edits import Edit, FreePromptEdit
from ..edits.base import check_prompts
from ..edits.registry import require_edit
from ..models.steps import StepWindow
from ..prompts.words import warn_of_unknown_words
from ..sampling.output import FreePromptPipelineOutput
from ..texts import check_text
from .recording import Recording
from .replay import Replay


def target_list(target_prompt: Any) -> list[str]:
    """The targets.

    Raises:
        TypeError: what is no text.
        ValueError: none, or one that cannot be encoded.
    """
    targets = [target_prompt] if isinstance(target_prompt, str) else list(target_prompt)
    if not targets or not all(isinstance(target, str) for target in targets):
        raise TypeError(f"expected one or more target prompts, got {target_prompt!r}")
    for target in targets:
        check_text("a target prompt", target)
    return targets


def loaded_recording(recording: Any) -> Recording:
    """The recording, read where a folder was passed; TypeError for anything else."""
    if isinstance(recording, str | Path):
        return Recording.load(recording)
    if not isinstance(recording, Recording):
        raise TypeError(f"expected what record returned, or its folder, got {type(recording).__name__}")
    return recording


def replayed_edit(
    recording: Recording, edit: Edit | None, self_replace_steps: Any, targets: Sequence[str], tokenizer: Any
) -> Edit:
    """The edit to do with a recording, by default the one that it was made for.

    Raises:
        TypeError: what is no edit.
        ValueError: an edit that is written for other prompts; steps beside an edit, or that were not recorded.
    """
    if edit is not None and self_replace_steps is not None:
        raise ValueError("self_replace_steps belongs to the edit; pass it there")
    chosen = _recorded_edit(recording, self_replace_steps) if edit is None else require_edit(edit)
    check_prompts(chosen, [recording.prompt, *targets], tokenizer)
    warn_of_unknown_words(targets, tokenizer)
    return chosen


def replayed_output(
    images: Any, censored: Any, replay: Replay, recording: Recording, targets: Sequence[str]
) -> FreePromptPipelineOutput:
    """The targets' images, beside a source that was not denoised."""
    return FreePromptPipelineOutput(
        images=images,
        nsfw_content_detected=censored,
        source_kept=False,
        report=replay.report(),
        prompts=(recording.prompt, *targets),
    )


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
