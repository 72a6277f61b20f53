"""Editing sessions: processors installed for the length of a `with` block, and a step that is read, not counted."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch

from ..callers import warn
from ..edits import Edit, base
from ..edits.registry import require_edit
from ..edits.watchers import Watcher, blended
from ..errors import EditWarning
from ..models.adapters.adapter import ModelCall, identity
from ..models.adapters.families import adapter_of, edited_model
from ..models.roles import BatchRoles
from ..models.steps import Step
from ..prompts.encoding import Encoding, encoding_tokenizer
from ..prompts.words import warn_of_unknown_words
from .entry import check_entry, check_selects, unread
from .finite import refuse_step
from .finite_watch import FiniteWatch
from .installation import NO_ORDERS, LayerProcessors
from .instructor import Instructor
from .latest_call import NO_CALL, LatestCall
from .layers.instructions import Order
from .layers.known_rows import RecordedLayer
from .layout import SHARED_NOISE, CallLayout
from .model_hooks import ModelHooks
from .pipeline_hooks import PipelineHooks
from .report import EditReport
from .run_clock import RunClock

__all__ = ["EditingSession", "editing", "session_of"]

_SESSIONS: weakref.WeakKeyDictionary[torch.nn.Module, EditingSession] = weakref.WeakKeyDictionary()


class EditingSession:
    """Edit every call of a diffusers pipeline in a ``with`` block::

        with editing(pipe, FreePromptEdit(self_replace_steps=0.8)) as session:
            images = pipe([source_prompt, target_prompt], latents=noise.expand(2, -1, -1, -1)).images

    The pipeline is an ordinary one with a UNet, or with a transformer that has an adapter (docs/write-an-adapter.md
    lists them): its prompts are one source and any number of targets, started from the same noise.
    Layers and steps that the edit leaves alone are computed by the processors that were there before, to the bit;
    on leaving the block, by an exception too, those are back in place.

    Args:
        pipe: a diffusers pipeline with a ``unet`` or ``transformer``; or one of those alone, whose steps are then set
            with ``session.step(index, total)`` and whose guidance is given by ``classifier_free_guidance``.
        edit: what to do, such as :class:`FreePromptEdit`.
        images_per_prompt: the pipeline call's ``num_images_per_prompt``. Default: read from the call.
        source_of: for each prompt, the index of its source prompt. Default: prompt 0 is the source of all.
        classifier_free_guidance: whether batches hold an unconditional half. Default: asked of the pipeline
            at each call.
        roles: the whole layout of the batch, where it is none of these; excludes the three arguments above.
        noise: whether the rows of one image draw the same noise, in calls that pass a generator and no latents:
            "shared" or "separate". Default: shared for edits that pair rows pixel by pixel, which is all but
            :class:`StyleAlignedEdit`.
        backend: one of ``fpe_kernels.backends()``, or "auto".
        override_processors: classes of custom processors that the edit may compute replaced layers in the stead of.

    Raises:
        TypeError: there is no UNet or transformer, or a transformer that no adapter describes.
        ValueError: the edit matches no layer, the backend is unknown, arguments exclude each other, or a pipeline
            that makes videos or panoramas; in a call, one that encodes other prompts or images than its batch holds.
        RuntimeError: the model is in another session, the backend cannot run here; in a call, another pipeline calls.
    """

    #: Whether a session that is entered inside this one takes its place, and its watchers along, until it ends.
    gives_way = False
    #: Why no watcher of a session around this one can follow it; empty where it can.
    unwatched = ""

    def __init__(
        self,
        pipe: Any,
        edit: Edit,
        *,
        images_per_prompt: int | None = None,
        source_of: Sequence[int] | None = None,
        classifier_free_guidance: bool | None = None,
        roles: BatchRoles | None = None,
        noise: Literal["shared", "separate"] | None = None,
        backend: str = "auto",
        override_processors: tuple[type, ...] = (),
    ) -> None:
        self.adapter = adapter_of(pipe)
        self.pipe = self.adapter.pipe
        self.edit = edit
        self.backend = backend
        require_edit(edit)
        layout = (images_per_prompt, source_of, classifier_free_guidance)
        check_entry(self.adapter, edit, backend, noise, roles, layout)
        self.sites = self.adapter.sites
        check_selects(edit, self.sites)
        self._layout = CallLayout(self.adapter, images_per_prompt, source_of, classifier_free_guidance, roles, noise)
        self._clock = RunClock(self.adapter)
        self._layers = LayerProcessors(self.adapter, lambda: self._instructor.begin())
        check = self._layers.check
        self._instructor = Instructor(self.sites, lambda sites: check(sites, override_processors), backend)
        self._hooks: ModelHooks | None = None
        self._encoding = Encoding()
        self._running = edit  # what is asked: the edit, or what it gave for this session
        self._watchers: tuple[Watcher, ...] = ()
        self._report = EditReport(sites=self.sites)
        self._finite = FiniteWatch()
        self._now = NO_CALL
        self._called_model = self.adapter.model  # of those that a run calls, the one that was called latest
        self._around: EditingSession | None = None  # the session that stands aside for this one

    def __enter__(self) -> EditingSession:
        key = self.adapter.module
        around = _SESSIONS.get(key)
        if self._hooks is not None or (around is not None and not around.gives_way):
            raise RuntimeError(
                f"this {type(key).__name__} is already being edited: leave that session first; to apply several edits "
                "at once, combine them into one Edit"
            )
        if around is not None and self.unwatched:
            raise ValueError(self.unwatched)
        self._clock = RunClock(self.adapter)
        self._report = EditReport(sites=self.sites)
        self._instructor.begin()
        self._encoding = Encoding()
        self._running = base.begun(self.edit)
        self._around = around
        if around is not None:
            around._finite.settle()
            around._take_off()
        _SESSIONS[key] = self
        try:
            self._install((*base.watchers_of(self._running), *(around._watchers if around is not None else ())))
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish_run()
        finally:
            self._restore()
        if error is None and self._clock.calls == 0:
            word = self.adapter.word
            warn(
                f"the editing session ended without a call of the {word} it watched: nothing was edited. Was the "
                f"pipeline's {word.lower()} replaced, or another pipeline called?",
                RuntimeWarning,
            )

    def _install(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = ()
        self._clock.begin()
        self._layers.wrap(self._running.select(self.sites))
        self._hooks = ModelHooks(
            self.adapter,
            base.feature_modules_of(self._running),
            self._before_call,
            self._after_call,
            lambda: PipelineHooks(
                self.adapter,
                self._encoded,
                self._after_scheduler_step,
                self._paired_rows,
                self._called,
                self._finite,
            ),
        )
        for watcher in watchers:
            self.watch(watcher)

    def watch(self, watcher: Watcher) -> None:
        """Let a watcher follow the session from here on, beside those of the edit."""
        self._layers.wrap(watcher.select(self.sites))
        self._watchers += (watcher,)

    def unwatch(self, watcher: Watcher) -> None:
        """Stop asking a watcher; the layers that it alone read go back to being computed as they were."""
        self._watchers = tuple(other for other in self._watchers if other is not watcher)
        self._instructor.selected.forget(watcher)

    def _restore(self) -> None:
        key = self.adapter.module
        inside, around = _SESSIONS.get(key), self._around
        self._around = None
        if inside is not self and inside is not None:  # this one stands aside already, and now for good
            inside._around = None
            self._clock.calls += inside._clock.calls
            for watcher in self._watchers:
                inside.unwatch(watcher)
            return
        _SESSIONS.pop(key, None)
        self._take_off()
        if around is not None:
            _SESSIONS[key] = around
            around._clock.calls += self._clock.calls
            around._install(around._watchers)

    def _take_off(self) -> None:
        """Leave the model and the scheduler as they were found."""
        if self._hooks is not None:
            self._hooks.remove(expected=self._clock.calls > 0 and any(w.blends for w in self._watchers))
            self._hooks = None
        self._finite.forget()
        self._now = NO_CALL
        self._layers.restore()

    def step(self, index: int, total: int) -> None:
        """Set the step of the model's calls that follow, in a sampling loop that has no diffusers scheduler::

            with editing(unet, edit, classifier_free_guidance=True) as session:
                for i, t in enumerate(timesteps):
                    session.step(i, len(timesteps))
                    noise = unet(latents, t, embeddings).sample

        From the first call on, the session no longer reads the pipeline's scheduler.
        """
        self._clock.fixed = Step(index, total)

    def paused(self) -> AbstractContextManager[None]:
        """Leave calls of the model unedited for a while, inside the session."""
        return self._clock.paused()

    @property
    def is_paused(self) -> bool:
        """Whether calls of the model are left unedited just now."""
        return self._clock.is_paused

    @property
    def current_step(self) -> Step | None:
        """The step of the latest call of the model; None before the first and while paused."""
        return self._clock.step

    def after_step(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents to go on from after a scheduler step; a pipeline's scheduler is followed without being asked.

        Only edits that blend latents, such as :class:`LocalBlend`, change them.
        """
        step, roles = self._clock.step, self._now.roles
        if step is not None and roles is not None:
            latents = blended(self._watchers, latents, step, roles, self.adapter.channels_last)
        return latents

    def _after_scheduler_step(self, latents: torch.Tensor, timestep: Any) -> torch.Tensor:
        if self._now.call is None:  # a step of a paused run, or of another pipeline that has the same scheduler
            return latents
        latents = self.after_step(latents)
        if not self.is_paused:
            self._look(latents, getattr(self.pipe, "guidance_scale", None))
        self._now = replace(self._now, call=None)
        self.adapter.stepped()
        return latents

    def _look(self, tensor: Any, guidance_scale: Any = None) -> None:
        """Refuse the latest step, now or later, where what was made of it is not finite."""
        assert self._hooks is not None
        step, model, features = self._clock.step, identity(self._called_model), self._hooks.features
        orders, rows, arguments = self._layers.orders, features.rows, self._now.arguments

        def refuse() -> None:
            self._layers.give(orders)
            features.rows = rows
            refuse_step(step, model, *arguments, guidance_scale)

        # A call is made once more to find the layer: where somebody reads along, or has read, before anything else.
        self._finite.look(tensor, refuse, wait=bool(self._watchers or self.unwatched))

    def report(self) -> EditReport:
        """What was replaced in the latest run: ``print(session.report())``."""
        return self._report

    def explain(self) -> str:
        """What was done to which layer at which step, what was left out and why, and the memory of it."""
        return self._report.explain()

    def _called(self) -> None:
        """The pipeline is called: what it encodes first are its prompts, whatever became of the call before."""
        self.adapter.called()
        if (self.adapter.guides_apart or self.adapter.encodes_in_parts) and not self.is_paused:
            self._encoding = Encoding()

    def _encoded(self, encoding: Encoding) -> None:
        """The pipeline has encoded its prompts: a run begins, with these prompts and with this layout."""
        if self.is_paused:
            return
        if self.adapter.guides_apart and self._clock.is_before_a_run and self._encoding.count is not None:
            return  # the negative prompts of the pipeline call whose prompts came before
        if self.adapter.encodes_in_parts and self._clock.is_before_a_run:
            encoding = self._encoding.joined(encoding)
        self._encoding = encoding
        self._clock.begin()
        if encoding.prompts is not None:
            tokenizer = encoding_tokenizer(self.pipe)
            base.check_prompts(self._running, encoding.prompts, tokenizer)
            warn_of_unknown_words(encoding.prompts, tokenizer)
        running = base.encoded_edit(self._running, encoding)
        if running is not self._running:
            self._instructor.forget(*base.parts_of(self._running))
            self._running = running
        for watcher in self._watchers:
            watcher.encoded(encoding)

    def _paired_rows(self, rows: int | None, asked: Encoding | None) -> tuple[Sequence[int], int] | None:
        """The sources of the prompts and images a prompt, where rows of one image are to draw the same noise."""
        if not (self.is_paused or self.adapter.tells_all_it_encodes):
            if self._encoding.count is None or not self._clock.is_before_a_run:
                self._encoded(unread(self._running))
            self._encoding = self._layout.drawn(self._encoding, rows)
        told, pairs = asked or self._encoding, self._running.pairs_pixels
        paired = None if self.is_paused else self._layout.paired(told, pairs, rows)
        if paired is not None:
            self._report.noise = SHARED_NOISE
        return paired

    def source_dropped(self) -> None:
        """The rows of the source have left the batch, for the rest of this run."""
        if self._encoding.count is not None:
            self._encoding = replace(self._encoding, count=self._encoding.count - 1, dropped=1)

    def _finish_run(self) -> None:
        """Say what of the edit did nothing in the run that has ended, of which everything is finite."""
        self._finite.settle()
        if not (seen := self._clock.finish()):
            return
        blends = any(watcher.blends for watcher in self._watchers)
        self._report.note_idle(type(self.edit).__name__, self._running, seen, blends=blends)
        for reason in self._report.idle:
            warn(reason, EditWarning)

    def _before_call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._hooks is not None
        features = self._hooks.features
        features.rows, self._now = {}, NO_CALL
        if self.is_paused:
            self._layers.give(NO_ORDERS)
            self._clock.pass_by()
            return
        self._called_model = self.adapter.models[name]
        call = self.adapter.call_of(name, args, kwargs)
        begins, step = self._clock.read(call)
        if begins:
            self._finish_run()
            self._hooks.check_caller()
            for watcher in self._watchers:
                watcher.begin()
            if self.adapter.turns_by_caption or call.keeps_texts:
                self._instructor.check(self._running, call, step, self._read_roles(call))
        self._clock.note()
        active = self._running.active(step)
        if not (active or self._watchers):
            self._now = LatestCall(call)
            self._layers.give(NO_ORDERS)
            return
        roles = self._read_roles(call)
        self._now = LatestCall(call, roles, self._recorded(step, roles))
        self._layers.give(self._orders(self._running if active else None, call, step, roles))
        if active and features.paths:
            features.rows = base.features_of(self._running, step, roles)

    def _after_call(self, output: Any) -> None:
        own_loop = self.pipe is None or self._clock.fixed is not None  # in which no scheduler's step need be seen
        if own_loop and not self.is_paused:
            self._look(output[0])
        if self._clock.step is not None:
            assert self._hooks is not None
            self._report = self._report.at(self._clock.step)
            self._report.add(self._clock.step, self._layers.records, self._hooks.features.rows, self._now.recorded)
        self._layers.warn_of_bypassed()

    def _orders(self, edit: Edit | None, call: ModelCall, step: Step, roles: BatchRoles) -> dict[str, Order]:
        """What the layers are to do in a call; ``edit`` is None where it is not active."""
        return self._instructor.orders(edit, self._watchers, call, step, roles, self._now.recorded)

    def _recorded(self, step: Step, roles: BatchRoles) -> Mapping[str, RecordedLayer] | None:
        """What is known of the roles' recorded rows, by layer path."""
        return None

    def _read_roles(self, call: ModelCall) -> BatchRoles:
        return self._layout.of_call(call, self._encoding)


#: How a session is begun, in words: ``with editing(pipe, edit):``.
editing = EditingSession


def session_of(pipe: Any) -> EditingSession | None:
    """The session that a pipeline's model is in, or None."""
    return _SESSIONS.get(identity(edited_model(pipe)[1]))
