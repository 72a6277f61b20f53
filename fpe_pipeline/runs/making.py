"""The images of a run, by a pipeline that is loaded: what `execute` does between loading and the record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import InputError, refusals
from ..images.distance import pixel_hash
from ..models.loading import pick_device, scheduler_settings
from ..models.served_families import FAMILIES, family_of
from ..models.sources import find_model, is_embedded
from .edit_class import edit_class
from .model_defaults import check_family
from .option_files import option_files, with_places
from .progress import Progress, show_steps
from .repeatable import Clock, machine, repeatable, threads_for, versions
from .result import Run
from .settings import Settings

if TYPE_CHECKING:
    from ..edits import Edit
    from ..inversion.trajectory import Inversion
    from ..pipelines.free_prompt import FreePromptPipeline
    from ..sampling.output import FreePromptPipelineOutput

__all__ = [
    "Loaded",
    "cut_prompts",
    "denoised",
    "details_of",
    "edit_of",
    "filled_in",
    "guided",
    "invert",
    "is_flow",
    "made_by",
    "model_of",
    "photo_for",
    "pinned",
    "pixels_across",
    "size_of",
    "solver_of_pictures",
    "start",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What a caller that makes several runs keeps between them.

    Args:
        pipe: of the settings' model, device and dtype; its scheduler is put back after a run.
        identity: of its model, from :func:`~fpe_pipeline.models.loading.identity`.
        inversion: of the settings' picture, made with the settings' steps and method; None to invert it in the run.
    """

    pipe: FreePromptPipeline
    identity: str
    inversion: Inversion | None = None


def pinned(settings: Settings, device: str) -> AbstractContextManager[None]:
    """The arithmetic of a run, pinned; see :mod:`fpe_pipeline.runs.repeatable`."""
    return repeatable(threads_for(settings.model, device) if settings.threads is None else settings.threads)


def made_by(
    settings: Settings,
    loaded: Loaded,
    progress: Progress,
    name: str,
    expected: tuple[str | None, str | None],
    clock: Clock,
    on_step: Callable[..., dict[str, Any]] | None,
) -> Run:
    """The images of checked settings; ``expected`` are the identities of model and picture, where a record has them."""
    pipe = loaded.pipe
    if cut := cut_prompts(pipe, settings):
        logger.warning(cut)
    photo = photo_for(pipe, settings)
    _check_expected(settings, loaded.identity, expected[0], photo, expected[1])
    check_family(settings, find_model(settings.model).told_by(pipe))
    edit = edit_of(pipe, settings, *size_of(pipe, settings, photo))
    started = start(settings, loaded, photo, progress, clock)

    def generate(title: str, prompts: list[str], **options: Any) -> FreePromptPipelineOutput:
        show_steps(pipe, f"{name} {title}".strip(), progress)
        with clock.measure(title):
            return denoised(settings, pipe, prompts, **started, **options)

    made = generate(
        "edit",
        [settings.source, *settings.targets],
        edit=edit,
        backend=settings.backend,
        callback_on_step_end=on_step,
    )
    source, *edited = made.images
    plain = None
    if settings.control:
        # A real image's targets start from its noise, with its source row beside them: it holds the inversion.
        with_source = [] if photo is None else [settings.source]
        free = generate("no control", [*with_source, *settings.targets], self_replace_steps=0)
        plain = tuple(free.images[len(with_source) :])
    settings = filled_in(settings, pipe, source.size)
    details = details_of(settings, loaded, clock.seconds)
    return Run(settings, source, tuple(edited), plain, details, photo, made.report)


def size_of(pipe: FreePromptPipeline, settings: Settings, photo: Image.Image | None) -> tuple[int, int]:
    """(width, height) of a run's images, px."""
    return photo.size if photo is not None else settings.size or pipe.native_size[::-1]


def start(
    settings: Settings, loaded: Loaded, photo: Image.Image | None, progress: Progress, clock: Clock
) -> dict[str, Any]:
    """Options of every call of a run: what it starts from. A picture is inverted here, unless it was before."""
    pipe = loaded.pipe
    width, height = size_of(pipe, settings, photo)
    options: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": settings.steps,
        **guided(pipe, settings),
    }
    if photo is None:
        return options
    inversion = loaded.inversion
    if inversion is None:
        show_steps(pipe, "invert", progress)
        with clock.measure("invert"):
            inversion = invert(pipe, photo, settings)
    pipe.scheduler = solver_of_pictures(pipe)
    return options | {"inversion": inversion, "height": None, "width": None}


def denoised(settings: Settings, pipe: Any, prompts: list[str], **options: Any) -> FreePromptPipelineOutput:
    """One call of a run, from the settings' noise; what it refuses is an InputError."""
    import torch

    noise = torch.Generator().manual_seed(settings.seed)
    with refusals(TypeError):
        made: FreePromptPipelineOutput = pipe(prompts, generator=noise, **options)
        return made


def filled_in(settings: Settings, pipe: FreePromptPipeline, size: tuple[int, int]) -> Settings:
    """Settings with what a run of them chose, so that they repeat it elsewhere: where things lie, and on what."""
    import torch

    location = find_model(settings.model)
    return settings.with_values(
        model=settings.model if location.kind == "hub" or is_embedded(settings.model) else location.location,
        image=None if settings.image is None else str(Path(settings.image).resolve()),
        options=with_places(settings.options),
        size=size,
        dtype=str(model_of(pipe).dtype).removeprefix("torch."),
        device=pick_device(settings.device),
        threads=torch.get_num_threads(),
    )


def details_of(settings: Settings, loaded: Loaded, seconds: dict[str, float]) -> dict[str, Any]:
    """What a record says beside the settings and the images: model, versions, machine, times."""
    from fpe_kernels import backends

    pipe = loaded.pipe
    return (
        edit_class(settings.method)
        | option_files(settings.options)
        | {
            "model": {
                "identity_sha256": loaded.identity,
                "class": type(pipe).__name__,
                "scheduler": scheduler_settings(pipe),
            },
            "versions": versions(),
            "machine": machine(settings.device),
            "backends": backends(),
            "seconds": seconds,
        }
    )


def _check_expected(
    settings: Settings, model: str, expected_model: str | None, photo: Image.Image | None, expected_photo: str | None
) -> None:
    """Raise InputError for another model or picture than the record's, where there is one."""
    if expected_model is not None and model != expected_model:
        raise InputError(
            f"model '{settings.model}' is not the one of the record: its weights, scheduler or dtype differ "
            f"({model[:12]}… instead of {expected_model[:12]}…); pass --model to use it all the same"
        )
    if expected_photo is not None and photo is not None and expected_photo != pixel_hash(photo):
        raise InputError(
            f"'{settings.image}' is not the picture of the record: its pixels differ; pass --image to edit "
            "it all the same"
        )


def cut_prompts(pipe: Any, settings: Settings) -> str:
    """Which prompts are longer than the model reads, in one line, where one tokenizer says that; "" where none is."""
    if is_flow(pipe) or _reads_t5(pipe):
        return ""
    tokenizer = pipe.tokenizer
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    prompts = {"source": settings.source, "negative": settings.negative or ""}
    prompts |= {f"target {number}": target for number, target in enumerate(settings.targets, start=1)}
    lengths = {name: len(tokenizer(prompt, add_special_tokens=False).input_ids) for name, prompt in prompts.items()}
    cut = [f"{name} {length}" for name, length in lengths.items() if length > room]
    return f"the model reads the first {room} tokens of a prompt and no more: {', '.join(cut)}" if cut else ""


def photo_for(pipe: FreePromptPipeline, settings: Settings) -> Image.Image | None:
    """The settings' picture as the model takes it; None where the source is generated."""
    from ..images.load import load_image

    if settings.image is None:
        return None
    pixels = pipe.native_size[0] * pipe.native_size[1]
    size = settings.size or (None, None)
    multiple = pixels_across(pipe)
    picture = load_image(settings.image, size, multiple=multiple, pixels=pixels)
    fitting = pipe.flow().fitting(picture.size) if settings.size is None and is_flow(pipe) else None
    return picture if fitting is None else load_image(settings.image, fitting, multiple=multiple)


def edit_of(pipe: FreePromptPipeline, settings: Settings, width: int, height: int) -> Edit:
    """The settings' edit; words and layers that it cannot serve are refused here, before a picture is inverted."""
    from ..models.adapters.families import adapter_of

    edit = settings.edit(pipe.tokenizer, model_of(pipe))
    latent = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    with refusals(TypeError):
        edit.select(tuple(site.at(*latent) for site in adapter_of(pipe).sites))
    return edit


def solver_of_pictures(pipe: Any) -> Any:
    """By what pictures are inverted and denoised again: DDIM on the noise levels of whatever scheduler a model names;
    of a flow model, the scheduler's own steps."""
    from ..sampling.noise_schedule import ddim_scheduler

    return pipe.scheduler if is_flow(pipe) else ddim_scheduler(pipe.scheduler)


def guided(pipe: Any, settings: Settings) -> dict[str, Any]:
    """Options of a pipeline's call that say how strongly, and by what, the settings have it guided."""
    return FAMILIES[family_of(pipe)].told(settings.guidance, settings.negative)


def pixels_across(pipe: Any) -> int:
    """Of what the sides of a pipeline's images are multiples, px."""
    multiple: int = pipe.flow().multiple if is_flow(pipe) else pipe.pixel_multiple
    return multiple


def _reads_t5(pipe: Any) -> bool:
    """Whether a text encoder reads more of a prompt than the first tokenizer says."""
    return any(type(part).__name__.startswith("T5") for part in pipe.components.values())


def model_of(pipe: Any) -> Any:
    """The UNet or transformer that a pipeline denoises with."""
    return getattr(pipe, "unet", None) or pipe.transformer


def is_flow(pipe: Any) -> bool:
    """Whether a pipeline takes noise away along a flow, and not by DDIM."""
    return FAMILIES[family_of(pipe)].is_flow


def invert(pipe: FreePromptPipeline, photo: Image.Image, settings: Settings) -> Inversion:
    """The settings' picture, cut for the model, inverted by DDIM, or along the flow."""
    pipe.scheduler = solver_of_pictures(pipe)
    method: Any = settings.inversion if is_flow(pipe) else settings.null_text() or settings.inversion
    with refusals(TypeError):
        return pipe.invert(
            photo,
            settings.source,
            num_inference_steps=settings.steps,
            guidance_scale=settings.inversion_guidance,
            method=method,
            height=photo.height,
            width=photo.width,
        )
