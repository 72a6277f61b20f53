"""A picture that is inverted and recorded once, for any number of edits in the time of their own denoising."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import EditWarning, refusals
from ..images.distance import distance
from .making import Loaded, details_of, edit_of, filled_in, guided, invert, is_flow, photo_for
from .progress import Progress, show_steps
from .repeatable import Clock
from .result import Run
from .settings import Settings

if TYPE_CHECKING:
    from ..edits import Edit
    from ..inversion.trajectory import Inversion
    from ..recordings.recording import Recording
    from ..sampling.output import FreePromptPipelineOutput

__all__ = [
    "Recorded",
    "check_recordable",
    "edited",
    "invert_and_record",
    "record_source",
    "source_of",
    "wide_edits",
]


@dataclass(frozen=True)
class Recorded:
    """A picture's way to noise, and what edits need of its way back.

    Args:
        recording: of the way back.
        cut: the picture as it was cut for the model.
        back: the picture as it came back.
        inversion: the way to noise; None where only the recording was kept.
    """

    recording: Recording
    cut: Image.Image
    back: Image.Image
    inversion: Inversion | None = None

    @property
    def psnr(self) -> float:
        """Of the picture as it came back, dB."""
        return distance(self.cut, self.back).psnr


def invert_and_record(
    pipe: Any,
    settings: Settings,
    progress: Progress,
    *,
    edits: Sequence[Edit] = (),
    clock: Clock | None = None,
    **options: Any,
) -> Recorded:
    """Find a picture's noise and record the way back.

    Args:
        pipe: its scheduler is replaced by the solver that pictures are inverted with.
        settings: checked as a source's.
        edits: that the recording is to serve; default: :func:`wide_edits`.
        clock: is told how long the two stages took.
        options: of `pipe.record`, such as ``placement``.

    Raises:
        InputError: settings that cannot be served.
    """
    clock = clock or Clock()
    cut = photo_for(pipe, settings)
    assert cut is not None
    show_steps(pipe, "invert the photo", progress)
    with clock.measure("invert"):
        inversion = invert(pipe, cut, settings)
    show_steps(pipe, "record the way back", progress)
    with clock.measure("record"):
        recording = record_source(pipe, settings, edits or wide_edits(pipe, settings), inversion=inversion, **options)
    return Recorded(recording, cut, source_of(pipe, recording, cut.size), inversion)


def source_of(pipe: Any, recording: Recording, size: tuple[int, int]) -> Image.Image:
    """The picture that a recording's source became; ``size`` is its width and height, px."""
    from ..sampling.decoding import decoded

    (image,) = decoded(pipe, recording.latents[-1], size[::-1])
    return image


def check_recordable(pipe: Any) -> None:
    """Raise ValueError where a generated source cannot be recorded, as its scheduler draws noise in each step."""
    from ..models.flow_solvers import require_flow
    from ..recordings.requirements import check_deterministic

    if is_flow(pipe):
        require_flow(pipe.scheduler, "a recording")
    else:
        check_deterministic(pipe.scheduler)


def wide_edits(pipe: Any, settings: Settings) -> list[Edit]:
    """What is recorded before anybody knows the targets: every step of Free-Prompt-Editing and, of a source that has
    words, of Prompt-to-Prompt, where attention to text can be recorded."""
    from ..edits.registry import make_edit

    twice = [settings.source, settings.source]
    edits = [make_edit("fpe", twice, pipe.tokenizer, pipe, self_replace_steps=1.0)]
    if settings.source.strip() and not getattr(pipe, "masks_text", False):
        whole = {"cross_replace_steps": 1.0, "self_replace_steps": 1.0}
        edits.append(make_edit("p2p-replace", twice, pipe.tokenizer, pipe, **whole))
    return edits


def record_source(pipe: Any, settings: Settings, edits: Sequence[Edit], **options: Any) -> Recording:
    """Record the settings' source for some edits; ``options`` are further ones of `pipe.record`.

    Raises:
        InputError: a source or edits that cannot be recorded.
    """
    with refusals():
        recording: Recording = pipe.record(
            settings.source,
            edit=list(edits),
            backend=settings.backend,
            **guided(pipe, settings),
            **options,
        )
        return recording


def edited(loaded: Loaded, settings: Settings, recorded: Recorded, progress: Progress, clock: Clock) -> Run:
    """The targets of some settings from a recording: a run like any other, but that its source is not denoised.

    Args:
        loaded: on the solver that pictures are inverted with.
        settings: checked; of the source that is recorded.

    Raises:
        Lacking: the recording holds less than the edit needs.
        InputError: settings that cannot be served.
    """
    from ..edits import FreePromptEdit

    pipe = loaded.pipe
    edit = edit_of(pipe, settings, *recorded.cut.size)
    show_steps(pipe, "edit from the recording", progress)
    with clock.measure("edit"):
        made = _replayed(pipe, settings, recorded.recording, edit)
    plain = None
    if settings.control:
        show_steps(pipe, "no control", progress)
        with clock.measure("no control"), warnings.catch_warnings():
            warnings.simplefilter("ignore", EditWarning)  # to do nothing is what it is for
            plain = tuple(_replayed(pipe, settings, recorded.recording, FreePromptEdit(0.0)).images)
    filled = filled_in(settings, pipe, recorded.cut.size)
    details = details_of(filled, loaded, clock.seconds)
    return Run(filled, recorded.back, tuple(made.images), plain, details, recorded.cut, made.report)


def _replayed(pipe: Any, settings: Settings, recording: Recording, edit: Edit) -> FreePromptPipelineOutput:
    with refusals():
        made: FreePromptPipelineOutput = pipe.edit(
            recording, list(settings.targets), edit=edit, backend=settings.backend
        )
        return made
