"""Which cases are measured with whom, the most telling first: a run that is cut short has those."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .cases import Case, grid_cases, headline_cases, kernel_cases

# Enough to see where we stand in a case; the headline cases meet everyone.
MAIN = ("fpe-triton", "fpe-torch", "dense-original", "unedited", "unedited-cudnn", "sdpa")
FUSED = tuple(name for name in MAIN if name != "dense-original")

# On a CPU a case has at most this many map entries over batch and heads; more takes seconds a call. The
# longest sequences stand in the memory suite there.
CPU_SCORES = 700_000_000


@dataclass(frozen=True)
class Step:
    """A case and its providers: all of them, all but those that compile a kernel first, the main ones, or the fused."""

    case: Case
    who: str = "main"

    def choose(self, names: Iterable[str]) -> list[str]:
        if self.who in ("main", "fused"):
            return [name for name in names if name in (MAIN if self.who == "main" else FUSED)]
        if self.who == "uncompiled":
            return [name for name in names if not name.startswith("flex")]
        return list(names)


def kernel_plan(device: str, *, quick: bool = False) -> list[Step]:
    heads = headline_cases()
    if quick:
        return [Step(case) for case in heads]
    cuda = device.startswith("cuda")
    # Attention that is compiled first may take a minute for it, so on a GPU it is met last, all rivals once more.
    steps = [Step(case, "uncompiled" if cuda else "all") for case in heads]
    if cuda:
        steps += [Step(case, "uncompiled") for case in grid_cases() if case.tokens > 1024 and case.layout == "halves"]
    for case in heads:
        steps += [Step(replace(case, layout=layout), "uncompiled") for layout in ("halves", "guided")]
        steps += [Step(replace(case, op=op), "uncompiled") for op in ("capture", "replay", "adjoint", "backward")]
    if cuda:
        steps += [Step(case, "uncompiled") for case in grid_cases()]
        steps += [Step(case) for case in kernel_cases()]
        # The headline cases once more, this time with everyone: a case's rows stand for one set of rounds.
        return [*_first(steps), *(Step(case, "all") for case in heads)]
    # With more targets a dense map a row takes most of the run and says nothing new.
    cases = kernel_cases(max_scores=CPU_SCORES)
    steps += [Step(case, "main" if case.targets == 1 else "fused") for case in cases]
    return _first(steps)


def _first(steps: Iterable[Step]) -> list[Step]:
    """Each case once, as it comes first."""
    first: dict[str, Step] = {}
    for step in steps:
        first.setdefault(step.case.name, step)
    return list(first.values())
