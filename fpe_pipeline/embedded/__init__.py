"""The embedded model: where it lies, the ones before it, and the scenes that they draw.

Importing this package is cheap; what trains the model is in :mod:`fpe_pipeline.embedded.training.train`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["EARLIER", "EMBEDDED", "embedded_path", "judge_path"]

EMBEDDED = "embedded"
# What was the embedded model once, newest first: kept so that records and recordings of that time still repeat.
EARLIER = ("embedded-80",)
_HERE = Path(__file__).parent


def embedded_path(name: str = EMBEDDED) -> Path:
    """Folder of the shipped model, or of an earlier one, which ``StableDiffusionPipeline.from_pretrained`` loads.

    Args:
        name: "embedded", or one of :data:`EARLIER`.

    Raises:
        ValueError: no such name.
        FileNotFoundError: this installation was built without the weights.
    """
    if name != EMBEDDED and name not in EARLIER:
        raise ValueError(f"the models in this package are {', '.join((EMBEDDED, *EARLIER))}, got {name!r}")
    folder = _HERE / "weights" if name == EMBEDDED else _HERE / "earlier" / name.replace("-", "_")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no embedded model in {folder}: train one with "
            "`python -m fpe_pipeline.embedded.training.train --preset cpu`"
        )
    return folder


def judge_path() -> Path:
    """File of the shipped judge, which :func:`fpe_pipeline.embedded.judge.load_judge` reads."""
    return embedded_path() / "judge.safetensors"
