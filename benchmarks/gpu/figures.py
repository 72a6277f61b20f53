"""How long the list of programs takes to compile: a figure for each release of Triton, in the repository."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpe_pipeline.atomic_folder import write_text

from ..rows import ROOT

Figure = dict[str, Any]


@dataclass(frozen=True)
class FigureFile:
    """One JSON object, by session, chip and release of Triton."""

    path: Path

    def read(self) -> dict[str, Figure]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def write(self, figure: Figure) -> None:
        key = f"{figure['session']}/{figure['arch']}/triton {figure['triton']}"
        figures = {**self.read(), key: figure}
        write_text(self.path, json.dumps(dict(sorted(figures.items())), indent=1) + "\n")


FIGURE = FigureFile(ROOT / "benchmarks" / "results" / "gpu-programs.json")


def measure_programs(arch: str, session: str, workers: int) -> tuple[Figure, list[tuple[str, str]]]:
    """Compile every program of a session for `arch`; the figure, and the programs that do not compile."""
    import triton

    from ..rows import device_name
    from ..workers.programs import compile_ahead, tasks_for, timed_subjects
    from . import checks

    subjects: list[Any] = [*checks.smoke_problems(arch), *((case, None) for case in checks.headline_cases())]
    if session == "full":
        subjects = [*checks.full_problems(), *timed_subjects(arch)]
    seconds, count, failures = 0.0, 0, []
    for task, took, problem in compile_ahead(tasks_for(subjects, arch), workers):
        seconds, count = seconds + took, count + 1
        if problem:
            failures.append((task.name, problem))
    figure = {
        "session": session,
        "arch": arch,
        "triton": triton.__version__,
        "programs": count,
        "seconds": round(seconds, 1),
        "workers": workers,
        "machine": device_name("cpu"),
    }
    return figure, failures
