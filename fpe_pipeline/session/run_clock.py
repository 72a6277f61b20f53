"""Where a run is: the step of each call, which is read and not counted, and the call at which another run begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..models.adapters.adapter import ModelAdapter, ModelCall
from ..models.steps import Step

__all__ = ["RunClock"]


class RunClock:
    """The steps of a session's calls.

    Attributes:
        fixed: the step of the calls that follow, where it was set by hand.
        step: of the latest call; None before the first and while paused.
        is_paused: whether calls are left alone just now.
        calls: how many there were, paused ones included.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self.fixed: Step | None = None
        self.step: Step | None = None
        self.is_paused = False
        self.calls = 0
        self._before_pause: Step | None = None
        self._begins = True
        self._seen: list[Step] = []  # of the run under way

    def begin(self) -> None:
        """The next call is the first of a run, whatever its step."""
        self._begins = True

    @property
    def is_before_a_run(self) -> bool:
        """Whether no call has been read since a run was begun."""
        return self._begins

    def pass_by(self) -> None:
        """Note a call that is left alone."""
        self.calls += 1
        self._before_pause, self.step = self.step or self._before_pause, None

    def read(self, call: ModelCall) -> tuple[bool, Step]:
        """Note a call; whether a run begins with it, and its step."""
        self.calls += 1
        before, self.step = self.step or self._before_pause, None
        step = self.step = self._adapter.step(call) if self.fixed is None else self.fixed
        begins = self._begins or (before is not None and (step.call < before.call or step.calls != before.calls))
        self._begins = False
        return begins, step

    def note(self) -> None:
        """Count the latest call's step among those of the run."""
        assert self.step is not None
        self._seen.append(self.step)

    def finish(self) -> list[Step]:
        """The steps of the run that has ended, in order; none of them is told again."""
        seen, self._seen = self._seen, []
        return seen

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave calls alone for a while."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before
