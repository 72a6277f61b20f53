"""Token positions come from what the pipeline encodes: tokens of several vectors, added tokens, padding, templates."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fpe_pipeline import (
    FreePromptEdit,
    FreePromptPipeline,
    LocalBlend,
    PromptToPromptEdit,
    WordMask,
    editing,
    heat_maps,
)
from fpe_pipeline.prompts.alignment import tokenize
from tests.support.silent import SOURCE, TARGET, add_token, dense_heat, embedded, noise, positions

TOY = "a photo of a <toy> on the beach"


@pytest.fixture(scope="module")
def toys():
    pipe = embedded()
    add_token(pipe, "<toy>", 3)
    add_token(pipe, "<cat-toy>", 1, seed=1)
    return pipe


def call(pipe, prompts, *seeds, steps=3, **options):
    options = {"guidance_scale": 5.0, "output_type": "latent", **options}
    return pipe(prompts, latents=noise(*seeds), num_inference_steps=steps, **options).images


def heat_error(pipe, prompt, words, texts, **options):
    """Largest difference of a word's heat from that of the positions at which the encoder received its tokens."""

    def run():
        return call(pipe, prompt, 0, **options)

    with heat_maps(pipe, words) as maps:
        run()
    errors = [
        (torch.tensor(maps.word(word)) - dense_heat(pipe, run, positions(pipe, prompt, *tokens), lambda rows: rows - 1))
        for word, tokens in zip(words, texts, strict=True)
    ]
    return max(error.abs().max().item() for error in errors)


@pytest.mark.slow
def test_heat_around_a_token_of_several_vectors(toys):
    texts = [["photo</w>"], ["<toy>", "<toy>_1", "<toy>_2"], ["beach</w>"]]
    assert heat_error(toys, TOY, ["photo", "<toy>", "beach"], texts) < 1e-5


@pytest.mark.slow
def test_heat_beside_two_of_them(toys):
    prompt = "a <toy> and a <cat-toy> and a <toy> on the beach"
    texts = [["<toy>", "<toy>_1", "<toy>_2"], ["<cat-toy>"], ["beach</w>"]]
    assert heat_error(toys, prompt, ["<toy>", "<cat-toy>", "beach"], texts) < 1e-5


@pytest.mark.slow
def test_alignment_beside_a_token_of_several_vectors(toys):
    """The prompts as users write them and with all vectors written out make one edit, of either call."""
    prompts = [TOY, "a photo of a <toy> on the red beach"]
    written = [toys.maybe_convert_prompt(prompt, toys.tokenizer) for prompt in prompts]
    assert written != prompts

    def run(words):
        edit = PromptToPromptEdit(words, toys.tokenizer, "refine", cross_replace_steps=1.0, self_replace_steps=0)
        with editing(toys, edit):
            return call(toys, prompts, 0, 0)

    torch.testing.assert_close(run(prompts), run(written), rtol=0, atol=1e-5)
    free = FreePromptPipeline.from_pipe(toys)
    free.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": noise(0)}
    images = [
        free(given[0], given[1:], edit=PromptToPromptEdit(words, toys.tokenizer, "refine"), **options).images
        for given in (prompts, written)
        for words in (prompts, written)
    ]
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=0, atol=1e-5)


def test_columns_beside_a_token_of_several_vectors(toys):
    """The mapper takes each token from where the encoder received the same one."""
    prompts = [TOY, "a photo of a <toy> on the red beach"]
    edit = PromptToPromptEdit(prompts, toys.tokenizer, "refine")
    (there,), (here,) = (positions(toys, prompt, "beach</w>") for prompt in prompts)
    (red,) = positions(toys, prompts[1], "red</w>")
    alignment = edit._targets[1]._alignment
    assert alignment.mapper[there, here] == 1
    assert alignment.kept[red] == 0  # the target's own word
    assert there != here


def test_an_added_token_is_one_word(toys):
    prompts = ["a photo of a car on the beach", "a photo of a <cat-toy> on the beach"]
    length = toys.tokenizer.model_max_length
    edit = PromptToPromptEdit(prompts, toys.tokenizer)
    assert torch.equal(edit._targets[1]._alignment.mapper, torch.eye(length, dtype=torch.float64))
    assert [word.text for word in tokenize(prompts[1], toys.tokenizer).words].count("<cat-toy>") == 1
    with pytest.raises(ValueError, match="'cat' is not in the prompt"):
        tokenize(prompts[1], toys.tokenizer).find("cat")


@pytest.fixture
def padded_left():
    pipe = embedded()
    pipe.tokenizer.padding_side = "left"
    return pipe


def test_heat_under_padding_on_the_left(padded_left):
    assert heat_error(padded_left, SOURCE, ["car", "beach"], [["car</w>"], ["beach</w>"]]) < 1e-5


def test_alignment_under_padding_on_the_left(padded_left):
    prompts = ["a red car", "a photo of a red car"]
    edit = PromptToPromptEdit(prompts, padded_left.tokenizer, "refine")
    mapper = edit._targets[1]._alignment.mapper
    (there,), (here,) = (positions(padded_left, prompt, "car</w>") for prompt in prompts)
    assert mapper[there, here] == 1
    padding = tokenize(prompts[1], padded_left.tokenizer).first
    assert padding > 0
    assert torch.equal(mapper.sum(0)[:padding], torch.ones(padding, dtype=mapper.dtype))


class Templated(StableDiffusionPipeline):
    """A pipeline that puts words of its own before the prompt."""

    def encode_prompt(self, prompt, *args, **kwargs):
        texts = [prompt] if isinstance(prompt, str) else prompt
        return super().encode_prompt([f"a picture of {text}" for text in texts], *args, **kwargs)


def test_heat_of_a_prompt_in_a_template():
    pipe = embedded(Templated)
    assert heat_error(pipe, SOURCE, ["car", "beach"], [["car</w>"], ["beach</w>"]]) < 1e-5


def test_edits_of_prompts_in_a_template():
    """Words are aligned where they are: as in a call in which the template is part of the prompts."""
    plain, templated = embedded(), embedded(Templated)
    prompts = [SOURCE, TARGET]
    written = [f"a picture of {prompt}" for prompt in prompts]
    weights, words = {"blue": 3.0}, ("red", "blue")

    def run(pipe, given):
        edit = PromptToPromptEdit(given, pipe.tokenizer, weights=weights, self_replace_steps=0)
        edit += LocalBlend(given, pipe.tokenizer, words)
        with editing(pipe, edit):
            return call(pipe, given, 0, 0)

    torch.testing.assert_close(run(templated, prompts), run(plain, written), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_word_mask_in_a_template():
    plain, templated = embedded(), embedded(Templated)
    prompts = [SOURCE, TARGET]
    written = [f"a picture of {prompt}" for prompt in prompts]

    def run(pipe, given):
        with editing(pipe, FreePromptEdit(1.0, mask=WordMask(given[0], "car", pipe.tokenizer, threshold=0.5))):
            return call(pipe, given, 0, 0)

    torch.testing.assert_close(run(templated, prompts), run(plain, written), rtol=0, atol=1e-5)


class Shouting(StableDiffusionPipeline):
    def encode_prompt(self, prompt, *args, **kwargs):
        texts = [prompt] if isinstance(prompt, str) else prompt
        return super().encode_prompt([text.replace("car", "boat") for text in texts], *args, **kwargs)


def test_prompts_that_are_changed_on_the_way_are_refused():
    pipe = embedded(Shouting)
    with (
        pytest.raises(ValueError, match="the pipeline encodes other tokens"),
        editing(pipe, PromptToPromptEdit([SOURCE, TARGET], pipe.tokenizer)),
    ):
        call(pipe, [SOURCE, TARGET], 0, 0)


def test_an_edit_of_other_prompts_is_refused(toys):
    edit = PromptToPromptEdit([SOURCE, TARGET], toys.tokenizer)
    with pytest.raises(ValueError, match="is written for the prompts"), editing(toys, edit):
        call(toys, [SOURCE, "a photo of a blue boat on the beach"], 0, 0)
