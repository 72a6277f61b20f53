"""Sessions: what is edited when, and that a pipeline comes out as it went in."""

import copy
import warnings

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from diffusers.models.attention_processor import AttnProcessor

from fpe_pipeline import FreePromptEdit, PlugAndPlayEdit, PromptToPromptEdit, editing
from fpe_pipeline.models.steps import Step
from tests.support.dense import DenseEditProcessor, replaced
from tests.support.tiny_models import add_image_prompts
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline, unedited
from tests.support.tiny_unets import SHAPES, tiny_unet, unet_inputs

FPE = FreePromptEdit(0.8)


# What an edited step is, in float64, for every layout of the batch


def dense_fpe(prompts, images, guidance):
    """Row b of the batch takes the map of its source's row: written with plain arithmetic on row numbers."""
    first = prompts * images if guidance else 0

    def rule(row):
        return [replaced(first + (row - first) % images, row)] if row >= first + images else None

    return rule


@pytest.mark.parametrize(("shape", "size"), [("sd1", (8, 12)), ("sd2", (6, 4)), ("sdxl", (8, 8)), ("simple", (8, 8))])
@pytest.mark.parametrize(
    ("prompts", "images", "guidance"), [(2, 1, True), (2, 1, False), (5, 1, True), (3, 2, True), (3, 2, False)]
)
def test_edited_unet_is_dense_mathematics(shape, size, prompts, images, guidance):
    unet = tiny_unet(shape)
    args, kwargs = unet_inputs(unet, prompts * images * (1 + guidance), *size)
    with torch.no_grad():
        before = unet(*args, **kwargs).sample
        with editing(unet, FPE, classifier_free_guidance=guidance, images_per_prompt=images) as session:
            session.step(0, 2)
            edited = unet(*args, **kwargs).sample
            session.step(1, 2)  # int(2 · 0.8) = 1: outside
            assert torch.equal(unet(*args, **kwargs).sample, before)
        assert torch.equal(unet(*args, **kwargs).sample, before)

        for site in FPE.select(session.sites):
            dense = DenseEditProcessor(dense_fpe(prompts, images, guidance))
            unet.get_submodule(site.path).set_processor(dense)
        expected = unet(*args, **kwargs).sample
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-10)
    targets = prompts * images * guidance + images
    assert (expected - before)[targets:].abs().amax((1, 2, 3)).min() > 1e-6
    assert (expected - before)[:targets].abs().max() < 1e-10


def edited_steps(pipe, edit, **kwargs):
    """The steps at which some target's noise prediction differs from the unedited layer outputs, as reported."""
    with editing(pipe, edit) as session:
        sample(pipe, **kwargs)
    steps = set(map(tuple, session.report().layers.values()))
    assert len(steps) <= 1
    return list(steps.pop()) if steps else []


@pytest.mark.parametrize(
    ("window", "steps"), [(0.8, [0, 1, 2, 3]), (1, [0, 1, 2, 3, 4]), (0.19, []), ((0.4, 0.6), [2]), ((0.2, 0.2), [])]
)
def test_window(tiny, window, steps):
    assert edited_steps(tiny, FreePromptEdit(window), steps=5) == steps


def test_outside_the_window_steps_are_unedited_to_the_bit(tiny):
    plain = sample(tiny)
    with editing(tiny, FreePromptEdit(0.3)):  # int(3 · 0.3) = 0 steps
        assert torch.equal(sample(tiny), plain)
    with editing(tiny, FreePromptEdit(0.4)):
        assert not torch.equal(sample(tiny), plain)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_schedulers_with_floats_and_repetitions(pipe, scheduler):
    tiny = tiny_pipeline(pipe, scheduler=scheduler(steps_offset=1))
    steps = edited_steps(tiny, FreePromptEdit(0.5), steps=4)
    assert steps == list(range(4 // 2))


def test_calling_the_unet_several_times_a_step_does_not_advance_it(tiny):
    plain_forward = tiny.unet.forward

    def twice(*args, **kwargs):
        tiny.unet.forward = plain_forward
        tiny.unet(*args, **kwargs)
        tiny.unet.forward = twice
        return plain_forward(*args, **kwargs)

    with editing(tiny, FPE):
        once = sample(tiny)
    tiny.unet.forward = twice
    try:
        with editing(tiny, FPE):
            assert torch.equal(sample(tiny), once)
    finally:
        del tiny.unet.forward


def test_a_second_call_in_a_session_starts_over(tiny):
    with editing(tiny, FPE) as session:
        first = sample(tiny)
        assert session.current_step == Step(2, 3)
        assert torch.equal(sample(tiny), first)
        sample(tiny, steps=2)
        assert session.report().total == 2
        assert set(map(tuple, session.report().layers.values())) == {(0,)}


def test_a_sampling_loop_of_ones_own(tiny):
    """The bare UNet with explicit steps gives what the pipeline gives."""
    unet = tiny.unet
    args, kwargs = unet_inputs(tiny_unet("sd1", torch.float32), 4)
    kwargs["encoder_hidden_states"] = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(3))
    tiny.scheduler.set_timesteps(5)
    edit = FreePromptEdit((0.2, 0.6))
    with torch.no_grad(), editing(tiny, edit, classifier_free_guidance=True):
        read = [unet(args[0], t, **kwargs).sample for t in tiny.scheduler.timesteps]
    with torch.no_grad(), editing(unet, edit, classifier_free_guidance=True) as session:
        told = []
        for index, timestep in enumerate(tiny.scheduler.timesteps.tolist()):
            session.step(index, 5)
            told.append(unet(args[0], timestep, **kwargs).sample)
    assert torch.equal(torch.stack(read), torch.stack(told))
    assert all(steps == [1, 2] for steps in session.report().layers.values())


def test_pausing(tiny):
    tiny.scheduler.set_timesteps(3)
    timestep = tiny.scheduler.timesteps[0]
    (latents, _), kwargs = unet_inputs(tiny_unet("sd1", torch.float32), 4)
    kwargs["encoder_hidden_states"] = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = tiny.unet(latents, timestep, **kwargs).sample
        with editing(tiny, FPE, classifier_free_guidance=True) as session:
            with session.paused():
                assert torch.equal(tiny.unet(latents, timestep, **kwargs).sample, plain)
                assert session.current_step is None
                tiny.unet(latents[:1], 12345, kwargs["encoder_hidden_states"][:1])  # neither a step nor a batch of ours
            assert not torch.equal(tiny.unet(latents, timestep, **kwargs).sample, plain)


def test_a_pipeline_is_as_it_was_before(tiny):
    before, plain = tiny.unet.attn_processors, sample(tiny)
    with editing(tiny, FPE):
        edited = sample(tiny)
    assert tiny.unet.attn_processors == before
    assert unedited(tiny.unet)
    assert torch.equal(sample(tiny), plain)
    with editing(tiny, FPE):
        assert torch.equal(sample(tiny), edited)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_by_an_exception(tiny, error):
    before, plain = tiny.unet.attn_processors, sample(tiny)

    def stop(pipe, step, timestep, tensors):
        if step == 1:
            raise error("stop")
        return {}

    with pytest.raises(error, match="stop"), editing(tiny, FPE):
        sample(tiny, callback_on_step_end=stop)
    assert tiny.unet.attn_processors == before
    assert unedited(tiny.unet)
    assert torch.equal(sample(tiny), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_start_leaves_nothing_behind(tiny, monkeypatch, error):
    before = tiny.unet.attn_processors
    session = editing(tiny, FPE)

    def fail(*args):
        raise error("stop")

    monkeypatch.setattr(type(tiny.unet), "register_forward_hook", fail)
    with pytest.raises(error, match="stop"), session:
        pass
    monkeypatch.undo()
    assert tiny.unet.attn_processors == before
    assert unedited(tiny.unet)
    with editing(tiny, FPE):
        sample(tiny)


def test_one_session_at_a_time(pipe, tiny):
    other = tiny_pipeline(pipe)
    other.unet = tiny.unet
    with editing(tiny, FPE):
        for second in (tiny, tiny.unet, other):
            with pytest.raises(RuntimeError, match="already being edited"), editing(second, FPE):
                pass
        sample(tiny)
    with editing(other, FPE):
        sample(other)
    assert unedited(tiny.unet)


def test_processors_that_someone_else_sets_meanwhile_are_kept(tiny):
    before = tiny.unet.attn_processors
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    theirs = AttnProcessor()
    try:
        with pytest.warns(RuntimeWarning) as record, editing(tiny, FPE) as session:
            tiny.unet.get_submodule(path).set_processor(theirs)
            sample(tiny)
        messages = [str(warning.message) for warning in record]
        assert any("computed without their editing processor" in message and path in message for message in messages)
        assert f"left as they are: {path} (AttnProcessor)" in messages[-1]
        assert path not in session.report().layers
        assert tiny.unet.get_submodule(path).processor is theirs
        assert {n: p for n, p in tiny.unet.attn_processors.items() if path not in n} == {
            n: p for n, p in before.items() if path not in n
        }
    finally:
        tiny.unet.set_attn_processor(dict(before))


def test_a_processor_that_outlives_its_session_does_nothing(tiny):
    plain = sample(tiny)
    before = tiny.unet.attn_processors
    with editing(tiny, FreePromptEdit(1.0)):  # edited to the last step
        edited = sample(tiny)
        kept = tiny.unet.attn_processors  # as libraries do that restore "what was there"
    tiny.unet.set_attn_processor(dict(kept))
    try:
        assert torch.equal(sample(tiny), plain)
        with editing(tiny, FreePromptEdit(1.0)):  # nor does it stand in the way of the next one
            assert torch.equal(sample(tiny), edited)
        assert tiny.unet.attn_processors == before
    finally:
        tiny.unet.set_attn_processor(dict(before))


def test_projections_that_are_fused_in_a_session(pipe):
    """diffusers keeps the processors that it found for ``unfuse_qkv_projections``, which may come after the session."""
    tiny = tiny_pipeline(pipe)
    with editing(tiny, FPE):
        edited = sample(tiny)
    with pytest.warns(RuntimeWarning, match="replaced during the editing session"), editing(tiny, FPE):
        sample(tiny)
        tiny.fuse_qkv_projections()
    tiny.unfuse_qkv_projections()
    with editing(tiny, FPE):
        assert torch.equal(sample(tiny), edited)
    assert unedited(tiny.unet)


class TestCopies:
    """What is copied in a session (a model to be trained, a scheduler to go another way) is in no session itself."""

    def test_of_the_model(self, pipe):
        tiny, other = tiny_pipeline(pipe), tiny_pipeline(pipe)
        plain = sample(tiny)
        edit = PlugAndPlayEdit(0.8, 0.8)  # of features too, whose hooks a copy gets as well
        with editing(tiny, edit) as session:
            edited = sample(tiny)
            other.unet = copy.deepcopy(tiny.unet)
            assert torch.equal(sample(other), plain)
            assert session._clock.calls == 3
            assert torch.equal(sample(tiny), edited)
        assert torch.equal(sample(other), plain)
        with editing(other, edit):
            assert torch.equal(sample(other), edited)

    def test_of_a_model_with_image_prompts(self, pipe):
        tiny = tiny_pipeline(pipe)
        add_image_prompts(tiny)
        edit = PromptToPromptEdit(PROMPTS[:2], tiny.tokenizer)
        with pytest.warns(RuntimeWarning, match="without a call"), editing(tiny, edit):
            copied = copy.deepcopy(tiny.unet)
        found = zip(copied.attn_processors.values(), tiny.unet.attn_processors.values(), strict=True)
        assert all(type(own) is type(of_the_model) and own is not of_the_model for own, of_the_model in found)

    def test_of_the_pipeline(self, pipe):
        """It encodes by its own text encoder, and its rows draw noise of their own."""

        def run(called):
            noise = torch.Generator().manual_seed(0)
            options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
            return called(PROMPTS[:2], generator=noise, **options).images

        tiny = tiny_pipeline(pipe)
        plain = run(tiny)
        with editing(tiny, FPE) as session:
            copied = copy.deepcopy(tiny)
            tiny.text_encoder = None  # which the copy does not need
            assert torch.equal(run(copied), plain)
            assert session._clock.calls == 0
            tiny.text_encoder = pipe.text_encoder
            run(tiny)
        assert torch.equal(run(copied), plain)

    def test_of_the_scheduler(self, pipe):
        """Its steps are its own: those of a multistep scheduler follow from the ones before."""

        def run():
            first = tiny.scheduler
            second = copy.deepcopy(first)
            latents = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))] * 2
            for scheduler in (first, second):
                scheduler.set_timesteps(4)
            for t in first.timesteps:
                latents = [
                    scheduler.step(factor * own, t, own).prev_sample
                    for scheduler, factor, own in zip((first, second), (0.1, 0.2), latents, strict=True)
                ]
            return torch.cat(latents)

        tiny = tiny_pipeline(pipe, scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler.config))
        expected = run()
        with pytest.warns(RuntimeWarning, match="without a call"), editing(tiny, FPE):
            actual = run()
        assert torch.equal(actual, expected)


def test_a_session_that_edited_nothing_says_so(tiny):
    with pytest.warns(RuntimeWarning, match="without a call of the UNet"), editing(tiny, FPE):
        pass


def test_no_warnings_in_an_ordinary_session(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with editing(tiny, FPE) as session:
            sample(tiny)
    assert str(session.report()).splitlines()[:2] == [
        "4 layers replaced in a run of 3 steps",
        "  down_blocks.1.attentions.0.transformer_blocks.0.attn1: steps 0-1",
    ]


def test_every_shape_of_unet_was_tried():
    assert set(SHAPES) == {"sd1", "sd2", "sdxl", "simple"}
