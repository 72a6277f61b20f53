"""Compile ahead, in parallel and without a device, what a session will launch; one cache on disk serves all stages.

The programs follow from the problems that are checked and the cases that are timed, planned on tensors without storage.
Each is compiled by Triton's own launcher, to which a driver that only knows the chip's name is given: what is found in
the cache later is what that launcher looks for. So a cache may also be filled on a machine without a GPU and carried.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import sass
from .pool import Task, share_out
from .problems import Problem, launches_of

if TYPE_CHECKING:
    from fpe_kernels.backends.triton.launch import Launch

    from ..candidates import Choice
    from ..cases import Case

Subject: TypeAlias = "Problem | tuple[Case, Choice | None]"
"""What is computed: a problem, or a case with a choice (None for the committed configuration)."""

COMPILE_LIMIT = 60.0  # seconds; a program takes two or three, and a compiler that hangs takes for ever


class ChipWithoutDevice:
    """What of a driver Triton's launcher asks before it launches: the chip. Installed by :func:`offline`."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def offline(arch: str) -> Iterator[None]:
    """Inside the block launches compile for `arch`, a key of ``offline.TARGETS``, and need no device."""
    from triton.runtime.driver import driver

    from fpe_kernels.backends.triton.offline import TARGETS

    before = driver._active  # asking for it in public makes one, which fails where there is no device
    driver.set_active(ChipWithoutDevice(TARGETS[arch]))
    try:
        yield
    finally:
        driver._active = before


def compile_launch(launch: Launch, arch: str) -> float:
    """Compile into the cache; the seconds of processor time that it took, the assembler's included."""
    begun = sum(os.times()[:4])
    compiled(launch, arch)
    return sum(os.times()[:4]) - begun


def compiled(launch: Launch, arch: str) -> Any:
    """The program of ``launch``, from the cache where it is there."""
    with offline(arch):
        return launch.kernel.warmup(grid=(launch.programs,), **launch._arguments())


def identity(launch: Launch) -> str:
    """What sets one compiled program apart from another."""
    from fpe_kernels.backends.triton.offline import _specialise

    source = _specialise(launch)
    return f"{source.hash()} {sorted(launch.config.options.items())}"


def of_case(case: Case, choice: Choice | None, arch: str) -> list[Launch]:
    """What `case` launches forward, with the committed configurations or with `choice`."""
    from contextlib import nullcontext

    import torch

    from fpe_kernels.backends.protocol import Maps
    from fpe_kernels.backends.triton import forward
    from fpe_kernels.ops import empty_heads, empty_logsumexp

    like = torch.empty(0, dtype=torch.float16, device="meta")
    query, key, value = (
        empty_heads(like, rows, case.heads, case.tokens, case.head_dim) for rows in (case.maps, case.maps, case.batch)
    )
    with launches_of(arch) as made, choice.installed() if choice else nullcontext():
        known = case.op == "replay"
        maps = Maps(query, key, None, case.map_index, case.head_dim**-0.5)
        forward.apply(maps, value, empty_heads(like, *value.shape), empty_logsumexp(query), known)
    return made


def compile_subject(subject: Subject, arch: str, place: int) -> float:
    """In a worker: compile launch number `place` of what `subject` launches; the seconds that it took."""
    launches = subject.launches(arch) if isinstance(subject, Problem) else of_case(*subject, arch)
    return compile_launch(launches[place], arch)


def compile_choice(case: Case, choice: Choice | None, arch: str) -> None:
    """In a worker: compile all that a choice launches for `case`.

    Raises:
        ValueError: for a candidate on Hopper that is not worth its time: what it launches spills or waits for every
            product, which no count of registers shows before.
    """
    from ..candidates import Candidate

    for launch in of_case(case, choice, arch):
        program = compiled(launch, arch)
        if arch != "sm_90" or not isinstance(choice, Candidate):
            continue
        found = sass.read(sass.disassemble(program.asm["cubin"]))
        if found.serialised or found.spills:
            what = "waits for every product" if found.serialised else f"spills ({found.spills} instructions)"
            raise ValueError(f"{choice} {what}: refused")


def tasks_for(subjects: Iterable[Subject], arch: str) -> list[Task]:
    """A task a program, each program once, in the order of the subjects."""
    tasks: dict[str, Task] = {}
    for subject in subjects:
        launches = subject.launches(arch) if isinstance(subject, Problem) else of_case(*subject, arch)
        name = subject.name if isinstance(subject, Problem) else f"{subject[0].name}@{subject[1] or 'committed'}"
        for place, launch in enumerate(launches):
            task = Task(
                f"{launch.kernel.__name__} of {name}",
                "benchmarks.workers.programs:compile_subject",
                (subject, arch, place),
            )
            tasks.setdefault(identity(launch), task)
    return list(tasks.values())


def compile_ahead(
    tasks: Sequence[Task], workers: int, limit: float = COMPILE_LIMIT, time_left: Any = lambda: float("inf")
) -> Iterator[tuple[Task, float, str]]:
    """Compile everything; for each program its task, the seconds it took, and what went wrong ("" for nothing)."""
    for outcome in share_out(tasks, workers, limit, startup=limit, time_left=time_left):
        if not outcome.skipped:
            yield outcome.task, outcome.seconds if outcome.value is None else outcome.value, outcome.problem


def worker_count(most: int = 15) -> int:
    """As many processes as there are cores, but one for the session itself."""
    return max(1, min(most, len(os.sched_getaffinity(0)) - 1))


def timed_subjects(arch: str) -> list[Subject]:
    """What the timed stages launch: the plan's cases, and every choice of the tuner."""
    from ..candidates import choices, tuning_plan
    from ..plan import kernel_plan

    cases = [step.case for step in kernel_plan("cuda") if step.case.op in ("apply", "replay")]
    subjects: list[Subject] = [(case, None) for case in cases]
    return subjects + [(case, choice) for case in tuning_plan() for choice in choices(case, arch)]
