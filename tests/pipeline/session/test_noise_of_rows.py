"""Rows of one image draw the same noise, for edits that pair images pixel by pixel."""

import copy
from typing import ClassVar

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from fpe_pipeline import BatchRoles, FreePromptEdit, FreePromptPipeline, StyleAlignedEdit, editing, heat_maps
from tests.support.golden_cases import load_pipeline
from tests.support.silent import SOURCE, TARGET, embedded
from tests.support.tiny_language import tiny_lumina_that_reads
from tests.support.tiny_models import tiny_instruct_pipeline
from tests.support.tiny_transformers import tiny_flux_pipeline, tiny_sd3_pipeline
from tests.support.tiny_unets import tiny_unet

PROMPTS = [SOURCE, TARGET]
OTHERS = ["a photo of a green house in the snow", "a photo of a green house in the desert"]


@pytest.fixture(scope="module")
def pipe():
    return embedded()


@pytest.fixture
def starts(pipe):
    """The latents of the UNet's calls, conditional rows alone."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].chunk(2)[1].clone()))
    yield seen
    hook.remove()


SIDE = 32  # of the embedded model's latents


def run(pipe, prompts=PROMPTS, seed=0, images=1, steps=2, **options):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "latent", **options}
    return pipe(prompts, generator=generator, num_images_per_prompt=images, **options).images


def test_the_noise_is_shared(pipe, starts):
    with editing(pipe, FreePromptEdit(1.0)) as session:
        run(pipe)
    assert torch.equal(starts[0][0], starts[0][1])
    noise = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(starts[0][0], noise[0])
    assert 'editing(…, noise="separate") keeps them apart' in session.explain()


def test_the_edit_is_that_of_shared_latents(pipe):
    with editing(pipe, FreePromptEdit(1.0)):
        drawn = run(pipe)
    latents = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    with editing(pipe, FreePromptEdit(1.0)):
        given = run(pipe, latents=latents)
    torch.testing.assert_close(drawn, given, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, None])
def test_several_images_have_noise_of_their_own(pipe, starts, seed):
    with editing(pipe, FreePromptEdit(1.0)):
        run(pipe, seed=seed, images=2)
    first, second, one, two = starts[0]
    assert torch.equal(first, one)
    assert torch.equal(second, two)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_sources_of_their_own(pipe, starts):
    with editing(pipe, FreePromptEdit(1.0), source_of=(0, 0, 2, 2)):
        run(pipe, [*PROMPTS, *OTHERS])
    one, two, three, four = starts[0]
    assert torch.equal(one, two)
    assert torch.equal(three, four)
    assert not torch.equal(one, three)


def test_stochastic_steps(pipe, starts):
    """Under noise that is the same in every step, a target that is its source's prompt again is its source."""
    scheduler = pipe.scheduler
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
    try:
        with editing(pipe, FreePromptEdit(1.0)):
            images = run(pipe, [SOURCE, SOURCE], steps=3)
    finally:
        pipe.scheduler = scheduler
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


class TestStochasticFlow:
    """Pipelines of flow models hand no generator to their scheduler's steps."""

    OPTIONS: ClassVar = {"height": 64, "width": 64, "max_sequence_length": 12, "guidance_scale": 3.0}

    @pytest.fixture(params=[tiny_sd3_pipeline, tiny_flux_pipeline], ids=["sd3", "flux"])
    def flow(self, request):
        tiny = request.param(load_pipeline(), dtype=torch.float32)
        tiny.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        return tiny

    def test_equal_prompts_give_equal_images(self, flow):
        with editing(flow, FreePromptEdit(1.0)):
            images = run(flow, [SOURCE] * 4, images=2, steps=3, **self.OPTIONS)
        for target in (2, 4, 6):
            torch.testing.assert_close(images[target : target + 2], images[:2], rtol=0, atol=1e-4)
        assert (images[0] - images[1]).abs().max() > 0.1

    def test_a_pipeline_that_has_the_method_for_it_and_does_not_call_it(self):
        lumina = tiny_lumina_that_reads(torch.float32)
        lumina.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        with editing(lumina, FreePromptEdit(1.0)):
            images = run(lumina, [SOURCE] * 2, steps=3, **self.OPTIONS)
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)

    def test_a_seed_decides(self, flow):
        with editing(flow, FreePromptEdit(1.0)):
            first, again, other = (run(flow, steps=3, seed=seed, **self.OPTIONS) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert (first - other).abs().max() > 0.1

    def test_steps_of_another_pipeline_draw_their_own(self, flow):
        """One that has the same scheduler, and a model of its own."""
        other = type(flow)(**flow.components)
        other.transformer = copy.deepcopy(flow.transformer)

        def drawn():
            torch.manual_seed(0)  # which flow models' steps draw from
            return run(other, steps=3, **self.OPTIONS)

        expected = drawn()
        with editing(flow, FreePromptEdit(1.0)):
            edited = run(flow, steps=3, **self.OPTIONS)
            assert torch.equal(drawn(), expected)
            assert torch.equal(run(flow, steps=3, **self.OPTIONS), edited)

    def test_a_list_of_generators_is_every_rows_own(self, flow):
        def generators():
            return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

        with editing(flow, FreePromptEdit(1.0)):
            first, again = (
                flow([SOURCE] * 2, generator=generators(), num_inference_steps=3, output_type="latent", **self.OPTIONS)
                for _ in range(2)
            )
        assert torch.equal(first.images, again.images)
        assert (first.images[0] - first.images[1]).abs().max() > 0.1

    def test_noise_that_is_kept_apart(self, flow):
        with editing(flow, FreePromptEdit(1.0), noise="separate"):
            images = run(flow, [SOURCE] * 2, steps=3, **self.OPTIONS)
        assert (images[0] - images[1]).abs().max() > 0.1
        assert "step" not in vars(flow.scheduler) and "check_inputs" not in vars(flow)

    def test_ours_shares_it_whatever_it_starts_from(self, flow):
        tiny = FreePromptPipeline.from_pipe(flow)
        tiny.set_progress_bar_config(disable=True)
        latents = torch.randn(1, 16, 8, 8) if flow.transformer.config.in_channels == 16 else torch.randn(1, 16, 64)
        for given in ({}, {"latents": latents}):
            out = tiny([SOURCE] * 2, num_inference_steps=3, output_type="latent", **given, **self.OPTIONS)
            torch.testing.assert_close(out.targets[0], out.source, rtol=0, atol=1e-4)


def test_image_to_image(pipe, starts):
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    with editing(img2img, FreePromptEdit(1.0)):
        run(img2img, image=Image.new("RGB", (80, 80), (200, 30, 30)), strength=1.0)
    assert torch.equal(starts[0][0], starts[0][1])


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("pictures", [1, 3], ids=["one picture", "a picture a row"])
def test_inpainting_by_stochastic_steps(pipe, channels, pictures, seed):
    """The picture under the mask is encoded by noise that rows share too, and steps draw the same after it."""
    width = pipe.text_encoder.config.hidden_size
    parts = {**pipe.components, "scheduler": EulerAncestralDiscreteScheduler()}
    parts["unet"] = tiny_unet("sd1", torch.float32, cross_attention_dim=width, in_channels=channels)
    inpaint = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    image, mask = Image.radial_gradient("L").convert("RGB").resize((64, 64)), torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    options = {"image": [image] * pictures, "mask_image": mask, "height": 64, "width": 64, "steps": 3}
    with editing(inpaint, FreePromptEdit(1.0)):
        images = run(inpaint, [SOURCE, TARGET, SOURCE], seed=seed, **options)
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 1e-2
    with editing(inpaint, FreePromptEdit(1.0), noise="separate"):
        apart = run(inpaint, [SOURCE, TARGET, SOURCE], seed=seed, **options)
    assert (apart[0] - apart[2]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, None])
def test_a_control_picture_is_encoded_alike_for_rows_of_one_image(pipe, seed):
    """FLUX.1's control models encode it by the caller's generator before they prepare latents."""
    from diffusers import FluxControlPipeline

    tiny = tiny_flux_pipeline(pipe, torch.float32, FluxControlPipeline, in_channels=128, out_channels=64)
    seen, encode = [], tiny.vae.encode
    handle = tiny.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    size = {"height": 64, "width": 64, "max_sequence_length": 12}
    for images in (1, 2):
        with editing(tiny, FreePromptEdit(1.0)):
            run(tiny, [SOURCE] * 2, seed, images, control_image=Image.new("RGB", (64, 64)), **size)
        sources, targets = seen[0].chunk(2)
        assert torch.equal(sources, targets)
        assert images == 1 or not torch.equal(sources[0], sources[1])
        seen.clear()
    assert tiny.vae.encode == encode
    torch.manual_seed(1)
    run(tiny, [SOURCE] * 2, seed, control_image=Image.new("RGB", (64, 64)), **size)
    alone, other = seen[0][..., 64:]
    assert not torch.equal(alone, other)
    seen.clear()
    torch.manual_seed(1)
    with editing(tiny, FreePromptEdit(1.0)):  # a source sees what it sees without an edit
        run(tiny, [SOURCE] * 2, seed, control_image=Image.new("RGB", (64, 64)), **size)
    assert torch.equal(seen[0][0, :, 64:], alone)
    handle.remove()


def test_rows_that_are_kept_apart(pipe, starts):
    run(pipe)
    with editing(pipe, FreePromptEdit(1.0), noise="separate") as session:
        run(pipe)
    with editing(pipe, StyleAlignedEdit()):
        run(pipe)
    with heat_maps(pipe, ["car"]):
        run(pipe)
    for call in starts[2::2]:
        assert torch.equal(call, starts[0])
    assert not torch.equal(starts[0][0], starts[0][1])
    assert "noise:" not in session.explain()
    with editing(pipe, StyleAlignedEdit(), noise="shared"):
        run(pipe)
    assert torch.equal(starts[8][0], starts[8][1])


class TestRoles:
    """A layout that is written down says too which rows are of one image, in every part of the batch."""

    ROLES = BatchRoles(conditional=(False, False, True, True), source_of=(0, 0, 2, 2))

    def test_the_noise_is_shared(self, pipe, starts):
        with editing(pipe, FreePromptEdit(1.0), roles=self.ROLES) as session:
            run(pipe)
        assert torch.equal(starts[0][0], starts[0][1])
        assert 'editing(…, noise="separate") keeps them apart' in session.explain()

    def test_three_parts(self):
        tiny = tiny_instruct_pipeline(load_pipeline())
        starts = []
        tiny.unet.register_forward_pre_hook(lambda module, args: starts.append(args[0][:, :4].clone()))
        roles = BatchRoles(
            (True,) * 4 + (False,) * 8, tuple(4 * part + row for part in range(3) for row in (0, 1, 0, 1))
        )
        options = {"image": torch.rand(4, 3, 64, 64), "steps": 1, "images": 2}
        with editing(tiny, FreePromptEdit(1.0), roles=roles):
            run(tiny, **options)
        first, second, one, two = starts[0][:4]
        assert torch.equal(first, one)
        assert torch.equal(second, two)
        assert not torch.equal(first, second)
        with editing(tiny, FreePromptEdit(1.0), roles=roles, noise="separate"):
            run(tiny, **options)
        assert not torch.equal(starts[1][0], starts[1][2])

    def test_rows_that_cannot_be_told(self, pipe):
        roles = BatchRoles(conditional=(True, False, True), source_of=(0, 0, 0))
        message = 'noise="shared" of 2 rows, of which a batch of 3'
        with pytest.raises(ValueError, match=message), editing(pipe, FreePromptEdit(1.0), roles=roles, noise="shared"):
            run(pipe)


def test_a_list_of_generators_is_every_rows_own(pipe, starts):
    with editing(pipe, FreePromptEdit(1.0)):
        pipe(
            PROMPTS,
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
            num_inference_steps=1,
            output_type="latent",
        )
    assert not torch.equal(starts[0][0], starts[0][1])


def test_the_pipeline_is_left_as_it_was(pipe):
    with editing(pipe, FreePromptEdit(1.0)):
        assert {"prepare_latents", "encode_prompt", "prepare_extra_step_kwargs"} <= vars(pipe).keys()
    assert not {"prepare_latents", "encode_prompt", "prepare_extra_step_kwargs"} & vars(pipe).keys()
    with pytest.raises(ValueError, match='noise to be "shared" or "separate"'):
        editing(pipe, FreePromptEdit(1.0), noise="same")
