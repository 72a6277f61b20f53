"""Everything that decides the images of a run: one schema for the command line, for records and for whoever calls.

`Settings.model_json_schema()` is that schema, with a description and the bounds of every field. What needs no more than
the value itself is checked where settings are made, the rest by `Settings.check`, before weights are read.
"""

from __future__ import annotations

import json
import os.path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import InputError, refusals
from ..models.loading import pick_device, pick_dtype
from ..models.served_families import FLOW_WINDOW, SHORT_WINDOW, UNET_INVERSIONS
from ..models.sources import EMBEDDED, ModelSource, find_model
from ..texts import check_text
from .model_defaults import check_family, check_source_of, defaults_for
from .sentences import Text, sentences

if TYPE_CHECKING:
    from ..inversion.null_text import NullText

__all__ = ["DEFAULTS", "DTYPE_NAMES", "INVERSIONS", "OF_NULL_TEXT", "SELECTORS", "InversionName", "Schema", "Settings"]

#: Fields that choose layers, one instead of another.
SELECTORS = ("levels", "max_tokens", "layers")
#: Fields of null-text inversion alone.
OF_NULL_TEXT = {"inner_steps", "early_stop"}
SELF_REPLACE = (0.0, 0.8)
# Those of `fpe_pipeline.inversion`, which is not imported here: it takes seconds that `fpe --help` need not spend.
# UNets have the first four, transformers "direct" and the last two.
InversionName = Literal["ddim", "direct", "null-text", "negative-prompt", "reference", "free"]
INVERSIONS: tuple[InversionName, ...] = UNET_INVERSIONS
Dtype = Literal["float32", "float16", "bfloat16", "auto"]
DTYPE_NAMES: tuple[Dtype, ...] = get_args(Dtype)


class Schema(BaseModel):
    """Named values that cannot be changed, of exactly their types; lists may stand for tuples, as in JSON.

    Raises:
        InputError: in one line, all that is wrong with the values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(sentences(error, type(self).model_fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def with_values(self, **given: Any) -> Self:
        """These values with some replaced, checked as new ones are."""
        return type(self)(**{**dict(self), **given})

    @classmethod
    def about(cls, name: str) -> str:
        """What a field is, in words."""
        return cls.model_fields[name].description or ""


class Settings(Schema):
    """Everything that decides the images of a run; the fields say what each is."""

    source: Text = Field(description="prompt of the source image; of a real picture it may be empty")
    targets: tuple[Text, ...] = Field(description="prompts to edit it into, one or more")
    negative: Text | None = Field(None, description="what all images should not show")
    model: Text = Field(
        EMBEDDED,
        description="diffusers folder, .safetensors or .ckpt file, hub name; embedded-sd3, the embedded transformer, "
        "or embedded-80, the embedded model of before",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="of the noise that all images start from; drawn on the CPU, so the same on every device",
    )
    steps: int = Field(50, ge=1, description="denoising steps")
    guidance: float = Field(7.5, description="classifier-free guidance; 1 or less switches it off")
    method: Text = Field(
        "fpe",
        description="how the images are edited: a method by name, or an edit's class as package.module:Class, which is "
        "imported",
    )
    self_replace: tuple[float, float] = Field(
        SELF_REPLACE,
        description="steps whose self-attention maps come from the source, as fractions of all steps from 0 to 1; of "
        "Free-Prompt-Editing only",
    )
    levels: tuple[int, ...] | None = Field(
        None,
        description="replace at these levels of the UNet; level n is downsampled n times from the latent",
    )
    max_tokens: int | None = Field(None, ge=0, description="replace where height x width of the layer is at most this")
    layers: tuple[Text | int, ...] | None = Field(
        None,
        description="replace in these self-attention layers: module paths such as up_blocks.1, or numbers in execution "
        "order",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the method's edit, by name")
    size: tuple[int, int] | None = Field(None, description="width and height in pixels")
    image: Text | None = Field(
        None,
        description="path of a real picture to edit, which is sampled by DDIM, whatever scheduler the model names",
    )
    inversion: InversionName = Field(
        "ddim",
        description="how the source is held to the picture: put back onto it in every step (ddim, direct: to the end), "
        "or followed by an optimised (null-text) or by its own prompt's (negative-prompt) unconditional half; of "
        "transformers direct, reference (put back in every step but the last) or free (not held)",
    )
    inversion_guidance: float = Field(1.0, description="guidance while the picture is inverted")
    inner_steps: int = Field(
        10, ge=1, description="of null-text inversion: at most so many iterations a denoising step"
    )
    early_stop: float = Field(
        1e-5,
        ge=0,
        description="of null-text inversion: mean squared error below which the first step ends; later ones are "
        "allowed a little more each",
    )
    control: bool = Field(True, description="also make each target without the edit, to compare")
    backend: Text = Field("auto", description="attention backend")
    dtype: Dtype = Field("auto", description="of weights and images while they are denoised")
    device: Text = Field("auto", description="cpu, cuda, cuda:1 or mps")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads, by whose number sums may round differently; where none is said, one for the embedded "
        "model and torch's choice for others",
    )

    def __init__(self, *prompts: Any, **values: Any) -> None:
        """The source's prompt and the targets' may stand first, without their names."""
        super().__init__(**dict(zip(("source", "targets"), prompts, strict=False)), **values)

    @field_validator("options")
    @classmethod
    def _options_can_be_recorded(cls, options: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"must be values that JSON has: {error}") from None
        return options

    @classmethod
    def of_model(cls, **given: Any) -> Self:
        """Settings with the defaults of the model that they name, which are others for a transformer than for a UNet.

        Raises:
            InputError: there is no such model, or something is wrong with the values.
        """
        return cls(**defaults_for(given.get("model"), given), **given)

    def edit(self, tokenizer: Any = None, model: Any = None) -> Any:
        """The edit of these settings.

        Args:
            tokenizer: the pipeline's. Without it, an edit that aligns words is not made, and None is returned.
            model: the pipeline, its UNet or its transformer, whose layers the method's defaults suit. Without it, those
                of Stable Diffusion.

        Raises:
            InputError: an unknown method, or a window, a choice of layers or options that make no sense.
        """
        from ..edits.registry import find_method, make_edit

        with refusals(TypeError):
            method = find_method(self.method)
            if method.window is None and self.self_replace not in (SELF_REPLACE, FLOW_WINDOW, SHORT_WINDOW):
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
            return make_edit(self.method, [self.source, *self.targets], tokenizer, model, **chosen, **self.options)

    @property
    def optimises(self) -> bool:
        """Whether a picture is inverted by null-text inversion, whose alone `OF_NULL_TEXT` are."""
        return self.image is not None and self.inversion == "null-text"

    def null_text(self) -> NullText | None:
        """The settings of the optimisation, where the picture is inverted by it.

        Raises:
            InputError: a number out of range.
        """
        from ..inversion.null_text import NullText

        if self.inversion != "null-text":
            return None
        with refusals():
            return NullText(self.guidance, inner_steps=self.inner_steps, early_stop=self.early_stop)

    def changed(self, **given: Any) -> Settings:
        """These settings with some replaced; a new choice of layers replaces the old one, of whichever kind."""
        if given.keys() & set(SELECTORS):
            given = dict.fromkeys(SELECTORS) | given
        return self.with_values(**given)

    def check(self) -> ModelSource:
        """Check all that can be checked before weights are read, and say where the model is.

        Raises:
            InputError: what was expected, what came and what to do.
        """
        self._check_source_text()
        if not self.targets or not all(target.strip() for target in self.targets):
            raise InputError("expected one or more target prompts with words in them; pass --target")
        for target in self.targets:
            _check_text("the target prompt", target)
        self.edit()
        source = self.check_source()
        check_family(self, source)
        return source

    def check_source(self) -> ModelSource:
        """The same of the source alone, whatever it is edited into and by what; targets may be missing.

        Raises:
            InputError: what was expected, what came and what to do.
        """
        from fpe_kernels import backends

        self._check_source_text()
        if self.image is not None:
            self._check_image()
        states = {"auto": "available", **backends()}
        if states.get(self.backend) != "available":
            reason = states.get(self.backend, f"there are {', '.join(states)}")
            raise InputError(f"attention backend '{self.backend}' cannot be used here: {reason}; leave --backend out")
        pick_dtype(self.dtype, pick_device(self.device))
        source = find_model(self.model)
        check_source_of(self, source)
        source.check_size(self.size)
        if self.size is not None:
            from ..images.load import check_openable

            check_openable(self.size)
        return source

    def _check_source_text(self) -> None:
        if self.image is None and not self.source.strip():
            raise InputError("the source prompt is empty; describe the image to start from")
        _check_text("the source prompt", self.source)
        _check_text("the negative prompt", self.negative or "")

    def _check_image(self) -> None:
        from ..images.load import load_image

        assert self.image is not None
        if os.path.exists(self.image) and not (os.path.isfile(self.image) or os.path.isdir(self.image)):
            raise InputError(
                f"'{self.image}' is a pipe or a device, which can be read once: expected a file, which is read again "
                "once the model is loaded and when the run is repeated; save the picture and pass its path"
            )
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


#: What is done where nothing is said.
DEFAULTS = Settings("", ())
