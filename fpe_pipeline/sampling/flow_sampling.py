"""What a call of a flow pipeline gets beside its prompts: noise that rows share, a size, and guidance a row.

diffusers' loop runs unchanged, inside a session and with our tasks at the end of each step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch

from ..callers import warn
from ..edits import Edit, FreePromptEdit
from ..edits.free_prompt import JOINT_STEPS
from ..edits.registry import require_edit
from ..errors import EditWarning, check_guidance
from ..models.precision import check_precision
from ..session.finite_watch import FiniteSteps
from ..session.session import EditingSession
from ..session.shared_noise import shared_latents
from .arguments import image_size, negative_list
from .flow_models import FlowModel, flow_model
from .parent import AroundParent
from .served_models import check_image_prompts, check_skipped_layers
from .step_end import Call, StepEnd, Task

__all__ = ["FlowSampling", "chosen_flow_edit", "flow_start", "guidance_of_rows", "texts_of_call"]

#: Prompts of a call beside the first, one for all or a list with one for each.
_TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")


class FlowSampling(AroundParent):
    """Mixed into a diffusers pipeline of a flow model: its calls run in a session, and end each step with tasks."""

    #: The fraction of the run in which a target has its source's maps where nothing is said.
    default_window: ClassVar[float] = JOINT_STEPS
    #: The guidance scale up to which a call is not guided.
    unguided: ClassVar[float] = 1.0
    #: Text encoders and the rest, whose precision is checked.
    parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the pipeline makes by default."""
        return flow_model(self).native_size

    @classmethod
    def parent_options(cls) -> frozenset[str]:
        """The arguments of a call in diffusers."""
        return frozenset(inspect.signature(cls.parent.__call__).parameters) - {"self"}

    def default_of(self, name: str) -> Any:
        """What an argument of a call is where it is left out: in diffusers, or by what the pipeline is made of."""
        return self.parent_default(name)

    def is_guided_at(self, scale: float) -> bool:
        """Whether calls with this ``guidance_scale`` have rows that do not see their prompts."""
        return scale > self.unguided

    @classmethod
    def takes_true_guidance(cls) -> bool:
        """Whether calls are guided by a negative prompt and ``true_cfg_scale``, and not by their ``guidance_scale``."""
        return "true_cfg_scale" in cls.parent_options()

    def flow(self) -> FlowModel:
        """The pipeline's model.

        Raises:
            ValueError: one that takes more than latents, or parts that cannot compute.
        """
        pipe: Any = self
        model = flow_model(pipe)
        expected = model.channels(model.latent_channels)
        if model.in_channels != expected:
            raise ValueError(
                f"expected a transformer that takes the {expected} channels of its autoencoder's latents, got one that "
                f"takes {model.in_channels}, as inpainting and control models do: put "
                "`with editing(pipe, edit):` around this model's own diffusers pipeline"
            )
        for name in self.parts:
            check_precision(name, getattr(pipe, name, None))
        return model

    def _sample(
        self, call: Call, session: AbstractContextManager[Any], tasks: Sequence[Task], arguments: dict[str, Any]
    ) -> Any:
        """The images of the parent's sampling loop inside ``session``, with ``tasks`` at the end of each step."""
        if tasks:
            end = StepEnd(
                arguments.get("callback_on_step_end"),
                arguments.get("callback_on_step_end_tensor_inputs", ("latents",)),
                tasks,
                self._callback_tensor_inputs,  # type: ignore[attr-defined]
            )
            names = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": end.tensor_inputs}
            arguments = {**arguments, **names}
        watched = nullcontext() if isinstance(session, EditingSession) else FiniteSteps(self)
        with session, watched:
            return self._loop(arguments)

    def _loop(self, arguments: dict[str, Any]) -> Any:
        """The images of the parent's call."""
        return super().__call__(return_dict=False, **arguments)[0]  # type: ignore[misc]


def chosen_flow_edit(pipe: Any, edit: Edit | None, self_replace_steps: Any, layers: Any) -> Edit:
    """The edit, or the `FreePromptEdit` that the two arguments describe, in the window of a pipeline's model."""
    if edit is None:
        return FreePromptEdit(pipe.default_window if self_replace_steps is None else self_replace_steps, layers=layers)
    require_edit(edit)
    if self_replace_steps is not None or layers is not None:
        raise ValueError("self_replace_steps and layers belong to the edit; pass them to it")
    return edit


def texts_of_call(pipe: Any, options: Mapping[str, Any], count: int) -> dict[str, list[str]]:
    """Prompts of a call beside the first, each a list with one for each of ``count`` prompts.

    Raises:
        ValueError: another number of them.
    """
    texts = {name: negative_list(options.get(name), count, name) for name in _TEXTS}
    _check_options(pipe, options)
    name = "true_cfg_scale" if pipe.takes_true_guidance() else "guidance_scale"
    given = options[name] if name in options else pipe.default_of(name)
    scales = given if isinstance(given, list | tuple) else [given]
    for scale in scales:
        check_guidance(scale)
    scale = max(scales, default=pipe.unguided)
    if texts["negative_prompt"] is not None and not pipe.is_guided_at(scale):
        off = "which switches guidance off" if scale <= pipe.unguided else "which this model is told and not guided by"
        warn(
            f"the negative prompt does nothing at {name}={scale:g}, {off}",
            EditWarning,
        )
    negative = any(options.get(given) is not None for given in ("negative_prompt", "negative_prompt_embeds"))
    if not negative and options.get("true_cfg_scale", pipe.unguided) > pipe.unguided:
        warn(
            f"true_cfg_scale={scale:g} does nothing without a negative prompt, from which it guides away: pass "
            'negative_prompt, which may be ""',
            EditWarning,
        )
    return {name: given for name, given in texts.items() if given is not None}


def flow_start(
    model: FlowModel, call: Call, latents: torch.Tensor | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """Height, width and, where they are given, the latents of every row [prompts · images, …] of a call.

    Args:
        model: of the pipeline.
        call: its prompts and images.
        latents: as `shared_latents` takes them.
        height, width: pixels; None where latents of two dimensions, or the pipeline's default, say them.

    Raises:
        ValueError: a size between tokens, or latents of another one.
    """
    packed = latents is not None and model.is_packed
    if packed and (height is None or width is None):
        raise ValueError("latents that are packed into tokens do not say their image's size: pass height and width")
    size = image_size(model.native_size, model.latent_pixels, height, width, None if packed else latents)
    model.check_size(size)
    start: dict[str, Any] = {"height": size[0], "width": size[1]}
    tokens = model.tokens(size) if packed else None
    channels = model.in_channels
    shared = shared_latents(latents, call.prompts, call.images_per_prompt, channels, tokens)
    if shared is not None:
        start["latents"] = model.cast(torch.cat([shared] * call.prompts))
    return start


def _check_options(pipe: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options of a call that would fail inside."""
    check_image_prompts(
        options, any(getattr(pipe.transformer, name, None) is not None for name in ("encoder_hid_proj", "image_proj"))
    )
    if options.get("clip_skip") is not None:
        check_skipped_layers(pipe, options["clip_skip"])
    scales = options.get("guidance_scale", 1.0)
    for scale in scales if isinstance(scales, list | tuple) else [scales]:
        check_guidance(scale)


@contextmanager
def guidance_of_rows(pipe: Any, scales: Sequence[float], images: int) -> Iterator[None]:
    """Tell a guidance-distilled transformer in a block the guidance of each prompt's rows.

    Args:
        pipe: of a flow model.
        scales: one a prompt.
        images: images a prompt.

    Raises:
        ValueError: a model that is not told its guidance.
    """
    if not pipe.transformer.config.get("guidance_embeds"):
        raise ValueError(
            f"a guidance for each prompt is for transformers that are told it, as FLUX.1 dev and FLUX.2 dev; this "
            f"{type(pipe.transformer).__name__} is not: pass one number"
        )
    for scale in scales:
        check_guidance(scale)
    unit = flow_model(pipe).guidance_unit
    rows = torch.tensor([scale for scale in scales for _ in range(images)], dtype=torch.float32)

    def tell(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "guidance": rows.to(kwargs["guidance"]) * unit}

    handle = pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
