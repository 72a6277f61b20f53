"""What a run remembers belongs to prompts and images, not to batch rows: guidance may end half-way."""

import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback, SDCFGCutoffCallback

from fpe_pipeline import (
    BatchRoles,
    FreePromptEdit,
    FreePromptPipeline,
    LocalBlend,
    PromptToPromptEdit,
    WordMask,
    editing,
    heat_maps,
)
from tests.support.golden_cases import load_pipeline
from tests.support.silent import SOURCE, TARGET, dense_heat, embedded, noise, positions
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.tiny_transformers import tiny_sd3_pipeline

STEPS, CUT = 5, 0.4
PROMPTS = [SOURCE, TARGET]


@pytest.fixture(scope="module")
def pipe():
    return embedded()


def end(pipe, index, timestep, tensors):
    """diffusers' SDCFGCutoffCallback for several prompts, of which that one keeps the last."""
    if index == int(STEPS * CUT):
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
    return tensors


def weaken(pipe, index, timestep, tensors):
    """Guidance without effect from the same step on, all rows kept: what a run whose guidance ends has to give."""
    if index == int(STEPS * CUT):
        pipe._guidance_scale = 1.0 + 1e-12  # still "above 1", and the prediction is the conditional one
    return tensors


def call(pipe, prompts=PROMPTS, images=1, cut=True, callback=None, **options):
    rows = 1 if isinstance(prompts, str) else len(prompts)
    return pipe(
        prompts,
        latents=noise(*range(images)).repeat(rows, 1, 1, 1),
        num_images_per_prompt=images,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
        callback_on_step_end=callback or (end if cut else weaken),
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **options,
    ).images


def test_heat(pipe):
    def run():
        return call(pipe, SOURCE, callback=SDCFGCutoffCallback(cutoff_step_ratio=CUT))

    with heat_maps(pipe, ["car"]) as maps:
        run()
    right = dense_heat(pipe, run, positions(pipe, SOURCE, "car</w>"), lambda rows: rows - 1)
    torch.testing.assert_close(torch.tensor(maps.word("car")), right, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_heat_of_several_prompts_and_images(pipe):
    """Against runs that keep the unconditional rows to the end, where rows never move."""
    read = []
    for cut in (True, False):
        with heat_maps(pipe, ["car", "beach"], pixels=[(40, 40)]) as maps:
            call(pipe, images=2, cut=cut)
        read.append([maps.word(word, image) for word in ("car", "beach") for image in range(4)])
        read[-1] += [maps.pixel((40, 40), image) for image in range(4)]
    for one, other in zip(*read, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_components(pipe):
    read = []
    for cut in (True, False):
        with heat_maps(pipe, components=2) as maps:
            call(pipe, cut=cut)
        read.append(maps.principal_components(1))
    torch.testing.assert_close(torch.tensor(read[0]), torch.tensor(read[1]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["local blend", "word mask"])
def test_edits_that_remember(pipe, kind):
    if kind == "local blend":
        edit = PromptToPromptEdit(PROMPTS, pipe.tokenizer) + LocalBlend(PROMPTS, pipe.tokenizer, ("red", "blue"))
    else:
        edit = FreePromptEdit(1.0, mask=WordMask(SOURCE, "car", pipe.tokenizer, threshold=0.5))
    images = []
    for cut in (True, False):
        with editing(pipe, edit):
            images.append(call(pipe, images=2, cut=cut))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)


def test_a_layout_that_was_written_down(pipe):
    roles = BatchRoles((False, False, True, True), (0, 0, 2, 2))
    images = []
    for options in ({"roles": roles}, {}):
        with editing(pipe, FreePromptEdit(1.0), **options):
            images.append(call(pipe))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_through_the_pipeline():
    pipe = embedded(FreePromptPipeline)
    images = []
    for cut in (True, False):
        edit = FreePromptEdit(1.0, mask=WordMask(SOURCE, "car", pipe.tokenizer, threshold=0.5))
        images.append(
            pipe(
                SOURCE,
                TARGET,
                edit=edit,
                latents=noise(0),
                num_inference_steps=STEPS,
                guidance_scale=5.0,
                output_type="latent",
                callback_on_step_end=end if cut else weaken,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            ).images
        )
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("window", [1.0, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "callback"),
    [(tiny_pipeline, SDCFGCutoffCallback), (tiny_sd3_pipeline, SD3CFGCutoffCallback)],
    ids=["one that diffusers fails in", "one that sees the last prompt's text in every row"],
)
def test_callbacks_that_keep_the_last_prompt_alone(make, callback, window):
    """diffusers' own: what they leave of several prompts is the last one's text, for all rows."""
    tiny = make(load_pipeline())
    options = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "latent"}
    message = r"expected a text for each of the 2 rows of latents, got 1: .*SDCFGCutoffCallback"
    with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit(window)):
        tiny(PROMPTS, callback_on_step_end=callback(cutoff_step_ratio=CUT), **options)
    assert not vars(tiny).keys() & {"encode_prompt", "prepare_latents"}
    with heat_maps(tiny, ["car"]) as maps:  # of one prompt they keep what there is
        tiny(SOURCE, callback_on_step_end=callback(cutoff_step_ratio=CUT), **options)
    assert maps.word("car").max() > 0
