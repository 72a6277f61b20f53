"""Loading and identifying the model of a run."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..text_parts import plain_tokenizer
from .guiders import guider_settings
from .quiet import quiet_libraries
from .served_families import FAMILIES
from .sources import ModelSource

if TYPE_CHECKING:
    import torch

__all__ = ["identity", "load", "pick_device", "pick_dtype", "scheduler_settings"]

# What diffusers and transformers call weights; shards have their number before or after the variant.
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?(\.(?P<variant>[a-z]\w*))?(-\d+-of-\d+)?\.(safetensors|bin)"
)
_LONGEST_TEXT = 10**6  # tokens; transformers writes 10^30 where nothing says how many a model reads
# What an error of loading may come of, by where the model is.
_HINTS = {
    "file": "; a checkpoint file needs its configuration from the hub once",
    "hub": "; where it was not fetched from the hub to its end, run this again while the hub can be reached",
}
DTYPES = ("float32", "float16", "bfloat16")


def load(source: ModelSource, pipeline: Any, *, dtype: torch.dtype, device: str) -> Any:
    """Load a pipeline in one dtype onto one device, with the scheduler that the model names.

    Args:
        source: where the weights are.
        pipeline: the class to load, one of diffusers' or ours.
        dtype, device: of all weights.

    Raises:
        InputError: the hub does not provide it, or the weights cannot be read.
    """
    loader = pipeline.from_single_file if source.kind == "file" else pipeline.from_pretrained
    options = {"variant": _only_variant(Path(source.location))} if source.kind == "folder" else {}
    try:
        with quiet_libraries():
            pipe = loader(source.location, torch_dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"model '{source.location}' could not be loaded: {reason[0]}{_HINTS.get(source.kind, '')}"
        ) from error
    _check_tokenizers(pipe, source.location)
    return pipe.to(device)


def _only_variant(folder: Path) -> str | None:
    """The variant, such as "fp16", in which a folder has the weights of parts that it has in no other form."""
    variants = set()
    for part in folder.iterdir():
        found = [match for path in part.glob("*") if (match := _WEIGHTS.fullmatch(path.name))]
        if found and all(match["variant"] for match in found):
            variants |= {match["variant"] for match in found}
    return variants.pop() if len(variants) == 1 else None


def _check_tokenizers(pipe: Any, location: str) -> None:
    """Raise InputError for tokenizers without words or a length: of a folder that lacks files, or the whole of it,
    transformers makes one all the same."""
    for name, part in pipe.components.items():
        if part is None or not name.startswith("tokenizer"):
            continue
        tokenizer = plain_tokenizer(part)
        lacks = ""
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            lacks = f"words: expected tokenizer.json, or vocab.json and merges.txt, in '{name}'"
        elif type(tokenizer).__name__.startswith("CLIP") and tokenizer.model_max_length > _LONGEST_TEXT:
            lacks = f"length: expected tokenizer_config.json with model_max_length in '{name}'"
        if lacks:
            raise InputError(
                f"model '{location}' could not be loaded: its {name} has no {lacks}; copy the whole folder"
            )


def identity(pipe: Any) -> str:
    """SHA-256 (hex) of what decides the images: every weight as loaded, settings of the scheduler and of guiders, the
    vocabulary.

    Independent of the path and of files that are not loaded; different for another dtype.
    """
    import torch

    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, torch.nn.Module):
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(json.dumps(scheduler_settings(pipe), sort_keys=True, default=str).encode())
    guiders = guider_settings(pipe)
    if guiders:
        digest.update(json.dumps(guiders, sort_keys=True, default=str).encode())
    if pipe.tokenizer is not None:
        digest.update(json.dumps(plain_tokenizer(pipe.tokenizer).get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()


def scheduler_settings(pipe: Any) -> dict[str, Any]:
    """Class name and public configuration of the pipeline's scheduler."""
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {"class": type(pipe.scheduler).__name__, **config}


def pick_device(device: str) -> str:
    """The device to run on: "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: not a device, or not one of this machine.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device '{device}' is not available here ({str(error).strip().splitlines()[0]}); use --device cpu or auto"
        ) from error
    return str(wanted)


def pick_dtype(dtype: str, device: str, source: ModelSource | None = None) -> torch.dtype:
    """The dtype of all weights: "auto" is the family's on CUDA, float32 elsewhere.

    Args:
        dtype: one of :data:`DTYPES`, or "auto".
        device: that they are on.
        source: of the model; None for what holds for most.

    Raises:
        InputError: not one of float32, float16, bfloat16, auto.
    """
    import torch

    if dtype == "auto":
        served = FAMILIES["unet"] if source is None else source.served
        dtype = served.cuda_dtype if device.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)} or auto, got '{dtype}'")
    return getattr(torch, dtype)
