"""Recording a source and editing it later: see `recording` for what is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .arguments import check_prompts, chosen_edit, image_size
from .edits import Edit, FreePromptEdit
from .inversion import Inversion
from .map_store import FileStore, MapStore, MemoryStore
from .noise_schedule import NoiseSchedule
from .output import FreePromptPipelineOutput
from .packing import PRECISIONS, Precision
from .recorded_layers import Capture, Replay
from .recorded_parts import Contents, contents_bytes, describe_lack, source_needs
from .recording import Recording, fingerprint
from .schedule import StepWindow
from .sites import Site, attention_sites
from .step_end import Call, FollowEmbeddings, Task

if TYPE_CHECKING:
    from .pipeline import FreePromptPipeline

__all__ = ["edit", "estimate", "record"]


def estimate(
    pipe: FreePromptPipeline,
    edits: Edit | Iterable[Edit],
    size: tuple[int, int],
    steps: int,
    precision: Precision = "exact",
    *,
    guided: bool = True,
) -> int:
    """Bytes that a recording for some edits keeps, of ``steps`` steps on latents of ``size`` (height, width)."""
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    return _bytes(pipe, source_needs(edits, _sites(pipe, size), steps, guided=guided), size, precision)


@torch.no_grad()
def record(
    pipe: FreePromptPipeline,
    prompt: str | None = None,
    *,
    self_replace_steps: Any = 0.8,
    levels: int | Iterable[int] | None = None,
    max_tokens: int | None = None,
    layers: str | int | Iterable[str | int] | None = None,
    edit: Edit | Sequence[Edit] | None = None,
    placement: str | Path = "device",
    precision: Precision = "exact",
    budget_bytes: int | None = None,
    inversion: Inversion | None = None,
    latents: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    backend: str = "auto",
) -> Recording:
    """Generate the source once and keep what edits need of it, for any number of them.

    Args:
        prompt: the source's; default with `inversion`: its prompt.
        self_replace_steps, levels, max_tokens, layers: of the `FreePromptEdit` to record for; edits may replace fewer
            steps.
        edit: another edit to record for, or several, each of which the recording then serves, and with it every edit
            that needs no more. A `PromptToPromptEdit` for targets that are not known yet may be written for the source
            twice: what is kept depends on its steps and layers.
        placement: "device", "cpu" (pinned beside a GPU), or a new folder.
        precision: "exact", "half" or "int8-keys"; `Recording.error` is what it costs.
        budget_bytes: refuse to record more. The estimate goes to standard error unless progress bars are off.
        inversion: a real image as the source; it decides latents and steps.
        latents: [1, C, h, w], the noise to start from.
        generator, height, width, num_inference_steps, guidance_scale, negative_prompt, backend: as in a call.

    Returns:
        `Recording`; one in a folder is read again by `Recording.load`.

    Raises:
        ValueError: a scheduler that draws noise in each step, a budget that is too small, layers that match nothing, an
            edit that is written for another source; before any denoising.
        InputError: a folder that is not empty or cannot be written.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, received {precision!r}")
    _check_deterministic(pipe.scheduler)
    if prompt is None and inversion is not None:
        prompt = inversion.prompt
    if not isinstance(prompt, str):
        raise TypeError(f"expected one source prompt, received {type(prompt).__name__}")
    given = edit if isinstance(edit, Sequence) else (edit,)
    edits = [chosen_edit(one, self_replace_steps, levels, max_tokens, layers) for one in given]
    for one in edits:
        check_prompts(one, [prompt])
    steps = inversion.steps if inversion is not None else num_inference_steps or 50
    device, dtype = pipe._execution_device, pipe.unet.dtype
    noise = inversion.noise if inversion is not None else latents
    if noise is None:
        across = image_size(pipe.native_size, pipe.vae_scale_factor, height, width, None)
        shape = (1, pipe.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in across))
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if noise.ndim != 4 or noise.shape[0] != 1:
        raise ValueError(f"a recording holds one image: expected latents [1, C, h, w], received {list(noise.shape)}")
    size = (noise.shape[-2], noise.shape[-1])

    pipe.scheduler.set_timesteps(steps, device=device)
    schedule = NoiseSchedule.of(pipe.scheduler)
    sites, calls = _sites(pipe, size), len(pipe.scheduler.timesteps)
    contents = source_needs(edits, sites, calls, guided=_is_guided(pipe, guidance_scale))
    needed = _bytes(pipe, contents, size, precision)
    kept_steps = {step for parts in contents.values() for at in parts.values() for step in at}
    told = (
        f"{_megabytes(needed)} for {len(contents)} layers at {len(kept_steps)} of {calls} steps, {precision}, placed "
        f"on {placement}"
    )
    if budget_bytes is not None and needed > budget_bytes:
        raise ValueError(
            f"a recording takes {told}, more than budget_bytes={budget_bytes} ({_megabytes(budget_bytes)}): raise it, "
            "record fewer steps (self_replace_steps) or layers (levels), pass precision='half' or 'int8-keys', or a "
            "folder as placement"
        )
    if not pipe.progress_is_hidden:
        print(f"recording: {told}", file=sys.stderr)
    store = _new_store(placement, device)

    kept = [noise.to(device, dtype)]

    def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return {}

    capture = Capture(pipe, contents, store, precision, backend)
    with capture:
        pipe(
            prompt,
            inversion=inversion,
            latents=None if inversion is not None else noise,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            output_type="latent",
            callback_on_step_end=keep,
        )
    if inversion is not None and inversion.method == "negative-prompt":
        negative_prompt = inversion.prompt
    plain = next((one for one in edits if isinstance(one, FreePromptEdit) and one.is_plain), None)
    recording = Recording(
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        steps=steps,
        schedule=schedule,
        contents=contents,
        window=None if plain is None else (plain.window.start, plain.window.stop),
        paths=() if plain is None else tuple(site.path for site in plain.select(sites)),
        latents=torch.stack(kept),
        model=fingerprint(pipe),
        precision=precision,
        error=capture.error,
        store=store,
        unconditional=None if inversion is None else inversion.unconditional,
    )
    if isinstance(store, FileStore):
        tensors = {"latents": recording.latents}
        if recording.unconditional is not None:
            tensors["unconditional"] = recording.unconditional
        store.write_tensors("latents.safetensors", tensors)
        store.finish(recording.index())
    return recording


@torch.no_grad()
def edit(
    pipe: FreePromptPipeline,
    recording: Recording,
    target_prompt: str | Sequence[str],
    *,
    edit: Edit | None = None,
    self_replace_steps: Any = None,
    output_type: str = "pil",
    backend: str = "auto",
) -> FreePromptPipelineOutput:
    """Edit a recorded source into target prompts; the source itself is not denoised again.

    Args:
        recording: from `record` or `Recording.load`, made with this model, scheduler and dtype.
        target_prompt: one or more prompts.
        edit: any that needs no more of the source than was recorded; default: Free-Prompt-Editing as recorded. Edits
            that align words are written for `[recording.prompt, *targets]`.
        self_replace_steps: of the default edit; fewer steps than were recorded.
        output_type: "pil", "np", "pt" or "latent".
        backend: attention backend.

    Returns:
        The targets' images, to rounding those of ``pipe(source, targets, edit=edit)`` (where the recording is exact);
        ``.report.explain()`` says what was replayed.

    Raises:
        ValueError: a recording of another model or schedule, one that lacks what the edit needs, or an edit that is
            written for other prompts; before any denoising.
    """
    targets = [target_prompt] if isinstance(target_prompt, str) else list(target_prompt)
    if not targets or not all(isinstance(target, str) for target in targets):
        raise TypeError(f"expected one or more target prompts, received {target_prompt!r}")
    here = fingerprint(pipe)
    if here != recording.model:
        raise ValueError(
            f"the recording is of another model: {recording.model[:12]}… there and {here[:12]}… here; weights, "
            "adapters, dtype and configurations must be those that it was made with"
        )
    pipe.scheduler.set_timesteps(recording.steps)
    recording.schedule.check(pipe.scheduler, "recording")
    chosen = _recorded_edit(recording, self_replace_steps) if edit is None else edit
    if edit is not None and self_replace_steps is not None:
        raise ValueError("self_replace_steps belongs to the edit; pass it there")
    check_prompts(chosen, [recording.prompt, *targets])
    noise = recording.latents[0]
    guided = _is_guided(pipe, recording.guidance_scale)
    replay = Replay(pipe, chosen, recording.store, recording.latents, len(targets), guided, backend)
    lack = describe_lack(replay.needed, recording.contents)
    if lack:
        raise ValueError(
            f"the recording lacks what {type(chosen).__name__} needs of the source: {lack}. Record it for this edit "
            "(pipe.record(…, edit=…) takes several), or give the edit fewer steps or layers"
        )
    tasks: list[Task] = []
    options: dict[str, Any] = {}
    if recording.negative_prompt is not None:
        options["negative_prompt"] = [recording.negative_prompt] * len(targets)
    if recording.unconditional is not None:
        tasks.append(FollowEmbeddings(recording.unconditional))
        options["negative_prompt_embeds"] = recording.unconditional[0].to(pipe.unet.dtype).expand(len(targets), -1, -1)
    factor = pipe.vae_scale_factor
    images, nsfw = pipe._sample(
        Call(len(targets), 1),
        replay,
        tasks,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=["latents"],
        prompt=targets,
        height=noise.shape[-2] * factor,
        width=noise.shape[-1] * factor,
        num_inference_steps=recording.steps,
        guidance_scale=recording.guidance_scale,
        latents=noise,
        output_type=output_type,
        **options,
    )
    return FreePromptPipelineOutput(
        images=images, nsfw_content_detected=nsfw, source_kept=False, report=replay.report()
    )


def _recorded_edit(recording: Recording, self_replace_steps: Any) -> FreePromptEdit:
    """The plain Free-Prompt-Editing that a recording was made for, in fewer steps where that is asked."""
    if recording.window is None:
        raise ValueError(
            "the recording was not made for plain Free-Prompt-Editing: say with edit= what to do, as it was said to "
            "record"
        )
    steps = recording.schedule.steps
    recorded = StepWindow(*recording.window)
    asked = recorded if self_replace_steps is None else StepWindow.parse(self_replace_steps)
    held, window = recorded.steps(steps), asked.steps(steps)
    if window and (window.start < held.start or window.stop > held.stop):
        raise ValueError(
            f"self_replace_steps={self_replace_steps} asks for steps {window.start} to {window.stop - 1}; the "
            f"recording holds {held.start} to {held.stop - 1}: record a wider window, or pass a narrower one"
        )
    return FreePromptEdit(asked, layers=recording.paths)


def _sites(pipe: FreePromptPipeline, size: tuple[int, int]) -> tuple[Site, ...]:
    return tuple(site.at(*size) for site in attention_sites(pipe.unet))


def _bytes(pipe: FreePromptPipeline, contents: Contents, size: tuple[int, int], precision: Precision) -> int:
    tokens = pipe.tokenizer.model_max_length
    return contents_bytes(contents, pipe.unet, size, tokens, pipe.unet.dtype.itemsize, precision)


def _is_guided(pipe: FreePromptPipeline, guidance_scale: float) -> bool:
    return guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None


def _check_deterministic(scheduler: Any) -> None:
    """Raise ValueError for samplers that add noise in each step, which a recording does not hold."""
    name = type(scheduler).__name__
    kind = str(scheduler.config.get("algorithm_type", ""))
    if any(word in name for word in ("Ancestral", "SDE", "LCM", "TCD", "DDPM", "SASolver")) or kind.startswith("sde"):
        raise ValueError(
            f"{name} adds noise in each step, which targets would have to share with a source that does not run; "
            "record with a deterministic scheduler, such as DDIM, DPM-Solver++ or Euler"
        )


def _new_store(placement: str | Path, device: torch.device) -> MapStore:
    if placement == "device":
        return MemoryStore(device)
    if placement == "cpu":
        return MemoryStore(torch.device("cpu"))
    return FileStore.create(Path(placement))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
