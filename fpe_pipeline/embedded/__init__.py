"""The embedded models: where they lie, the ones before them, and the scenes that they draw.

Importing this package is cheap; what trains the models is in :mod:`fpe_pipeline.embedded.training.train` and
:mod:`fpe_pipeline.embedded.training.train_flow`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["EARLIER", "EMBEDDED", "EMBEDDED_SD3", "JUDGE", "NAMES", "embedded_path", "judge_path"]

EMBEDDED = "embedded"
#: The embedded transformer, of Stable Diffusion 3's kind.
EMBEDDED_SD3 = "embedded-sd3"
# What was the embedded model once, newest first: kept so that records and recordings of that time still repeat.
EARLIER = ("embedded-80",)
#: Every name.
NAMES = (EMBEDDED, EMBEDDED_SD3, *EARLIER)
#: What a model's judge is called in its folder.
JUDGE = "judge.safetensors"
_HERE = Path(__file__).parent
_FOLDERS = {EMBEDDED: "weights", EMBEDDED_SD3: "sd3", **{name: f"earlier/{name.replace('-', '_')}" for name in EARLIER}}
_TRAINING = {EMBEDDED_SD3: "train_flow"}


def embedded_path(name: str = EMBEDDED) -> Path:
    """Folder of a shipped model, which diffusers' pipeline of its kind loads by ``from_pretrained``.

    Args:
        name: "embedded" (``StableDiffusionPipeline``), "embedded-sd3" (``StableDiffusion3Pipeline``), or one of
            :data:`EARLIER`.

    Raises:
        ValueError: no such name.
        FileNotFoundError: this installation was built without the weights.
    """
    if name not in NAMES:
        raise ValueError(f"the models in this package are {', '.join(NAMES)}, got {name!r}")
    folder = _HERE / _FOLDERS[name]
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no embedded model in {folder}: train one with "
            f"`python -m fpe_pipeline.embedded.training.{_TRAINING.get(name, 'train')} --preset cpu`"
        )
    return folder


def judge_path(folder: Path | None = None) -> Path:
    """File of the judge, which :func:`fpe_pipeline.embedded.judge.load_judge` reads.

    Args:
        folder: of a model. The embedded transformer draws the same scenes as the embedded model, and is judged by its
            judge; others have one of their own, or none, in which case there is no such file. Default: the embedded
            model's.
    """
    if folder is None or folder.resolve() == (_HERE / _FOLDERS[EMBEDDED_SD3]).resolve():
        return embedded_path() / JUDGE
    return folder / JUDGE
