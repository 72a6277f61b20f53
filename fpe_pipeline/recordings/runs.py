"""Recording a source and editing it later: see `recording` for what is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..edits import Edit, FreePromptEdit
from ..edits.base import check_prompts
from ..errors import check_generator, check_guidance, check_positive, require_edit, warn_of_unknown_words
from ..inversion.trajectory import Inversion
from ..models.loading import EARLIER, EMBEDDED, InputError, find_model, load_pipeline
from ..models.sites import Site, attention_sites
from ..models.steps import StepWindow, run_steps
from ..sampling.arguments import check_inversion_options, chosen_edit, image_size
from ..sampling.noise_schedule import NoiseSchedule
from ..sampling.output import FreePromptPipelineOutput
from ..sampling.served_models import check_guided_inversion, check_pipeline, check_without_image_prompts
from ..sampling.step_end import Call, FollowEmbeddings, Task
from ..texts import check_text, print_text
from .contents import Contents, contents_bytes, describe_lack, recorded_steps, source_needs
from .fingerprint import fingerprint
from .folder_store import FileStore
from .layers import Capture, Replay
from .precision import PRECISIONS, Precision
from .recording import Recording
from .store import MapStore, MemoryStore

if TYPE_CHECKING:
    from ..pipeline import FreePromptPipeline

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
    check_pipeline(pipe)
    check_without_image_prompts(pipe, "a recording")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, received {precision!r}")
    _check_deterministic(pipe.scheduler)
    check_guidance(guidance_scale)
    check_generator(generator)
    if inversion is not None:
        check_inversion_options(inversion, {"latents": latents}, negative_prompt, num_inference_steps)
        check_guided_inversion(pipe.unet, inversion.method)
        inversion.check(pipe.scheduler, guidance_scale)
        prompt = inversion.prompt if prompt is None else prompt
        num_inference_steps = inversion.steps
    for name, text in (("source", prompt), ("negative", negative_prompt)):
        if not isinstance(text, str) and (name, text) != ("negative", None):
            raise TypeError(f"expected one {name} prompt, received {type(text).__name__}")
        check_text(f"the {name} prompt", text or "")
    assert prompt is not None
    given = edit if isinstance(edit, Sequence) else (edit,)
    if not given:
        raise ValueError("expected an edit to record for, or several, received none: leave edit out for its default")
    edits = [chosen_edit(one, self_replace_steps, levels, max_tokens, layers, pipe.unet) for one in given]
    for one in edits:
        check_prompts(one, [prompt], pipe.tokenizer)
    steps = 50 if num_inference_steps is None else num_inference_steps
    check_positive(num_inference_steps=steps)
    _check_placement(placement)
    device, dtype = pipe._execution_device, pipe.unet.dtype
    noise = inversion.noise if inversion is not None else latents
    across = image_size(pipe.native_size, pipe.vae_scale_factor, height, width, noise)
    if noise is None:
        shape = (1, pipe.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in across))
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if noise.ndim != 4 or noise.shape[0] != 1:
        raise ValueError(f"a recording holds one image: expected latents [1, C, h, w], received {list(noise.shape)}")
    size = (noise.shape[-2], noise.shape[-1])

    pipe.scheduler.set_timesteps(steps, device=device)
    schedule = NoiseSchedule.of(pipe.scheduler)
    sites, calls = _sites(pipe, size), len(pipe.scheduler.timesteps)
    contents = source_needs(edits, sites, run_steps(pipe.scheduler), guided=_is_guided(pipe, guidance_scale))
    needed = _bytes(pipe, contents, size, calls, precision)
    if inversion is not None and inversion.unconditional is not None:
        needed += inversion.unconditional.nbytes
    told = (
        f"{_megabytes(needed)} for {len(contents)} layers at {len(recorded_steps(contents))} of {calls} steps, "
        f"{precision}, placed on {placement}"
    )
    if budget_bytes is not None and needed > budget_bytes:
        raise ValueError(
            f"a recording takes {told}, more than budget_bytes={budget_bytes} ({_megabytes(budget_bytes)}): raise it, "
            "record fewer steps (self_replace_steps) or layers (levels), pass precision='half' or 'int8-keys', or a "
            "folder as placement"
        )
    if not pipe.progress_is_hidden:
        print_text(f"recording: {told}", sys.stderr)
    model, store = fingerprint(pipe), _new_store(placement, device)

    kept = [noise.to(device, dtype)]

    def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return {}

    with store.all_or_nothing():
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
            model=model,
            precision=precision,
            error=capture.error,
            store=store,
            unconditional=None if inversion is None else inversion.unconditional,
        )
        if isinstance(store, FileStore):
            recording.save(store)
    return recording


@torch.no_grad()
def edit(
    pipe: FreePromptPipeline,
    recording: Recording | str | Path,
    target_prompt: str | Sequence[str],
    *,
    edit: Edit | None = None,
    self_replace_steps: Any = None,
    output_type: str = "pil",
    backend: str = "auto",
) -> FreePromptPipelineOutput:
    """Edit a recorded source into target prompts; the source itself is not denoised again.

    Args:
        recording: from `record` or `Recording.load`, or the folder that it is in; made with this model, scheduler and
            dtype.
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
        ValueError: a recording of another model or schedule, one that lacks what the edit needs, an edit that is
            written for other prompts, or an IP-Adapter; before any denoising.
        InputError: a folder, or a file of it, that is not what was recorded.
    """
    targets = [target_prompt] if isinstance(target_prompt, str) else list(target_prompt)
    if not targets or not all(isinstance(target, str) for target in targets):
        raise TypeError(f"expected one or more target prompts, received {target_prompt!r}")
    for target in targets:
        check_text("a target prompt", target)
    if isinstance(recording, str | Path):
        recording = Recording.load(recording)
    if not isinstance(recording, Recording):
        raise TypeError(f"expected what record returned, or its folder, received {type(recording).__name__}")
    check_pipeline(pipe)
    check_without_image_prompts(pipe, "a recording")
    here = fingerprint(pipe)
    if here != recording.model:
        raise ValueError(
            f"the recording is of another model: {recording.model[:12]}… there and {here[:12]}… here; "
            + _which_model(recording.model, pipe.unet.dtype)
        )
    _check_deterministic(pipe.scheduler)
    pipe.scheduler.set_timesteps(recording.steps)
    recording.schedule.check(pipe.scheduler, "recording")
    chosen = _recorded_edit(recording, self_replace_steps) if edit is None else require_edit(edit)
    if edit is not None and self_replace_steps is not None:
        raise ValueError("self_replace_steps belongs to the edit; pass it there")
    check_prompts(chosen, [recording.prompt, *targets], pipe.tokenizer)
    warn_of_unknown_words(targets, pipe.tokenizer)
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
        images=images,
        nsfw_content_detected=nsfw,
        source_kept=False,
        report=replay.report(),
        prompts=(recording.prompt, *targets),
    )


def _which_model(recorded: str, dtype: torch.dtype) -> str:
    """What to do about a recording of another model: one in this package is named."""
    for name in (EMBEDDED, *EARLIER):
        try:
            candidate = load_pipeline(find_model(name), dtype=dtype, device="cpu")
        except InputError:  # an installation without those weights
            continue
        if fingerprint(candidate) == recorded:
            return (
                f"it was made with the model {name!r} of this package: edit it with "
                f'FreePromptPipeline.from_pretrained(fpe_pipeline.models.embedded_path("{name}"))'
            )
    return "weights, adapters and their strengths, FreeU, dtype and configurations must be those that it was made with"


def _recorded_edit(recording: Recording, self_replace_steps: Any) -> FreePromptEdit:
    """The plain Free-Prompt-Editing that a recording was made for, in fewer steps where that is asked."""
    if recording.window is None:
        raise ValueError(
            "the recording was not made for plain Free-Prompt-Editing: say with edit= what to do, as it was said to "
            "record"
        )
    steps = recording.steps
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


def _bytes(
    pipe: FreePromptPipeline, contents: Contents, size: tuple[int, int], steps: int, precision: Precision
) -> int:
    """Parts of layers, and the latents before and after every step."""
    tokens, itemsize = pipe.tokenizer.model_max_length, pipe.unet.dtype.itemsize
    latents = (steps + 1) * pipe.unet.config.in_channels * size[0] * size[1] * itemsize
    return latents + contents_bytes(contents, pipe.unet, size, tokens, itemsize, precision)


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


def _check_placement(placement: str | Path) -> None:
    """Raise for the name of a device or of a medium, which would become a folder of that name."""
    if not isinstance(placement, str | Path):
        raise TypeError(f'placement must be "device", "cpu" or a folder, received {type(placement).__name__}')
    if placement in ("device", "cpu") or isinstance(placement, Path):
        return
    try:
        torch.device(placement)
    except RuntimeError:
        is_a_folder = placement not in ("gpu", "disk", "memory")
    else:
        is_a_folder = False
    if not is_a_folder:
        raise ValueError(
            f'placement must be "device" (that of the pipeline), "cpu" or a folder, received {placement!r}; if a '
            f"folder is meant, pass Path({placement!r})"
        )


def _new_store(placement: str | Path, device: torch.device) -> MapStore:
    if placement == "device":
        return MemoryStore(device)
    if placement == "cpu":
        return MemoryStore(torch.device("cpu"))
    return FileStore.create(Path(placement))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
