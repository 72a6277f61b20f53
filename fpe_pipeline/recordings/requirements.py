"""What recording and replaying ask of a model and its scheduler."""

from __future__ import annotations

from typing import Any

__all__ = ["UNWATCHED", "check_deterministic", "is_guided"]

#: Why a session of a recording has no watchers.
UNWATCHED = (
    "heat maps are read from a run of source and targets together, and a recording runs them apart: put heat_maps "
    "around pipe(source, targets, edit=…)"
)

#: In names of samplers that add noise in each step.
_NOISY = ("Ancestral", "SDE", "LCM", "TCD", "DDPM", "SASolver", "CogVideoXDPM")


def is_guided(pipe: Any, guidance_scale: float) -> bool:
    """Whether a run at this scale has unconditional rows; a UNet that takes the scale itself has none."""
    return guidance_scale > 1 and pipe.denoiser.config.get("time_cond_proj_dim") is None


def check_deterministic(scheduler: Any) -> None:
    """Raise ValueError for samplers that add noise in each step, which a recording does not hold."""
    name = type(scheduler).__name__
    kind = str(scheduler.config.get("algorithm_type", ""))
    if any(word in name for word in _NOISY) or kind.startswith("sde"):
        raise ValueError(
            f"{name} adds noise in each step, which targets would have to share with a source that does not run; "
            "record with a deterministic scheduler, such as DDIM, DPM-Solver++ or Euler"
        )
