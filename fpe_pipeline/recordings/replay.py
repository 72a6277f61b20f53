"""The session of targets whose source is recorded: it is replayed to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..edits import Edit
from ..edits.base import encoded_edit, feature_modules_of, parts_of, prompts_of
from ..edits.watchers import Watcher
from ..models.adapters.adapter import ModelCall
from ..models.roles import BatchRoles
from ..models.steps import Step, run_steps
from ..prompts.encoding import Encoding
from ..session.layers.known_rows import Packed, RecordedLayer, unpack
from ..session.session import EditingSession
from .contents import check_held, source_needs
from .keys import HALVES, Contents, Part, TensorKey
from .padded_texts import pad_texts
from .recording import Recording
from .requirements import UNWATCHED
from .source_text import with_source

__all__ = ["Replay"]


class Replay(EditingSession):
    """Edits targets alone, from a source that is recorded: its rows are numbered after those of the batch.

    Args:
        pipe: denoises the targets.
        edit: asked as if the source were in the batch.
        recording: of the source.
        targets: how many.
        guided: whether there are unconditional rows; in a call of their own where the model's pipeline guides so.
        backend: of the attention.
        size: (height, width) of the latents, where they are packed; default: what their shape says.
        placed: whether the recording knows which words the source's text tokens are, in joint attention.

    Attributes:
        needed: what the edit takes of the source.

    Raises:
        Lacking: the recording holds less than that.
    """

    unwatched = UNWATCHED

    def __init__(
        self,
        pipe: Any,
        edit: Edit,
        recording: Recording,
        targets: int,
        guided: bool,
        backend: str,
        size: tuple[int, int] | None = None,
        placed: bool = True,
    ) -> None:
        super().__init__(pipe, edit, backend=backend)
        self._recording = recording
        self._store = recording.store
        self._latents = latents = recording.latents
        apart, first = self.adapter.guides_apart, self.adapter.prompts_first
        self._recorded_roles = BatchRoles.from_recording(
            targets, classifier_free_guidance=guided and not apart, prompts_first=first
        )
        self._device = latents.device
        sites = tuple(site.at(*(size or latents.shape[-2:])) for site in self.sites)
        run = run_steps(pipe.scheduler)

        def needs(of: Edit) -> Contents:
            of_rows: dict[str, Any] = {"targets": targets, "guided": guided, "apart": apart, "prompts_first": first}
            return source_needs([of], sites, run, **of_rows, placed=placed)

        self._needs = needs
        self.needed = needs(edit)
        check_held(edit, self.needed, recording.contents)
        self._has_placed = False  # the words of the pipeline call's prompts
        self._lengths = {half == HALVES[True]: length for half, length in recording.text_lengths.items()}
        self._origins = {
            half == HALVES[True]: torch.view_as_complex(origin) for half, origin in recording.origins.items()
        }
        self._instructor.recorded_lengths = self._lengths
        self._unpad: Callable[[], None] | None = None

    def _install(self, watchers: Sequence[Watcher]) -> None:
        super()._install(watchers)
        words = bool(self._watchers or prompts_of(self.edit))
        if words or any(_is_text(part.name) for parts in self.needed.values() for part in parts):
            self._unpad = pad_texts(self.adapter, self._lengths)

    def _take_off(self) -> None:
        super()._take_off()
        if self._unpad is not None:
            self._unpad()
            self._unpad = None

    def after_step(self, latents: torch.Tensor) -> torch.Tensor:
        """As the session's; blends see the source's latents of the recorded run behind the targets'."""
        step = self.current_step
        if step is None:
            return latents
        source = self._latents[step.call + 1].to(latents)
        return super().after_step(torch.cat([latents, source]))[: latents.shape[0]]

    def _called(self) -> None:
        super()._called()
        self._has_placed = False

    def _encoded(self, encoding: Encoding) -> None:
        """The call encodes the targets alone; the edit was written for the source as well, and checked before.

        Words are placed among the tokens that the text encoders received, so that an edit is shown the source's with
        the targets'; once, as negative prompts may be encoded in a call that follows.
        """
        if self._has_placed or not self._recording.source_text:
            return
        self._has_placed = True
        encoding = with_source(encoding, self._recording.prompt, self._recording.source_text)
        before, self._running = self._running, encoded_edit(self._running, encoding)
        if self._running is not before:
            self._instructor.forget(*parts_of(before))
            self.needed = self._needs(self._running)
            check_held(self.edit, self.needed, self._recording.contents)
        for watcher in self._watchers:
            watcher.encoded(encoding)

    def _paired_rows(self, rows: int | None, asked: Encoding | None) -> None:
        """All targets start from the recorded noise, which the call is given."""

    def _restore(self) -> None:
        super()._restore()
        self._store.release()

    def _read_roles(self, call: ModelCall) -> BatchRoles:
        self._device = call.sample.device
        if self._recorded_roles.batch != call.rows:
            raise ValueError(
                f"expected a batch of {self._recorded_roles.batch} rows, the targets of a recording, got {call.rows}"
            )
        return self._recorded_roles.all_unconditional() if call.half == "unconditional" else self._recorded_roles

    def _recorded(self, step: Step, roles: BatchRoles) -> Mapping[str, RecordedLayer]:
        tensors = self._store.read(step.call, self._device)
        rows = {roles.conditional[row]: row for row in range(roles.batch, roles.rows)}
        found: dict[str, dict[int, Packed]] = {}
        for path, parts in self.needed.items():
            for part in parts:
                if part.conditional not in rows:  # of the step's other call
                    continue
                # Integer keys come with their scale.
                for name in (part.name, f"{part.name}_scale"):
                    tensor = tensors.get(TensorKey(path, Part(part.conditional, name)))
                    if tensor is not None:
                        found.setdefault(path, {}).setdefault(rows[part.conditional], {})[name] = tensor
        assert self._hooks is not None
        self._hooks.features.recorded = {
            path: {row: unpack(packed, self.adapter.model.dtype)["feature"] for row, packed in known.items()}
            for path, known in found.items()
            if path in feature_modules_of(self._running)
        }
        self._origins = {half: origin.to(self._device) for half, origin in self._origins.items()}  # once a run
        of_text = [
            {row: told[half] for half, row in rows.items() if half in told} for told in (self._lengths, self._origins)
        ]
        return {
            path: RecordedLayer(known, _in_words(known, roles), *(of_text if _holds_text(known) else ()))
            for path, known in found.items()
        }


def _is_text(part: str) -> bool:
    return part.startswith("text-")


def _holds_text(known: Mapping[int, Packed]) -> bool:
    return any(_is_text(name) for packed in known.values() for name in packed)


def _in_words(known: Mapping[int, Packed], roles: BatchRoles) -> str:
    return "; ".join(str(Part(roles.conditional[row], ", ".join(packed))) for row, packed in known.items())
