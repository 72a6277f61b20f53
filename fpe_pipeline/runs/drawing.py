"""The pictures of a run: the edit first, then the same targets without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .progress import Progress, show_steps
from .repeatable import Clock
from .settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from ..edits import Edit
    from ..inversion.trajectory import Inversion
    from ..pipeline import FreePromptPipeline

__all__ = ["Drawing"]


@dataclass(frozen=True)
class Drawing:
    """Draws what settings ask for.

    Args:
        pipe: of the settings' model.
        settings: of the run.
        progress: is told how far each stage has come.
        name: of the run, which stands before those of its stages.
        clock: measures each stage.
    """

    pipe: FreePromptPipeline
    settings: Settings
    progress: Progress
    name: str
    clock: Clock

    def pictures(
        self, photo: Image.Image | None
    ) -> tuple[Image.Image, tuple[Image.Image, ...], tuple[Image.Image, ...] | None]:
        """The source, its edits, and the targets without control where the settings ask for them.

        Args:
            photo: the real image, cut for the model; None where the source is generated.

        Raises:
            InputError: settings that the model cannot serve.
        """
        settings = self.settings
        width, height = photo.size if photo is not None else settings.size or self.pipe.native_size[::-1]
        edit = self._edit(width, height)
        options: dict[str, Any] = {"height": height, "width": width}
        if photo is not None:
            options = {"inversion": self._inversion(photo)}
        prompts = [settings.source, *settings.targets]
        source, *edited = self._images("edit", prompts, edit=edit, backend=settings.backend, **options)
        if not settings.control:
            return source, tuple(edited), None
        # A real image's targets start from its noise, with its source row beside them: it holds the inversion.
        first = 0 if photo is not None else 1
        plain = self._images("no control", prompts[first:], self_replace_steps=0, **options)
        return source, tuple(edited), tuple(plain[1 - first :])

    def _images(self, title: str, prompts: list[str], **options: Any) -> list[Image.Image]:
        """One for each prompt, all from the seed's noise."""
        import torch

        show_steps(self.pipe, f"{self.name} {title}".strip(), self.progress)
        with self.clock.measure(title):
            try:
                images, _ = self.pipe(
                    prompts,
                    generator=torch.Generator().manual_seed(self.settings.seed),
                    return_dict=False,
                    num_inference_steps=self.settings.steps,
                    guidance_scale=self.settings.guidance,
                    negative_prompt=self.settings.negative,
                    **options,
                )
                return images
            except (TypeError, ValueError) as error:
                raise InputError(str(error)) from error

    def _edit(self, width: int, height: int) -> Edit:
        """The settings' edit; words and layers that it cannot serve are refused here, before a picture is inverted."""
        from ..models.sites import attention_sites

        edit = self.settings.edit(self.pipe.tokenizer, self.pipe.unet)
        latent = height // self.pipe.vae_scale_factor, width // self.pipe.vae_scale_factor
        try:
            edit.select(tuple(site.at(*latent) for site in attention_sites(self.pipe.unet)))
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        return edit

    def _inversion(self, photo: Image.Image) -> Inversion:
        """The picture, inverted by DDIM on the noise levels of whatever scheduler the model names."""
        from ..sampling.noise_schedule import ddim_scheduler

        settings = self.settings
        show_steps(self.pipe, "invert", self.progress)
        with self.clock.measure("invert"):
            self.pipe.scheduler = ddim_scheduler(self.pipe.scheduler)
            try:
                return self.pipe.invert(
                    photo,
                    settings.source,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.inversion_guidance,
                    method=settings.null_text() or settings.inversion,
                    height=photo.height,
                    width=photo.width,
                )
            except (TypeError, ValueError) as error:
                raise InputError(str(error)) from error
