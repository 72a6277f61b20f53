"""Every method on the same pictures, generated and real: each edit made by itself, timed and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ...embedded.judge import Judge
from ...embedded.measure import noise
from ...images.load import load_image
from ...inversion.null_text import NullText
from ...inversion.trajectory import Inversion, Method
from ...models.served_families import FAMILIES, family_of
from ...runs.settings import DEFAULTS
from ...sampling.decoding import decoded
from ...sampling.flow_models import is_flow_model
from ..similarity import iou, psnr
from ..store import plain
from .contenders import Contender, Unfit
from .subjects import GENERATED, Subject

__all__ = ["LatestInversions", "MethodScore", "score_subject"]


@dataclass(frozen=True)
class MethodScore:
    """One edit of one picture by one method. What cannot be measured is ``None``.

    Args:
        subject, kind: of the picture and its edit.
        origin: ``"generated"``, or how the real image was inverted.
        method: the contender's name.
        success: whether the edit shows the target prompt's object, colour and background, as the judge sees it.
        iou: intersection over union of two silhouettes: the source's, which is known of a real image and the judge's
            of a generated one, and the edit's, as the judge sees it.
        outside_psnr: PSNR in dB between source and edit where neither has its object; ``None`` where the background
            is what changes, or nothing lies outside. The source of a real image is the image itself, not what its
            inversion gives back.
        reconstruction: PSNR in dB between a real image and the source row of the edit.
        seconds: of the edit; processor time on a CPU, so that it does not depend on what else runs there.
        inversion_seconds: of the inversion, which any number of edits share.
        autoencoder: PSNR in dB between a real image and what the autoencoder alone gives back of it, which no inversion
            can be expected to exceed.
        reason: why the method cannot make this edit; everything else is ``None`` then.
        picture: what the edit is of; empty where no other edit is of it.
    """

    subject: str
    kind: str
    origin: str
    method: str
    success: bool | None = None
    iou: float | None = None
    outside_psnr: float | None = None
    reconstruction: float | None = None
    seconds: float | None = None
    inversion_seconds: float | None = None
    autoencoder: float | None = None
    reason: str = ""
    picture: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dictionary with numbers for truth values and four decimals."""
        return {name: plain(value) for name, value in asdict(self).items()}


def score_subject(
    pipe: Any,
    judge: Judge | None,
    subject: Subject,
    origin: str,
    contenders: Sequence[Contender],
    *,
    steps: int = DEFAULTS.steps,
    guidance: float = DEFAULTS.guidance,
    inversions: LatestInversions | None = None,
    **options: Any,
) -> Iterator[MethodScore]:
    """Edit one picture by every method, and score each edit as soon as it is made.

    Args:
        pipe: a ``FreePromptPipeline`` with a DDIM scheduler, or one of those of flow models.
        judge: of the embedded model's scenes; without one, what it would say is ``None``.
        subject: the picture and its edit.
        origin: ``"generated"``, or an inversion: a name of :data:`fpe_pipeline.inversion.trajectory.METHODS`, of a flow
            model of :data:`fpe_pipeline.inversion.flow.FLOW_METHODS`.
        contenders: the methods.
        steps: denoising steps, and of the inversion.
        guidance: classifier-free guidance of the edits; inversions are unguided.
        inversions: of edits that were scored before in the same way, which other edits of their picture share.
        **options: of the pipeline's calls and inversions.
    """
    drawing = _Drawing(pipe, subject, origin, steps, guidance, inversions, **options)
    scorer = _Scorer(judge, subject, drawing)
    for contender in contenders:
        unscored = MethodScore(subject.name, subject.kind, origin, contender.name, picture=subject.picture_name)
        try:
            edit = contender.edit_for(subject, pipe.tokenizer, pipe)
        except Unfit as unfit:
            yield replace(unscored, reason=str(unfit))
            continue
        started = _clock(pipe)
        source, image = (None, drawing.target_alone()) if contender.alone else drawing.edited(edit)
        seconds = _clock(pipe) - started
        figures = scorer.figures(source, image)
        yield replace(unscored, **figures, seconds=seconds, inversion_seconds=drawing.inversion_seconds)


class LatestInversions:
    """What one picture was inverted to, in each way, and how many seconds it took: for all edits of it in a row."""

    def __init__(self) -> None:
        self._of: tuple[Any, str] = None, ""
        self._found: dict[str, tuple[Inversion, float]] = {}

    def of(
        self, subject: Subject, origin: str, invert: Callable[[], tuple[Inversion, float]]
    ) -> tuple[Inversion, float]:
        """The inversion of a subject's picture by its source prompt, made where it is not the latest one's."""
        picture, prompt = self._of
        is_path = isinstance(picture, Path) and isinstance(subject.picture, Path)  # arrays are equal number by number
        same = picture == subject.picture if is_path else picture is subject.picture
        if not same or prompt != subject.source_prompt:
            self._of, self._found = (subject.picture, subject.source_prompt), {}
        if origin not in self._found:
            self._found[origin] = invert()
        return self._found[origin]


class _Drawing:
    """The pictures of one subject, uint8 [h, w, 3]. A real image is inverted when this is made."""

    def __init__(
        self,
        pipe: Any,
        subject: Subject,
        origin: str,
        steps: int,
        guidance: float,
        inversions: LatestInversions | None = None,
        **options: Any,
    ) -> None:
        self._pipe, self._subject = pipe, subject
        told = FAMILIES[family_of(pipe)].told(guidance, None)
        self._options: dict[str, Any] = {**told, "output_type": "np", **options}
        self.inversion: Inversion | None = None
        self.inversion_seconds: float | None = None
        if origin == GENERATED:
            latents = self._noise(subject.seed)
            self._source = {**self._options, "latents": latents, "num_inference_steps": steps}
        else:

            def invert() -> tuple[Inversion, float]:
                started = _clock(pipe)
                method = NullText(guidance_scale=guidance) if origin == "null-text" else cast(Method, origin)
                inversion = pipe.invert(
                    subject.picture, subject.source_prompt, num_inference_steps=steps, method=method, **options
                )
                return inversion, _clock(pipe) - started

            self.inversion, self.inversion_seconds = (inversions or LatestInversions()).of(subject, origin, invert)
            self._source = {**self._options, "inversion": self.inversion}
        self._alone = {**self._options, "num_inference_steps": steps}
        if is_flow_model(pipe):  # whose latents may be tokens, which do not say the size
            width, height = self._size()
            self._alone |= {"height": height, "width": width}
            if self.inversion is None:
                self._source |= {"height": height, "width": width}

    def edited(self, edit: Any) -> tuple[np.ndarray, np.ndarray]:
        """Source row and target of an edit."""
        images = self._pipe(
            self._subject.source_prompt, [self._subject.target_prompt], edit=edit, **self._source
        ).images
        return _eight_bit(images[0]), _eight_bit(images[1])

    def target_alone(self) -> np.ndarray:
        """The target from noise of its own."""
        latents = self._noise(self._subject.other_seed)
        return _eight_bit(self._pipe(self._subject.target_prompt, latents=latents, **self._alone).images[0])

    def reference(self) -> np.ndarray:
        """The picture that edits are compared with: the real image as it was cut, or the generated source."""
        if self.inversion is not None:
            return np.asarray(self.inversion.image)
        return _eight_bit(self._pipe(self._subject.source_prompt, **self._source).images[0])

    def autoencoded(self, inversion: Inversion) -> np.ndarray:
        """What the autoencoder alone gives back of the real image."""
        (image,) = decoded(self._pipe, inversion.latents[0], inversion.image.size[::-1])
        return np.asarray(image)

    def _noise(self, seed: int) -> torch.Tensor:
        pipe = self._pipe
        if not is_flow_model(pipe):
            width, height = (side // pipe.vae_scale_factor for side in self._size())
            return noise((pipe.vae.config.latent_channels, height, width), [seed]).to(pipe.device, pipe.denoiser.dtype)
        flow = pipe.flow()
        width, height = (side // flow.latent_pixels for side in self._size())
        channels = flow.latent_channels if flow.is_packed else flow.channels(flow.latent_channels)
        latents = noise((channels, height, width), [seed])
        return (flow.latents(latents) if flow.is_packed else latents).to(pipe.device, pipe.transformer.dtype)

    def _size(self) -> tuple[int, int]:
        """(width, height) of the pictures in pixels."""
        if self.inversion is not None:
            return self.inversion.image.size
        height, width = self._pipe.native_size
        return width, height


class _Scorer:
    """Compares edits with the one picture that they were made of."""

    def __init__(self, judge: Judge | None, subject: Subject, drawing: _Drawing) -> None:
        # Without a scene that it knows there is nothing that the judge could say.
        self._judge = judge if subject.scene is not None else None
        self._subject, self._drawing = subject, drawing
        self._reference: np.ndarray | None = None
        self._mask: np.ndarray | None = None
        self._autoencoder: float | None = None

    def figures(self, source: np.ndarray | None, image: np.ndarray) -> dict[str, Any]:
        if self._reference is None:
            real = self._drawing.inversion is not None or source is None
            self._reference = self._drawing.reference() if real else source
            self._mask = self._source_mask(cast(np.ndarray, self._reference))
            if self._drawing.inversion is not None:
                autoencoded = self._drawing.autoencoded(self._drawing.inversion)
                self._autoencoder = psnr(cast(np.ndarray, self._reference), autoencoded)
        reference, mask = cast(np.ndarray, self._reference), self._mask
        found: dict[str, Any] = {}
        if self._drawing.inversion is not None and source is not None:
            found["reconstruction"], found["autoencoder"] = psnr(reference, source), self._autoencoder
        either = mask
        if self._judge is not None:
            verdict = self._judge.look([Image.fromarray(image)])
            shown = (verdict.objects[0], verdict.colours[0], verdict.backgrounds[0])
            found["success"] = shown == self._subject.scene
            if mask is not None:
                either = mask | verdict.masks[0]
                found["iou"] = iou(mask, verdict.masks[0])
        if either is not None and not either.all() and self._subject.kind != "background":
            found["outside_psnr"] = psnr(reference, image, ~either)
        return found

    def _source_mask(self, reference: np.ndarray) -> np.ndarray | None:
        """bool [h, w]: the known silhouette, cut as the picture was, or the judge's."""
        if self._subject.mask is not None:
            size = (reference.shape[1], reference.shape[0])
            return np.asarray(load_image(self._subject.mask, size, multiple=1).convert("L")) > 127
        if self._drawing.inversion is None and self._judge is not None:
            return self._judge.look([Image.fromarray(reference)]).masks[0]
        return None


def _eight_bit(image: np.ndarray) -> np.ndarray:
    if not np.isfinite(image).all():
        raise FloatingPointError("a picture holds values that are not finite: lower the guidance scale")
    return (image * 255).round().astype(np.uint8)


def _clock(pipe: Any) -> float:
    """Seconds: of this process on a CPU, on the wall where the work is another device's."""
    if pipe.device.type == "cpu":
        return time.process_time()
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
    return time.perf_counter()
