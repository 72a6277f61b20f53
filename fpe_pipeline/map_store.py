"""Where recorded attention maps are kept: on a device, in (pinned) memory or in files, at one of three precisions.

A map is kept as query, key and log-sum-exp. At reduced precision the log-sum-exp is that of the *rounded* query and
key, so that every row of the replayed map still sums to one.

=============  ==============================================================  =========================
precision      kept                                                            bytes a token and head
=============  ==============================================================  =========================
"exact"        query and key as they are                                       2 · D · itemsize + 4
"half"         both in float16                                                 4 · D + 4
"int8-keys"    query in float16, key in int8 with a scale for each token       3 · D + 4 + 4
=============  ==============================================================  =========================
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fpe_kernels import AttentionMap

from .loading import InputError

__all__ = ["PRECISIONS", "FileStore", "MapStore", "MemoryStore", "Precision", "pack", "packed_bytes", "unpack"]

Precision = Literal["exact", "half", "int8-keys"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Packed = dict[str, torch.Tensor]

FORMAT = 1
INDEX = "index.json"
_STEP = "step-"


def pack(attention: AttentionMap, precision: Precision) -> Packed:
    """Tensors that hold a map [1, H, N, M]: query, key, logsumexp and, for integer keys, key_scale."""
    query, key = attention.query.detach(), attention.key.detach()
    if precision == "exact":
        return {"query": query, "key": key, "logsumexp": attention.logsumexp}
    packed = {"query": query.half(), "key": key.half()}
    if precision == "int8-keys":
        scale = (key.float().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        packed["key"] = (key.float() / scale).round().to(torch.int8)
        packed["key_scale"] = scale
    packed["logsumexp"] = unpack(packed, attention.dtype, attention.scale, attention.backend).logsumexp
    return packed


def unpack(packed: Mapping[str, torch.Tensor], dtype: torch.dtype, scale: float, backend: str) -> AttentionMap:
    """The map of :func:`pack`, in ``dtype``, on the device of the tensors."""
    key = packed["key"]
    if "key_scale" in packed:
        key = key.float() * packed["key_scale"]
    return AttentionMap(
        packed["query"].to(dtype),
        key.to(dtype),
        scale=scale,
        backend=backend,
        logsumexp=packed.get("logsumexp"),
    )


def packed_bytes(heads: int, tokens: int, head_dim: int, itemsize: int, precision: Precision) -> int:
    """Bytes of one packed self-attention map; ``itemsize`` is that of the model's dtype."""
    statistics = 8 if itemsize == 8 else 4
    a_token = {
        "exact": 2 * head_dim * itemsize + statistics,
        "half": 4 * head_dim + statistics,
        "int8-keys": 3 * head_dim + 4 + statistics,
    }[precision]
    return heads * tokens * a_token


class MapStore(ABC):
    """Packed maps by step and layer path; the step after the one that was read is fetched ahead."""

    def __init__(self) -> None:
        self._ahead: tuple[int, Future[dict[str, Packed]]] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fpe-recording")

    @abstractmethod
    def write(self, step: int, maps: dict[str, Packed]) -> None:
        """Keep a step's maps, by layer path."""

    @abstractmethod
    def fetch(self, step: int) -> dict[str, Packed]:
        """A step's maps, on the device where they are kept."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all maps."""

    def read(self, step: int, device: torch.device) -> dict[str, Packed]:
        """A step's maps on ``device``; the next step's are fetched in the background meanwhile."""
        if self._ahead is not None and self._ahead[0] == step:
            maps = self._ahead[1].result()
        else:
            maps = self.fetch(step)
        self._ahead = (step + 1, self._worker.submit(self.fetch, step + 1))
        return {
            path: {name: tensor.to(device, non_blocking=True) for name, tensor in packed.items()}
            for path, packed in maps.items()
        }


class MemoryStore(MapStore):
    """Maps in the memory of one device; on the CPU beside a GPU, pinned, so that copies overlap with computing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._pinned = device.type == "cpu" and torch.cuda.is_available()
        self._steps: dict[int, dict[str, Packed]] = {}

    def write(self, step: int, maps: dict[str, Packed]) -> None:
        self._steps[step] = {
            path: {name: self._kept(tensor) for name, tensor in packed.items()} for path, packed in maps.items()
        }

    def fetch(self, step: int) -> dict[str, Packed]:
        return self._steps.get(step, {})

    @property
    def nbytes(self) -> int:
        return sum(
            tensor.nbytes for maps in self._steps.values() for packed in maps.values() for tensor in packed.values()
        )

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device, pin_memory=self._pinned)
        return kept.copy_(tensor)  # views of a whole batch would keep the batch


class FileStore(MapStore):
    """Maps in a folder, a memory-mapped safetensors file a step.

    Each file is written under another name and renamed; the index, which lists them all, is written last. A folder
    without one belongs to a recording that was killed, and is refused.
    """

    def __init__(self, folder: Path, files: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._files = {} if files is None else files

    @classmethod
    def create(cls, folder: Path) -> FileStore:
        """An empty folder to write to.

        Raises:
            InputError: it holds something, or cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = next(folder.iterdir(), None)
        except OSError as error:
            raise InputError(
                f"cannot record into '{folder}': {error.strerror or error}; pass another folder"
            ) from error
        if taken is not None:
            raise InputError(f"'{folder}' is not empty (it holds '{taken.name}'); record into a new folder")
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> tuple[FileStore, dict[str, Any]]:
        """A finished folder and what its index says of the recording.

        Raises:
            InputError: no recording, an unfinished one, another version's, or files that are not those of the index.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            what = "was not finished: it has no index" if folder.is_dir() else "does not exist"
            raise InputError(f"the recording '{folder}' {what}; record it again") from error
        except (OSError, ValueError) as error:
            raise InputError(f"the recording '{folder}' is damaged: {error}; record it again") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            found = index.get("format") if isinstance(index, dict) else type(index).__name__
            raise InputError(f"expected a recording of format {FORMAT}, '{folder}' has {found}; record it again")
        store = cls(folder, index["files"])
        for name, expected in index["files"].items():
            store._check_file(name, expected)
        return store, index["recording"]

    def write(self, step: int, maps: dict[str, Packed]) -> None:
        self.write_tensors(
            _step_file(step), {f"{path}|{name}": t for path, packed in maps.items() for name, t in packed.items()}
        )

    def fetch(self, step: int) -> dict[str, Packed]:
        if _step_file(step) not in self._files:
            return {}
        maps: dict[str, Packed] = {}
        for key, tensor in self.read_tensors(_step_file(step)).items():
            path, name = key.split("|")
            maps.setdefault(path, {})[name] = tensor
        return maps

    def write_tensors(self, name: str, tensors: Packed) -> None:
        """Write a file of the recording; it counts once the index names it."""
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        partial = self.folder / f"{name}.part"
        save_file(ready, partial)
        os.replace(partial, self.folder / name)
        self._files[name] = {
            "bytes": (self.folder / name).stat().st_size,
            "tensors": {key: list(tensor.shape) for key, tensor in ready.items()},
        }

    def read_tensors(self, name: str) -> Packed:
        """All tensors of a file, mapped from it."""
        with safe_open(self.folder / name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)

    def finish(self, recording: dict[str, Any]) -> None:
        """Write the index: from here on the folder is a recording."""
        index = {"format": FORMAT, "recording": recording, "files": self._files}
        partial = self.folder / f"{INDEX}.part"
        partial.write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(partial, self.folder / INDEX)

    @property
    def nbytes(self) -> int:
        return sum(entry["bytes"] for name, entry in self._files.items() if name.startswith(_STEP))

    def _check_file(self, name: str, expected: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise InputError(
                    f"the recording's '{path}' has {size} bytes instead of {expected['bytes']}; record it again"
                )
            with safe_open(path, "pt") as file:
                shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"the recording's '{path}' cannot be read: {error}; record it again") from error
        if shapes != expected["tensors"]:
            raise InputError(f"the recording's '{path}' holds other tensors than its index says; record it again")


def _step_file(step: int) -> str:
    return f"{_STEP}{step:04d}.safetensors"
