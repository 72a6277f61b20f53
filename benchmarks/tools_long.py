"""Tools at sizes where a call takes many seconds: every way in as few calls as three samples need.

The first call of each way gives its output, its peak memory and its first sample: counting allocations costs
microseconds for each of PyTorch's operations, of a call that takes seconds. Tools whose steps are the same are measured
in the same rounds, so that the step without a tool is one of them and not one for each. The original's way, where it
writes maps out, is called once: its one sample stands beside ours of the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .measure import Clock
from .memory import counted
from .rows import Row
from .table_parts import DENSE, UNEDITED
from .tools_cases import TOOLS
from .tools_ways import Tool

__all__ = ["ROUNDS", "groups", "run_together"]

ROUNDS = 3
SMALL = 8  # side of latents at which a tool is asked which step it shares


def groups(tools: Sequence[str]) -> list[list[str]]:
    """Tools that are measured in the same rounds, in order of appearance."""
    by_step: dict[str, list[str]] = {}
    for tool in tools:
        by_step.setdefault(TOOLS[tool](SMALL, "cpu").shared or tool, []).append(tool)
    return list(by_step.values())


def run_together(tools: Sequence[str], side: int, device: str = "cpu", rounds: int = ROUNDS) -> list[Row]:
    """The rows of several tools whose step without any tool is the same.

    Args:
        tools: keys of `TOOLS`, of one of :func:`groups`.
        side: of the latents.
        device: "cpu" or "cuda".
        rounds: samples of ours, and of the step without a tool.
    """
    measured = {name: Tool(name, side, device) for name in tools}
    # The step without a tool is the first tool's, and stands for the others'.
    ways = {("", UNEDITED): measured[tools[0]].ways[UNEDITED]}
    for name, tool in measured.items():
        ways |= {(name, way): call for way, call in tool.ways.items() if way != UNEDITED}
    outputs: dict[tuple[str, str], torch.Tensor] = {}
    samples: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    for key, call in ways.items():
        first = counted(call, device)
        assert isinstance(first.result, torch.Tensor)
        outputs[key], samples[key], peaks[key] = first.result, [first.milliseconds], first.peak
    errors = {name: tool.error({way: outputs[_key(name, way)] for way in tool.ways}) for name, tool in measured.items()}
    wrong = {name: tool.wrong(errors[name]) for name, tool in measured.items()}
    again = {key: call for key, call in ways.items() if key[1] != DENSE and not wrong.get(key[0])}
    _more_rounds(again, samples, device, rounds)
    rows = []
    for name, tool in measured.items():
        rows += [*tool.missing(), *wrong[name]]
        if not wrong[name]:
            of_tool = {way: samples[_key(name, way)] for way in tool.ways}
            rows += tool.measured(of_tool, {way: peaks[_key(name, way)] for way in tool.ways}, errors[name])
    return rows


def _key(tool: str, way: str) -> tuple[str, str]:
    return ("", way) if way == UNEDITED else (tool, way)


def _more_rounds(
    ways: dict[tuple[str, str], Callable[[], torch.Tensor]],
    samples: dict[tuple[str, str], list[float]],
    device: str,
    rounds: int,
) -> None:
    """Sample until there are ``rounds``, each round beginning with another way."""
    clock, keys = Clock(device, wall=True), list(ways)
    for number in range(1, rounds):
        turn = number % len(keys)
        for key in keys[turn:] + keys[:turn]:
            samples[key] += clock.calls(ways[key], 1)
