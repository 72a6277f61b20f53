"""What is held against float64 on the device: a short list for the smoke run, the rest for the full one.

The smoke list computes every kernel kind, dtype and head dim once, and every kind of input at the head dims of the
models that people edit; the rest combines them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from typing import Any

from ..cases import Case
from ..workers.pool import Task, resolve
from ..workers.problems import DTYPES, Problem, check
from . import launch_path

HEAD_DIMS = (40, 64, 80, 128, 160)  # of SD 1.5, SD 2 and SDXL, and of diffusion transformers
OTHER_HEAD_DIMS = (8, 16, 32, 72, 96, 256)
EVERY_SCORE, PADDING = (True, True, True, True), (True, False, False, True)  # the axes [G, H, N, M] that a bias has
RAGGED = (333, 517)  # queries and keys that end within a tile

# The shapes whose times the smoke run compares: (tokens, heads, head dim).
HEADLINE_SHAPES = (
    (4096, 10, 64),
    (4096, 8, 40),
    (4096, 8, 80),
    (4096, 8, 160),
    (4608, 24, 128),
    (1024, 20, 64),
    (1024, 8, 80),
    (256, 8, 160),
    (16384, 10, 64),
    (16384, 8, 40),
)


def headline_cases() -> list[Case]:
    """Two maps, each shared by a source and a target: a guided batch whose halves are both edited."""
    return [Case("smoke", 8 * int(n**0.5), n, heads, d, 1, "halves") for n, heads, d in HEADLINE_SHAPES]


def smoke_problems(arch: str = "sm_90") -> list[Problem]:
    """Every kernel kind, dtype and head dim once; every kind of input at the head dims of models."""
    pairs = (0, 0, 1)  # a map with two rows and one with one: launches of both widths
    problems = [
        Problem(pairs, *RAGGED, head_dim, dtype, results="all")
        for head_dim, dtype in product((*HEAD_DIMS, *OTHER_HEAD_DIMS), DTYPES)
        if dtype != "bfloat16" or head_dim in HEAD_DIMS
    ]
    for head_dim in HEAD_DIMS:
        problems += [
            Problem((0, 0), 512, 512, head_dim, heads=2),
            Problem((0, 1), *RAGGED, head_dim, results="replay"),
            Problem((0, 0), *RAGGED, head_dim, bias=EVERY_SCORE),
            Problem((0, 0), 256, 77, head_dim, bias=PADDING),
            Problem((0, 0), *RAGGED, head_dim, row_weight=(True, False, True)),
            Problem((0, 0, 0, 0, 0), *RAGGED, head_dim, heads=2),
        ]
    return [*problems, *launch_path.PROBLEMS, *(hopper_problems() if arch == "sm_90" else [])]


def hopper_problems() -> list[Problem]:
    """The kernel that only Hopper has, by name, since no rule chooses it before it has been measured."""
    tiles = {40: "128x128w4s2g", 64: "128x128w4s2g", 80: "128x64w4s2g", 128: "128x64w4s2g", 160: "128x64w4s2g"}
    return [
        Problem(rows, *shape, head_dim, dtype, choice=tile, results=results)
        for head_dim, tile in tiles.items()
        for rows, shape, dtype, results in (
            ((0, 0), (512, 512), "float16", "forward"),
            ((0, 0, 1), RAGGED, "float16", "forward"),
            ((0, 0), RAGGED, "bfloat16", "forward"),
            ((0, 1), RAGGED, "float16", "replay"),
        )
    ]


def full_problems() -> list[Problem]:
    """The combinations that the smoke list leaves out, at real sizes too."""
    problems = [
        Problem(index, 4096, 4096, head_dim, dtype, heads=2, results="all")
        for head_dim, dtype, index in product(HEAD_DIMS, ("float16", "bfloat16"), ((0,), (0, 0)))
    ]
    problems += [
        Problem((0, 0, 1), *RAGGED, head_dim, dtype, results="all", bias=bias)
        for head_dim, dtype, bias in product(
            (*HEAD_DIMS, 256),
            DTYPES,
            ((True, True, True, True), (True, False, False, True), (False, False, True, False)),
        )
        if head_dim in (40, 64, 160) or dtype == "float16"
    ]
    problems += [
        Problem((0, 0), queries, keys, head_dim)
        for head_dim, (queries, keys) in product(
            HEAD_DIMS, ((1, 1), (7, 63), (65, 64), (255, 1023), (1024, 77), (64, 64), (2048, 2048))
        )
    ]
    done = {problem.name for problem in smoke_problems()}
    return [problem for problem in problems if problem.name not in done]


def tasks(problems: list[Problem], device: str, backend: str = "triton") -> list[Task]:
    return [Task(problem.name, f"{__name__}:run_problem", (problem, device, backend)) for problem in problems]


def launch_tasks(device: str, backend: str = "triton", devices: int = 1) -> list[Task]:
    """The checks of :mod:`.launch_path` that this machine can run."""
    chosen: list[Callable[..., Any]] = list(launch_path.ANYWHERE)
    if device == "cuda":
        chosen += launch_path.ON_CUDA
        chosen += [launch_path.second_device] if devices > 1 else []
    return [
        Task(function.__name__.replace("_", " "), f"{__name__}:run_launch", (function.__name__, device, backend))
        for function in chosen
    ]


def run_problem(problem: Problem, device: str, backend: str) -> dict[str, float]:
    """In a worker."""
    return check(problem, device, backend)


def run_launch(name: str, device: str, backend: str) -> dict[str, float]:
    """In a worker."""
    return resolve(f"{launch_path.__name__}:{name}")(device, backend)


def one_thread() -> None:
    """What every worker does first: many of them share the cores."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
