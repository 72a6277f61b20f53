"""What a stage of a session is told."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """What a stage is told: where results go, the device, when its time is over, whether it is a dry run on a CPU."""

    out: Path
    device: str
    until: float  # seconds since the epoch
    dry: bool = False
    options: tuple[tuple[str, str], ...] = ()

    def left(self) -> float:
        return self.until - time.time()

    @property
    def backend(self) -> str:
        return "triton" if self.device == "cuda" else "torch"

    def option(self, name: str, default: str) -> str:
        return dict(self.options).get(name, default)
