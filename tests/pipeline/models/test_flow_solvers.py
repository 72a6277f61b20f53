"""Schedulers of flow models: where they call the model, what they make of it, and which step a call is of."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Pipeline,
)

from fpe_pipeline import FireFlowScheduler, FreePromptEdit, RFSolverScheduler, editing, flow_scheduler
from fpe_pipeline.models.flow_solvers import SOLVERS, flow_nodes, require_flow, solver_of
from fpe_pipeline.models.steps import run_steps
from fpe_pipeline.sampling.noise_schedule import NoiseSchedule
from tests.support.tiny_transformers import PROMPTS, draw, draw_flux, tiny_flux_pipeline, tiny_sd3_pipeline

SECOND_ORDER = ["rf-solver", "fireflow"]


def made(solver, steps=4, **config):
    scheduler = flow_scheduler(FlowMatchEulerDiscreteScheduler(**config), solver)
    scheduler.set_timesteps(steps)
    return scheduler


def solved(solver, steps):
    """z(0) of dz/dσ = -sin(5σ) z from z(1) = 1."""
    scheduler, z = made(solver, steps), torch.ones(1, 1, dtype=torch.float64)
    for t in scheduler.timesteps:
        z = scheduler.step(-z * torch.sin(t.double() / 200), t, z, return_dict=False)[0]
    return z.item()


@pytest.mark.parametrize(("solver", "order"), [("rf-solver", 2), ("fireflow", 2)])
def test_order(solver, order):
    """Twice the steps divide the error by 2 to the order, on an equation whose solution is known."""
    exact = math.exp((1 - math.cos(5)) / 5)
    errors = [abs(solved(solver, steps) - exact) for steps in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
    assert errors[1] < 1e-3


def test_where_the_model_is_called():
    a, b, c, d, end = made("euler").sigmas.tolist()
    middles = [(a + b) / 2, (b + c) / 2, (c + d) / 2, (d + end) / 2]
    rf, fire = made("rf-solver"), made("fireflow")
    assert rf.sigmas.tolist() == pytest.approx([a, middles[0], b, middles[1], c, middles[2], d, middles[3], end])
    assert fire.sigmas.tolist() == pytest.approx([a, *middles, end])
    for scheduler in (rf, fire):
        assert flow_nodes(scheduler).tolist() == [a, b, c, d, end]
        assert torch.equal(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert [(step.index, step.total, step.call, step.calls) for step in run_steps(fire)] == [
        (0, 4, 0, 5),
        (0, 4, 1, 5),
        (1, 4, 2, 5),
        (2, 4, 3, 5),
        (3, 4, 4, 5),
    ]
    assert [step.index for step in run_steps(rf)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_configurations(solver):
    given = FlowMatchEulerDiscreteScheduler(shift=2.5, base_shift=0.4, stochastic_sampling=True)
    scheduler = flow_scheduler(given, solver)
    assert scheduler.config.shift == 2.5 and scheduler.config.base_shift == 0.4
    assert solver_of(scheduler) == solver and given.config.stochastic_sampling
    back = flow_scheduler(scheduler, "euler")
    assert type(back) is FlowMatchEulerDiscreteScheduler and solver_of(back) == "euler"
    assert back.config.shift == 2.5
    scheduler.set_timesteps(3)
    schedule = NoiseSchedule.of(scheduler)
    assert schedule.is_flow and schedule.scheduler == type(scheduler).__name__ and schedule.settings["shift"] == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_steps_are_computed_wide(solver, dtype):
    """Latents come back in the dtype of the prediction, and no step is lost to its rounding."""
    scheduler, z = made(solver, 200), torch.ones(1, 4, 2, 2, dtype=dtype)
    for t in scheduler.timesteps:
        output = scheduler.step(torch.full_like(z, 0.1), t, z)
        z = output.prev_sample
        assert z.dtype is dtype
    # RF-Solver's steps start from latents that were rounded, as Euler's do; FireFlow's from where the last one ended.
    lost = dtype is torch.bfloat16 and solver == "rf-solver"
    assert z[0, 0, 0, 0].item() == pytest.approx(1.0 if lost else 0.9, abs=2e-3 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_pipelines_make_the_papers_steps(pipe, family, solver):
    """A call of the stock pipeline is the formula over its nodes, with the velocities that its model gives."""
    tiny = {"sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline}[family](pipe)
    tiny.scheduler = flow_scheduler(tiny.scheduler, solver)
    calls = []

    def note(module, args, kwargs, output):
        calls.append((kwargs["hidden_states"], output[0]))

    tiny.transformer.register_forward_hook(note, with_kwargs=True)
    run = {"sd3": draw, "flux": draw_flux}[family]
    result = run(tiny, 1, steps=3, guidance_scale=1.0)
    nodes = flow_nodes(tiny.scheduler).double()
    widths = nodes[1:] - nodes[:-1]
    assert len(calls) == {"rf-solver": 6, "fireflow": 4}[solver]
    z, before = calls[0][0], calls[0][1]
    for step, width in enumerate(widths):
        call = 2 * step + 1 if solver == "rf-solver" else step + 1
        if solver == "rf-solver":
            here, before = calls[2 * step]
            assert (here - z).abs().max() <= 1e-12
        assert (calls[call][0] - (z + width / 2 * before)).abs().max() <= 1e-12
        before = calls[call][1]
        z = z + width * before
    assert (result - z).abs().max() <= 1e-12


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_windows_count_steps(pipe, solver):
    tiny = tiny_sd3_pipeline(pipe)
    tiny.scheduler = flow_scheduler(tiny.scheduler, solver)
    with editing(tiny, FreePromptEdit((0.25, 0.75))) as session:
        draw(tiny, steps=4)
    assert session.report().layers
    assert all(steps == [1, 2] for steps in session.report().layers.values())


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_hooks_see_the_ends_of_steps(pipe, solver):
    """What is changed there is where the next step starts from, though a loop holds latents of the middle."""
    from fpe_pipeline.session.hooks import SchedulerHook

    tiny = tiny_sd3_pipeline(pipe)
    tiny.scheduler = flow_scheduler(tiny.scheduler, solver)
    plain, seen = draw(tiny, 1, steps=3), []

    def halve(latents, timestep):
        seen.append(latents)
        return 0.5 * latents if len(seen) == 3 else latents

    hook = SchedulerHook(tiny.scheduler, halve)
    halved = draw(tiny, 1, steps=3)
    hook.remove(expected=True)
    assert len(seen) == 3 and (halved - 0.5 * plain).abs().max() <= 1e-12
    assert torch.equal(draw(tiny, 1, steps=3), plain) and len(seen) == 3

    def replace(latents, timestep):
        seen.append(latents)
        return torch.zeros_like(latents) if len(seen) == 4 else latents

    hook = SchedulerHook(tiny.scheduler, replace)
    calls = []

    def note(module, args, kwargs):
        calls.append(kwargs["hidden_states"])

    handle = tiny.transformer.register_forward_pre_hook(note, with_kwargs=True)
    draw(tiny, 1, steps=3, guidance_scale=1.0)
    handle.remove()
    hook.remove(expected=True)
    width = (flow_nodes(tiny.scheduler)[2] - flow_nodes(tiny.scheduler)[1]).item()
    after = calls[2]  # of the second step: at its start, or in its middle
    assert after.any() == (solver == "fireflow") and after.abs().max() < abs(width) * 10


def test_saved_with_a_pipeline(pipe, tmp_path):
    tiny = tiny_sd3_pipeline(pipe, dtype=torch.float32)
    tiny.scheduler = flow_scheduler(tiny.scheduler, "fireflow")
    tiny.save_pretrained(tmp_path)
    assert type(StableDiffusion3Pipeline.from_pretrained(tmp_path).scheduler) is FireFlowScheduler


class TestRefusals:
    def test_solvers_and_schedulers(self):
        with pytest.raises(ValueError, match="solver must be one of euler, rf-solver, fireflow, got 'heun'"):
            flow_scheduler(FlowMatchEulerDiscreteScheduler(), "heun")
        with pytest.raises(ValueError, match=r"flow_scheduler needs flow matching .* got DDIMScheduler"):
            flow_scheduler(DDIMScheduler())
        with pytest.raises(ValueError, match="invert_sigmas=True"):
            flow_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
        assert flow_scheduler(FlowMatchHeunDiscreteScheduler(shift=2.0)).config.shift == 2.0

    def test_what_cannot_be_undone(self):
        with pytest.raises(ValueError, match=r"an edit needs flow matching .* got FlowMatchHeunDiscreteScheduler"):
            require_flow(FlowMatchHeunDiscreteScheduler(), "an edit")
        with pytest.raises(ValueError, match="stochastic_sampling draws noise"):
            require_flow(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "an edit")
        for solver in SOLVERS:
            require_flow(made(solver), "an edit")

    def test_runs_that_start_part_way(self, pipe):
        tiny = tiny_flux_pipeline(pipe, torch.float32, kind=FluxImg2ImgPipeline)
        tiny.scheduler = flow_scheduler(tiny.scheduler, "rf-solver")
        picture = torch.rand(1, 3, 64, 64)
        options = {"height": 64, "width": 64, "max_sequence_length": 12, "num_inference_steps": 4, "strength": 0.5}
        with pytest.raises(ValueError, match="RFSolverScheduler has no runs that start part-way"):
            tiny(PROMPTS[0], image=picture, **options)

    def test_arguments_of_steps(self):
        scheduler = RFSolverScheduler()
        with pytest.raises(ValueError, match="pass sigmas instead"):
            scheduler.set_timesteps(timesteps=[3.0, 2.0])
        scheduler.set_timesteps(2)
        z = torch.zeros(1, 1)
        with pytest.raises(ValueError, match="one timestep for all tokens"):
            scheduler.step(z, scheduler.timesteps[0], z, per_token_timesteps=z)
