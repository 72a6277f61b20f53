"""Grids: one run for each method, strength or window, all from the same noise."""

from __future__ import annotations

from ..edits.method import REQUIRED
from ..edits.registry import METHODS, methods_of
from ..errors import InputError
from ..models.sources import find_model
from ..runs.model_defaults import defaults_for
from ..runs.settings import SELF_REPLACE, Settings

__all__ = ["AXES", "sweep"]

AXES = ("methods", "strengths", "windows")
_ENDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def sweep(settings: Settings, axis: str) -> list[tuple[str, Settings]]:
    """(label, settings) of each run of a grid.

    Args:
        settings: what the runs have in common.
        axis: one of :data:`AXES`. Methods that need words to be named are left out of theirs.

    Raises:
        InputError: another axis, or a method that has no window.
    """
    plain = settings.changed(control=False)
    served = find_model(settings.model).served
    usual = defaults_for(settings.model, {}).get("self_replace", SELF_REPLACE)
    if axis == "methods":
        known = methods_of(served.kind)
        # Of a UNet each method has layers of its own; on a transformer those that are chosen are the model's.
        layers = {"levels": None, "max_tokens": None, "layers": None if served.is_unet else plain.layers}
        return [
            (
                method.title,
                plain.changed(method=name, options={}, self_replace=usual if method.window else SELF_REPLACE, **layers),
            )
            for name, method in known.items()
            if all(option.default is not REQUIRED for option in method.choices)
        ]
    if axis == "strengths":
        window = settings.self_replace if METHODS[settings.method].window else usual
        return [
            (f"strength {s:g}", plain.changed(method="fpe-soft", options={"strength": s}, self_replace=window))
            for s in _STRENGTHS
        ]
    if axis == "windows":
        if METHODS[settings.method].window is None:
            raise InputError(f"{settings.method} has no window of steps that is the source's; choose fpe")
        start = settings.self_replace[0]
        ends = [end for end in _ENDS if end >= start]
        return [(f"steps {start:g} to {end:g}", plain.changed(self_replace=(start, end))) for end in ends]
    raise InputError(f"a grid goes over {', '.join(AXES)}, got {axis!r}")
