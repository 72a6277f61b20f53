"""`FreePromptPipeline` for Ideogram 4, which is guided by a model of its own."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import Ideogram4Pipeline

from .flow import FlowEditing

__all__ = ["FreePromptIdeogram4Pipeline"]


class FreePromptIdeogram4Pipeline(FlowEditing, Ideogram4Pipeline):
    """Edit an image, generated or real, into target prompts, on Ideogram 4.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`, but that it takes no negative prompt. Its own ``guidance_schedule`` is of 48 steps:
    a ``guidance_scale`` takes its place, and other numbers of steps ask for either. A scale of 1 or less guides by
    nothing, as in other families; diffusers' pipeline leaves the prompt out at 0. Prompts are encoded as they are
    given: ``pipe.upsample_prompt(prompts)`` rewrites them first. There are no recordings of it.
    """

    parent = Ideogram4Pipeline
    kept_in_loop = "text features"
    parts = ("transformer", "unconditional_transformer", "vae", "text_encoder")

    @classmethod
    def parent_default(cls, name: str) -> Any:
        """What an argument of a call is in diffusers where it is left out; of the guidance, the schedule's largest."""
        if name == "guidance_scale":
            return float(max(super().parent_default("guidance_schedule")))
        return super().parent_default(name)

    def _arguments(
        self, model: Any, call: Any, edit: Any, prompts: Any, latents: Any, generator: Any, options: Any
    ) -> Any:
        # None is the scale's default in diffusers: the schedule holds.
        given = {name: value for name, value in options.items() if (name, value) != ("guidance_scale", None)}
        return super()._arguments(model, call, edit, prompts, latents, generator, given)

    def _loop(self, arguments: dict[str, Any]) -> Any:
        if arguments.get("prompt_upsampling"):
            raise ValueError(
                "prompt_upsampling=True gives the model other prompts than an edit, an inversion or a recording is "
                "told of: rewrite them by pipe.upsample_prompt(prompts), and pass what it makes of them"
            )
        scale, schedule = arguments.get("guidance_scale"), arguments.get("guidance_schedule")
        if scale is not None:
            scale = max(scale, self.unguided)  # below, the model that sees no text would be followed
            arguments = {"guidance_schedule": None, **arguments, "guidance_scale": scale}
        elif "guidance_schedule" not in arguments:
            schedule = self.parent_default("guidance_schedule")
        steps = arguments.get("num_inference_steps", self.parent_default("num_inference_steps"))
        if (scale is None) is not (schedule is None):  # else the parent refuses it
            of_steps: Any = [scale] * steps if schedule is None else schedule
            calls = self._steps_of_calls(steps)
            if calls and len(of_steps) == steps:
                arguments |= {
                    "guidance_scale": None,
                    "guidance_schedule": _OfCalls(float(of_steps[step]) for step in calls),
                }
        return super()._loop(arguments)

    def _steps_of_calls(self, steps: int) -> tuple[int, ...]:
        """Which step each call belongs to, of a solver that calls the model within steps too; () of others."""
        alike = type(self.scheduler).from_config(self.scheduler.config)
        if not hasattr(alike, "steps_of_calls"):
            return ()
        alike.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], mu=0.0)
        found: tuple[int, ...] = alike.steps_of_calls
        return found

    @functools.wraps(Ideogram4Pipeline.check_inputs, assigned=())  # a session reads what is asked by its names
    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, of a guidance for each step, where solvers call the model within steps too."""
        schedule = kwargs.get("guidance_schedule")
        if isinstance(schedule, _OfCalls):
            kwargs["guidance_schedule"] = schedule[: kwargs["num_inference_steps"]]
        super().check_inputs(*args, **kwargs)


class _OfCalls(list[float]):
    """A guidance for each call of the model, which the parent's loop counts."""
