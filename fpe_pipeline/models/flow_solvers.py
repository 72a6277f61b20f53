"""Solvers of a flow model's equation: which velocities a step of ``dz/dσ = v(z, σ)`` is made from, and at which σ.

With nodes σ_0 > … > σ_N, Δ_i = σ_{i+1} - σ_i and m_i the middle between the two:

- ``"euler"``: z_{i+1} = z_i + Δ_i · v(z_i, σ_i): diffusers' `FlowMatchEulerDiscreteScheduler`, one call a step.
- ``"rf-solver"``: the Taylor expansion to second order, z_{i+1} = z_i + Δ_i · v_i + Δ_i²/2 · v'_i, whose derivative is
  the difference between v_i and the velocity w_i at m_i, half an Euler step ahead: v'_i = (w_i - v_i) / (Δ_i/2). What
  remains of it is z_{i+1} = z_i + Δ_i · w_i. Two calls a step.
- ``"fireflow"``: the same, with the velocity of the middle before, w_{i-1}, in the place of v_i: only the first step
  asks for v_0. One call a step and one more, and still of second order.

The nodes are those of the scheduler at hand, so shift, dynamic shifting and custom sigmas mean what they mean there.

Sources: Wang et al., "Taming Rectified Flow for Inversion and Editing", ICML 2025 (arXiv 2411.04746); Deng et al.,
"FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing", ICML 2025 (arXiv 2412.07517).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch

# diffusers loads a saved scheduler of another package if it finds SchedulerMixin, by that name, in the class's module.
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

__all__ = [
    "SOLVERS",
    "FireFlowScheduler",
    "RFSolverScheduler",
    "Solver",
    "flow_nodes",
    "flow_scheduler",
    "require_flow",
    "solver_of",
]

Solver = Literal["euler", "rf-solver", "fireflow"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)


class _MidpointScheduler(FlowMatchEulerDiscreteScheduler):
    """A flow scheduler whose steps end with a velocity from the middle between two nodes.

    A sampling loop goes through ``timesteps`` as ever, which are those of the calls of the model and not of the steps.
    """

    solver: ClassVar[Solver]

    sigmas: torch.Tensor
    timesteps: torch.Tensor

    # From the signature, diffusers reads what is configured.
    @functools.wraps(FlowMatchEulerDiscreteScheduler.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Functions (latents, timestep) -> latents, which are shown the latents at the end of each step.
        self.node_hooks: list[Callable[[torch.Tensor, Any], torch.Tensor]] = []
        #: σ of the nodes [steps + 1], noisiest first, on the CPU.
        self.nodes = self.sigmas
        #: For each call of the model, the step that it belongs to.
        self.steps_of_calls: tuple[int, ...] = ()
        self._node: torch.Tensor | None = None  # the latents that the step under way started from

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As in diffusers, for so many steps; ``timesteps`` alone, of which the σ between are not known, are refused.

        Beside ``sigmas`` they are what the model is told at the nodes (CogView 4's are not shifted as σ is), and at the
        middle of a step what is half-way, down to 0 at the last node.
        """
        if timesteps is not None and sigmas is None:
            raise ValueError(f"{type(self).__name__} calls the model between its timesteps too: pass sigmas instead")
        both = {} if timesteps is None else {"timesteps": timesteps}
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, **both)
        self.nodes, self._node = self.sigmas.cpu(), None
        calls = self._calls(self.nodes).to(device)
        told = self.timesteps.cpu()
        self.timesteps = calls * self.config.num_train_timesteps
        if both:
            self.timesteps = self._calls(torch.cat([told, told.new_zeros(1)])).to(device)
        self.sigmas = torch.cat([calls, self.sigmas[-1:]])

    def _calls(self, nodes: torch.Tensor) -> torch.Tensor:
        """What the model's calls are at, of numbers at the nodes; sets which steps they belong to."""
        raise NotImplementedError

    def _opens(self, call: int) -> bool:
        """Whether a call is at the node that its step starts from."""
        raise NotImplementedError

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself: Bria's pipeline asks schedulers that are not of diffusers' own class."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Refused: a run that starts part-way counts timesteps, of which a step has more than one here."""
        raise ValueError(
            f"{type(self).__name__} has no runs that start part-way, as image-to-image and inpainting pipelines make: "
            "set FlowMatchEulerDiscreteScheduler for them, or start from an inversion"
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Where the model is called next: in the middle of a step, or at its end. Computed in at least float32.

        Args:
            model_output: the velocity at ``timestep`` [B, …].
            timestep: one of ``timesteps``.
            sample: the latents that the model received [B, …].
            s_churn, s_tmin, s_tmax, s_noise, generator: nothing, as in diffusers.
            per_token_timesteps: refused.
            return_dict: whether an output class comes back, or a tuple.
        """
        if per_token_timesteps is not None:
            raise ValueError(f"{type(self).__name__} takes one timestep for all tokens, got per_token_timesteps")
        if self.step_index is None:
            self._init_step_index(timestep)
        call, velocity = self.step_index, model_output
        wide = torch.promote_types(torch.promote_types(sample.dtype, velocity.dtype), torch.float32)
        step = self.steps_of_calls[call]
        if self._opens(call):
            self._node = sample.to(wide)
            latents = self._half_way(self._node, step, velocity)
        else:
            assert self._node is not None
            latents = self._node + self._width(step, step + 1) * velocity.to(wide)
            for hook in tuple(self.node_hooks):
                latents = hook(latents, timestep)
            following = call + 1
            if following < len(self.timesteps) and not self._opens(following):
                self._node = latents
                latents = self._half_way(latents, step + 1, velocity)
        self._step_index += 1
        latents = latents.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=latents) if return_dict else (latents,)

    def at_node(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents at the end of the step that the latest call of :meth:`step` ended.

        Args:
            latents: what it gave, from where the model is called next. Where that is the middle of the following step,
                the end of the step is behind it; where the call ended none, there is no end, and these come back.
        """
        following = self.step_index
        if following is None or following >= len(self.timesteps):
            return latents
        if self._node is None or self._opens(following) or self._opens(following - 1):
            return latents
        return self._node.to(latents.dtype)

    def _width(self, first: int, last: int) -> float:
        start, end = self.nodes[first].item(), self.nodes[last].item()
        return end - start

    def _half_way(self, node: torch.Tensor, step: int, velocity: torch.Tensor) -> torch.Tensor:
        return node + 0.5 * self._width(step, step + 1) * velocity.to(node.dtype)


class RFSolverScheduler(_MidpointScheduler):
    """Flow matching by RF-Solver: steps of second order, each of two calls of the model.

    `flow_scheduler(pipe.scheduler, "rf-solver")` makes one from a pipeline's scheduler.
    """

    solver = "rf-solver"

    def _calls(self, nodes: torch.Tensor) -> torch.Tensor:
        middles = _middles(nodes)
        self.steps_of_calls = tuple(call // 2 for call in range(2 * len(middles)))
        return torch.stack([nodes[:-1], middles], dim=1).flatten()

    def _opens(self, call: int) -> bool:
        return call % 2 == 0


class FireFlowScheduler(_MidpointScheduler):
    """Flow matching by FireFlow: steps of second order, of one call of the model each and one more for the first.

    `flow_scheduler(pipe.scheduler, "fireflow")` makes one from a pipeline's scheduler. What a sampling loop holds
    between two calls are the latents in the middle of a step; blends and reference latents act at its end.
    """

    solver = "fireflow"

    def _calls(self, nodes: torch.Tensor) -> torch.Tensor:
        middles = _middles(nodes)
        self.steps_of_calls = (0, *range(len(middles)))
        return torch.cat([nodes[:1], middles])

    def _opens(self, call: int) -> bool:
        return call == 0


def _middles(nodes: torch.Tensor) -> torch.Tensor:
    return (nodes[:-1] + nodes[1:]) / 2


_SCHEDULERS: dict[str, type[FlowMatchEulerDiscreteScheduler]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "rf-solver": RFSolverScheduler,
    "fireflow": FireFlowScheduler,
}


def flow_scheduler(scheduler: SchedulerMixin, solver: Solver = "rf-solver") -> FlowMatchEulerDiscreteScheduler:
    """A scheduler of a flow model that solves by another rule, on the sigmas that another one is configured with.

    Example: ``pipe.scheduler = flow_scheduler(pipe.scheduler, "fireflow")``; whatever the pipeline does then, generate,
    invert and edit, it does by this solver.

    Args:
        scheduler: a diffusers scheduler of a flow model, whose configuration is read.
        solver: "euler", "rf-solver" (two calls of the model a step) or "fireflow" (one a step and one more).

    Returns:
        A new scheduler; the one that was passed stays as it is.

    Raises:
        ValueError: an unknown solver; a scheduler that is not flow matching's, or whose steps cannot be undone.
    """
    if solver not in _SCHEDULERS:
        raise ValueError(f"solver must be one of {', '.join(_SCHEDULERS)}, got {solver!r}")
    if not type(scheduler).__name__.startswith("FlowMatch") and not isinstance(scheduler, _MidpointScheduler):
        require_flow(scheduler, "flow_scheduler")
    made = _SCHEDULERS[solver].from_config(scheduler.config, stochastic_sampling=False)
    require_flow(made, "flow_scheduler")
    return made


def require_flow(scheduler: Any, what: str) -> None:
    """Raise ValueError unless the steps of ``scheduler`` are one of the solvers', from noise at σ = 1 to σ = 0."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"{what} needs flow matching by a solver whose steps can be undone ({', '.join(SOLVERS)}), got "
            f"{type(scheduler).__name__}: set pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config("
            "pipe.scheduler.config), or one of the others by fpe_pipeline.flow_scheduler from that"
        )
    if scheduler.config.stochastic_sampling:
        raise ValueError(
            f"{what} needs steps that can be undone, and stochastic_sampling draws noise in each: set pipe.scheduler = "
            'fpe_pipeline.flow_scheduler(pipe.scheduler, "euler"), which draws none'
        )
    if scheduler.config.invert_sigmas:
        raise ValueError(f"{what} needs sigmas that fall from noise to image, got a scheduler with invert_sigmas=True")


def solver_of(scheduler: FlowMatchEulerDiscreteScheduler) -> Solver:
    """By which solver a scheduler goes."""
    return getattr(scheduler, "solver", "euler")


def flow_nodes(scheduler: FlowMatchEulerDiscreteScheduler) -> torch.Tensor:
    """σ at the ends of the steps [steps + 1], noisiest first, of a scheduler whose ``set_timesteps`` has run."""
    return getattr(scheduler, "nodes", scheduler.sigmas)
