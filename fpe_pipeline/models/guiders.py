"""The guiders of a pipeline of diffusers, by which some of its pipelines guide."""

from __future__ import annotations

from typing import Any

__all__ = ["guider_settings", "guiders_of"]

#: Where pipelines keep them; the second is for prompts that quote something.
_NAMES = ("guider", "ocr_guider")


def guiders_of(pipe: Any) -> dict[str, Any]:
    """The guiders that a pipeline has, by where it keeps them."""
    found = {name: getattr(pipe, name, None) for name in _NAMES}
    return {name: guider for name, guider in found.items() if guider is not None}


def guider_settings(pipe: Any) -> dict[str, dict[str, Any]]:
    """How each of them guides, but for its scale, which a call says."""
    return {name: _settings(guider) for name, guider in guiders_of(pipe).items()}


def _settings(guider: Any) -> dict[str, Any]:
    said = {key: value for key, value in guider.config.items() if not key.startswith("_") and key != "guidance_scale"}
    # Those that were set since it was made are attributes, some of them named as if they were nobody's.
    own = vars(guider)
    now = {key: own.get(key, own.get(f"_{key}", value)) for key, value in said.items()}
    return {"class": type(guider).__name__, **now}
