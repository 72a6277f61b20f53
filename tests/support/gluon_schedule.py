"""Warps of an emulated program as threads of which one runs at a time, drawn by a seed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


class Fault(AssertionError):
    """What would hang, or read what is not there yet, on the device."""


class Schedule:
    """Threads that take turns, and the copies that are under way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # Some are fast and some are slow, in any of which a mistake may hide.
        self.speeds = [self.random.choice((1, 10, 100)) for _ in range(8)]
        self.copying = self.random.choice((0.05, 0.3, 0.9))
        self.changed = threading.Condition()
        self.ready: dict[int, Callable[[], bool]] = {}  # of each thread that has not ended: whether it can go on
        self.where: dict[int, str] = {}
        self.running: int | None = None
        self.copies: list[Callable[[], None]] = []
        self.fault: BaseException | None = None

    def run(self, functions: Iterable[Callable[[], None]]) -> None:
        """All of them, to the end.

        Raises:
            Fault: if none can go on, or by one of them.
        """
        threads = []
        for number, function in enumerate(functions):
            self.ready[number] = lambda: True
            threads.append(threading.Thread(target=self._thread, args=(number, function), daemon=True))
        self._next()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while self.copies and self.fault is None:
            self.copies.pop()()
        if self.fault is not None:
            raise self.fault

    def _thread(self, number: int, function: Callable[[], None]) -> None:
        WARPS.number, WARPS.in_flight = number, []
        try:
            self._until_drawn(number)
            function()
            if WARPS.in_flight:
                raise Fault(f"warps {number} end with products in flight")
        except BaseException as problem:
            self.fault = self.fault or problem
        with self.changed:
            self.ready.pop(number, None)
            self._next()
            self.changed.notify_all()

    def switch(self, where: str = "", condition: Callable[[], bool] = lambda: True) -> None:
        """Let others run, until this one is drawn again and ``condition`` holds."""
        number = WARPS.number
        with self.changed:
            self.ready[number], self.where[number] = condition, where
            self._next()
            self.changed.notify_all()
        self._until_drawn(number)

    def _until_drawn(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.running == number or self.fault is not None)
        if self.fault is not None:
            raise Fault("stopped")

    def _next(self) -> None:
        """Draw who runs; copies are drawn with them."""
        while True:
            able = [number for number, condition in self.ready.items() if condition()]
            if self.copies and (not able or self.random.random() < self.copying):
                self.copies.pop(self.random.randrange(len(self.copies)))()
            elif able:
                (self.running,) = self.random.choices(able, [self.speeds[number] for number in able])
                return
            else:
                self.running = None
                if self.ready and self.fault is None:
                    waiting = "; ".join(f"{number}: {self.where.get(number)}" for number in self.ready)
                    self.fault = Fault(f"deadlock, every warp waits: {waiting}")
                return


@dataclass
class Running:
    """The program that runs now.

    Args:
        schedule: of its warps.
        program, programs: its number, and how many the launch has.
        loads: how often each box was fetched, by name, program and place.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(0))
    program: int = 0
    programs: int = 1
    loads: Counter[tuple] = field(default_factory=Counter)


#: What a thread is: the number of its warps, and their products in flight.
WARPS = threading.local()
NOW = Running()
