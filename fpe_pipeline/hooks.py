"""What a session hangs on a model besides attention processors: injected features, and a hand on the latents."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = ["FeatureHooks", "SchedulerHook"]


class FeatureHooks:
    """Forward hooks by which rows of a module's output take another row's, for the length of a session.

    Rows numbered past the module's output are looked up in ``recorded``. ``receive`` is shown every output.
    """

    def __init__(self, unet: torch.nn.Module, paths: Iterable[str]) -> None:
        self.rows: Mapping[str, Mapping[int, int]] = {}
        self.recorded: Mapping[str, Mapping[int, torch.Tensor]] = {}
        self.receive: Callable[[str, torch.Tensor], None] | None = None
        self._handles: list[Any] = []
        try:
            for path in paths:
                module = _submodule(unet, path)
                hook = torch.compiler.disable(functools.partial(self._replace, path))
                self._handles.append(module.register_forward_hook(hook))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _replace(self, path: str, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self.receive is not None:
            self.receive(path, output)
        sources = self.rows.get(path)
        if not sources:
            return None
        rows, known = output.shape[0], self.recorded.get(path, {})
        taken = [sources.get(row, row) for row in range(rows)]
        return torch.stack([output[row] if row < rows else known[row][0] for row in taken])


class SchedulerHook:
    """Passes a scheduler's new latents through a function, for the length of a session.

    Schedulers offer no callback. The method is shadowed on the instance, with its signature, which pipelines inspect.
    """

    def __init__(self, scheduler: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.calls = 0
        self._scheduler, original = scheduler, scheduler.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            output = original(*args, **kwargs)
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            output.prev_sample = change(output.prev_sample)
            return output

        self._step = step
        scheduler.step = step

    def remove(self, *, expected: bool) -> None:
        """Uncover the scheduler's own method; warn where steps were ``expected`` and none was made."""
        if expected and not self.calls:
            warnings.warn(
                "latents were to be blended after each step, and the scheduler that the session found on entering made "
                "none: set the pipeline's scheduler before, or call session.after_step(latents) in a loop of your own",
                RuntimeWarning,
                stacklevel=4,
            )
        if vars(self._scheduler).get("step") is self._step:
            del self._scheduler.step


def _submodule(unet: torch.nn.Module, path: str) -> torch.nn.Module:
    try:
        return unet.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"{type(unet).__name__} has no module {path!r} to inject features into: name one of its modules, such as "
            "'up_blocks.1.resnets.1'"
        ) from None
