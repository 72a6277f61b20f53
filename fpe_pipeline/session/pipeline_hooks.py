"""Everything that a session hangs on a pipeline besides its UNet, put on and taken off together."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..models.adapters.adapter import ModelAdapter
from ..models.adapters.modular import is_modular
from ..prompts.encoding import Encoding, EncodingHook
from ..shadows import Shadows
from .finite_watch import FiniteDecoder, FiniteWatch
from .hooks import SchedulerHook
from .modular_calls import ModularCalls
from .shared_noise import InTurn, are_paired, level, paired_generators

__all__ = ["PipelineHooks"]


class PipelineHooks:
    """Hands on a pipeline's prompts, its latents after every step, and the noise that it draws.

    Args:
        adapter: of the model, with the diffusers pipeline around it.
        encoded: is shown what the pipeline encodes.
        stepped: takes the scheduler's new latents with the timestep and returns those to go on from.
        paired: from how many rows the call draws noise for, where it says so, and what it asks for, where it has
            encoded nothing yet, the sources of its prompts and its images a prompt, where rows of one image are to draw
            the same noise; None where rows draw their own.
        called: is told that a call of the pipeline begins.
        watch: of the latents, which is heard before a picture is made of them.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        encoded: Callable[[Encoding], None],
        stepped: Callable[[torch.Tensor, Any], torch.Tensor],
        paired: Callable[[int | None, Encoding | None], tuple[Sequence[int], int] | None],
        called: Callable[[], None],
        watch: FiniteWatch,
    ) -> None:
        pipe = adapter.pipe
        self._asked: Encoding | None = None  # of a call that has encoded nothing yet

        def begun(original: Any, *args: Any, **kwargs: Any) -> Any:
            self._hear()
            called()
            self._asked = Encoding.of(inspect.signature(original).bind(*args, **kwargs).arguments, {})
            self._noise.begins()
            return original(*args, **kwargs)

        def encodes(encoding: Encoding) -> None:
            asked, self._asked = self._asked, None
            if adapter.tells_all_it_encodes or asked is None or asked.prompts is not None:
                encoded(encoding)  # and not negative prompts alone, beside embeddings

        self._pipe = pipe
        self._is_heard = False  # whether the pipeline has said something since the latest run began
        self._calls = Shadows(pipe)
        # What every call of a diffusers pipeline begins with; its __call__ itself is looked up in the class.
        self._calls.cover("check_inputs", begun)
        heard = self._heard(called), self._heard(encoded), paired
        self._modular = (
            ModularCalls(adapter, *heard, lambda *drawn, **how: self._noise.take(*drawn, **how))
            if is_modular(pipe)
            else None
        )
        self._encoding = EncodingHook(pipe, self._heard(encodes), adapter.text_parts)
        self._decoder = FiniteDecoder(pipe, watch)
        self._noise = _PairedNoise(adapter, self._heard(lambda rows: paired(rows, self._asked)))
        self._stepped = stepped
        self._followed: Any = None
        self._scheduler: SchedulerHook | None = None
        self._follow_scheduler()

    def _follow_scheduler(self) -> None:
        """Hang the hook of the pipeline's scheduler on the one that it has now."""
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is self._followed:
            return
        if self._scheduler is not None:
            self._scheduler.remove(expected=False)
        has_steps = hasattr(scheduler, "step")
        self._scheduler = SchedulerHook(scheduler, self._stepped, self._noise.of_steps) if has_steps else None
        self._followed = scheduler

    def _hear(self) -> None:
        """Note that the pipeline has said something, whose scheduler may be another one than at its latest word."""
        self._is_heard = True
        self._follow_scheduler()

    def _heard(self, told: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which notes that the pipeline has said something."""

        def hear(*args: Any, **kwargs: Any) -> Any:
            self._hear()
            return told(*args, **kwargs)

        return hear

    def check_caller(self) -> None:
        """Refuse a run that begins in the call of another pipeline with the same model.

        What the session's own pipeline says of prompts, images and guidance would be that of an earlier call of its.

        Raises:
            RuntimeError: another pipeline calls.
        """
        caller = None if self._is_heard else _calling_pipeline()
        self._is_heard = False
        if caller is not None and caller is not self._pipe:
            name, own = type(caller).__name__, type(self._pipe).__name__
            which = f"another {name}" if name == own else f"a {name}"
            raise RuntimeError(
                f"the session is of a {own}, and {which} calls the model that they share, of whose prompts, images "
                "and guidance the session is told nothing: open the session on the pipeline that is called"
            )

    def remove(self, *, expected: bool) -> None:
        """Leave the pipeline as it was found; warn where steps of its scheduler were ``expected`` and none was made."""
        self._calls.remove()
        if self._modular is not None:
            self._modular.remove()
        self._encoding.remove()
        self._decoder.remove()
        self._noise.remove()
        if self._scheduler is not None:
            self._scheduler.remove(expected=expected)


def _calling_pipeline() -> Any | None:
    """The pipeline in whose call this is; None in a sampling loop of one's own."""
    return _variables_of_call().get("self")


def _argument_of_call(name: str) -> Any:
    """What the pipeline in whose call this is was given under a name; None where it was not, or there is none."""
    return _variables_of_call().get(name)


def _variables_of_call() -> Mapping[str, Any]:
    """The local variables of the pipeline's call in which this is; none in a sampling loop of one's own."""
    from diffusers import DiffusionPipeline

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # By name first: asking a frame for its locals makes it hold them until it ends.
        variables: Mapping[str, Any] = frame.f_locals if frame.f_code.co_name == "__call__" else {}
        own = variables.get("self")
        if isinstance(own, DiffusionPipeline) or is_modular(own):
            return variables
        frame = frame.f_back
    return {}


class _PairedNoise:
    """Rows of one image draw the same noise: at the start, where no latents are given, and in every stochastic step.

    So do pictures that a pipeline encodes by its generator beside the latents, as inpainting does under its mask, and
    before them, as FLUX.1's control models do.
    """

    def __init__(self, adapter: ModelAdapter, paired: Callable[[int | None], tuple[Sequence[int], int] | None]) -> None:
        self._paired = paired
        self._generators: list[torch.Generator] | None = None
        self._shared: tuple[Sequence[int], int] | None = None  # what they were made of; None where they are not ours
        self._is_level = True
        self._in_turn: InTurn | None = None  # where they are a list of the caller's
        self._began: dict[int, torch.Tensor] = {}  # the states of the caller's list when the call began
        self._repeats_pictures = adapter.repeats_pictures
        self._tells_all = adapter.tells_all_it_encodes
        self._is_before = False  # whether a call has begun, and has prepared no latents yet
        self._prepares = False  # whether it is at it
        self._shadows = Shadows(adapter.pipe)
        self._shadows.cover("prepare_latents", self._latents)
        self._shadows.cover("prepare_audio_latents", self._latents)  # of sound beside a video
        self._shadows.cover("prepare_mask_latents", self._picture)
        self._shadows.cover("_encode_vae_image", self._picture)
        self._shadows.cover("prepare_extra_step_kwargs", self._options)
        self._encoder = Shadows(getattr(adapter.pipe, "vae", None))
        self._encoder.cover("encode", self._distribution)
        self._pipe = adapter.pipe
        # Whether the pipeline hands its generator to steps: those of flow models do not, and Lumina 2's has the method
        # for it and does not call it.
        self._hands_on = False
        self._to_steps = False

    def remove(self) -> None:
        self._encoder.remove()
        self._shadows.remove()

    def begins(self) -> None:
        """A call of the pipeline begins."""
        self._is_before = True
        generators = _argument_of_call("generator")
        own = generators if isinstance(generators, list) else []
        self._began = {id(each): each.get_state() for each in own}

    def take(
        self,
        generators: list[torch.Generator] | None,
        shared: tuple[Sequence[int], int] | None = None,
        *,
        given: bool = False,
    ) -> None:
        """Take note of what the rows of a call draw from.

        Args:
            generators: of the rows; None where there is one for all of them, or none.
            shared: the sources of prompts and images a prompt, where rows of one image draw the same; None where rows
                draw each its own.
            given: whether they are the caller's, and not made by `paired_generators`.
        """
        self._generators, self._shared, self._is_level, self._is_before = generators, shared, False, False
        self._in_turn = InTurn(generators, *shared) if given and generators and shared else None
        step = getattr(getattr(self._pipe, "scheduler", None), "step", None)
        self._to_steps = step is not None and "generator" in inspect.signature(step).parameters

    def _level(self) -> None:
        """Bring the rows of each image to where that one is which a pipeline drew from in between."""
        if self._in_turn is not None:
            self._in_turn.level()
        elif self._shared is not None and self._generators is not None:
            level(self._generators, *self._shared)

    def of_steps(self) -> dict[str, Any]:
        """What a step of the scheduler is to be given beside what the pipeline gives it."""
        if _calling_pipeline() not in (None, self._pipe):  # another one has the same scheduler
            return {}
        self._is_before = False
        if not self._is_level:
            self._level()
            self._is_level = True
        given = self._to_steps and not self._hands_on and self._generators is not None
        return {"generator": self._generators} if given else {}

    def _latents(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(original)
        given = signature.bind(*args, **kwargs)
        layout, generator = self._paired(given.arguments.get("batch_size")), given.arguments.get("generator")
        self.take(generator if isinstance(generator, list) else None)

        def prepared() -> Any:
            self._prepares = True
            try:
                return original(*given.args, **given.kwargs)
            finally:
                self._prepares = False

        if "generator" not in signature.parameters or given.arguments.get("latents") is not None or layout is None:
            return prepared()
        if isinstance(generator, list):  # which says every row's own: it may be the same
            if self._began_paired(generator, layout):
                self.take(generator, layout, given=True)
                self._level()
            return prepared()
        given.arguments["generator"] = made = paired_generators(generator, *layout)
        self.take(made, layout)
        for name in () if self._repeats_pictures else ("image", "video"):
            shown = given.arguments.get(name)
            if isinstance(shown, torch.Tensor) and len(made) % max(shown.shape[0], 1) == 0:
                # Some pipelines look for a generator's own picture, and find none where one stands for all rows.
                repeats = len(made) // shown.shape[0]
                given.arguments[name] = shown.repeat(repeats, *[1] * (shown.ndim - 1))
        return prepared()

    def _began_paired(self, generators: list[torch.Generator], layout: tuple[Sequence[int], int]) -> bool:
        """Whether a caller's generators began the call in states that give rows of one image the same noise.

        Then the caller means it so, and pipelines that encode one picture for all rows draw from the first ones alone.
        """
        return are_paired(generators, *layout, self._began)

    def _picture(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(original)
        given = signature.bind(*args, **kwargs)
        shown = next((given.arguments[name] for name in ("masked_image", "image") if name in given.arguments), None)
        generator = given.arguments.get("generator")
        pictures = shown.shape[0] if isinstance(shown, torch.Tensor) else 0
        draws = "generator" in signature.parameters and not isinstance(generator, list)
        if self._shared is not None and pictures > 1 and draws:
            given.arguments["generator"] = paired_generators(generator, (0,) * pictures, 1)
        return original(*given.args, **given.kwargs)

    def _distribution(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        encoded = original(*args, **kwargs)
        found: Any = getattr(encoded, "latent_dist", None)
        if not hasattr(found, "std"):
            return encoded
        if self._is_before and self._tells_all:
            found.sample = functools.partial(self._drawn, found, found.sample)
        elif self._in_turn is not None and not self._is_level:
            found.sample = functools.partial(self._drawn_in_turn, found, found.sample)
        elif self._prepares and self._tells_all:
            found.sample = functools.partial(self._drawn, found, found.sample)
        return encoded

    def _drawn(self, found: Any, sample: Any, generator: Any = None) -> torch.Tensor:
        """A sample of a picture for each row, whose noise is that of its source, which draws what it always does."""
        layout = self._paired(None)
        if isinstance(generator, list):
            if layout is not None and len(found.mean) > 1 and self._began_paired(generator, layout):
                InTurn(generator, *layout).level()
            layout = None
        elif self._prepares and generator is not None:
            layout = None  # a pipeline that has generators is told of them beside its latents; JoyImage draws from none
        batch = 0 if layout is None else len(layout[0]) * layout[1]
        # Stable Diffusion 3's ControlNets encode a picture for each half of a guided batch.
        if layout is None or len(found.mean) not in (batch, 2 * batch):
            drawn: torch.Tensor = sample(generator)
            return drawn
        (sources, images), given = layout, found.parameters
        noise = randn_tensor(found.mean.shape, generator=generator, device=given.device, dtype=given.dtype)
        rows = [source * images + image for source in sources for image in range(images)]
        taken = [first + row for first in range(0, len(noise), batch) for row in rows]
        return found.mean + found.std * noise[taken]  # type: ignore[no-any-return]

    def _drawn_in_turn(self, found: Any, sample: Any, generator: Any = None) -> torch.Tensor:
        """The same where generators are a list of the caller's, which JoyImage does not tell where it samples."""
        assert self._in_turn is not None
        if generator is None and self._prepares and self._tells_all:
            return self._drawn(found, sample)
        return self._in_turn.draw(sample, generator)

    def _options(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._hands_on, options = True, original(*args, **kwargs)
        # A caller's list is there already, or what a pipeline of ours has made of it.
        if self._shared is not None and "generator" in options:
            options["generator"] = self._generators
        return options
