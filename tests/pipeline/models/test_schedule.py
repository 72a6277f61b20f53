import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from fpe_pipeline.models.steps import Step, StepWindow, locate_step, run_steps

FRACTIONS = st.floats(0, 1)


@pytest.mark.parametrize(
    "value",
    [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), (0, 0.5), [0.0, 0.5], np.array([0, 0.5])],
    ids=repr,
)
def test_a_number_means_from_the_start(value):
    assert StepWindow.parse(value) == StepWindow(0.0, 0.5)


@pytest.mark.parametrize(("value", "window"), [(0, (0, 0)), (1, (0, 1)), (np.int64(1), (0, 1)), ((0, 1), (0, 1))])
def test_integers_are_fractions_too(value, window):
    assert StepWindow.parse(value) == StepWindow(*window)


@pytest.mark.parametrize(
    "value",
    [math.nan, (0, math.nan), (math.nan, 1), -0.1, 1.1, 2, (0.5, 0.4), (0.1,), (0, 0.5, 1), [], "0.8", None, True],
    ids=repr,
)
def test_what_is_not_a_window_is_refused(value):
    with pytest.raises(ValueError, match="expected"):
        StepWindow.parse(value)


@pytest.mark.parametrize("ends", [("0", 1), (0, None), (0, True)], ids=repr)
def test_ends_that_are_no_fractions_are_refused(ends):
    with pytest.raises(ValueError, match="expected a fraction of the run"):
        StepWindow(*ends)


def test_truncation_is_the_original_one():
    assert StepWindow.parse(0.58).steps(50) == range(28)  # 0.58 · 50 is 28.999…
    assert StepWindow.parse((0.29, 0.8)).steps(100) == range(28, 80)


@given(FRACTIONS, FRACTIONS, st.integers(1, 100))
def test_membership_is_the_window_of_the_original_code(a, b, total):
    a, b = sorted((a, b))
    window = StepWindow.parse((a, b))
    for index in range(total):
        assert (Step(index, total) in window) == (int(total * a) <= index < int(total * b))


@pytest.mark.parametrize(("index", "total"), [(-1, 5), (5, 5), (0, 0)])
def test_a_step_lies_in_its_run(index, total):
    with pytest.raises(ValueError, match="0 <= index < total"):
        Step(index, total)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_steps_of_a_sampling_loop(scheduler):
    """Heun and PNDM repeat timesteps: the views that a loop receives tell the repetitions apart."""
    scheduler = scheduler()
    scheduler.set_timesteps(6)
    steps = run_steps(scheduler)
    assert [step.call for step in steps] == list(range(len(scheduler.timesteps)))
    assert {(step.total, step.calls) for step in steps} == {(6, len(steps))}
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        assert locate_step(scheduler, timestep) == step
        assert locate_step(scheduler, timestep.expand(4)) == step
    for step, timestep in zip(steps[2:], scheduler.timesteps[2:], strict=True):
        assert locate_step(scheduler, timestep) == step


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DDIMScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (HeunDiscreteScheduler, {}),
        (KDPM2DiscreteScheduler, {}),
        (KDPM2AncestralDiscreteScheduler, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers' KDPM2 with NumPy 2
def test_calls_belong_to_the_users_steps(kind, options, count):
    """Calls of one step lie between the noise levels of that step; a step's first call is at its own level."""
    scheduler = kind(**options)
    scheduler.set_timesteps(count)
    steps, timesteps = run_steps(scheduler), scheduler.timesteps.double()
    starts = [next(step.call for step in steps if step.index == index) for index in range(count)]
    assert [step.index for step in steps] == sorted(step.index for step in steps)
    assert {step.total for step in steps} == {count}
    for step in steps:
        following = timesteps[starts[step.index + 1]] if step.index + 1 < count else timesteps.min()
        assert timesteps[starts[step.index]] >= timesteps[step.call] >= following


def test_runge_kutta_steps():
    """PNDM as published begins with three steps of four calls each."""
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(8)
    assert [step.index for step in run_steps(scheduler)] == [0] * 4 + [1] * 4 + [2] * 4 + list(range(3, 8))


def test_timesteps_of_ones_own_after_a_run_of_another_length():
    """DDPM keeps the number of steps of the run before, of which nine calls would be five steps of two calls."""
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_timesteps(timesteps=list(range(900, 0, -100)))
    assert run_steps(scheduler) == tuple(Step(index, 9) for index in range(9))


def test_schedulers_that_repeat_timesteps_by_value():
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(6)
    timesteps = scheduler.timesteps.tolist()
    assert timesteps[1] == timesteps[2]
    sample = torch.zeros(1, 1, 2, 2)
    for call, timestep in enumerate(timesteps):
        assert locate_step(scheduler, timestep).call == call
        scheduler.step(sample, timestep, sample)


@pytest.mark.parametrize(
    "cast", [lambda t: t.clone(), lambda t: t.item(), lambda t: t.clone().repeat(3), torch.Tensor.half]
)
def test_steps_by_value(cast):
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(8)  # 999/7 and its multiples, which float16 rounds
    for index, timestep in enumerate(scheduler.timesteps):
        assert locate_step(scheduler, cast(timestep)) == Step(index, 8)


def test_timesteps_outside_the_schedule_are_refused():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"timestep 7 is not among.*session.step"):
        locate_step(scheduler, 7)
    with pytest.raises(ValueError, match="one timestep for the whole batch"):
        locate_step(scheduler, scheduler.timesteps[:2])
    with pytest.raises(ValueError, match="no timesteps yet"):
        locate_step(object(), 7)
