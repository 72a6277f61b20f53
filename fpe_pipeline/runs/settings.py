"""Everything that decides the images of a run, checked before weights are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..models.loading import EMBEDDED, ModelSource, find_model, pick_device, pick_dtype
from ..texts import check_text

if TYPE_CHECKING:
    from ..inversion.null_text import NullText

__all__ = ["INVERSIONS", "Settings"]

SELECTORS = ("levels", "max_tokens", "layers")
# Those of `fpe_pipeline.inversion`, which is not imported here: it takes seconds that `fpe --help` need not spend.
SELF_REPLACE = (0.0, 0.8)
INVERSIONS = ("ddim", "direct", "null-text", "negative-prompt")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the images of a run.

    Args:
        source: prompt of the source image; of a real one it may be empty.
        targets: one or more prompts to edit it into.
        negative: negative prompt of every image; None is the empty prompt.
        model: "embedded", an earlier one such as "embedded-80", a folder, a checkpoint file or a hub name.
        seed: of the noise that all images start from; drawn on the CPU, so the same on every device, and to rounding on
            every CPU.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less switches it off.
        method: a key of `fpe_pipeline.edits.registry.METHODS`, which has its defaults for a model, "fpe" being
            Free-Prompt-Editing; or an edit's class as "package.module:Class", which is imported.
        self_replace: (first, last) of the replaced steps, as fractions of all steps; of Free-Prompt-Editing only.
        levels, max_tokens, layers: at most one, to choose the edited self-attention layers as the method's edit does.
        options: further arguments of the method's edit, by name.
        size: (width, height) in pixels; None is the model's own.
        image: path of a real image to edit; None generates the source. It is sampled by DDIM, whatever scheduler the
            model names, and `seed` decides nothing.
        inversion: how the real image is held: "ddim", "direct", "null-text" or "negative-prompt"; see
            `fpe_pipeline.inversion.trajectory`.
        inversion_guidance: classifier-free guidance while it is inverted.
        inner_steps, early_stop: of null-text inversion only: at most so many iterations a step, and the mean squared
            error below which a step ends; see `fpe_pipeline.NullText`.
        control: also make each target without the edit, to compare.
        backend: attention backend, or "auto".
        dtype: "float32", "float16", "bfloat16" or "auto".
        device: "cpu", "cuda", "cuda:1", "mps" or "auto".
        threads: CPU threads of torch; None is one for the embedded model, which is too small to share, and torch's
            choice for others. Sums may round differently with another number.
    """

    source: str
    targets: tuple[str, ...]
    negative: str | None = None
    model: str = EMBEDDED
    seed: int = 0
    steps: int = 50
    guidance: float = 7.5
    method: str = "fpe"
    self_replace: tuple[float, float] = SELF_REPLACE
    levels: tuple[int, ...] | None = None
    max_tokens: int | None = None
    layers: tuple[str | int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    image: str | None = None
    inversion: str = "ddim"
    inversion_guidance: float = 1.0
    inner_steps: int = 10
    early_stop: float = 1e-5
    control: bool = True
    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None

    def edit(self, tokenizer: Any = None, unet: Any = None):
        """The edit of these settings.

        Args:
            tokenizer: the pipeline's. Without it, an edit that aligns words is not made, and None is returned.
            unet: the pipeline's, whose layers the method's defaults suit. Without it, those of Stable Diffusion.

        Raises:
            InputError: an unknown method, or a window, a choice of layers or options that make no sense.
        """
        from ..edits.registry import find_method, make_edit

        try:
            method = find_method(self.method)
            if method.window is None and self.self_replace != SELF_REPLACE:
                raise InputError(
                    f"--self-replace is Free-Prompt-Editing's window; give {self.method} its own by --option, such as "
                    "--option self_replace_steps=0.4 or --option start_step=4"
                )
            chosen = {name: getattr(self, name) for name in SELECTORS if getattr(self, name) is not None}
            if method.window is not None:
                chosen[method.window] = self.self_replace
            method.check_options([*self.options, *chosen])
            twice = chosen.keys() & self.options.keys()
            if twice:
                raise InputError(f"{', '.join(sorted(twice))} is given twice, by --option and by an option of its own")
            if method.aligns and tokenizer is None:
                return None
            return make_edit(self.method, [self.source, *self.targets], tokenizer, unet, **chosen, **self.options)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    def null_text(self) -> NullText | None:
        """The settings of the optimisation, where the picture is inverted by it.

        Raises:
            InputError: a number out of range.
        """
        from ..inversion.null_text import NullText

        if self.inversion != "null-text":
            return None
        # A record is JSON, which has no infinity.
        if self.early_stop == float("inf"):
            raise InputError("early_stop must be a finite number, received inf; pass a large one for one iteration")
        try:
            return NullText(self.guidance, inner_steps=self.inner_steps, early_stop=self.early_stop)
        except ValueError as error:
            raise InputError(str(error)) from error

    def changed(self, **given: Any) -> Settings:
        """These settings with some replaced; a new choice of layers replaces the old one, of whichever kind."""
        if given.keys() & set(SELECTORS):
            given = dict.fromkeys(SELECTORS) | given
        return dataclasses.replace(self, **given)

    def check(self) -> ModelSource:
        """Check all that can be checked before weights are read, and say where the model is.

        Raises:
            InputError: what was expected, what came and what to do.
        """
        from fpe_kernels import backends

        if self.image is None and not self.source.strip():
            raise InputError("the source prompt is empty; describe the image to start from")
        if not self.targets or not all(target.strip() for target in self.targets):
            raise InputError("expected one or more target prompts with words in them; pass --target")
        for name, text in (("source", self.source), *(("target", each) for each in self.targets)):
            _check_text(f"the {name} prompt", text)
        _check_text("the negative prompt", self.negative or "")
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, received {self.steps}")
        if not abs(self.guidance) < float("inf"):
            raise InputError(f"guidance must be a finite number, received {self.guidance}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be from 0 to 2^63 - 1, received {self.seed}")
        if self.inversion not in INVERSIONS:
            raise InputError(f"inversion must be one of {', '.join(INVERSIONS)}, received '{self.inversion}'")
        if self.image is not None:
            self._check_image()
        self.edit()
        states = {"auto": "available", **backends()}
        if states.get(self.backend) != "available":
            reason = states.get(self.backend, f"there are {', '.join(states)}")
            raise InputError(f"attention backend '{self.backend}' cannot be used here: {reason}; leave --backend out")
        pick_dtype(self.dtype, pick_device(self.device))
        source = find_model(self.model)
        source.check_size(self.size)
        return source

    def _check_image(self) -> None:
        from ..images.load import load_image

        if not abs(self.inversion_guidance) < float("inf"):
            raise InputError(f"inversion guidance must be a finite number, received {self.inversion_guidance}")
        if self.inversion in ("null-text", "negative-prompt"):
            if self.guidance <= 1:
                raise InputError(
                    f"{self.inversion} inversion lives in the unconditional half of classifier-free guidance, which "
                    f"--guidance {self.guidance:g} switches off; pass a larger one, or --inversion direct"
                )
            if self.negative is not None:
                raise InputError(
                    f"{self.inversion} inversion takes the place of the negative prompt; leave --negative out, or "
                    "pass --inversion direct"
                )
        self.null_text()
        if self.inversion == "null-text" and self.inversion_guidance > 1:
            raise InputError("null-text inversion follows the unguided trajectory; leave --inversion-guidance out")
        load_image(self.image)


def _check_text(name: str, text: str) -> None:
    try:
        check_text(name, text)
    except ValueError as error:
        raise InputError(str(error)) from None
