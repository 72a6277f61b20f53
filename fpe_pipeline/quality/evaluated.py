"""The model that an evaluation is of, and the judge beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..embedded import JUDGE, judge_path
from ..errors import InputError, refusals
from ..models.loading import pick_dtype
from ..models.served_families import Served
from ..models.sources import EMBEDDED, ModelSource, find_model
from ..runs.loading import load_pipeline

__all__ = ["EvaluatedModel"]


@dataclass(frozen=True)
class EvaluatedModel:
    """A diffusers folder and its judge's file; without one, nothing is judged."""

    source: ModelSource
    judge: Path | None

    @classmethod
    def find(cls, model: Path | None, *, judged: bool) -> EvaluatedModel:
        """The model of a folder (default: the embedded one), before any weights are read.

        Args:
            judged: whether the evaluation cannot do without a judge.

        Raises:
            InputError: there is no such model, or no judge where one is needed.
        """
        source = find_model(EMBEDDED if model is None else str(model))
        if source.kind != "folder":
            raise InputError(f"expected --model to be a diffusers folder, got '{model}'; save the model as one first")
        judge = judge_path(Path(source.location))
        if judged and not judge.is_file():
            raise InputError(
                f"'{source.location}' has no {JUDGE}, which says what a picture of the embedded model's scenes shows; "
                "leave --model out, or evaluate pictures of your own with --images FOLDER"
            )
        return cls(source, judge if judge.is_file() else None)

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        return Path(self.source.location)

    @property
    def is_transformer(self) -> bool:
        """Whether it is a flow's, which denoises with a transformer."""
        return self.source.served.is_flow

    @property
    def served(self) -> Served:
        """What methods call its kind."""
        return self.source.served.kind

    @property
    def inversions(self) -> tuple[str, ...]:
        """How it inverts pictures, first the default."""
        return self.source.served.inversions

    def check_text_tokens(self, count: int | None) -> None:
        """Raise InputError where a number of text tokens is said and the model has a UNet."""
        if count is not None and not self.is_transformer:
            raise InputError("--text-tokens is about a transformer's text, and this model has a UNet: leave it out")

    def load(self, device: str, pipeline: Any = None) -> tuple[Any, Any]:
        """A silent pipeline, of the class ``pipeline`` or a `FreePromptPipeline`, and the judge or None.

        Raises:
            InputError: the weights, or the judge's, cannot be read.
        """
        from ..embedded.judge import load_judge

        with refusals():
            judge = None if self.judge is None else load_judge(self.judge).to(device)
        pipe = load_pipeline(
            self.source, dtype=pick_dtype("auto", device, self.source), device=device, pipeline=pipeline
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe, judge
