"""Edits that are written for some prompts, called with others: refused before anything is denoised."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fpe_pipeline import FreePromptEdit, LocalBlend, PromptToPromptEdit, WordMask, editing
from tests.support.free_prompt_pipelines import OTHER, SOURCE, TARGET, free_prompt_pipeline, noise

RUN = {"num_inference_steps": 2, "latents": noise(), "output_type": "latent"}

SWAPPED = "a photo of rubber ducks sitting on street"

EDITS = {
    "prompt to prompt": lambda t: PromptToPromptEdit([SOURCE, TARGET, SWAPPED], t),
    "a local blend": lambda t: LocalBlend([SOURCE, TARGET, SWAPPED], t, ("green", "rubber", "rubber")),
    "both": lambda t: EDITS["prompt to prompt"](t) + EDITS["a local blend"](t),
    "beside a word's mask": lambda t: (
        EDITS["a local blend"](t) + FreePromptEdit(mask=WordMask(SOURCE, "ducks", t), levels=1)
    ),
}


@pytest.fixture(scope="module")
def tiny(pipe):
    return free_prompt_pipeline(pipe)


@pytest.fixture
def unet_must_not_run(tiny, monkeypatch):
    monkeypatch.setattr(tiny.unet, "forward", lambda *a, **k: pytest.fail("denoised before it was checked"))


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(
    "prompts",
    [[OTHER, TARGET, SWAPPED], [SOURCE, SWAPPED, TARGET], [SOURCE, TARGET], [SOURCE, TARGET, SWAPPED, SWAPPED]],
    ids=["another source", "another order", "fewer", "more"],
)
def test_other_prompts(tiny, unet_must_not_run, name, prompts):
    with pytest.raises(ValueError, match=r"is written for the prompts .*green ducks.* in their order"):
        tiny(prompts, edit=EDITS[name](tiny.tokenizer), **RUN)


def test_a_mask_from_a_word_of_another_source(tiny, unet_must_not_run):
    edit = FreePromptEdit(mask=WordMask(OTHER, "cars", tiny.tokenizer))
    with pytest.raises(ValueError, match=r"FreePromptEdit is written for the prompts .*red cars"):
        tiny(SOURCE, TARGET, edit=edit, **RUN)
    with pytest.raises(ValueError, match=r"FreePromptEdit is written for the prompts .*red cars"):
        tiny.record(SOURCE, edit=edit, num_inference_steps=2)


def test_parts_for_different_prompts(tiny):
    words = EDITS["prompt to prompt"](tiny.tokenizer)
    for other in (
        FreePromptEdit(mask=WordMask(OTHER, "cars", tiny.tokenizer)),
        LocalBlend([SOURCE, TARGET], tiny.tokenizer, ("green", "rubber")),
    ):
        with pytest.raises(ValueError, match=r"combined edits are written for different prompts"):
            tiny([SOURCE, TARGET, SWAPPED], edit=words + other, **RUN)


@pytest.mark.parametrize("name", EDITS)
def test_the_prompts_that_they_are_written_for(tiny, name):
    assert tiny([SOURCE, TARGET, SWAPPED], edit=EDITS[name](tiny.tokenizer), **RUN).report


def test_a_mask_serves_any_target(tiny):
    edit = FreePromptEdit(mask=WordMask(SOURCE, "ducks", tiny.tokenizer))
    assert tiny(SOURCE, [TARGET, OTHER], edit=edit, **RUN).report.layers
    assert editing(tiny, edit)


class TestMasksInASessionOfDiffusersPipeline:
    """A word stands in other places of another prompt, where it would be the mask of another word."""

    @staticmethod
    def mask(tiny):
        return FreePromptEdit(1.0, mask=WordMask(SOURCE, "ducks", tiny.tokenizer, threshold=0.9))

    def test_of_another_source(self, tiny, unet_must_not_run):
        message = r"mask of 'ducks' is written for the source prompt .*, got .*red cars"
        with pytest.raises(ValueError, match=message), editing(tiny, self.mask(tiny)):
            called(tiny, [OTHER, TARGET])

    def test_of_one_source_of_two(self, tiny):
        message = r"mask of 'ducks' .*, and prompt 3 of .* is a source too"
        with (
            pytest.raises(ValueError, match=message),
            editing(tiny, self.mask(tiny), source_of=(0, 0, 2, 2)),
        ):
            called(tiny, [SOURCE, TARGET, OTHER, SWAPPED])

    def test_wherever_its_source_stands(self, tiny):
        with editing(tiny, self.mask(tiny)):
            first = called(tiny, [SOURCE, TARGET])
        with editing(tiny, self.mask(tiny), source_of=(1, 1)):
            last = called(tiny, [TARGET, SOURCE])
        torch.testing.assert_close(last.flip(0), first, rtol=0, atol=1e-4)


def called(tiny, prompts):
    """The latents of the ordinary pipeline's call, of one prompt after the other."""
    call = {**RUN, "latents": noise().repeat(len(prompts), 1, 1, 1)}
    return StableDiffusionPipeline.__call__(tiny, prompts, **call).images
