"""What a batch is asked for: the schemas that the command line fills in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from ..runs.sentences import Text
from ..runs.settings import Schema

__all__ = ["LOCAL", "BatchRequest", "Weights"]

#: The address of a cluster that is this machine alone.
LOCAL = "local"


class Weights(Schema):
    """Where the weights of measures lie; without them nothing is measured by them, and nothing is fetched."""

    clip: Text | None = Field(
        default=None, description="folder of a CLIP model: measures its score and the directional similarity"
    )
    dino: Text | None = Field(
        default=None, description="folder of a vision transformer that DINO trained: measures the structure distance"
    )
    lpips: Text | None = Field(
        default=None,
        description="weights of torchvision's alexnet, vgg16 or squeezenet1_1, a .pth file: measures LPIPS",
    )


class BatchRequest(Schema):
    """What to make, by whom, and where it goes; the fields say what each is."""

    jobs: Path = Field(description="list of edits: .jsonl, .csv, .json or .yaml")
    output: Path = Field(
        Path("out/batch"), description="folder for the results; what is there of them is not made again"
    )
    images: Path | None = Field(None, description="folder of the pictures that the list names")
    defaults: dict[str, Any] = Field(default_factory=dict, description="settings of jobs that do not say otherwise")
    at_once: int = Field(4, ge=1, description="targets of one source that are denoised at once, at most")
    workers: int = Field(1, ge=1, description="processes, each with the model in its memory; more than one need Ray")
    cluster: Text = Field(
        LOCAL, description="address of a Ray cluster, such as auto or ray://host:10001; local is this machine"
    )
    weights: Weights = Field(Weights(), description="of measures that ask a pretrained encoder")
