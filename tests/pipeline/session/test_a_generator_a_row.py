"""A list of generators in which those of one image begin alike means one noise, whatever is drawn before it."""

from contextlib import nullcontext

import diffusers
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from fpe_pipeline import FreePromptEdit, editing
from tests.support.modular_twins import last_latents, sd3_twins
from tests.support.silent import SOURCE, TARGET
from tests.support.tiny_transformers import tiny_flux_pipeline, tiny_sd3_pipeline
from tests.support.tiny_unets import tiny_unet

PICTURE = Image.radial_gradient("L").convert("RGB").resize((64, 64))
MASK = Image.linear_gradient("L").resize((64, 64))
CLOSE = {"rtol": 0, "atol": 1e-4}


def run(pipe, prompts=(SOURCE, SOURCE, TARGET), images=1, seeds=None, **options):
    if seeds is None:
        seeds = [*range(images)] * len(prompts)
    size = {} if isinstance(pipe, StableDiffusionImg2ImgPipeline) else {"height": 64, "width": 64}
    return pipe(
        list(prompts),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_images_per_prompt=images,
        num_inference_steps=4,
        output_type="latent",
        **size,
        **options,
    ).images


def check(pipe, images=1, **options):
    """Equal prompts give equal images, the target another one, and the source's is the unedited run's."""
    plain = run(pipe, images=images, **options)
    with editing(pipe, FreePromptEdit(0.5)):
        edited = run(pipe, images=images, **options)
    source, same, target = edited.split(images)
    torch.testing.assert_close(source, plain[:images], **CLOSE)
    torch.testing.assert_close(same, source, **CLOSE)
    assert (target - source).abs().max() > 1e-3
    return plain


def flux(pipe, kind, **config):
    tiny = tiny_flux_pipeline(pipe, torch.float32, **config)
    tiny.scheduler = FlowMatchEulerDiscreteScheduler()
    made = getattr(diffusers, kind)(**{name: part for name, part in tiny.components.items() if part is not None})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("images", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("channels", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_inpainting_by_stochastic_steps(pipe, channels, images):
    """diffusers encodes the one picture, and the one under its mask, by the first row's generator alone."""
    unet = tiny_unet("sd1", torch.float32, cross_attention_dim=32, in_channels=channels)
    parts = {**pipe.components, "scheduler": EulerAncestralDiscreteScheduler(), "unet": unet}
    inpaint = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    options = {"image": PICTURE, "mask_image": MASK, "strength": 0.75}
    plain = check(inpaint, images, **options)
    with editing(inpaint, FreePromptEdit(0.5), noise="separate"):
        apart = run(inpaint, images=images, **options)
    assert (apart[0] - apart[images]).abs().max() > 0.1
    torch.testing.assert_close(apart[:images], plain[:images], **CLOSE)


@pytest.mark.parametrize("pictures", [PICTURE, [PICTURE.rotate(90), PICTURE]], ids=["one", "two"])
def test_rows_that_encode_their_pictures_in_turn(pipe, pictures):
    """Stable Diffusion repeats pictures for a list of generators, before it draws noise by the same."""
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    options = {"image": pictures, "strength": 0.75, "num_inference_steps": 4, "output_type": "latent"}
    drawn = []
    for edit in (FreePromptEdit(0.0), None):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 0, 1)]
        with nullcontext() if edit is None else editing(img2img, edit):
            given = {"generator": generators, "num_images_per_prompt": 2, **options}
            drawn.append(img2img([SOURCE, SOURCE], **given).images)
    assert torch.equal(*drawn)
    torch.testing.assert_close(drawn[0][:2], drawn[0][2:], **CLOSE)
    assert (drawn[0][0] - drawn[0][1]).abs().max() > 0.1


def from_a_picture(pipe, kind=StableDiffusionImg2ImgPipeline):
    unet = tiny_unet("sd1", torch.float32, cross_attention_dim=32)
    parts = {**pipe.components, "scheduler": EulerAncestralDiscreteScheduler(), "unet": unet}
    tiny = kind(**parts, requires_safety_checker=False)
    tiny.set_progress_bar_config(disable=True)
    return tiny


@pytest.mark.parametrize("images", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pictures", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_picture_that_is_encoded_for_each_row(pipe, pictures, images):
    """Stable Diffusion's pipeline repeats the one that it is given, and each row draws for its own."""
    tiny = from_a_picture(pipe)
    plain = check(tiny, images, image=PICTURE if pictures == 1 else [PICTURE] * pictures, strength=0.75)
    torch.testing.assert_close(plain[:images], plain[images : 2 * images], **CLOSE)


def test_what_is_drawn_by_the_first_row_before_pictures_of_each(pipe):
    class Draws(StableDiffusionImg2ImgPipeline):
        def get_timesteps(self, *given, **named):
            torch.randn(1, generator=self.first)
            return super().get_timesteps(*given, **named)

    tiny, generators = from_a_picture(pipe, Draws), [torch.Generator().manual_seed(0) for _ in range(2)]
    tiny.first = generators[0]
    options = {"image": PICTURE, "strength": 0.75, "num_inference_steps": 4, "output_type": "latent"}
    with editing(tiny, FreePromptEdit(0.5)):
        source, same = tiny([SOURCE] * 2, generator=generators, **options).images
    torch.testing.assert_close(same, source, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("FluxImg2ImgPipeline", {}),
        pytest.param("FluxInpaintPipeline", {"mask_image": MASK}, marks=pytest.mark.slow),
        pytest.param("FluxControlImg2ImgPipeline", {"control_image": PICTURE}, marks=pytest.mark.slow),
        # Encodes the picture under the mask before the controlling one, and that before it draws noise.
        ("FluxControlInpaintPipeline", {"control_image": PICTURE, "mask_image": MASK}),
    ],
)
def test_flux_from_a_picture(pipe, kind, given):
    config = {"in_channels": 128, "out_channels": 64} if "Control" in kind else {}
    check(flux(pipe, kind, **config), image=PICTURE, strength=0.75, max_sequence_length=12, **given)


def test_what_began_apart_stays_apart(pipe):
    """Of the rows of one image, and of rows that draw one after another from a generator that they share."""
    tiny = flux(pipe, "FluxImg2ImgPipeline")
    options = {"image": PICTURE, "strength": 0.75, "max_sequence_length": 12}
    one = torch.Generator()
    for generators in ([torch.Generator() for _ in range(2)], [one, one]):

        def drawn(generators=generators):
            for seed, generator in enumerate(generators):
                generator.manual_seed(seed)
            size = {"num_inference_steps": 4, "height": 64, "width": 64}
            return tiny([SOURCE] * 2, generator=generators, output_type="latent", **size, **options).images

        plain = drawn()
        with editing(tiny, FreePromptEdit(0.0)):
            assert torch.equal(drawn(), plain)
        assert (plain[0] - plain[1]).abs().max() > 0.1


@pytest.mark.slow
def test_modular_blocks_that_encode_one_picture(pipe):
    _, twin, _, call = sd3_twins(pipe)
    call = call | {"prompt": [SOURCE, SOURCE], "image": PICTURE, "strength": 0.75}
    with editing(twin, FreePromptEdit(0.5)):
        source, same = last_latents(twin, [torch.Generator().manual_seed(0) for _ in range(2)], **call)
    torch.testing.assert_close(same, source, **CLOSE)


@pytest.mark.parametrize("images", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_controlnet_that_encodes_a_picture_for_each_half(pipe, images):
    """Stable Diffusion 3's do, by no generator: rows of one image are controlled by one sample of it."""
    tiny = tiny_sd3_pipeline(pipe, dtype=torch.float32)
    tiny.scheduler = FlowMatchEulerDiscreteScheduler()
    torch.manual_seed(3)
    net = diffusers.SD3ControlNetModel.from_transformer(
        tiny.transformer, num_layers=2, num_extra_conditioning_channels=0
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "controlnet" in name or "pos_embed_input" in name:
                parameter.normal_(std=0.2)
    controlled = diffusers.StableDiffusion3ControlNetPipeline(**tiny.components, controlnet=net.eval())
    controlled.set_progress_bar_config(disable=True)
    options = {"control_image": PICTURE, "max_sequence_length": 12, "guidance_scale": 4.0}
    drawn = []
    for edit in (None, FreePromptEdit(0.5)):
        torch.manual_seed(0)  # of which the picture is sampled
        if edit is None:
            drawn.append(run(controlled, images=images, **options))
        else:
            with editing(controlled, edit):
                drawn.append(run(controlled, images=images, **options))
    plain, edited = drawn
    source, same, target = edited.split(images)
    torch.testing.assert_close(source, plain[:images], **CLOSE)
    torch.testing.assert_close(same, source, **CLOSE)
    assert (plain[images : 2 * images] - plain[:images]).abs().max() > 0.1  # without an edit each row has its own
    assert (target - source).abs().max() > 1e-3
