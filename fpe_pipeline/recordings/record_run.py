"""Recording a source and editing it later: see `recording` for what is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..edits import Edit
from ..inversion.follow import Followed
from ..models.adapters.families import adapter_of
from ..models.sites import Site
from ..models.steps import run_steps
from ..sampling.arguments import check_option_names
from ..sampling.noise_schedule import NoiseSchedule
from ..sampling.pipeline import SamplingPipeline
from ..sampling.step_end import Call
from ..texts import print_text
from .capture import Capture
from .contents import contents_bytes, recorded_steps, source_needs
from .fingerprint import fingerprint
from .flow_capture import JointCapture, recorded_bytes
from .keys import Contents
from .plan import KeptLatents, Plan, new_store
from .precision import Precision
from .record_request import RecordRequest, Source
from .recording import Recording
from .requirements import is_guided
from .store import MapStore

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .record_request import RecordOptions

__all__ = ["estimate", "record"]


def estimate(
    pipe: SamplingPipeline,
    edits: Edit | Iterable[Edit],
    size: tuple[int, int],
    steps: int,
    precision: Precision = "exact",
    *,
    guided: bool = True,
) -> int:
    """Bytes that a recording for some edits keeps, of ``steps`` steps on latents of ``size`` (height, width).

    A null-text inversion's embeddings come on top.
    """
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    run = run_steps(scheduler)
    return _bytes(pipe, source_needs(edits, _sites(pipe, size), run, guided=guided), size, len(run), precision)


@torch.no_grad()
def record(
    pipe: SamplingPipeline,
    prompt: str | None = None,
    **options: Unpack[RecordOptions],
) -> Recording:
    """Generate the source once and keep what edits need of it, for any number of them.

    Args:
        prompt: the source's; default with `inversion`: its prompt.
        self_replace_steps, levels, max_tokens, layers: of the `FreePromptEdit` to record for; edits may replace fewer
            steps.
        edit: another edit to record for, or several, each of which the recording then serves, and with it every edit
            that needs no more. A `PromptToPromptEdit` for targets that are not known yet may be written for the source
            twice: what is kept depends on its steps and layers.
        placement: "device", "cpu" (pinned beside a GPU), or a new folder; one that is called as a device is goes as a
            `Path`.
        precision: "exact", "half" or "int8-keys"; `Recording.error` is what it costs.
        budget_bytes: refuse to record more. The estimate goes to standard error unless progress bars are off.
        inversion: a real image as the source; it decides latents and steps.
        latents: [1, C, h, w], the noise to start from.
        generator, height, width, num_inference_steps, guidance_scale, negative_prompt, backend: as in a call.

    Returns:
        `Recording`; one in a folder is read again by `Recording.load`.

    Raises:
        ValueError: a model that `FreePromptPipeline` does not serve, an IP-Adapter, a scheduler that draws noise in
            each step, a budget that is too small, layers that match nothing, an edit that is written for another
            source; before any denoising. Values that do not fit a reduced precision.
        InputError: a folder that is not empty or cannot be written.
    """
    check_option_names(options, RecordRequest.names(), ())
    request = RecordRequest(prompt=prompt, **options)
    source = request.source(pipe)
    plan = _plan(pipe, source, request)
    plan.check_budget(
        request.budget_bytes,
        "record fewer steps (self_replace_steps) or layers (levels), pass precision='half' or 'int8-keys'",
    )
    if not pipe.progress_is_hidden:
        print_text(f"recording: {plan.told}", sys.stderr)
    store = new_store(request.placement, plan.noise.device)
    return _run(pipe, source, plan, store, request.precision, request.backend)


# What `help`, an editor and the reference show: the options one by one, with their defaults.
record.__signature__ = RecordRequest.signature_of(record)  # type: ignore[attr-defined]


def _plan(pipe: SamplingPipeline, source: Source, request: RecordRequest) -> Plan:
    if request.precision == "int8-keys" and _is_joint(pipe):
        raise ValueError(
            f"precision must be exact or half for layers of joint attention, got {request.precision!r}: there a key is "
            "asked by image and text, whose scores rounding moves apart"
        )
    edits, noise = request.edits(pipe, source), request.noise(pipe, source)
    size = (noise.shape[-2], noise.shape[-1])
    pipe.scheduler.set_timesteps(source.steps, device=noise.device)
    sites, calls = _sites(pipe, size), len(pipe.scheduler.timesteps)
    contents = source_needs(edits, sites, run_steps(pipe.scheduler), guided=is_guided(pipe, source.guidance_scale))
    _check_masks(pipe, edits, sites, contents)
    nbytes = _bytes(pipe, contents, size, calls, request.precision)
    if source.inversion is not None and source.inversion.unconditional is not None:
        nbytes += source.inversion.unconditional.nbytes
    words = f"at {len(recorded_steps(contents))} of {calls} steps, {request.precision}, placed on {request.placement}"
    return Plan.of(edits, sites, contents, noise, NoiseSchedule.of(pipe.scheduler), nbytes, words)


def _run(
    pipe: SamplingPipeline, source: Source, plan: Plan, store: MapStore, precision: Precision, backend: str
) -> Recording:
    """Denoise the source and keep what is planned of it."""
    model, inversion, negative = fingerprint(pipe), source.inversion, source.negative_prompt
    if inversion is not None and inversion.method == "negative-prompt":
        negative = inversion.prompt
    kept = KeptLatents([plan.noise])
    call = Call(1, 1)
    followed = Followed.of(pipe, call, inversion)
    options: dict[str, Any] = {} if negative is None else {"negative_prompt": [negative]}
    factor = pipe.vae_scale_factor
    with store.all_or_nothing():
        capture = (JointCapture if _is_joint(pipe) else Capture)(pipe, plan.contents, store, precision, backend)
        with capture, followed.source:
            pipe._sample(
                call,
                nullcontext(),
                followed.tasks,
                callback_on_step_end=kept,
                callback_on_step_end_tensor_inputs=["latents"],
                prompt=[source.prompt],
                height=plan.noise.shape[-2] * factor,
                width=plan.noise.shape[-1] * factor,
                num_inference_steps=source.steps,
                guidance_scale=source.guidance_scale,
                latents=plan.noise,
                output_type="latent",
                **options,
                **followed.options,
            )
        return plan.recording(
            source,
            kept,
            store,
            negative_prompt=negative,
            model=model,
            precision=precision,
            error=capture.error,
            unconditional=None if inversion is None else inversion.unconditional,
            source_text=capture.source_text,
            text_lengths=capture.text_lengths,
        )


def _check_masks(pipe: SamplingPipeline, edits: Sequence[Edit], sites: Sequence[Site], contents: Contents) -> None:
    """Refuse to record layers that attend to text through a mask, which recordings do not hold."""
    masked = [site.path for site in sites if pipe.masks_text and site.kind == "cross" and site.path in contents]
    if masked:
        names = ", ".join(type(one).__name__ for one in edits)
        raise ValueError(
            f"{names} takes of the source its attention to text in {masked[0]}, which {pipe.parent.__name__} masks "
            "behind each text's end, and recordings hold no masks: run source and targets together, pipe(source, "
            "targets, edit=…), or record for an edit of self-attention alone"
        )


def _is_joint(pipe: SamplingPipeline) -> bool:
    """Whether layers are of image and text together."""
    return any(site.is_joint for site in adapter_of(pipe).sites)


def _sites(pipe: SamplingPipeline, size: tuple[int, int]) -> tuple[Site, ...]:
    return tuple(site.at(*size) for site in adapter_of(pipe).sites)


def _bytes(pipe: SamplingPipeline, contents: Contents, size: tuple[int, int], steps: int, precision: Precision) -> int:
    """Parts of layers, and the latents before and after every step."""
    tokens, itemsize = pipe.text_tokens, pipe.denoiser.dtype.itemsize
    latents = (steps + 1) * pipe.denoiser.config.in_channels * size[0] * size[1] * itemsize
    if _is_joint(pipe):
        sites, dim = {site.path: site for site in _sites(pipe, size)}, pipe.denoiser.config.attention_head_dim
        return latents + recorded_bytes(contents, sites, dim, lambda part: tokens, itemsize, precision)
    return latents + contents_bytes(contents, pipe.denoiser, size, tokens, itemsize, precision)
