"""The layout of a batch is read from the pipeline call, checked, or refused."""

import inspect

import diffusers
import pytest
import torch

from fpe_pipeline import FreePromptEdit, LocalBlend, PromptToPromptEdit, editing, heat_maps
from tests.support.silent import SOURCE, TARGET, embedded, noise

PROMPTS = [SOURCE, TARGET]


@pytest.fixture(scope="module")
def pipe():
    return embedded()


def call(pipe, prompts, latents, images, steps=3, **options):
    options = {"guidance_scale": 5.0, "output_type": "latent", **options}
    return pipe(prompts, latents=latents, num_images_per_prompt=images, num_inference_steps=steps, **options).images


@pytest.mark.parametrize("guidance", [5.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["fpe", "p2p and blend"])
def test_several_images_a_prompt(pipe, kind, guidance):
    """Image i of a target is edited from image i of the source: as in calls of one image each."""

    def edit():
        if kind == "fpe":
            return FreePromptEdit(1.0)
        return PromptToPromptEdit(PROMPTS, pipe.tokenizer) + LocalBlend(PROMPTS, pipe.tokenizer, ("red", "blue"))

    def run(latents, images):
        with editing(pipe, edit()):
            return call(pipe, PROMPTS, latents, images, guidance_scale=guidance)

    one, two = run(noise(1, 1), 1), run(noise(2, 2), 1)
    together = run(noise(1, 2, 1, 2), 2)
    torch.testing.assert_close(together, torch.stack([one[0], two[0], one[1], two[1]]), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_several_images_with_sources_of_their_own(pipe):
    prompts = [SOURCE, TARGET, "a photo of a green house in the snow", "a photo of a green house in the desert"]

    def run(latents, images):
        with editing(pipe, FreePromptEdit(1.0), source_of=(0, 0, 2, 2)):
            return call(pipe, prompts, latents, images)

    one, two = run(noise(1, 1, 1, 1), 1), run(noise(2, 2, 2, 2), 1)
    together = run(noise(1, 2, 1, 2, 1, 2, 1, 2), 2)
    right = torch.stack([image for pair in zip(one, two, strict=True) for image in pair])
    torch.testing.assert_close(together, right, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_heat_of_several_images_of_one_prompt(pipe):
    def read(latents, images):
        with heat_maps(pipe, ["car"]) as maps:
            call(pipe, SOURCE, latents, images)
        return [torch.tensor(maps.word("car", image)) for image in range(images)]

    together, (one,), (two,) = read(noise(1, 2), 2), read(noise(1), 1), read(noise(2), 1)
    torch.testing.assert_close(torch.stack(together), torch.stack([one, two]), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_embeddings_in_place_of_prompts(pipe):
    embeddings = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["", ""])
    named = {"prompt_embeds": embeddings[0], "negative_prompt_embeds": embeddings[1]}
    images = []
    for prompts, options in ((PROMPTS, {}), (None, named)):
        with editing(pipe, FreePromptEdit(1.0)):
            images.append(call(pipe, prompts, noise(1, 2, 1, 2), 2, **options))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


def test_what_was_said_wrongly_is_refused(pipe):
    with (
        pytest.raises(ValueError, match="images_per_prompt=2 was said of a pipeline call with num_images_per_prompt=1"),
        editing(pipe, FreePromptEdit(1.0), images_per_prompt=2),
    ):
        call(pipe, [*PROMPTS, *PROMPTS], noise(1, 1, 1, 1), 1)
    with (
        pytest.raises(ValueError, match="encodes 4 prompts with 1 images each"),
        editing(pipe, FreePromptEdit(1.0), classifier_free_guidance=True),
    ):
        call(pipe, [*PROMPTS, *PROMPTS], noise(1, 1, 1, 1), 1, guidance_scale=1.0)


def test_panoramas_are_refused():
    parts = embedded().components
    pipe = diffusers.StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False)
    for enter in (lambda: editing(pipe, FreePromptEdit(1.0)), lambda: heat_maps(pipe, ["car"])):
        with pytest.raises(ValueError, match="views of a panorama"), enter():
            pass


def test_two_networks_in_one_are_refused():
    both = diffusers.UNetControlNetXSModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        num_attention_heads=2,
        ctrl_block_out_channels=(4, 8),
        ctrl_num_attention_heads=1,
        ctrl_max_norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(4,),
    )
    with pytest.raises(ValueError, match="holds two networks"), editing(both, FreePromptEdit(1.0)):
        pass


def test_video_pipelines_are_refused():
    base = embedded()
    sizes = {"block_out_channels": (64, 128), "motion_norm_num_groups": 16, "motion_num_attention_heads": 2}
    adapter = diffusers.MotionAdapter(motion_layers_per_block=1, motion_mid_block_layers_per_block=1, **sizes)
    animated, zero = (
        kind(**{name: p for name, p in base.components.items() if name in inspect.signature(kind).parameters}, **more)
        for kind, more in (
            (diffusers.AnimateDiffPipeline, {"motion_adapter": adapter}),
            (diffusers.TextToVideoZeroPipeline, {"requires_safety_checker": False}),
        )
    )
    for pipe in (animated, zero, animated.unet):
        for enter in (lambda p=pipe: editing(p, FreePromptEdit(1.0)), lambda p=pipe: heat_maps(p, pixels=[(1, 1)])):
            with pytest.raises(ValueError, match="frames as rows of the batch"), enter():
                pass
