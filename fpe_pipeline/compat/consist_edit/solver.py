"""``pipe.denoise``, which ConsistEdit's solvers give a pipeline."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ...models.adapters.families import adapter_of
from ...sampling.step_end import StepEnd
from ..names import unknown_name
from .global_var import GlobalVars

__all__ = ["RegisteredSolver", "register_cog_solver", "register_flux_solver", "register_sd3_solver"]

__getattr__ = unknown_name(__name__, "consistEdit.solver", __all__)
_ADDED = ("denoise", "invert")


class RegisteredSolver(AbstractContextManager["RegisteredSolver"]):
    """``denoise`` and ``invert`` on a pipeline, until :meth:`restore` or the end of a ``with`` block.

    Args:
        pipe: of diffusers.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._before = {name: vars(pipe)[name] for name in _ADDED if name in vars(pipe)}
        pipe.denoise, pipe.invert = self.denoise, self.invert

    def denoise(self, *arguments: Any, **options: Any) -> Any:
        """The pipeline's call, whose steps :class:`GlobalVars` counts; it takes and gives what that does."""
        GlobalVars.reset_global_vars()
        pipe = self._pipe
        end = StepEnd(
            options.pop("callback_on_step_end", None),
            options.pop("callback_on_step_end_tensor_inputs", ("latents",)),
            (_count,),
            ("latents",),
        )
        names = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": end.tensor_inputs}
        return pipe(*arguments, **options, **names)

    def invert(self, *arguments: Any, **options: Any) -> Any:
        """Not served."""
        raise NotImplementedError(
            "the original inverts by a scheduler of its own, which is not here: invert a picture by "
            "fpe_pipeline.FreePromptPipeline.from_pipe(pipe).invert(image, prompt); denoise takes its noise as latents"
        )

    def restore(self) -> None:
        """Leave the pipeline as it was found; a second time does nothing."""
        for name in _ADDED:
            if getattr(vars(self._pipe).get(name), "__self__", None) is self:
                delattr(self._pipe, name)
                if name in self._before:
                    setattr(self._pipe, name, self._before[name])

    def __exit__(self, *error: Any) -> None:
        self.restore()


def register_sd3_solver(model: Any) -> RegisteredSolver:
    """Give a pipeline of Stable Diffusion 3 ``denoise``.

    Args:
        model: the pipeline.

    Returns:
        What takes it off again: ``.restore()``, or a ``with`` block.

    Raises:
        TypeError: another pipeline.
    """
    return _registered(model, "sd3", "Stable Diffusion 3")


def register_flux_solver(model: Any) -> RegisteredSolver:
    """Give a pipeline of FLUX.1 ``denoise``; what is returned and refused is as for `register_sd3_solver`."""
    return _registered(model, "flux", "FLUX.1")


def register_cog_solver(model: Any) -> RegisteredSolver:
    """Give a pipeline of CogVideoX ``denoise``; what is returned and refused is as for `register_sd3_solver`."""
    return _registered(model, "cogvideox", "CogVideoX")


def _registered(model: Any, family: str, name: str) -> RegisteredSolver:
    adapter = adapter_of(model)
    if adapter.family != family or adapter.pipe is None:
        raise TypeError(f"expected a pipeline of {name}, got {type(model).__name__}")
    return RegisteredSolver(model)


def _count(pipe: Any, index: int, tensors: dict[str, Any]) -> None:
    GlobalVars.TOTAL_STEPS, GlobalVars.CUR_STEP = len(pipe.scheduler.timesteps), index + 1
