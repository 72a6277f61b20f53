"""Where the model of a run is: an embedded one, one before it, a diffusers folder, a single-file checkpoint, or a name
on the Hugging Face hub.

What can be checked without reading weights is checked first, so that a typo costs no loading.
"""

from __future__ import annotations

import functools
import json
import math
import os.path
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..embedded import EARLIER, EMBEDDED, EMBEDDED_SD3, NAMES, embedded_path
from ..errors import InputError
from ..texts import check_readable_name
from .served_families import FAMILIES, FAMILY_OF, Family, ServedFamily, family_of, titles

__all__ = [
    "EARLIER",
    "EMBEDDED",
    "EMBEDDED_SD3",
    "NAMES",
    "ModelSource",
    "find_model",
    "holds_sdxl",
    "is_embedded",
    "replaced_models",
]

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")
_TRAINING = ", or train it with `python -m fpe_pipeline.embedded.training.train_flow`"
# Folders of earlier versions, which records made with `--model FOLDER` name.
_LAY_BEFORE = {
    "fpe_pipeline/models/embedded": EMBEDDED,
    **{f"fpe_pipeline/models/earlier/{name.replace('-', '_')}": name for name in EARLIER},
}
_INDEX = "model_index.json"
_MODULAR = "modular_model_index.json"
_SDXL_PART = "conditioner.embedders.1.model."


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Args:
        kind: "folder", "file" or "hub".
        location: a path, or a hub's name.
        vae_factor: image pixels that sizes are multiples of; None where only loading the weights would tell.
        family: what it denoises with; None where only loading the weights would tell.
        is_distilled: whether it says that it does without guidance.
        is_turbo: whether it is called so, which says the same where models say it nowhere else.
    """

    kind: str
    location: str
    vae_factor: int | None = None
    family: Family | None = None
    is_distilled: bool = False
    is_turbo: bool = False

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Of a run, where they are not those of Stable Diffusion with a UNet."""
        served = self.served
        own = served.of_distilled if self.is_distilled else served.of_turbo if self.is_turbo else {}
        return {**served.defaults, **own}

    @property
    def served(self) -> ServedFamily:
        """What is known of its family; where only loading the weights would tell that, of Stable Diffusion's UNets."""
        return FAMILIES[self.family or "unet"]

    def told_by(self, pipe: Any) -> ModelSource:
        """The same with what the loaded pipeline says of it."""
        family = family_of(pipe)

        def config_of(part: str) -> Mapping[str, Any]:
            config: Mapping[str, Any] = getattr(pipe, part).config if part else pipe.config
            return config

        return replace(self, family=family, is_distilled=FAMILIES[family].is_distilled(config_of))

    def check_size(self, size: tuple[int, int] | None) -> None:
        """Raise `InputError` for a (width, height) in pixels that this model's autoencoder cannot make."""
        if size is None or self.vae_factor is None:
            return
        if any(side <= 0 or side % self.vae_factor for side in size):
            down, up = (
                [max(1, rounding(side / self.vae_factor)) * self.vae_factor for side in size]
                for rounding in (math.floor, math.ceil)
            )
            raise InputError(
                f"width and height must be positive multiples of {self.vae_factor} px for this model's "
                f"{'autoencoder' if self.served.patch == 1 else 'tokens'}, "
                f"got {size[0]}x{size[1]}; use {down[0]}x{down[1]} or {up[0]}x{up[1]}"
            )


def find_model(model: str) -> ModelSource:
    """Resolve a model name without loading weights.

    Args:
        model: "embedded", "embedded-sd3" or an earlier one's name such as "embedded-80", a diffusers folder, a
            .safetensors or .ckpt file, or a hub name such as "owner/model".

    Raises:
        InputError: nothing of that name is here and it cannot be a hub name, the hub does not give what such a model
            says of itself, it is another kind of model, or this user may not read it.
    """
    try:
        return _found(model)
    except PermissionError as error:
        raise InputError(
            f"model '{model}' must lie where this user may read it, got '{error.filename}': {error.strerror}; "
            "change its permissions or those of a folder above it, or pass another model"
        ) from error


def _found(model: str) -> ModelSource:
    """What `find_model` returns, and what the system raises."""
    if is_embedded(model):
        return _folder(_embedded_folder(model))
    path = Path(os.path.expanduser(model))  # which leaves "~nobody" as it is
    try:
        check_readable_name(path)
    except ValueError as error:
        raise InputError(f"model {error}") from None
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix not in SINGLE_FILE_SUFFIXES:
            raise InputError(
                f"a model file must end in {' or '.join(SINGLE_FILE_SUFFIXES)}, got '{model}'; "
                "pass a checkpoint file or a diffusers folder"
            )
        if _is_lora(path):
            raise InputError(
                f"'{model}' is a LoRA, which is added to a model and is none; pass the model that it was made for, and "
                "in Python add it by pipe.load_lora_weights and edit with `fpe_pipeline.editing(pipe, ...)`"
            )
        return ModelSource("file", str(path.resolve()), family="sdxl" if holds_sdxl(path) else None)
    for end, name in _LAY_BEFORE.items():
        if path.as_posix().endswith(f"/{end}"):
            return _found(name)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        return replace(_folder(_without_weights(model), model), kind="hub", location=model)
    raise InputError(
        f"model '{model}' is neither a folder nor a file here, nor a hub name of the form owner/model; "
        f"pass --model with the path where it lies, or --model {EMBEDDED}"
    )


def is_embedded(model: str) -> bool:
    """Whether a name is that of an embedded model or of one before it, rather than a path or a hub's name."""
    return model in NAMES


def holds_sdxl(path: Any) -> bool:
    """Whether a file here is a checkpoint of SDXL, as its second text encoder tells; no weights are read."""
    if Path(path).suffix not in SINGLE_FILE_SUFFIXES or not Path(path).is_file():
        return False
    names = _names_in_safetensors(path) if Path(path).suffix == ".safetensors" else _names_in_pickle(path)
    return any(name.startswith(_SDXL_PART) for name in names)


def _is_lora(path: Path) -> bool:
    """Whether a file here holds what is added to the weights of a model rather than those; of safetensors alone."""
    names = _names_in_safetensors(path) if path.suffix == ".safetensors" else []
    return sum("lora" in name for name in names) > len(names) / 2


def _names_in_safetensors(path: Any) -> list[str]:
    """What a file's tensors are called; none where it cannot be read, which loading says better."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def _names_in_pickle(path: Any) -> list[str]:
    """The same of a checkpoint that torch wrote, whose tensors may lie in a dictionary of their own."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
        return []
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    return [str(name) for name in found]


def replaced_models(model: str) -> list[str]:
    """What lay before where a model lies, newest first: names for "embedded", folders for its folder, else nothing."""
    if model == EMBEDDED:
        return list(EARLIER)
    try:
        if find_model(model) != find_model(EMBEDDED):
            return []
    except InputError:
        return []
    return [find_model(name).location for name in EARLIER]


def _embedded_folder(name: str) -> Path:
    try:
        return Path(embedded_path(name))
    except FileNotFoundError as error:
        raise InputError(
            f"this installation has no {'embedded model' if name == EMBEDDED else name}; pass --model with a diffusers "
            f"folder or a checkpoint file{_TRAINING if name == EMBEDDED_SD3 else ''}"
        ) from error


@functools.cache
def _without_weights(model: str) -> Path:
    """The folder, here, of a model on the hub with what it says of itself, which is some kilobytes.

    Raises:
        InputError: neither the hub, nor what was fetched from it before, has it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(snapshot_download(model, allow_patterns=[_INDEX, _MODULAR, "*/config.json"]))
    except (OSError, ValueError) as error:
        raise InputError(f"model '{model}' is no folder here, and {_why_not(error, model)}") from error
    finally:
        if shown:
            enable_progress_bars()


def _why_not(error: Exception, model: str) -> str:
    """Why the hub does not give a model, and what to do."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    page = f"{ENDPOINT}/{model}"
    if isinstance(error, GatedRepoError):  # which is a RepositoryNotFoundError too
        return f"the hub gives it to those alone who have accepted its terms: do so at {page}, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has none of that name, or a private one: look for {page}, or `hf auth login`"
    if isinstance(error, LocalEntryNotFoundError):
        reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else f"{ENDPOINT} does not answer"
        return f"it was not fetched from the hub before, which cannot be asked: {reason}; pass --model with a folder"
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"the hub does not give it: {said[0]}; try again, or pass --model with a folder"


def _folder(path: Path, name: str | None = None) -> ModelSource:
    """What a pipeline's folder says of its model, which messages call by a name, or by its path."""
    index, called = path / _INDEX, name or str(path)
    if not index.is_file():
        if (path / _MODULAR).is_file():
            raise InputError(
                f"'{called}' holds a modular pipeline (it has {_MODULAR}), expected an ordinary one with {_INDEX}; in "
                "Python, `with fpe_pipeline.editing(pipe, ...)` edits what diffusers' ModularPipeline loads"
            )
        raise InputError(
            f"'{called}' is not a diffusers pipeline folder: it has no {_INDEX}; "
            "pass the folder that save_pretrained wrote, or a .safetensors file"
        )
    said = _json(index)
    kind = said.get("_class_name")
    if kind not in FAMILY_OF:
        raise InputError(
            f"expected a text-to-image pipeline of {titles()}, '{called}' holds a {kind}; in Python, "
            "`with fpe_pipeline.editing(pipe, ...)` edits what diffusers loads"
        )
    family = FAMILY_OF[kind]
    served = FAMILIES[family]
    factor = _pixels_across(path, served.patch)
    is_distilled = served.is_distilled(lambda part: _config(path, part) if part else said)
    return ModelSource("folder", str(path.resolve()), factor, family, is_distilled, served.is_turbo(called))


def _pixels_across(path: Path, patch: int | str) -> int | None:
    """Image pixels across a token, or across a latent pixel of a UNet; None where a folder does not say it.

    Args:
        path: of the folder.
        patch: of its family.
    """
    vae = _config(path, "vae")
    halvings = vae.get("temperal_downsample")  # of Qwen-Image's autoencoder, as diffusers spells it
    if halvings is None and vae.get("block_out_channels"):
        halvings = vae["block_out_channels"][1:]
    if isinstance(patch, str):
        patch = _config(path, "transformer").get(patch, 1)
        patch = patch[0] if isinstance(patch, list) else patch
    across = vae.get("scale_factor_spatial")  # of Wan's, of which the later fold 2 x 2 pixels first
    if across is None and halvings is not None:
        across = 2 ** len(halvings)
    return None if across is None else patch * across


def _config(path: Path, part: str) -> dict[str, Any]:
    """The settings of a part of a pipeline's folder; {} where it has none."""
    config = path / part / "config.json"
    return _json(config) if config.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON: {error}; the model folder is damaged") from error
