"""Sessions: what is edited when, and that a pipeline comes out as it went in."""

import warnings

import pytest
import torch
from dense import DenseEditProcessor, replaced
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from tiny_pipelines import PROMPTS, sample, shared_noise, tiny_controlnet_pipeline, tiny_pipeline, tiny_sdxl_pipeline
from tiny_unets import SHAPES, tiny_unet, unet_inputs

from fpe_pipeline import BatchRoles, FreePromptEdit, editing
from fpe_pipeline.processors import EditAttnProcessor
from fpe_pipeline.schedule import Step

FPE = FreePromptEdit(0.8)


@pytest.fixture(scope="module")
def tiny(pipe):
    return tiny_pipeline(pipe)


def unedited(unet):
    """Whether a UNet carries nothing of a session."""
    processors = unet.attn_processors.values()
    hooks = len(unet._forward_pre_hooks) + len(unet._forward_hooks)
    return hooks == 0 and not any(isinstance(processor, EditAttnProcessor) for processor in processors)


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


# Windows and steps


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
    assert steps == list(range(len(tiny.scheduler.timesteps) // 2))


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


# Leaving


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
        sample(tiny)
        kept = tiny.unet.attn_processors  # as libraries do that restore "what was there"
    tiny.unet.set_attn_processor(dict(kept))
    try:
        assert torch.equal(sample(tiny), plain)
    finally:
        tiny.unet.set_attn_processor(dict(before))


def test_a_session_that_edited_nothing_says_so(tiny):
    with pytest.warns(RuntimeWarning, match="without a call of the UNet"), editing(tiny, FPE):
        pass


# Pipelines


def check_edits_the_targets(pipe, **kwargs):
    """Only targets change, and the pipeline gives its own images again afterwards."""
    plain = sample(pipe, 3, **kwargs)
    with editing(pipe, FPE) as session:
        edited = sample(pipe, 3, **kwargs)
    change = (edited - plain).abs().amax((1, 2, 3))
    assert change[0] < 1e-4
    assert change[1:].min() > 1e-3
    assert len(session.report().layers) == len(FPE.select(session.sites))
    assert torch.equal(sample(pipe, 3, **kwargs), plain)


def test_stable_diffusion(tiny):
    check_edits_the_targets(tiny)


def test_without_guidance(tiny):
    check_edits_the_targets(tiny, guidance_scale=1.0)


def test_not_square(tiny):
    check_edits_the_targets(tiny, size=(6, 12))


def test_stable_diffusion_xl(pipe):
    check_edits_the_targets(tiny_sdxl_pipeline(pipe))


def test_controlnet(pipe):
    image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    check_edits_the_targets(tiny_controlnet_pipeline(pipe), image=image)


def test_images_per_prompt(tiny):
    """Image i of every prompt is what it is alone."""
    with editing(tiny, FPE, images_per_prompt=2):
        both = sample(tiny, images=2)
    for image in range(2):
        with editing(tiny, FPE):
            alone = tiny(
                PROMPTS[:2],
                latents=shared_noise(1, images=2)[image].expand(2, -1, -1, -1),
                num_inference_steps=3,
                guidance_scale=5.0,
                output_type="latent",
            ).images
        torch.testing.assert_close(both[image::2], alone, rtol=0, atol=1e-4)


def test_several_sources(tiny):
    def run(prompts):
        noise = shared_noise(len(prompts))
        return tiny(prompts, latents=noise, num_inference_steps=3, guidance_scale=5.0, output_type="latent").images

    with editing(tiny, FPE, source_of=(0, 0, 2, 2)):
        both = run(PROMPTS[:4])
    with editing(tiny, FPE):
        alone = torch.cat([run(PROMPTS[:2]), run(PROMPTS[2:4])])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-4)


def test_an_adapter_in_peft_layers(pipe):
    """LoRA lives in the projections: edited layers use it, for the rows that they project."""
    peft = pytest.importorskip("peft")
    tiny = tiny_pipeline(pipe)
    without = sample(tiny)
    tiny.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    check_edits_the_targets(tiny)
    with editing(tiny, FPE):
        edited = sample(tiny)
    assert not torch.equal(sample(tiny), without)

    # The same weights merged by hand, edited without peft.
    tiny.unet.fuse_lora()
    tiny.unet.unload_lora()
    with editing(tiny, FPE):
        torch.testing.assert_close(sample(tiny), edited, rtol=0, atol=1e-4)


def test_fused_projections(pipe):
    tiny = tiny_pipeline(pipe)
    with editing(tiny, FPE):
        separate = sample(tiny)
    tiny.unet.fuse_qkv_projections()
    with editing(tiny, FPE):
        torch.testing.assert_close(sample(tiny), separate, rtol=0, atol=1e-4)
    assert unedited(tiny.unet)


def test_processors_that_are_modules_stay_registered(tiny):
    """An IP-Adapter's weights live in the processors of its cross-attention layers."""
    before = tiny.unet.attn_processors
    adapter = IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=32)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    try:
        tiny.unet.get_submodule(path).set_processor(adapter)
        weights = list(tiny.unet.state_dict())
        assert any(".processor." in name for name in weights)
        session = editing(tiny, FPE)
        with pytest.warns(RuntimeWarning, match="without a call"), session:
            assert tiny.unet.get_submodule(path).processor is adapter
            assert list(tiny.unet.state_dict()) == weights
        assert list(tiny.unet.state_dict()) == weights
    finally:
        tiny.unet.set_attn_processor(dict(before))


def test_channels_last_and_attention_slicing(pipe):
    tiny = tiny_pipeline(pipe)
    with editing(tiny, FPE):
        expected = sample(tiny)
    tiny.unet.to(memory_format=torch.channels_last)
    tiny.enable_attention_slicing("max")
    with editing(tiny, FPE):
        torch.testing.assert_close(sample(tiny), expected, rtol=0, atol=1e-3)


def one_level_unet():
    """As small as a UNet with self-attention gets, because tracing takes seconds a layer."""
    unet = tiny_unet(
        "sd2",
        torch.float32,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
    )
    return unet, *unet_inputs(unet, 4)


def six_steps(unet, args, kwargs):
    """The outputs of six steps of which the first three are edited."""
    edit = FreePromptEdit(0.5, layers="mid_block")
    with torch.no_grad(), editing(unet, edit, classifier_free_guidance=True) as session:
        for index in range(6):
            session.step(index, 6)
            yield unet(*args, **kwargs).sample
    assert list(session.report().layers.values()) == [[0, 1, 2]]


def test_a_compiled_unet():
    """One graph without breaks for the steps inside the window and one for those outside, however many steps."""
    from torch._dynamo.testing import CompileCounter

    unet, args, kwargs = one_level_unet()
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    eager = list(six_steps(unet, args, kwargs))
    for index, output in enumerate(six_steps(compiled, args, kwargs)):
        torch.testing.assert_close(output, eager[index], rtol=0, atol=1e-5)
        assert counter.frame_count == (1 if index < 3 else 2)


def test_a_unet_compiled_in_place():
    """`unet.compile()` traces hooks along with the UNet: a session's are left out of the graphs."""
    unet, args, kwargs = one_level_unet()
    eager = list(six_steps(unet, args, kwargs))
    unet.compile(backend="eager")
    for output, expected in zip(six_steps(unet, args, kwargs), eager, strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


# What is computed


def test_queries_and_keys_of_targets_are_not_projected(tiny):
    rows = {}
    layers = {site.path for site in FPE.select(editing(tiny, FPE).sites)}
    hooks = []
    for name in tiny.unet.attn_processors:
        path = name.removesuffix(".processor")
        for projection in ("to_q", "to_k", "to_v"):
            seen = rows.setdefault((path, projection), [])
            module = tiny.unet.get_submodule(f"{path}.{projection}")
            hooks.append(module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].shape[0])))
    try:
        with editing(tiny, FPE):
            sample(tiny, 4, steps=5)
    finally:
        for hook in hooks:
            hook.remove()
    # Of 8 rows, 4 are unconditional and 1 is the source; the last step is outside the window.
    for (path, projection), seen in rows.items():
        assert seen == [5 if path in layers and projection != "to_v" else 8] * 4 + [8], (path, projection)


# Refusals


class Custom(AttnProcessor2_0):
    """Some other library's processor."""


def test_custom_processors_are_not_dropped_silently(pipe):
    tiny = tiny_pipeline(pipe)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    tiny.unet.get_submodule(path).set_processor(Custom())
    with pytest.raises(ValueError, match=rf"{path}: its processor Custom may do more"), editing(tiny, FPE):
        sample(tiny)
    assert unedited(tiny.unet)
    with editing(tiny, FPE, override_processors=(Custom,)):
        sample(tiny)
    with editing(tiny, FreePromptEdit(layers="up_blocks")):
        sample(tiny)
    assert isinstance(tiny.unet.get_submodule(path).processor, Custom)


def test_batches_that_do_not_fit(tiny):
    with (
        pytest.raises(ValueError, match="not prompts × 3 images per prompt × 2"),
        editing(tiny, FPE, images_per_prompt=3),
    ):
        sample(tiny)
    with (
        pytest.raises(ValueError, match="sources of 3 prompts; the batch holds 2"),
        editing(tiny, FPE, source_of=(0, 0, 0)),
    ):
        sample(tiny)
    with pytest.raises(ValueError, match="holds no target"), editing(tiny, FPE):
        sample(tiny, 1)
    layout = BatchRoles(conditional=(True, True), source_of=(0, 0))
    with pytest.raises(ValueError, match="batch of 2 rows; the UNet received 4"), editing(tiny, FPE, roles=layout):
        sample(tiny)
    assert unedited(tiny.unet)


def test_outside_the_window_any_batch_will_do(tiny):
    """Rows may be dropped once nothing is replaced any more."""
    tiny.scheduler.set_timesteps(2)
    (latents, _), _ = unet_inputs(tiny_unet("sd1", torch.float32), 1)
    embeddings = torch.zeros(1, 7, 32)
    with torch.no_grad(), editing(tiny, FPE, images_per_prompt=2, classifier_free_guidance=True):
        tiny.unet(latents, tiny.scheduler.timesteps[1], embeddings)


def test_a_zero_match_is_refused_at_once_or_with_the_first_call(tiny):
    with pytest.raises(ValueError, match=r"layers \['nowhere'\] match none"):
        editing(tiny, FreePromptEdit(layers=["nowhere"]))
    with pytest.raises(ValueError, match="max_tokens=3 match none"), editing(tiny, FreePromptEdit(max_tokens=3)):
        sample(tiny)
    assert unedited(tiny.unet)


def test_a_token_limit_depends_on_the_size(tiny):
    with editing(tiny, FreePromptEdit(max_tokens=16)) as session:
        sample(tiny, size=(8, 8))
        assert len(session.report().layers) == 4
        sample(tiny, size=(12, 12), steps=2)
        assert len(session.report().layers) == 1


def test_arguments_that_make_no_sense(tiny):
    with pytest.raises(TypeError, match="with a unet"):
        editing(object(), FPE)
    with pytest.raises(TypeError, match="expected an Edit"):
        editing(tiny, 0.8)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        editing(tiny, FPE, backend="cuda")
    with pytest.raises(ValueError, match="whole layout"):
        editing(tiny, FPE, roles=BatchRoles((True,), (0,)), images_per_prompt=2)


def test_backends_that_cannot_run_say_why(tiny, monkeypatch):
    import fpe_kernels

    monkeypatch.setattr(fpe_kernels, "backends", lambda: {"triton": "needs a CUDA device", "torch": "available"})
    with pytest.raises(RuntimeError, match="'triton' cannot run here: needs a CUDA device"):
        editing(tiny, FPE, backend="triton")


def test_a_bare_unet_has_to_be_told(tiny):
    (latents, _), _ = unet_inputs(tiny_unet("sd1", torch.float32), 4)
    embeddings = torch.zeros(4, 7, 32)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"session\.step"), editing(tiny.unet, FPE):
            tiny.unet(latents, 1, embeddings)
        with pytest.raises(ValueError, match="classifier_free_guidance="), editing(tiny.unet, FPE) as session:
            session.step(0, 2)
            tiny.unet(latents, 1, embeddings)
        with pytest.raises(ValueError, match="perturbed-attention"), editing(tiny, FPE) as session:
            tiny.__dict__["do_perturbed_attention_guidance"] = True
            try:
                sample(tiny)
            finally:
                del tiny.__dict__["do_perturbed_attention_guidance"]


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
