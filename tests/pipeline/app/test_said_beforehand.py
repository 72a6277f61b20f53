"""What will hardly give what was meant is warned of; errors speak of what the user passed."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, PromptToPromptEdit, ddim_scheduler, editing
from fpe_pipeline.app import cli
from fpe_pipeline.embedded.scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS
from fpe_pipeline.embedded.training.tokenizer import caption_words
from fpe_pipeline.errors import RequestWarning
from fpe_pipeline.prompts.words import unknown_words
from fpe_pipeline.sampling.arguments import image_size
from tests.support.silent import SOURCE, TARGET, embedded, noise

FAST = {"num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return embedded(FreePromptPipeline)


def test_every_word_of_the_training_captions_is_known(pipe):
    assert not [word for word in caption_words() if unknown_words(word, pipe.tokenizer)]


@pytest.mark.parametrize("word", ["dog", "squirrel", "tv", "Zürich", "猫", "dog's"])
def test_words_that_are_spelt_letter_by_letter(pipe, word):
    assert unknown_words(f"a photo of a {word} on the beach", pipe.tokenizer) == (word,)


def test_letters_digits_and_marks_are_no_words(pipe):
    assert not unknown_words("a red car, 12 4 - !?", pipe.tokenizer)


def test_an_added_token_is_known(pipe):
    fresh = embedded(FreePromptPipeline)
    fresh.tokenizer.add_tokens("<toy>")
    assert not unknown_words("a photo of a <toy>", fresh.tokenizer)
    assert unknown_words("a photo of a <toy>", pipe.tokenizer)


def test_unknown_words_are_warned_of(pipe):
    dog = "a photo of a dog on the beach"
    message = "does not know 'dog' of 'a photo of a dog on the beach'"
    with pytest.warns(RequestWarning, match=message):
        pipe(dog, latents=noise(0), **FAST)
    with pytest.warns(RequestWarning, match=message):
        pipe(SOURCE, dog, self_replace_steps=1.0, latents=noise(0), **FAST)
    recording = pipe.record(SOURCE, latents=noise(0), num_inference_steps=1, self_replace_steps=1.0)
    with pytest.warns(RequestWarning, match=message):
        pipe.edit(recording, dog, output_type="latent")
    plain = embedded()
    with pytest.warns(RequestWarning, match=message), editing(plain, FreePromptEdit(1.0)):
        plain([SOURCE, dog], latents=noise(0, 0), **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RequestWarning)
        pipe(SOURCE, TARGET, self_replace_steps=1.0, latents=noise(0), **FAST)


def test_the_command_line_warns_in_a_line_and_lists_what_the_model_knows(tmp_path, capfd):
    given = [
        "--source",
        SOURCE,
        "--target",
        "a photo of a blue dog on the beach",
        "--steps",
        "1",
        "--self-replace",
        "1",
    ]
    assert cli.main(["edit", *given, "--no-control", "--quiet", "-o", str(tmp_path)]) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "'dog'" in line]
    assert line.startswith("fpe: warning: the model's tokenizer does not know 'dog'")
    assert cli.main(["info"]) == 0
    out = capfd.readouterr().out
    for names in (OBJECTS, tuple(COLOURS), BACKGROUNDS):
        assert ", ".join(names) in out


@pytest.mark.parametrize(
    ("tall", "wide", "far"), [(1.0, 1.0, False), (1.5, 1.0, False), (2.0, 2.0, True), (0.25, 0.25, True)]
)
def test_sizes_far_from_the_models_own(pipe, tall, wide, far):
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    height, width = int(tall * native), int(wide * native)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RequestWarning)
        pipe(SOURCE, height=height, width=width, **FAST)
    assert bool(seen) == far
    if far:
        share = height * width / native**2
        assert f"{width} x {height} pixels (width x height) are {share:.2g} times" in str(seen[0].message)


def test_sizes_of_photos_and_recordings_too():
    from PIL import Image

    pipe = embedded(FreePromptPipeline)
    pipe.scheduler = ddim_scheduler(pipe.scheduler)
    with pytest.warns(RequestWarning, match="16 x 16 pixels"):
        pipe.invert(Image.new("RGB", (16, 16)), SOURCE, num_inference_steps=1, height=16, width=16)
    with pytest.warns(RequestWarning, match="16 x 16 pixels"):
        pipe.record(SOURCE, height=16, width=16, num_inference_steps=1, self_replace_steps=1.0)


@pytest.mark.parametrize(
    ("asked", "named", "unnamed"),
    [({"height": 96}, "height 96", "width"), ({"width": 96}, "width 96", "height")],
)
def test_an_error_of_size_speaks_of_what_was_passed(asked, named, unnamed):
    with pytest.raises(ValueError, match=rf"got {named}; leave \w+ out") as caught:
        image_size((80, 80), 4, asked.get("height"), asked.get("width"), torch.zeros(1, 4, 20, 20))
    assert unnamed not in str(caught.value).split("got")[1]


@pytest.mark.slow
def test_a_size_at_which_layers_are_large_needs_no_choice_of_layers(tmp_path, capfd):
    """At 160 x 160 pixels the embedded model's largest layers have 1600 tokens, above the limit that the user did not
    set."""
    given = ["--source", SOURCE, "--target", TARGET, "--steps", "1", "--self-replace", "1", "--size", "160x160"]
    assert cli.main(["edit", *given, "--no-control", "--quiet", "-o", str(tmp_path)]) == 0
    assert "max_tokens" not in capfd.readouterr().err


def test_default_layers_that_are_not_there_blame_no_option():
    """A UNet without levels below the first: what the edit would choose is not what the user chose."""
    from fpe_pipeline.models.sites import attention_sites
    from tests.support.tiny_unets import tiny_unet

    sites = tuple(site for site in attention_sites(tiny_unet("sd1", torch.float32)) if site.level == 0)
    with pytest.raises(ValueError, match="the layers that are edited where none are named") as caught:
        FreePromptEdit().select(sites)
    assert "levels=(1" not in str(caught.value)
    with pytest.raises(ValueError, match=r"levels=\(1,\) match none"):
        FreePromptEdit(levels=1).select(sites)


def test_a_limit_of_no_tokens_is_no_layer(pipe):
    plain = pipe(SOURCE, TARGET, self_replace_steps=0, latents=noise(0), **FAST).images
    assert torch.equal(pipe(SOURCE, TARGET, max_tokens=0, latents=noise(0), **FAST).images, plain)
    edit = PromptToPromptEdit([SOURCE, TARGET], pipe.tokenizer, cross_replace_steps=1.0, max_tokens=0)
    with_cross = pipe(SOURCE, TARGET, edit=edit, latents=noise(0), **FAST)
    assert all("attn2" in path for path in with_cross.report.layers)
    with pytest.raises(ValueError, match="max_tokens to be integers >= 0"):
        FreePromptEdit(max_tokens=-1)


def test_no_layer_on_the_command_line(tmp_path):
    given = ["--source", SOURCE, "--target", TARGET, "--steps", "2", "--quiet", "--max-tokens", "0"]
    assert cli.main(["edit", *given, "-o", str(tmp_path)]) == 0
    edited, plain, source = (
        np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=int)
        for name in ("target-1", "target-1-no-control", "source")
    )
    # To rounding, which is another one in a batch of other rows on some CPUs.
    assert abs(edited - plain).max() <= 2 < abs(edited - source).max()
