"""A device that is asked at each step and heard later: what is wrong is told of the step at which it began.

CUDA is stood in for by the CPU: what a device would answer later is answered when it is waited for, and no sooner.
"""

import math

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, LocalBlend, PromptToPromptEdit, editing
from fpe_pipeline.session import finite_watch
from fpe_pipeline.session.finite_watch import AHEAD, FiniteWatch
from tests.support.silent import embedded, noise

from .test_values_that_are_not_finite import (
    FAST,
    LAYER,
    PROMPTS,
    SOURCE,
    STEPS,
    TARGET,
    break_layer,
    refused_in_a_loop_of_ones_own,
)


class Late:
    """A question that is answered when somebody waits for it."""

    waits = 0

    def __init__(self, tensor):
        self.largest = finite_watch.magnitude(tensor)

    is_answered = False

    def answer(self):
        Late.waits += 1
        return float(self.largest)


class Prompt(Late):
    """One whose answer is there as soon as it is asked."""

    is_answered = True


def use(monkeypatch, question):
    monkeypatch.setattr(finite_watch, "is_late", torch.is_floating_point)
    monkeypatch.setattr(finite_watch, "Question", question)
    Late.waits = 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_the_largest_magnitude_is_finite_only_if_all_numbers_are(value, dtype):
    numbers = torch.full((3, 70), torch.finfo(dtype).max, dtype=dtype)  # whose sum would overflow
    assert math.isfinite(finite_watch.magnitude(numbers))
    for place in ((0, 0), (1, 33), (2, 69)):
        spoilt = numbers.clone()
        spoilt[place] = value
        assert not math.isfinite(finite_watch.magnitude(spoilt))
    spoilt[0, 0] = math.nan
    assert not math.isfinite(finite_watch.magnitude(spoilt))


@pytest.mark.parametrize(("question", "steps_later"), [(Late, AHEAD), (Prompt, 0)])
@pytest.mark.parametrize("step", [0, STEPS - 1])
@pytest.mark.parametrize("kind", [pytest.param(StableDiffusionPipeline, marks=pytest.mark.slow), FreePromptPipeline])
def test_the_step_and_the_layer(monkeypatch, kind, step, question, steps_later):
    use(monkeypatch, question)
    pipe = embedded(kind)
    break_layer(pipe, step)
    made = []
    options = {**FAST, "callback_on_step_end": lambda *given: made.append(None) or {}}
    with pytest.raises(FloatingPointError, match=rf"from step {step} of {STEPS} on: .*{LAYER}"):
        if kind is FreePromptPipeline:
            pipe(SOURCE, TARGET, latents=noise(0), **options)
        else:
            with editing(pipe, FreePromptEdit()):
                pipe(PROMPTS, latents=noise(0, 0), **options)
    assert len(made) == min(step + steps_later, STEPS)
    assert "step" not in vars(pipe.scheduler)


def test_a_source_alone_in_no_session(monkeypatch):
    use(monkeypatch, Late)
    pipe = embedded(FreePromptPipeline)
    break_layer(pipe, STEPS - 1)
    with pytest.raises(FloatingPointError, match=rf"from step {STEPS - 1} of {STEPS} on: .*{LAYER}"):
        pipe(SOURCE, latents=noise(0), **FAST)


def test_no_picture_is_made(monkeypatch):
    """What the decoder makes of bad latents is bad too, and is not what is told."""
    use(monkeypatch, Late)
    pipe = embedded()
    break_layer(pipe, 1)
    given = {"latents": noise(0, 0), "num_inference_steps": 2}
    with pytest.raises(FloatingPointError, match="from step 1 of 2 on"), editing(pipe, FreePromptEdit(1.0)) as session:
        try:
            pipe(PROMPTS, **given)
        finally:
            assert session.current_step.index == 1  # told inside of the call


def test_orders_of_the_step_are_given_again(monkeypatch):
    """The layer that overflows does so by what the edit asks of it at step 0 alone."""
    use(monkeypatch, Late)
    pipe = embedded()
    edit = PromptToPromptEdit(
        PROMPTS, pipe.tokenizer, weights={"blue": 1e300}, cross_replace_steps=(0, 1 / STEPS), self_replace_steps=0
    )
    with (
        pytest.raises(FloatingPointError, match=rf"from step 0 of {STEPS} on: the first such layer is .*attn2"),
        editing(pipe, edit),
    ):
        pipe(PROMPTS, latents=noise(0, 0), **FAST)


def test_a_run_that_begins_hears_of_the_one_before(monkeypatch):
    use(monkeypatch, Late)
    pipe = embedded()
    break_layer(pipe, 0)
    with editing(pipe, FreePromptEdit(1.0)) as session:
        pipe(PROMPTS, latents=noise(0, 0), **{**FAST, "num_inference_steps": AHEAD})
        with pytest.raises(FloatingPointError, match=f"from step 0 of {AHEAD} on"):
            pipe(PROMPTS, latents=noise(0, 0), **{**FAST, "num_inference_steps": AHEAD})
        session._finite.settle()  # nothing is told twice


def test_a_loop_of_ones_own(monkeypatch):
    use(monkeypatch, Late)
    refused_in_a_loop_of_ones_own()


def test_what_reads_along_does_not_go_on(monkeypatch):
    """A call is made once more to find the layer, which has to leave nothing behind where somebody reads along."""
    use(monkeypatch, Late)
    pipe = embedded(FreePromptPipeline)
    break_layer(pipe, 1)
    made = []
    edit = PromptToPromptEdit(PROMPTS, pipe.tokenizer) + LocalBlend(PROMPTS, pipe.tokenizer, (["car"], ["car"]))
    options = {**FAST, "callback_on_step_end": lambda *given: made.append(None) or {}}
    with pytest.raises(FloatingPointError, match=rf"from step 1 of {STEPS} on"):
        pipe(SOURCE, TARGET, edit=edit, latents=noise(0), **options)
    assert len(made) == 1 and Late.waits == 0


def test_another_error_is_not_hidden(monkeypatch):
    use(monkeypatch, Late)
    pipe = embedded()
    break_layer(pipe, 0)

    def stop(*given):
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"), editing(pipe, FreePromptEdit(1.0)):
        pipe(PROMPTS, latents=noise(0, 0), **FAST, callback_on_step_end=stop)
    with editing(pipe, FreePromptEdit(1.0)) as session:
        assert not session._finite._asked


def test_the_host_is_no_further_ahead(monkeypatch):
    use(monkeypatch, Late)
    watch, told = FiniteWatch(), []
    for number in range(6):
        watch.look(torch.tensor([math.nan if number == 2 else 1.0]), lambda number=number: told.append(number))
        assert told == ([2] if number >= 2 + AHEAD else [])
        assert Late.waits == min(max(0, number + 1 - AHEAD), 3)  # what came after the third came of it
    watch.look(torch.tensor([math.inf]), lambda: told.append("now"), wait=True)
    assert told == [2, "now"]
    watch.look(torch.tensor([math.inf]), lambda: told.append("never"))
    watch.forget()
    watch.settle()
    assert told == [2, "now"]


@pytest.mark.gpu
def test_on_a_device():
    for value in (1.0, math.inf, -math.inf, math.nan):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            numbers, told, watch = torch.full((4, 4, 128, 128), 60000.0, device="cuda", dtype=dtype), [], FiniteWatch()
            numbers[-1, -1, -1, -1] = value
            watch.look(numbers, lambda told=told: told.append(True))
            watch.settle()
            assert bool(told) == (value != 1.0), (value, dtype)
    pipe = embedded().to("cuda")
    break_layer(pipe, 1)
    with (
        pytest.raises(FloatingPointError, match=rf"from step 1 of {STEPS} on: .*{LAYER}"),
        editing(pipe, FreePromptEdit()),
    ):
        pipe(PROMPTS, latents=noise(0, 0).to("cuda"), **FAST)
