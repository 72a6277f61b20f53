"""Recordings: the source pass of an edit, kept, so that later edits never run the source again.

Free-Prompt-Editing needs from its source nothing but attention maps, and a map is its query, key and log-sum-exp.
`record` generates the source once and keeps those for every layer and step that the edit would replace, with the
latents of every step. `edit` denoises the targets alone: their conditional rows take the recorded maps, applied to
their own values, and compute no queries and keys there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.utils.torch_utils import randn_tensor

from .edits import FreePromptEdit
from .inversion import Inversion
from .loading import InputError
from .map_store import PRECISIONS, FileStore, MapStore, MemoryStore, Precision, packed_bytes
from .noise_schedule import NoiseSchedule
from .output import FreePromptPipelineOutput
from .recorded_layers import Capture, Replay
from .schedule import StepWindow
from .sites import Site, attention_sites
from .step_end import Call, FollowEmbeddings, Task

if TYPE_CHECKING:
    from .pipeline import FreePromptPipeline

__all__ = ["Recording", "edit", "estimate", "fingerprint", "record"]


@dataclass(frozen=True, eq=False)
class Recording:
    """The source pass of an edit; `FreePromptPipeline.record` makes it, `load` reads one from a folder.

    Args:
        prompt: the source's.
        negative_prompt: of the source, and of the edits.
        guidance_scale: of the run.
        schedule: timesteps and noise levels of the run.
        window: (first, last) of the recorded steps, as fractions of the run.
        paths: the recorded layers.
        latents: [steps + 1, 1, C, h, w], from the noise that all start from to the source's last latent.
        model: fingerprint of the weights and configurations that made it.
        precision: "exact", "half" or "int8-keys".
        error: largest relative error, over all recorded layers and steps, that the precision makes in the source's own
            attention output (2-norm); 0 where exact.
        store: where the maps are.
        unconditional: [steps, 1, tokens, channels], the embeddings of a null-text inversion, or None.
    """

    prompt: str
    negative_prompt: str | None
    guidance_scale: float
    schedule: NoiseSchedule
    window: tuple[float, float]
    paths: tuple[str, ...]
    latents: torch.Tensor
    model: str
    precision: Precision
    error: float
    store: MapStore = field(repr=False)
    unconditional: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded maps, latents and embeddings."""
        rest = 0 if self.unconditional is None else self.unconditional.nbytes
        return self.store.nbytes + self.latents.nbytes + rest

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """A recording from the folder that it was placed in.

        Raises:
            InputError: no recording, one that was killed before its end, another version's, damaged files.
        """
        store, values = FileStore.open(Path(folder))
        tensors = store.read_tensors("latents.safetensors")
        names = {f.name for f in dataclasses.fields(cls)} - {"store", "latents", "unconditional"}
        if values.keys() != names:
            raise InputError(f"the recording '{folder}' is damaged: its index has other entries; record it again")
        schedule = dict(values.pop("schedule"))
        schedule["timesteps"] = tuple(schedule["timesteps"])
        values["window"], values["paths"] = tuple(values["window"]), tuple(values["paths"])
        return cls(
            schedule=NoiseSchedule(**schedule),
            store=store,
            latents=tensors["latents"],
            unconditional=tensors.get("unconditional"),
            **values,
        )

    def _index(self) -> dict[str, Any]:
        tensors = ("store", "latents", "unconditional")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in tensors}
        return values | {"schedule": dataclasses.asdict(self.schedule)}


def estimate(
    pipe: FreePromptPipeline, edit: FreePromptEdit, size: tuple[int, int], steps: int, precision: Precision = "exact"
) -> int:
    """Bytes of the maps that a recording of ``steps`` steps on latents of ``size`` (height, width) keeps."""
    return len(edit.window.steps(steps)) * sum(
        packed_bytes(
            site.heads,
            cast(int, site.tokens),
            pipe.unet.get_submodule(site.path).inner_dim // site.heads,
            pipe.unet.dtype.itemsize,
            precision,
        )
        for site in _recorded_sites(pipe, edit, size)
    )


def record(
    pipe: FreePromptPipeline,
    prompt: str | None = None,
    *,
    edit: FreePromptEdit,
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
    """What `FreePromptPipeline.record` does, and documents."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, received {precision!r}")
    _check_deterministic(pipe.scheduler)
    if prompt is None and inversion is not None:
        prompt = inversion.prompt
    if not isinstance(prompt, str):
        raise TypeError(f"expected one source prompt, received {type(prompt).__name__}")
    steps = inversion.steps if inversion is not None else num_inference_steps or 50
    device, dtype = pipe._execution_device, pipe.unet.dtype
    noise = inversion.noise if inversion is not None else latents
    if noise is None:
        across = pipe._image_size(height, width, None)
        shape = (1, pipe.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in across))
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if noise.ndim != 4 or noise.shape[0] != 1:
        raise ValueError(f"a recording holds one image: expected latents [1, C, h, w], received {list(noise.shape)}")
    size = (noise.shape[-2], noise.shape[-1])

    needed = estimate(pipe, edit, size, steps, precision)
    sites = _recorded_sites(pipe, edit, size)
    told = (
        f"{_megabytes(needed)} for {len(sites)} layers at {len(edit.window.steps(steps))} of {steps} steps, "
        f"{precision}, placed on {placement}"
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

    capture = Capture(pipe, sites, edit.window.steps(steps), store, precision, backend)
    with capture.installed():
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
    recording = Recording(
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        schedule=NoiseSchedule.of(pipe.scheduler),
        window=(edit.window.start, edit.window.stop),
        paths=tuple(site.path for site in sites),
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
        store.finish(recording._index())
    return recording


def edit(
    pipe: FreePromptPipeline,
    recording: Recording,
    target_prompt: str | Sequence[str],
    *,
    self_replace_steps: Any = None,
    output_type: str = "pil",
    backend: str = "auto",
) -> FreePromptPipelineOutput:
    """What `FreePromptPipeline.edit` does, and documents."""
    targets = [target_prompt] if isinstance(target_prompt, str) else list(target_prompt)
    if not targets or not all(isinstance(target, str) for target in targets):
        raise TypeError(f"expected one or more target prompts, received {target_prompt!r}")
    here = fingerprint(pipe)
    if here != recording.model:
        raise ValueError(
            f"the recording is of another model: {recording.model[:12]}… there and {here[:12]}… here; weights, "
            "adapters, dtype and configurations must be those that it was made with"
        )
    steps = recording.schedule.steps
    pipe.scheduler.set_timesteps(steps)
    recording.schedule.check(pipe.scheduler, "recording")
    recorded = StepWindow(*recording.window).steps(steps)
    window = recorded if self_replace_steps is None else StepWindow.parse(self_replace_steps).steps(steps)
    if window and (window.start < recorded.start or window.stop > recorded.stop):
        raise ValueError(
            f"self_replace_steps={self_replace_steps} asks for steps {window.start} to {window.stop - 1}; the "
            f"recording holds {recorded.start} to {recorded.stop - 1}: record a wider window, or pass a narrower one"
        )
    tasks: list[Task] = []
    options: dict[str, Any] = {}
    if recording.negative_prompt is not None:
        options["negative_prompt"] = [recording.negative_prompt] * len(targets)
    if recording.unconditional is not None:
        tasks.append(FollowEmbeddings(recording.unconditional))
        options["negative_prompt_embeds"] = recording.unconditional[0].to(pipe.unet.dtype).expand(len(targets), -1, -1)
    noise = recording.latents[0]
    sites = [site.at(noise.shape[-2], noise.shape[-1]) for site in attention_sites(pipe.unet)]
    sites = [site for site in sites if site.path in recording.paths]
    replay = Replay(pipe, sites, window, recording.store, len(targets), backend)
    factor = pipe.vae_scale_factor
    images, nsfw = pipe._sample(
        Call(len(targets), 1),
        replay.installed(),
        tasks,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=["latents"],
        prompt=targets,
        height=noise.shape[-2] * factor,
        width=noise.shape[-1] * factor,
        num_inference_steps=steps,
        guidance_scale=recording.guidance_scale,
        latents=noise,
        output_type=output_type,
        **options,
    )
    return FreePromptPipelineOutput(images=images, nsfw_content_detected=nsfw, source_kept=False)


def fingerprint(pipe: FreePromptPipeline) -> str:
    """SHA-256 (hex) of the text encoder's and the UNet's configuration, and of samples of every weight.

    64 numbers a weight: another checkpoint, an adapter and another dtype are told apart in a fraction of the time
    that it takes to read everything.
    """
    digest = hashlib.sha256()
    for name in ("text_encoder", "unet"):
        module = getattr(pipe, name)
        config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for key, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _recorded_sites(pipe: FreePromptPipeline, edit: FreePromptEdit, size: tuple[int, int]) -> tuple[Site, ...]:
    return edit.select(tuple(site.at(*size) for site in attention_sites(pipe.unet)))


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
