"""Editing sessions: processors installed for the length of a `with` block, and a step that is read, not counted."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch

from ..edits import Edit, base
from ..edits.registry import require_edit
from ..edits.watchers import Watcher
from ..errors import EditWarning
from ..models.roles import BatchRoles
from ..models.sites import attention_sites
from ..models.steps import Step, step_of_call
from ..models.unet import identity, pipe_and_unet
from ..prompts.encoding import Encoding, encoding_tokenizer
from ..prompts.words import warn_of_unknown_words
from .device_copies import Place, Placement
from .entry import check_entry, check_selects
from .finite import is_finite, refuse_step
from .hooks import FeatureHooks
from .installation import LayerProcessors
from .instructions import Order, StandingOrders, make_orders
from .known_rows import RecordedLayer
from .layout import CallLayout
from .pipeline_hooks import PipelineHooks
from .report import EditReport
from .selected_sites import SelectedSites

__all__ = ["EditingSession", "editing", "session_of", "unedited"]

_SESSIONS: weakref.WeakKeyDictionary[torch.nn.Module, EditingSession] = weakref.WeakKeyDictionary()


class EditingSession:
    """Edit every call of a diffusers pipeline in a ``with`` block::

        with editing(pipe, FreePromptEdit(self_replace_steps=0.8)) as session:
            images = pipe([source_prompt, target_prompt], latents=noise.expand(2, -1, -1, -1)).images

    The pipeline is an ordinary one with a UNet: its prompts are one source and any number of targets, started
    from the same noise. Layers and steps that the edit leaves alone are computed by the processors that were
    there before, to the bit; on leaving the block, by an exception too, those are back in place.

    Args:
        pipe: a diffusers pipeline with a ``unet``; or a UNet alone, whose steps are then set with
            ``session.step(index, total)`` and whose guidance is given by ``classifier_free_guidance``.
        edit: what to do, such as :class:`FreePromptEdit`.
        images_per_prompt: the pipeline call's ``num_images_per_prompt``. Default: read from the call.
        source_of: for each prompt, the index of its source prompt. Default: prompt 0 is the source of all.
        classifier_free_guidance: whether UNet batches hold an unconditional half. Default: asked of the pipeline
            at each call.
        roles: the whole layout of the batch, where it is none of these; excludes the three arguments above.
        noise: whether the rows of one image draw the same noise, in calls that pass a generator and no latents:
            "shared" or "separate". Default: shared for edits that pair rows pixel by pixel, which is all but
            :class:`StyleAlignedEdit`.
        backend: one of ``fpe_kernels.backends()``, or "auto".
        override_processors: classes of custom processors that the edit may compute replaced layers in the stead of.

    Raises:
        TypeError: there is no UNet.
        ValueError: the edit matches no layer, the backend is unknown, arguments exclude each other, or a pipeline
            that makes videos or panoramas; in a call, one that encodes other prompts or images than its batch holds.
        RuntimeError: the UNet is in another session, or the backend cannot run here.
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
        self.pipe, self.unet = pipe_and_unet(pipe)
        self.edit = edit
        self.backend = backend
        require_edit(edit)
        layout = (images_per_prompt, source_of, classifier_free_guidance)
        check_entry(self.pipe, self.unet, edit, backend, noise, roles, layout)
        self._layout = CallLayout(self.pipe, images_per_prompt, source_of, classifier_free_guidance, roles, noise)
        self.sites = attention_sites(self.unet)
        check_selects(edit, self.sites)
        self._running = edit  # what is asked: the edit, or what it gave for this session
        self._watchers: tuple[Watcher, ...] = ()
        self._layers = LayerProcessors(self.unet)
        self._selected = SelectedSites(self.sites, lambda sites: self._layers.check(sites, override_processors))
        self._hooks: list[Any] = []
        self._encoding = Encoding()
        self._pipeline_hooks: PipelineHooks | None = None
        self._features: FeatureHooks | None = None
        self._current_roles: BatchRoles | None = None
        self._fixed_step: Step | None = None
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # of the latest UNet call
        self._paused = False
        self._calls = 0
        self._step: Step | None = None
        self._step_before_pause: Step | None = None
        self._report = EditReport(sites=self.sites)
        self._placement = Placement()
        self._standing = StandingOrders()
        self._at_hand: Mapping[str, RecordedLayer] | None = None  # of a recording, in the call under way
        self._around: EditingSession | None = None  # the session that stands aside for this one
        self._is_new_run = True
        self._seen: list[Step] = []  # of the run under way

    def __enter__(self) -> EditingSession:
        key = identity(self.unet)
        around = _SESSIONS.get(key)
        if self._hooks or (around is not None and not around.gives_way):
            raise RuntimeError(
                f"this {type(key).__name__} is already being edited: leave that session first; to apply several edits "
                "at once, combine them into one Edit"
            )
        if around is not None and self.unwatched:
            raise ValueError(self.unwatched)
        self._calls = 0
        self._fixed_step = None
        self._step = self._step_before_pause = None
        self._report = EditReport(sites=self.sites)
        self._selected.clear()
        self._standing = StandingOrders()
        self._seen = []
        self._encoding = Encoding()
        self._running = base.begun(self.edit)
        self._around = around
        if around is not None:
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
        if error is None:
            self._finish_run()
        self._restore()
        if error is None and self._calls == 0:
            warnings.warn(
                "the editing session ended without a call of the UNet it watched: nothing was edited. Was the "
                "pipeline's unet replaced, or another pipeline called?",
                RuntimeWarning,
                stacklevel=2,
            )

    def _install(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = ()
        self._is_new_run = True
        self._layers.wrap(self._running.select(self.sites))
        self._features = FeatureHooks(identity(self.unet), base.feature_modules_of(self._running))
        # One by one, so that a failure leaves none behind. `unet.compile()` would trace them with the UNet.
        self._hooks.append(
            self.unet.register_forward_pre_hook(torch.compiler.disable(self._before_unet), with_kwargs=True)
        )
        self._hooks.append(self.unet.register_forward_hook(torch.compiler.disable(self._after_unet)))
        if self.pipe is not None:
            self._pipeline_hooks = PipelineHooks(
                self.pipe, self._encoded, self._after_scheduler_step, self._paired_rows
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
        self._selected.forget(watcher)

    def _restore(self) -> None:
        key = identity(self.unet)
        inside, around = _SESSIONS.get(key), self._around
        self._around = None
        if inside is not self and inside is not None:  # this one stands aside already, and now for good
            inside._around = None
            self._calls += inside._calls
            for watcher in self._watchers:
                inside.unwatch(watcher)
            return
        _SESSIONS.pop(key, None)
        self._take_off()
        if around is not None:
            _SESSIONS[key] = around
            around._calls += self._calls
            around._install(around._watchers)

    def _take_off(self) -> None:
        """Leave the UNet and the scheduler as they were found."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._arguments = (), {}
        if self._features is not None:
            self._features.remove()
        if self._pipeline_hooks is not None:
            self._pipeline_hooks.remove(expected=self._calls > 0 and any(w.blends for w in self._watchers))
            self._pipeline_hooks = None
        self._layers.restore(stacklevel=4)

    def step(self, index: int, total: int) -> None:
        """Set the step of the UNet calls that follow, in a sampling loop that has no diffusers scheduler::

            with editing(unet, edit, classifier_free_guidance=True) as session:
                for i, t in enumerate(timesteps):
                    session.step(i, len(timesteps))
                    noise = unet(latents, t, embeddings).sample

        From the first call on, the session no longer reads the pipeline's scheduler.
        """
        self._fixed_step = Step(index, total)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave UNet calls unedited for a while, inside the session."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def is_paused(self) -> bool:
        """Whether UNet calls are left unedited just now."""
        return self._paused

    @property
    def current_step(self) -> Step | None:
        """The step of the latest UNet call; None before the first and while paused."""
        return self._step

    def after_step(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents to go on from after a scheduler step; a pipeline's scheduler is followed without being asked.

        Only edits that blend latents, such as :class:`LocalBlend`, change them.
        """
        if self._step is not None and self._current_roles is not None:
            for watcher in self._watchers:
                if watcher.blends:
                    latents = watcher.blend(latents, self._step, self._current_roles)
        return latents

    def _after_scheduler_step(self, latents: torch.Tensor, timestep: Any) -> torch.Tensor:
        latents = self.after_step(latents)
        if not (self._paused or is_finite(latents)):
            refuse_step(self._step, identity(self.unet), *self._arguments, getattr(self.pipe, "guidance_scale", None))
        self._arguments = (), {}
        return latents

    def report(self) -> EditReport:
        """What was replaced in the latest run: ``print(session.report())``."""
        return self._report

    def explain(self) -> str:
        """What was done to which layer at which step, what was left out and why, and the memory of it."""
        return self._report.explain()

    def _encoded(self, encoding: Encoding) -> None:
        """The pipeline has encoded its prompts: a run begins, with these prompts and with this layout."""
        if self._paused:
            return
        self._encoding, self._is_new_run = encoding, True
        if encoding.prompts is not None:
            tokenizer = encoding_tokenizer(self.pipe)
            base.check_prompts(self._running, encoding.prompts, tokenizer)
            warn_of_unknown_words(encoding.prompts, tokenizer)
        running = base.encoded_edit(self._running, encoding)
        if running is not self._running:
            self._selected.forget(*base.parts_of(self._running))
            self._running = running
        for watcher in self._watchers:
            watcher.encoded(encoding)

    def _paired_rows(self) -> tuple[Sequence[int], int] | None:
        """The sources of the prompts and images a prompt, where rows of one image are to draw the same noise."""
        paired = None if self._paused else self._layout.paired(self._encoding, self._running.pairs_pixels)
        if paired is not None:
            self._report.noise = (
                "rows of one image draw the same noise where the call passes none (generator and no latents); "
                'editing(…, noise="separate") keeps them apart'
            )
        return paired

    def source_dropped(self) -> None:
        """The rows of the source have left the batch, for the rest of this run."""
        if self._encoding.count is not None:
            self._encoding = replace(self._encoding, count=self._encoding.count - 1, dropped=1)

    def _finish_run(self) -> None:
        """Say what of the edit did nothing in the run that has ended."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        blends = any(watcher.blends for watcher in self._watchers)
        self._report.note_idle(type(self.edit).__name__, self._running, seen, blends=blends)
        for reason in self._report.idle:
            warnings.warn(reason, EditWarning, stacklevel=3)

    def _before_unet(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls += 1
        self._layers.give({})
        self._at_hand = None
        before, self._step, self._current_roles = self._step, None, None
        assert self._features is not None
        self._features.rows = {}
        if self._paused:
            self._step_before_pause = before or self._step_before_pause
            return
        self._arguments = args, kwargs
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        step = self._step = self._read_step(timestep)
        before = before or self._step_before_pause
        if self._is_new_run or (before is not None and (step.call < before.call or step.calls != before.calls)):
            self._is_new_run = False
            self._finish_run()
            for watcher in self._watchers:
                watcher.begin()
        self._seen.append(step)
        active = self._running.active(step)
        if active or self._watchers:
            roles = self._current_roles = self._read_roles(sample.shape[0])
            self._layers.give(self._orders(sample, step, roles, active))
            if active:
                self._features.rows = base.features_of(self._running, step, roles)

    def _after_unet(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        ordered = self._layers.ordered
        own_loop = self.pipe is None or self._fixed_step is not None  # in which no scheduler's step need be seen
        if own_loop and not (self._paused or is_finite(output[0])):
            refuse_step(self._step, identity(self.unet), *self._arguments)
        if self._step is not None:
            assert self._features is not None
            self._report = self._report.at(self._step)
            self._report.add(self._step, ordered, self._features.rows, self._at_hand)
        self._layers.warn_of_bypassed(stacklevel=3)

    def _orders(self, sample: torch.Tensor, step: Step, roles: BatchRoles, active: bool) -> dict[str, Order]:
        size = (sample.shape[-2], sample.shape[-1])
        place = Place(self._placement, sample.device, sample.dtype)
        edited = [(part, self._selected.of(part, size)) for part in base.parts_of(self._running)] if active else []
        watched = [(watcher, self._selected.of(watcher, size)) for watcher in self._watchers]
        self._at_hand = self._recorded(step, roles)
        context = (step, roles, self.backend, place, self._at_hand)
        if watched or self._at_hand is not None or not active:
            return make_orders(edited, watched, *context)
        return self._standing.orders(
            self._running.phase(step),
            (roles, size, sample.device, sample.dtype),
            lambda: make_orders(edited, (), *context),
        )

    def _recorded(self, step: Step, roles: BatchRoles) -> Mapping[str, RecordedLayer] | None:
        """What is known of the roles' recorded rows, by layer path."""
        return None

    def _read_step(self, timestep: Any) -> Step:
        return step_of_call(self.pipe, timestep) if self._fixed_step is None else self._fixed_step

    def _read_roles(self, rows: int) -> BatchRoles:
        return self._layout.of(rows, self._encoding)


#: How a session is begun, in words: ``with editing(pipe, edit):``.
editing = EditingSession


def session_of(pipe: Any) -> EditingSession | None:
    """The session that a pipeline's UNet is in, or None."""
    return _SESSIONS.get(identity(pipe_and_unet(pipe)[1]))


def unedited(pipe: Any) -> AbstractContextManager[None]:
    """Leave calls of a pipeline's UNet alone in a ``with`` block, whether or not it is in a session."""
    session = session_of(pipe)
    return nullcontext() if session is None else session.paused()
