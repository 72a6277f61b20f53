"""Where recorded tensors are kept: on a device, in (pinned) memory or in files.

All tensors of a step lie in one block of memory, or one after the other in one file: a step is moved, and fetched
ahead, by one copy.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .loading import InputError
from .packing import Packed

__all__ = ["FileStore", "MapStore", "MemoryStore"]


FORMAT = 2
INDEX = "index.json"
_STEP = "step-"
_ALIGNMENT = 64  # bytes, so that kernels load from a view as they do from a tensor of its own
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


@dataclass(frozen=True)
class _Layout:
    """Where tensors lie in a block of bytes: for each name its dtype, its shape and its first byte."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]
    nbytes: int

    @classmethod
    def of(cls, tensors: Packed) -> _Layout:
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = (tensor.dtype, tuple(tensor.shape), end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        return cls(places, end)

    @classmethod
    def of_file(cls, path: Path) -> _Layout:
        """That of a safetensors file, whose header says it and whose data lie one after the other."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        places = {
            name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        return cls(places, path.stat().st_size)

    def views(self, block: torch.Tensor) -> Packed:
        """The tensors in a block of bytes, without a copy."""
        return {
            name: block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (dtype, shape, start) in self.tensors.items()
        }


class _Loaded:
    """A step on its way to a device."""

    def __init__(self, block: torch.Tensor, layout: _Layout, device: torch.device, stream: Any) -> None:
        self._event = None
        if stream is not None:
            with torch.cuda.stream(stream):
                block = block.to(device, non_blocking=True)
            self._event = stream.record_event()
        self._block = block.to(device)
        self._views = layout.views(self._block)

    def tensors(self) -> Packed:
        """The tensors, to be used on the current stream."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._block.device)
            current.wait_event(self._event)
            self._block.record_stream(current)
        return self._views


class MapStore(ABC):
    """Tensors by step and name; the step after the one that was read is fetched ahead."""

    def __init__(self) -> None:
        self._ahead: tuple[int, torch.device, Future[_Loaded]] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fpe-recording")
        self._streams: dict[torch.device, Any] = {}

    @abstractmethod
    def write(self, step: int, tensors: Packed) -> None:
        """Keep a step's tensors."""

    @abstractmethod
    def fetch(self, step: int) -> tuple[torch.Tensor, _Layout]:
        """A step's block of bytes, where it is kept, and what lies in it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all steps."""

    def read(self, step: int, device: torch.device) -> Packed:
        """A step's tensors on ``device``; the next step's are fetched in the background meanwhile."""
        if self._ahead is not None and self._ahead[:2] == (step, device):
            loaded = self._ahead[2].result()
        else:
            loaded = self._load(step, device)
        self._ahead = (step + 1, device, self._worker.submit(self._load, step + 1, device))
        return loaded.tensors()

    def release(self) -> None:
        """Let go of what was fetched ahead."""
        self._ahead = None

    def _load(self, step: int, device: torch.device) -> _Loaded:
        block, layout = self.fetch(step)
        stream = None
        if device.type == "cuda" and block.device.type == "cpu":
            # A stream of its own, so that the copy runs beside the step before.
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            block = block if block.is_pinned() else block.pin_memory()
        return _Loaded(block, layout, device, stream)


class MemoryStore(MapStore):
    """Steps in the memory of one device; on the CPU beside a GPU, pinned, so that copies overlap with computing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._pinned = device.type == "cpu" and torch.cuda.is_available()
        self._steps: dict[int, tuple[torch.Tensor, _Layout]] = {}
        self._views: dict[int, Packed] = {}

    def write(self, step: int, tensors: Packed) -> None:
        layout = _Layout.of(tensors)
        block = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)
        self._steps[step], self._views[step] = (block, layout), layout.views(block)
        for name, kept in self._views[step].items():
            kept.copy_(tensors[name])

    def fetch(self, step: int) -> tuple[torch.Tensor, _Layout]:
        return self._steps.get(step, (torch.empty(0, dtype=torch.uint8), _Layout({}, 0)))

    def read(self, step: int, device: torch.device) -> Packed:
        if device == self._device:
            return self._views.get(step, {})
        return super().read(step, device)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for views in self._views.values() for tensor in views.values())


class FileStore(MapStore):
    """Steps in a folder, a memory-mapped safetensors file each.

    Each file is written under another name and renamed; the index, which lists them all, is written last. A folder
    without one belongs to a recording that was killed, and is refused.
    """

    def __init__(self, folder: Path, files: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._files = {} if files is None else files
        self._layouts: dict[str, _Layout] = {}

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

    def write(self, step: int, tensors: Packed) -> None:
        self.write_tensors(_step_file(step), tensors)

    def fetch(self, step: int) -> tuple[torch.Tensor, _Layout]:
        name = _step_file(step)
        if name not in self._files:
            return torch.empty(0, dtype=torch.uint8), _Layout({}, 0)
        if name not in self._layouts:
            self._layouts[name] = _Layout.of_file(self.folder / name)
        layout = self._layouts[name]
        block = torch.from_file(str(self.folder / name), shared=False, size=layout.nbytes, dtype=torch.uint8)
        return block, layout

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
