"""What hangs on a model during a run besides attention processors: injected features, and hands on the latents."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..callers import warn

__all__ = ["FeatureHooks", "SchedulerHook"]


class FeatureHooks:
    """Forward hooks by which rows of a module's output take another row's, for the length of a session.

    Rows numbered past the module's output are looked up in ``recorded``. ``receive`` is shown every output.
    """

    def __init__(self, unet: torch.nn.Module, paths: Iterable[str]) -> None:
        self.rows: Mapping[str, Mapping[int, int]] = {}
        self.recorded: Mapping[str, Mapping[int, torch.Tensor]] = {}
        self.receive: Callable[[str, torch.Tensor], None] | None = None
        self.paths = tuple(paths)
        self._modules: set[int] = set()
        self._handles: list[Any] = []
        try:
            for path in self.paths:
                module = _submodule(unet, path)
                self._modules.add(id(module))
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
        if id(module) not in self._modules:  # a copy, whose hooks are copied with it
            return None
        if self.receive is not None:
            self.receive(path, output)
        sources = self.rows.get(path)
        if not sources:
            return None
        rows, known = output.shape[0], self.recorded.get(path, {})
        taken = [sources.get(row, row) for row in range(rows)]
        return torch.stack([output[row] if row < rows else known[row][0] for row in taken])


class SchedulerHook:
    """Passes a scheduler's new latents through a function ``change(latents, timestep)``, until it is removed.

    Schedulers offer no callback. The method is shadowed on the instance, with its signature, which pipelines inspect;
    where steps end inside of it (:mod:`..models.flow_solvers`) the scheduler calls back itself. Of several hooks the
    first one acts first; they are removed in any order.

    Args:
        scheduler: whose steps.
        change: takes new latents and the timestep, and returns the latents to go on from.
        options: further keyword arguments of a step, where its caller leaves them out.
        every_call: pass on what each call of the method gives, in the middle of a solver's step too.
    """

    def __init__(
        self,
        scheduler: Any,
        change: Callable[[torch.Tensor, Any], torch.Tensor],
        options: Callable[[], Mapping[str, Any]] = dict,
        *,
        every_call: bool = False,
    ) -> None:
        self.calls = 0
        self.change, self.options = change, options
        self._scheduler = scheduler
        self._nodes: list[Any] | None = None if every_call else getattr(scheduler, "node_hooks", None)
        self._shadow: Any = None
        if self._nodes is not None:
            self._nodes.append(self.pass_through)
            return
        shadow = vars(scheduler).get("step")
        self._shadow = shadow if hasattr(shadow, "hooks") else _shadow_step(scheduler)
        self._shadow.hooks.append(self)

    def pass_through(self, latents: torch.Tensor, timestep: Any) -> torch.Tensor:
        """New latents, counted and changed."""
        self.calls += 1
        return self.change(latents, timestep)

    def remove(self, *, expected: bool) -> None:
        """Uncover the method that was there before; warn where steps were ``expected`` and none was made."""
        if expected and not self.calls:
            warn(
                "latents were to be blended after each step, and the scheduler that the session found on entering made "
                "none: set the pipeline's scheduler before, or call session.after_step(latents) in a loop of your own",
                RuntimeWarning,
            )
        if self._nodes is not None:
            if self.pass_through in self._nodes:
                self._nodes.remove(self.pass_through)
            return
        hooks = self._shadow.hooks
        if self in hooks:
            hooks.remove(self)
        if not hooks and vars(self._scheduler).get("step") is self._shadow:
            del self._scheduler.step
            if self._shadow.shadowed is not None:
                self._scheduler.step = self._shadow.shadowed


def _shadow_step(scheduler: Any) -> _ShadowStep:
    """Cover a scheduler's ``step`` by one that shows its latents to every one of its ``hooks``."""
    scheduler.step = shadow = _ShadowStep(scheduler, scheduler.step, vars(scheduler).get("step"))
    return shadow


class _ShadowStep:
    """A scheduler's ``step`` that shows its latents to hooks.

    Pipelines of few steps (LCM's, Sana-Sprint's) make the picture of the last step's denoised sample, which there is
    what the new latents are, and stands beside them: it is changed with them.

    Args:
        scheduler: the scheduler.
        original: the method that it covers.
        shadowed: the same where it covered another one of the instance.
    """

    def __init__(self, scheduler: Any, original: Callable[..., Any], shadowed: Any) -> None:
        functools.update_wrapper(self, original)
        self._scheduler = scheduler
        self.original, self.shadowed = original, shadowed
        named = list(inspect.signature(original).parameters)
        self._place = named.index("timestep") if "timestep" in named else 1  # CogVideoX's DPM-Solver++ has it third
        self.hooks: list[SchedulerHook] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        timestep = args[self._place] if len(args) > self._place else kwargs["timestep"]
        for hook in tuple(self.hooks):
            kwargs = {**hook.options(), **kwargs}
        output = self.original(*args, **kwargs)
        given = latents = output[0] if isinstance(output, tuple) else output.prev_sample
        for hook in tuple(self.hooks):
            latents = hook.pass_through(latents, timestep)
        if latents is given:
            return output
        if isinstance(output, tuple):
            return (latents, *(latents if self._is_same(other, given) else other for other in output[1:]))
        if self._is_same(getattr(output, "denoised", None), given):
            output.denoised = latents
        output.prev_sample = latents
        return output

    def _is_same(self, other: Any, latents: torch.Tensor) -> bool:
        """Whether what stands beside the new latents is these: only at the end of a run are numbers asked for."""
        if other is latents or not isinstance(other, torch.Tensor) or other.shape != latents.shape:
            return other is latents
        steps, index = getattr(self._scheduler, "timesteps", ()), getattr(self._scheduler, "step_index", None)
        return index is not None and index >= len(steps) - 1 and torch.equal(other, latents)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What a copy of the scheduler has: the method itself, of the copy."""
        return copy.deepcopy(self.original, memo)


def _submodule(unet: torch.nn.Module, path: str) -> torch.nn.Module:
    try:
        return unet.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"{type(unet).__name__} has no module {path!r} to inject features into: name one of its modules, such as "
            "'up_blocks.1.resnets.1'"
        ) from None
