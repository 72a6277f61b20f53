"""A recording in a folder: a memory-mapped safetensors file for each step, and an index that vouches for all of them.

Each file is written under another name, brought to the disk and renamed; the index is written last. It lists every
file with its size, shapes and digest, and carries a digest of itself, so that whatever it says after the check is what
was written. A folder without one belongs to a recording that was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..atomic_folder import replaced, save_tensors, write_text
from ..errors import InputError
from ..texts import check_readable_name
from .keys import Contents, Part, TensorKey, Tensors
from .store import Layout, MapStore, TensorPlace

__all__ = ["FileStore"]

FORMAT = 7
# 3 has a digest of the noise levels in place of the levels; up to 4, latents of a loop that may be inside of a step;
# up to 5, of a source on a transformer no tokens; up to 6, none on one whose texts are of several lengths.
READABLE = (3, 4, 5, 6, FORMAT)
INDEX = "index.json"
LATENTS = "latents.safetensors"
_STEP = "step-"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}


class FileStore(MapStore):
    """Steps in a folder; a file is held against its digest when it is first read."""

    def __init__(self, folder: Path, files: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._files = {} if files is None else files
        self._layouts: dict[str, Layout[str]] = {}  # of the files that were verified
        self._made: list[Path] = []  # folders, outermost first
        self._written: list[str] = []

    @classmethod
    def create(cls, folder: Path) -> FileStore:
        """An empty folder to write to.

        Raises:
            InputError: it holds something, or cannot be made.
        """
        try:
            check_readable_name(folder.absolute())
        except ValueError as error:
            raise InputError(f"cannot record: {error}") from None
        store = cls(folder)
        try:
            for path in reversed([folder, *folder.parents]):
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    store._made.append(path)
            taken = next(folder.iterdir(), None)
        except OSError as error:
            store.discard()
            raise InputError(
                f"cannot record into '{folder}': {error.strerror or error}; pass another folder"
            ) from error
        if taken is not None:
            raise InputError(f"'{folder}' is not empty (it holds '{taken.name}'); record into a new folder")
        return store

    @classmethod
    def open(cls, folder: Path) -> tuple[FileStore, dict[str, Any]]:
        """A finished folder and what its index says of the recording, with its format.

        Raises:
            InputError: no recording, an unfinished one, another version's, or files that are not those of the index.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            what = "was not finished: it has no index" if folder.is_dir() else "does not exist"
            raise InputError(f"the recording '{folder}' {what}; record it again") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"the recording '{folder}' is damaged: {error}; record it again") from error
        if not isinstance(index, dict) or index.get("format") not in READABLE:
            found = index.get("format") if isinstance(index, dict) else type(index).__name__
            raise InputError(f"expected a recording of format {FORMAT}, '{folder}' has {found}; record it again")
        if index.pop("digest", None) != _digest_of_index(index):
            raise InputError(f"the recording '{folder}' is damaged: its index is not what was written; record it again")
        store = cls(folder, index["files"])
        for name in index["files"]:
            store._check_header(name)
        recording = index["recording"]
        return store, recording | {"contents": _parsed(recording["contents"]), "format": index["format"]}

    def write(self, step: int, tensors: Tensors) -> None:
        self._write_file(_step_file(step), {str(key): tensor for key, tensor in tensors.items()})

    def fetch(self, step: int) -> tuple[torch.Tensor, Layout[TensorKey]]:
        name = _step_file(step)
        if name not in self._files:
            return torch.empty(0, dtype=torch.uint8), Layout({}, 0)
        block, layout = self._block(name)
        return block, Layout({TensorKey.parse(text): at for text, at in layout.tensors.items()}, layout.nbytes)

    def write_latents(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what belongs to no step."""
        self._write_file(LATENTS, tensors)

    def read_latents(self) -> dict[str, torch.Tensor]:
        """What :meth:`write_latents` kept."""
        block, layout = self._block(LATENTS)
        return {name: view.clone() for name, view in layout.views(block).items()}

    def check_steps(self, steps: Iterable[int]) -> None:
        """Raise InputError unless there are the latents and the files of these steps, and no others."""
        expected = {LATENTS, *map(_step_file, steps)}
        if self._files.keys() != expected:
            wrong = sorted(self._files.keys() ^ expected)
            raise InputError(
                f"the recording '{self.folder}' is damaged: its index and its contents disagree about "
                f"{', '.join(map(repr, wrong))}; record it again"
            )

    def finish(self, contents: Contents, recording: dict[str, Any]) -> None:
        """Write the index, of contents and what else there is to say: from here on the folder is a recording."""
        written = recording | {"contents": _written_out(contents)}
        index = {"format": FORMAT, "recording": written, "files": self._files}
        self._written.append(INDEX)
        write_text(self.folder / INDEX, json.dumps(index | {"digest": _digest_of_index(index)}, indent=1))

    def discard(self) -> None:
        """Remove what was written since :meth:`create`, and the folders that it made."""
        for name in self._written:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # somebody else's files keep their folder
                path.rmdir()

    @property
    def nbytes(self) -> int:
        return sum(entry["bytes"] for name, entry in self._files.items() if name.startswith(_STEP))

    def _write_file(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._written.append(name)
        with replaced(self.folder / name) as partial:
            save_tensors(partial, ready)
            block = _mapped(partial)
            self._files[name] = {
                "bytes": block.numel(),
                "digest": _digest(block),
                "tensors": {key: list(tensor.shape) for key, tensor in ready.items()},
            }

    def _block(self, name: str) -> tuple[torch.Tensor, Layout[str]]:
        """A file's bytes and what lies in them.

        Raises:
            InputError: it is not what was written.
        """
        path = self.folder / name
        try:
            block = _mapped(path)
        except (OSError, RuntimeError) as error:
            raise InputError(f"the recording's '{path}' cannot be read: {error}; record it again") from error
        if name not in self._layouts:
            if _digest(block) != self._files[name]["digest"]:
                raise InputError(
                    f"the recording's '{path}' is damaged: its digest is not that of what was written; record it again"
                )
            self._layouts[name] = _layout_of_file(block)
        return block, self._layouts[name]

    def _check_header(self, name: str) -> None:
        """What costs no reading of the tensors: that the file is there, its size and the shapes in it."""
        path, expected = self.folder / name, self._files[name]
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


def _written_out(contents: Contents) -> dict[str, dict[str, tuple[int, ...]]]:
    """Contents as an index holds them."""
    return {path: {str(part): steps for part, steps in parts.items()} for path, parts in contents.items()}


def _parsed(contents: Mapping[str, Mapping[str, Iterable[int]]]) -> Contents:
    """Contents out of an index."""
    return {path: {Part.parse(text): tuple(at) for text, at in parts.items()} for path, parts in contents.items()}


def _step_file(step: int) -> str:
    return f"{_STEP}{step:04d}.safetensors"


def _mapped(path: Path) -> torch.Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _digest(block: torch.Tensor) -> str:
    # Computed outside Python's lock: the step that is fetched ahead is verified while the one before it computes.
    return hashlib.blake2b(block.numpy().data, digest_size=32).hexdigest()


def _digest_of_index(index: dict[str, Any]) -> str:
    text = json.dumps(index, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _layout_of_file(block: torch.Tensor) -> Layout[str]:
    """That of a safetensors file, whose header says it and whose data lie one after the other."""
    length = int.from_bytes(block[:8].numpy().tobytes(), "little")
    header = json.loads(block[8 : 8 + length].numpy().tobytes())
    places = {
        name: TensorPlace(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return Layout(places, block.numel())
