"""What an evaluation is asked for: the schema that the command line fills in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field

from ..runs.model_defaults import defaults_for
from ..runs.sentences import Text
from ..runs.settings import DEFAULTS, InversionName, Schema

__all__ = ["KINDS", "Evaluation", "Kind"]

Kind = Literal["colour", "object", "background"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Evaluation(Schema):
    """What to score, how it is drawn and where the results go; the fields say what each is."""

    pairs: int = Field(200, ge=1, description="edits of each kind")
    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1, description="attributes to change")
    sweep: bool = Field(False, description="also vary the step window and the layers' level")
    methods: tuple[Text, ...] | None = Field(
        None, description="also Prompt-to-Prompt, Plug-and-Play and others; of images, compare these alone"
    )
    images: Text | None = Field(
        None,
        description="compare every method, edit by edit and timed, on pictures: generated (ones), held-out (renders of "
        "such scenes, taken for photos), or the path of a folder of your own with prompts.json or prompts.csv",
    )
    inversions: tuple[InversionName, ...] | None = Field(
        None, description="how real images are inverted, one or several"
    )
    steps: int = Field(DEFAULTS.steps, ge=1, description="denoising steps")
    guidance: float = Field(DEFAULTS.guidance, description="guidance scale")
    self_replace: float = Field(
        DEFAULTS.self_replace[1], ge=0, le=1, description="part of the steps, from 0 to 1, with replaced maps"
    )
    seed: int = Field(0, ge=0, description="of prompts, noise and bootstrap")
    chunk: int = Field(8, ge=1, description="pairs drawn at a time")
    model: Path | None = Field(
        None, description="model folder with its judge, or embedded-sd3, the embedded transformer (default: embedded)"
    )
    text_tokens: int | None = Field(
        None, ge=1, description="of a transformer: tokens in the place of T5's (default: the pipeline's number)"
    )
    device: Text = Field("cpu", description="torch device")
    output: Path = Field(Path("out/evaluation"), description="folder for the results")

    @classmethod
    def of_model(cls, **given: Any) -> Self:
        """An evaluation with the defaults of the model that it names, which are others for a transformer.

        Raises:
            InputError: there is no such model, or something is wrong with the values.
        """
        model = given.get("model")
        own = defaults_for(None if model is None else str(model), given)
        window = own.pop("self_replace", None)
        own.pop("inversion", None)
        return cls(**own, **({} if window is None else {"self_replace": window[1]}), **given)
