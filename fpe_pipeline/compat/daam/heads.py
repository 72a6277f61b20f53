"""``save_heads`` and ``load_heads``: a run's cross-attention, kept as queries and keys, in the place of another run's.

DAAM writes every map out. Its factors are what decides it, and they are smaller; they lie in one file for each call of
a layer, in the order of the calls: ``0.pt``, ``1.pt``, ….
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["KeptHeads"]


class KeptHeads:
    """Hooks on the projections of layers that keep what they give, or put what was kept in its place.

    Args:
        layers: the attention modules, by path.
        folder: where the files lie.
        loads: whether they are read; otherwise they are written.

    Raises:
        ValueError: a layer whose projections are fused.
    """

    def __init__(self, layers: dict[str, Any], folder: Path, *, loads: bool) -> None:
        self._folder, self._loads, self._call = folder, loads, 0
        self._part: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        if not loads:
            folder.mkdir(parents=True, exist_ok=True)
        for path, attn in layers.items():
            if getattr(attn, "fused_projections", False):
                self.remove()
                raise ValueError(f"{path} has fused projections: call pipe.unfuse_qkv_projections() to keep its heads")
            self._handles.append(attn.to_q.register_forward_hook(self._hook(path, "query")))
            self._handles.append(attn.to_k.register_forward_hook(self._hook(path, "key")))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, path: str, part: str) -> Any:
        def write(module: Any, args: Any, output: torch.Tensor) -> None:
            self._part[part] = output.detach().cpu()
            if part == "key":
                torch.save({"layer": path, **self._part}, self._file())
                self._call += 1

        def read(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            if part == "query":
                self._part = self._read(path)
            kept = self._part[part]
            if part == "key":
                self._call += 1
            if kept.shape != output.shape:
                raise ValueError(
                    f"the heads kept of {path} have a {part} of {tuple(kept.shape)}, and this run's is "
                    f"{tuple(output.shape)}: load them into a run of the same size, prompts and guidance"
                )
            return kept.to(output)

        return torch.compiler.disable(read if self._loads else write)

    def _file(self) -> Path:
        return self._folder / f"{self._call}.pt"

    def _read(self, path: str) -> dict[str, torch.Tensor]:
        if not self._file().is_file():
            raise FileNotFoundError(
                f"{self._file()} is not there, which would be call {self._call} of the layers: run with "
                "save_heads=True first, for as many steps and with the same data_dir"
            )
        kept = torch.load(self._file(), map_location="cpu", weights_only=True)
        if not isinstance(kept, dict) or kept.get("layer") != path:
            found = kept.get("layer") if isinstance(kept, dict) else "a written-out map of DAAM's own"
            raise ValueError(f"{self._file()} holds {found}, and {path} was expected: save the heads with this package")
        return kept
