"""How times are taken.

*Rounds are interleaved*: a round calls every provider once, each round starting with the next one, so what
the machine does meanwhile (a busy neighbour, a falling clock) falls on all of them. Ratios are quotients of
samples from the same round.

*Caches are cold*: a buffer larger than the last-level cache is overwritten before each call.

*Device time*: on a GPU the events stand around the call alone, and the device is kept busy until the host has
queued it (twice the time that queueing took before, which for a backward pass is milliseconds), so that what is
measured is the work and not Python. Whole edits (`edits.py`) are timed by the wall
clock and include the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# What is overwritten before a cold call: several times the last-level cache.
CACHE_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


# For how long a GPU is kept busy while the host queues a call, in its cycles at some 2 GHz.
LEAST_BUSY_MS, MOST_BUSY_MS = 0.5, 3.0
CYCLES_A_MS = 2_000_000


def busy_ms(queueing_ms: float) -> float:
    """How long to keep the device busy before a call that last took the host `queueing_ms`.

    A call that waits for the device takes as long as that is busy, so there is an end to it.
    """
    return min(max(2 * queueing_ms, LEAST_BUSY_MS), MOST_BUSY_MS)


@dataclass(frozen=True)
class Effort:
    """How long to measure. Everything is an upper bound but `least_rounds`."""

    rounds: int = 11
    least_rounds: int = 3
    seconds: float = 20.0
    # A sample is the median of as many calls as fit this time: it takes the edge off short calls.
    sample_ms: float = 20.0
    calls_a_sample: int = 20


QUICK = Effort(rounds=5, seconds=4.0, sample_ms=5.0, calls_a_sample=5)
THOROUGH = Effort()


class Clock:
    """Times one call, cache-cold, on one device."""

    def __init__(
        self, device: str, *, cold: bool = True, wall: bool = False, processor: bool = False, in_a_row: int = 1
    ) -> None:
        """`wall` takes the host's clock around the call on a GPU too, the device idle before and after; `processor`
        takes this process's time on a processor, whatever else ran meanwhile: with one thread, for what a CPU does.
        By either, a time is that of one of so many calls `in_a_row`, after which the device is waited for once: the
        host prepares the next while the device is at one, as in a loop."""
        self.cuda = device.startswith("cuda")
        self._now = time.process_time_ns if processor else time.perf_counter_ns
        self.wall = wall or not self.cuda
        self._in_a_row = in_a_row
        self._buffer = torch.empty(
            CACHE_BYTES["cuda" if self.cuda else "cpu"] if cold else 0, dtype=torch.int8, device=device
        )

    def calls(self, call: Call, count: int) -> list[float]:
        """Milliseconds of each of `count` calls."""
        return self._by_host(call, count) if self.wall else self._by_events(call, count)

    def _by_host(self, call: Call, count: int) -> list[float]:
        times = []
        for _ in range(count):
            self._buffer.zero_()
            self._wait()
            start = self._now()
            for _ in range(self._in_a_row):
                call()
            self._wait()
            times.append((self._now() - start) / 1e6 / self._in_a_row)
        return times

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _by_events(self, call: Call, count: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        busy = MOST_BUSY_MS
        for start, end in events:
            self._buffer.zero_()
            torch.cuda._sleep(int(busy * CYCLES_A_MS))
            start.record()
            began = time.perf_counter_ns()
            call()
            busy = busy_ms((time.perf_counter_ns() - began) / 1e6)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def interleaved(
    calls: Mapping[str, Call],
    device: str,
    effort: Effort = THOROUGH,
    *,
    wall: bool = False,
    processor: bool = False,
    in_a_row: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Samples in milliseconds for every call, as many for each, in rounds that all of them share."""
    clock = Clock(device, wall=wall, processor=processor, in_a_row=in_a_row)
    names = list(calls)
    estimate = {}
    for name in names:
        (first,) = clock.calls(calls[name], 1)
        # A call of seconds has had its warm-up when it was checked; another one would only cost time.
        estimate[name] = first if first > 1e3 else min(clock.calls(calls[name], 2))

    row_ms = {name: in_a_row * estimate[name] for name in names}
    repeats = {n: max(1, min(effort.calls_a_sample, int(effort.sample_ms / max(row_ms[n], 1e-3)))) for n in names}
    round_ms = sum(repeats[name] * row_ms[name] for name in names)
    rounds = max(effort.least_rounds, min(effort.rounds, int(1e3 * effort.seconds / max(round_ms, 1e-3))))

    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            samples[name].append(statistics.median(clock.calls(calls[name], repeats[name])))
    return {name: tuple(values) for name, values in samples.items()}
