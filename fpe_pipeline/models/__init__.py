"""The embedded model: where it lies, and the scenes that it draws.

Importing this package is cheap; what trains the model is in :mod:`fpe_pipeline.models.train`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["embedded_path", "judge_path"]

_FOLDER = Path(__file__).parent / "embedded"


def embedded_path() -> Path:
    """Folder of the shipped model, which ``StableDiffusionPipeline.from_pretrained`` loads.

    Raises:
        FileNotFoundError: this installation was built without the weights.
    """
    if not (_FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no embedded model in {_FOLDER}: train one with `python -m fpe_pipeline.models.train --preset cpu`"
        )
    return _FOLDER


def judge_path() -> Path:
    """File of the shipped judge, which :func:`fpe_pipeline.models.judge.load_judge` reads."""
    return embedded_path() / "judge.safetensors"
