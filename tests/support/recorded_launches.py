"""A driver that compiles for a chip that is not here and writes down every launch instead of making it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class RecordingLauncher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.names = list(source.fn.arg_names)

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        _packed, launch_metadata, enter_hook, _exit_hook, *arguments = rest
        if enter_hook is not None:
            enter_hook(launch_metadata)
        RecordingDriver.launches.append(Recorded((x, y, z), stream, function, self.names, arguments))


class Recorded:
    """A launch: its grid, its compiled function, and its arguments by name, pointers as addresses."""

    def __init__(self, grid: tuple, stream: int, function: Any, names: list[str], arguments: list[Any]) -> None:
        self.grid, self.stream, self.function = grid, stream, function
        self.arguments = {name: _address(argument) for name, argument in zip(names, arguments, strict=True)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recorded) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return repr(vars(self))


def _address(argument: Any) -> Any:
    if hasattr(argument, "block_shape"):
        return argument.base.data_ptr(), [*argument.shape], [*argument.strides], [*argument.block_shape]
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


class RecordingDriver:
    """As much of a driver as a launch asks for; sm_90."""

    launches: list[Recorded] = []  # noqa: RUF012  one device
    device = 0
    launcher_cls = RecordingLauncher

    def __init__(self) -> None:
        properties = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), (name, hash(binary), device), 0, 0, 1024),
            get_device_properties=lambda device: properties,
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @classmethod
    def install(cls) -> None:
        driver.set_active(cls())

    @classmethod
    def taken(cls) -> list[Recorded]:
        """What was launched since the last call."""
        taken, cls.launches = cls.launches, []
        return taken
