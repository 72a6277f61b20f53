"""Inversion of flow models: from an image at σ = 0 to its noise, by the solver of the pipeline's own scheduler.

The equation ``dz/dσ = v(z, σ)`` is followed from the last node of the schedule to the first, by the same rule by which
the edit will come back (:mod:`..models.flow_solvers`): the velocity of a step from σ_{i+1} to σ_i is that at σ_{i+1}
(Euler), or that in the middle (RF-Solver, FireFlow). It is not quite the velocity of the way back, which starts from
the other end: the difference is what is left between the image and its reconstruction. The methods differ in what holds
the source against it while it is denoised again:

- ``"direct"``: after every step the source row is put back onto the stored latent, so that the source comes out as the
  autoencoder's reconstruction, whatever prompt and guidance.
- ``"reference"``: the same but for the last step, which is left to the sampler.
- ``"free"``: nothing; the source follows as well as the solver does, as RF-Solver and FireFlow are published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

from ..callers import warn
from ..errors import EditWarning, check_guidance, check_positive, check_text_length, warn_of_size
from ..images.load import load_image, to_tensor
from ..models.adapters.adapter import identity
from ..models.flow_solvers import Solver, flow_nodes, require_flow, solver_of
from ..models.steps import Step
from ..prompts.encoding import encoding_tokenizer
from ..prompts.words import warn_of_unknown_words
from ..sampling.flow_models import FlowModel, Velocity, flow_model
from ..sampling.noise_schedule import NoiseSchedule
from ..session.finite import is_finite, refuse_step
from ..session.unedited import unedited
from ..texts import check_text
from .null_text import NullText
from .trajectory import METHODS, Inversion

__all__ = ["FLOW_METHODS", "FlowMethod", "check_flow_inversion", "invert_flow", "warn_of_other_texts", "with_size_of"]

FlowMethod = Literal["direct", "reference", "free"]
FLOW_METHODS: tuple[FlowMethod, ...] = get_args(FlowMethod)


@torch.no_grad()
def invert_flow(
    pipe: Any,
    image: Any,
    prompt: str = "",
    *,
    num_inference_steps: int = 28,
    guidance_scale: float = 1.0,
    method: FlowMethod = "direct",
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
    callback: Callable[[int, int, torch.Tensor], None] | None = None,
) -> Inversion:
    """Find the noise from which a real image comes out again, to edit it with ``pipe(inversion=…)``.

    The solver is that of ``pipe.scheduler``: `fpe_pipeline.flow_scheduler` sets another. Inside a session or
    `heat_maps`, its passes are neither edited nor watched.

    Args:
        image: a path, a PIL image, an array or a tensor; `fpe_pipeline.images.load` states how it is cut and scaled.
        prompt: what the image shows.
        num_inference_steps: steps here and of the edits.
        guidance_scale: of these passes, not of the edits; 1 follows the image best.
        method: "direct", "reference" or "free"; see `fpe_pipeline.inversion.flow`.
        height, width: pixels, multiples of those across a token; default: the image's aspect ratio at the model's own
            number of pixels.
        max_sequence_length: tokens of T5, here and of edits that do not say theirs; default: the pipeline's.
        callback: called after each step with its index, the number of steps and the latents.

    Returns:
        `Inversion`, for any number of edits.

    Raises:
        InputError: an image that cannot be read or used.
        TypeError: a pipeline of another kind.
        ValueError: an IP-Adapter, a scheduler whose steps cannot be undone, a method for UNets, numbers out of range.
    """
    model = flow_model(pipe)
    _check(pipe, prompt, method)
    check_positive(num_inference_steps=num_inference_steps)
    check_text_length(max_sequence_length)
    check_guidance(guidance_scale)
    area = model.native_size[0] * model.native_size[1]
    picture = load_image(image, (width, height), multiple=model.multiple, pixels=area)
    fitting = model.fitting(picture.size) if width is None and height is None else None
    if fitting is not None:
        picture = load_image(image, fitting, multiple=model.multiple)
    size = picture.size[::-1]
    model.check_size(size)
    warn_of_size(size, model.native_size)
    warn_of_unknown_words([prompt], encoding_tokenizer(pipe))
    model.set_timesteps(int(num_inference_steps), size)
    nodes, steps = flow_nodes(pipe.scheduler).cpu(), int(num_inference_steps)
    text_length = max_sequence_length or model.text_length
    with unedited(pipe):
        pixels = to_tensor(picture).to(pipe._execution_device, pipe.vae.dtype)
        start = model.latents(model.encoded(pixels))
        latents = [start.to(torch.promote_types(start.dtype, torch.float32))]
        velocity = model.velocity(prompt, guidance_scale, size, text_length)
        reaching = _integrated(solver_of(pipe.scheduler), velocity, latents[0], nodes.flip(0))
        with pipe.progress_bar(total=steps) as bar:
            for index, reached in enumerate(reaching):
                if not is_finite(reached):
                    refuse_step(Step(index, steps), identity(pipe.transformer), (), velocity.arguments)
                latents.append(reached)
                bar.update()
                if callback is not None:
                    callback(index, steps, reached)
    pipe.maybe_free_model_hooks()
    schedule = NoiseSchedule.of(pipe.scheduler)
    return Inversion(method, torch.stack(latents), prompt, guidance_scale, schedule, picture, text_length=text_length)


def check_flow_inversion(inversion: Inversion, model: FlowModel) -> None:
    """Set the pipeline's scheduler to the run of an inversion; raise ValueError where it cannot follow it."""
    scheduler = model.pipe.scheduler
    require_flow(scheduler, f"an image inverted by {inversion.method!r}")
    model.set_timesteps(inversion.steps, inversion.image.size[::-1])
    inversion.schedule.check(scheduler, "inversion")


def with_size_of(inversion: Inversion, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a call with the size and the steps that an inversion decides, and tokens of text as many as its own
    where the call says no number; ValueError for another size."""
    width, height = inversion.image.size
    for name, side in (("height", height), ("width", width)):
        if options.get(name) not in (None, side):
            raise ValueError(f"the image was inverted at {name} {side}, got {options[name]}; leave {name} out")
    run = {"height": height, "width": width, "num_inference_steps": inversion.steps}
    if inversion.text_length is not None and options.get("max_sequence_length") is None:
        run["max_sequence_length"] = inversion.text_length  # padding takes attention too
    return {**options, **run}


def warn_of_other_texts(
    inversion: Inversion, model: FlowModel, prompts: Sequence[str], max_sequence_length: int | None
) -> None:
    """Warn where an inverted image is denoised beside texts that change what the model sees of it."""
    lengths = inversion.text_length or model.text_length, max_sequence_length or model.text_length
    apart = model.seen_apart(inversion.prompt, lengths[0], prompts, lengths[1])
    if apart is not None:
        held = "it comes back less exactly than it could" if inversion.method == "free" else "it is held all the same"
        warn(f"the image {apart}; {held}", EditWarning)


def _check(pipe: Any, prompt: Any, method: Any) -> None:
    """Refuse what is no request, before anything is computed."""
    if not isinstance(prompt, str):
        raise TypeError(f"expected one prompt, the image's, got {type(prompt).__name__}")
    check_text("the prompt", prompt)
    if method not in FLOW_METHODS:
        known = f"method must be one of {', '.join(FLOW_METHODS)}, got {method!r}"
        if isinstance(method, NullText) or method in METHODS:
            known += f", which is for UNets: it follows DDIM, and {type(pipe).__name__} solves a flow"
        raise ValueError(known)
    require_flow(pipe.scheduler, "inversion")
    if any(getattr(pipe.transformer, name, None) is not None for name in ("image_proj", "encoder_hid_proj")):
        raise ValueError(
            "inversion takes no image prompts, and the transformer has an IP-Adapter: take it off with "
            "pipe.unload_ip_adapter()"
        )


def _integrated(
    solver: Solver, velocity: Velocity, latents: torch.Tensor, nodes: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The latents at each node after the first.

    Args:
        solver: by which rule.
        velocity: of the model.
        latents: at the first node.
        nodes: σ, in the order in which they are gone through.
    """
    carried: torch.Tensor | None = None  # the velocity from which the middle of the next step is reached
    for now, then in pairwise(nodes):
        width = then.item() - now.item()
        if carried is None:
            carried = velocity(latents, now)
        if solver == "euler":
            latents, carried = latents + width * carried, None
        else:
            middle = velocity(latents + 0.5 * width * carried, (now + then) / 2)
            latents = latents + width * middle
            carried = middle if solver == "fireflow" else None
        yield latents
