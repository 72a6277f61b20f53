"""Recording a source and editing it later: see `recording` for what is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..edits import Edit, FreePromptEdit
from ..inversion.follow import Followed
from ..models.sites import Site, attention_sites
from ..models.steps import run_steps
from ..sampling.arguments import check_option_names
from ..sampling.noise_schedule import NoiseSchedule
from ..sampling.pipeline import SamplingPipeline
from ..sampling.step_end import Call
from ..texts import print_text
from .capture import Capture
from .contents import contents_bytes, recorded_steps, source_needs
from .fingerprint import fingerprint
from .folder_store import FileStore
from .keys import Contents
from .precision import Precision
from .record_request import RecordRequest, Source
from .recording import Recording
from .requirements import is_guided
from .store import MapStore, MemoryStore

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
    if request.budget_bytes is not None and plan.nbytes > request.budget_bytes:
        raise ValueError(
            f"a recording takes {plan.told}, more than budget_bytes={request.budget_bytes} "
            f"({_megabytes(request.budget_bytes)}): raise it, record fewer steps (self_replace_steps) or layers "
            "(levels), pass precision='half' or 'int8-keys', or a folder as placement"
        )
    if not pipe.progress_is_hidden:
        print_text(f"recording: {plan.told}", sys.stderr)
    store = _new_store(request.placement, plan.noise.device)
    return _run(pipe, source, plan, store, request.precision, request.backend)


# What `help`, an editor and the reference show: the options one by one, with their defaults.
record.__signature__ = RecordRequest.signature_of(record)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is recorded of a run, known before any denoising.

    Args:
        noise: [1, C, h, w] on the device and in the dtype of the run.
        schedule: of the run.
        contents: the parts that are kept.
        window, paths: of the plain Free-Prompt-Editing among the edits, which a replay does by default.
        nbytes: that the recording takes.
        told: the same in words.
    """

    noise: torch.Tensor
    schedule: NoiseSchedule
    contents: Contents
    window: tuple[float, float] | None
    paths: tuple[str, ...]
    nbytes: int
    told: str


def _plan(pipe: SamplingPipeline, source: Source, request: RecordRequest) -> Plan:
    edits, noise = request.edits(pipe, source), request.noise(pipe, source)
    size = (noise.shape[-2], noise.shape[-1])
    pipe.scheduler.set_timesteps(source.steps, device=noise.device)
    sites, calls = _sites(pipe, size), len(pipe.scheduler.timesteps)
    contents = source_needs(edits, sites, run_steps(pipe.scheduler), guided=is_guided(pipe, source.guidance_scale))
    nbytes = _bytes(pipe, contents, size, calls, request.precision)
    if source.inversion is not None and source.inversion.unconditional is not None:
        nbytes += source.inversion.unconditional.nbytes
    plain = next((one for one in edits if isinstance(one, FreePromptEdit) and one.is_plain), None)
    return Plan(
        noise=noise,
        schedule=NoiseSchedule.of(pipe.scheduler),
        contents=contents,
        window=None if plain is None else (plain.window.start, plain.window.stop),
        paths=() if plain is None else tuple(site.path for site in plain.select(sites)),
        nbytes=nbytes,
        told=f"{_megabytes(nbytes)} for {len(contents)} layers at {len(recorded_steps(contents))} of {calls} steps, "
        f"{request.precision}, placed on {request.placement}",
    )


def _run(
    pipe: SamplingPipeline, source: Source, plan: Plan, store: MapStore, precision: Precision, backend: str
) -> Recording:
    """Denoise the source and keep what is planned of it."""
    model, inversion, negative = fingerprint(pipe), source.inversion, source.negative_prompt
    if inversion is not None and inversion.method == "negative-prompt":
        negative = inversion.prompt
    kept = [plan.noise]

    def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return {}

    call = Call(1, 1)
    followed = Followed.of(pipe, call, inversion)
    options: dict[str, Any] = {} if negative is None else {"negative_prompt": [negative]}
    factor = pipe.vae_scale_factor
    with store.all_or_nothing():
        capture = Capture(pipe, plan.contents, store, precision, backend)
        with capture, followed.source:
            pipe._sample(
                call,
                nullcontext(),
                followed.tasks,
                callback_on_step_end=keep,
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
        recording = Recording(
            prompt=source.prompt,
            negative_prompt=negative,
            guidance_scale=source.guidance_scale,
            steps=source.steps,
            schedule=plan.schedule,
            contents=plan.contents,
            window=plan.window,
            paths=plan.paths,
            latents=torch.stack(kept),
            model=model,
            precision=precision,
            error=capture.error,
            store=store,
            unconditional=None if inversion is None else inversion.unconditional,
        )
        if isinstance(store, FileStore):
            recording.save(store)
    return recording


def _sites(pipe: SamplingPipeline, size: tuple[int, int]) -> tuple[Site, ...]:
    return tuple(site.at(*size) for site in attention_sites(pipe.unet))


def _bytes(pipe: SamplingPipeline, contents: Contents, size: tuple[int, int], steps: int, precision: Precision) -> int:
    """Parts of layers, and the latents before and after every step."""
    tokens, itemsize = pipe.tokenizer.model_max_length, pipe.unet.dtype.itemsize
    latents = (steps + 1) * pipe.unet.config.in_channels * size[0] * size[1] * itemsize
    return latents + contents_bytes(contents, pipe.unet, size, tokens, itemsize, precision)


def _new_store(placement: str | Path, device: torch.device) -> MapStore:
    if placement == "device":
        return MemoryStore(device)
    if placement == "cpu":
        return MemoryStore(torch.device("cpu"))
    return FileStore.create(Path(placement))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
