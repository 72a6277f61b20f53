"""What is recorded of a run, known before any denoising, and the recording that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..edits import Edit, FreePromptEdit
from ..models.sites import Site
from ..sampling.noise_schedule import NoiseSchedule
from .contents import Contents
from .folder_store import FileStore
from .recording import Recording
from .store import MapStore, MemoryStore


class RecordedSource(Protocol):
    """The run that is recorded."""

    @property
    def prompt(self) -> str: ...

    @property
    def guidance_scale(self) -> float: ...

    @property
    def steps(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Plan:
    """What is recorded of a run.

    Args:
        noise: of one row, on the device and in the dtype of the run.
        schedule: of the run.
        contents: the parts that are kept.
        window, paths: of the plain Free-Prompt-Editing among the edits, which a replay does by default.
        nbytes: that the recording takes.
        told: the same in words.
        size: of the image in pixels (height, width), where the noise does not show it.
    """

    noise: torch.Tensor
    schedule: NoiseSchedule
    contents: Contents
    window: tuple[float, float] | None
    paths: tuple[str, ...]
    nbytes: int
    told: str
    size: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        edits: Sequence[Edit],
        sites: Sequence[Site],
        contents: Contents,
        noise: torch.Tensor,
        schedule: NoiseSchedule,
        nbytes: int,
        words: str,
        size: tuple[int, int] | None = None,
    ) -> Plan:
        """The plan for ``contents`` of the layers ``sites``; ``words`` say in how many steps, and how."""
        plain = next((one for one in edits if isinstance(one, FreePromptEdit) and one.is_plain), None)
        return cls(
            noise=noise,
            schedule=schedule,
            contents=contents,
            window=None if plain is None else (plain.window.start, plain.window.stop),
            paths=() if plain is None else tuple(site.path for site in plain.select(tuple(sites))),
            nbytes=nbytes,
            told=f"{mebibytes(nbytes)} for {len(contents)} layers {words}",
            size=size,
        )

    def check_budget(self, most: int | None, less: str) -> None:
        """Raise ValueError where the recording takes more than ``most`` bytes; ``less`` says what takes fewer."""
        if most is not None and self.nbytes > most:
            raise ValueError(
                f"a recording takes {self.told}, more than budget_bytes={most} ({mebibytes(most)}): raise it, {less}, "
                "or a folder as placement"
            )

    def recording(
        self,
        source: RecordedSource,
        latents: Sequence[torch.Tensor],
        store: MapStore,
        **rest: Any,
    ) -> Recording:
        """What was recorded of ``source``, written where it is kept in a folder.

        Args:
            latents: before and after every step.
            rest: of `Recording`, what the plan does not say.
        """
        recording = Recording(
            prompt=source.prompt,
            guidance_scale=source.guidance_scale,
            steps=source.steps,
            schedule=self.schedule,
            contents=self.contents,
            window=self.window,
            paths=self.paths,
            latents=torch.stack(list(latents)),
            store=store,
            **rest,
        )
        if isinstance(store, FileStore):
            recording.save(store)
        return recording


class KeptLatents(list[torch.Tensor]):
    """The latents before and after every step, as a callback of a pipeline's steps keeps them.

    Blends of a replay mix the targets' latents at the end of a step with these, where a solver's loop may hold those in
    the middle of the next one already.
    """

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        at_node = getattr(pipe.scheduler, "at_node", None)
        self.append((latents if at_node is None else at_node(latents)).clone())
        return {}


def new_store(placement: str | Path, device: torch.device) -> MapStore:
    """An empty store at ``placement``: "device", "cpu" or a new folder."""
    if placement == "device":
        return MemoryStore(device)
    if placement == "cpu":
        return MemoryStore(torch.device("cpu"))
    return FileStore.create(Path(placement))


def mebibytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**20:,.1f} MiB"
