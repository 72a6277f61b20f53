"""Who makes the groups: this process, or several by Ray, each with the model in its memory."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..runs.settings import Settings
from .making import Failed, Maker, Outcome
from .plan import Group
from .request import LOCAL, Weights

__all__ = ["Task", "check_ray", "outcomes"]


@dataclass(frozen=True)
class Task:
    """A group and what is wanted of it.

    Args:
        wanted: names of jobs.
        sources: whether the source's files are wanted too.
    """

    group: Group
    wanted: frozenset[str]
    sources: bool


def check_ray() -> None:
    """Raise InputError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("several workers need Ray: pip install 'fpe-kernels[cluster]', or leave --workers out")


def outcomes(
    tasks: Sequence[Task], settings: Settings, weights: Weights, workers: int = 1, cluster: str = LOCAL
) -> Iterator[tuple[Group, Outcome]]:
    """What comes of some tasks, as it comes.

    Args:
        settings: of any job, for what all share.
        workers: processes; 1 without a cluster is this one.
        cluster: ``"local"``, or the address of Ray's head node, such as ``ray://host:10001`` or ``auto``.

    Raises:
        InputError: a model or weights that cannot be loaded, a cluster that does not answer.
    """
    if workers == 1 and cluster == LOCAL:
        maker = Maker(settings, weights)
        for task in tasks:
            for outcome in maker.make(task.group, task.wanted, task.sources):
                yield task.group, outcome
    else:
        yield from _by_ray(tasks, settings, weights, workers, cluster)


def _by_ray(
    tasks: Sequence[Task], settings: Settings, weights: Weights, workers: int, cluster: str
) -> Iterator[tuple[Group, Outcome]]:
    import ray

    ours = not ray.is_initialized()
    if ours:
        _connect(cluster, workers)
    try:
        kind: Any = ray.remote(Maker)
        gpus = 1 if _on_gpu(settings.device) else 0
        options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": _environment(settings)}

        def new_maker() -> Any:
            return kind.options(**options).remote(settings, weights)

        makers = [new_maker() for _ in range(min(workers, len(tasks)))]
        try:
            ray.get([maker.__ray_ready__.remote() for maker in makers])
        except ray.exceptions.RayActorError as error:
            raise InputError(f"a worker cannot begin: {_last_line(error)}") from error
        yield from _shared_out(ray, makers, new_maker, list(tasks))
    finally:
        if ours:
            ray.shutdown()


def _shared_out(
    ray: Any, makers: Sequence[Any], new_maker: Callable[[], Any], waiting: list[Task]
) -> Iterator[tuple[Group, Outcome]]:
    """Give every worker a task, and the next one when it is done; one that dies costs the rest of its task."""
    running: dict[Any, tuple[Any, Task, set[str]]] = {}
    waiting.reverse()

    def begin(maker: Any) -> None:
        if waiting:
            task = waiting.pop()
            made = maker.make.options(num_returns="streaming").remote(task.group, task.wanted, task.sources)
            running[made] = (maker, task, set())

    for maker in makers:
        begin(maker)
    while running:
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        maker, task, seen = running[ready]
        try:
            outcome = ray.get(next(ready))
        except StopIteration:
            del running[ready]
            begin(maker)
            continue
        except ray.exceptions.RayError as error:
            del running[ready]
            for name in sorted(task.wanted - seen):
                yield task.group, Failed(name, f"its worker ended: {_last_line(error)}")
            if waiting:
                begin(new_maker())
            continue
        seen.add(outcome.name)
        yield task.group, outcome


def _connect(cluster: str, workers: int) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster == LOCAL:
        options |= {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(address=cluster, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"Ray does not begin at {cluster}: {_last_line(error)}") from error


def _on_gpu(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _environment(settings: Settings) -> dict[str, Any]:
    """Ray pins OMP_NUM_THREADS to the CPUs that it counts, which would be taken for a wish of the user's."""
    return {"env_vars": {"OMP_NUM_THREADS": str(settings.threads)}} if settings.threads is not None else {}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
