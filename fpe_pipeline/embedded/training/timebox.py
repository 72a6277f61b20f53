"""The wall clock of a training: what each stage may take, and the end that nothing passes."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from pathlib import Path

from .whole_model import INDEX

__all__ = ["GRACE", "TimeBox"]

log = logging.getLogger(__name__)

GRACE = 8.0  # seconds beyond the time box before the process is ended


class TimeBox:
    """Wall time from now on.

    Args:
        minutes: everything has to be done by then; ``None`` sets no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.begun = time.monotonic()
        self.end = math.inf if minutes is None else self.begun + 60 * minutes
        self.stages: dict[str, float] = {}
        self._last = self.begun
        self._guard: threading.Timer | None = None

    @property
    def limited(self) -> bool:
        """Whether there is an end."""
        return self.end < math.inf

    @property
    def total(self) -> float:
        """Seconds from beginning to end."""
        return self.end - self.begun

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def share(self, fraction: float) -> float:
        """The time, as of :func:`time.monotonic`, when so much of what is left now is over."""
        return time.monotonic() + fraction * max(0.0, self.left)

    def mark(self, stage: str) -> None:
        """A stage ended: keeps and tells what it took."""
        now = time.monotonic()
        self.stages[stage] = round(now - self._last, 2)
        log.info("%s: %.1f s, %.1f s since the start", stage, now - self._last, now - self.begun)
        self._last = now

    def guard(self, grace: float, output: Path) -> None:
        """End the process ``grace`` seconds after the end, whatever it does: the export on disk is what there is."""
        if not self.limited:
            return

        def leave() -> None:
            exported = (output / INDEX).is_file()
            said = f"the model in {output} is whole" if exported else f"no model in {output} yet; run it again to go on"
            log.error("the time is over and something still runs: left; %s", said)
            logging.shutdown()
            os._exit(0 if exported else 3)

        self._guard = threading.Timer(max(0.0, self.left + grace), leave)
        self._guard.daemon = True
        self._guard.start()

    def release(self) -> None:
        """Done in time."""
        if self._guard is not None:
            self._guard.cancel()
