"""Recordings of Bria FIBO, guided in one call whose texts are as long as the longest: edits are those of full runs."""

import diffusers
import pytest

if not hasattr(diffusers, "BriaFiboPipeline"):
    pytest.skip("this diffusers has no Bria FIBO", allow_module_level=True)

import numpy as np
import torch

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    FreePromptPipeline,
    LocalBlend,
    PromptToPromptEdit,
    Recording,
    ReFlexEdit,
    ValueInjectionEdit,
    WordMask,
)
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.models.sources import find_model
from tests.support.flow_pipelines import distance, solving
from tests.support.saved_transformers import saved_transformer
from tests.support.slow_cases import few
from tests.support.tiny_bria_fibo import tiny_fibo_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
SOURCE = "a photo of a red car on a mountain"
TARGETS = {
    "shorter": ["a red car"],
    "of all lengths": ["a red car", "a photo of a red car on a house in winter, a photo of a red dog"],
}
#: The negative prompt is longer than prompts, or one token.
LONG = "a drawing of a house in winter, a drawing of a big dog on a house"
GUIDED = {
    "guided": {"guidance_scale": 3.0, "negative_prompt": LONG},
    "by nothing": {"guidance_scale": 3.0},
    "unguided": {"guidance_scale": 1.0},
}


def words(align):
    return lambda tokenizer, targets: PromptToPromptEdit([SOURCE, *targets], tokenizer, align, self_replace_steps=0.5)


EDITS = {
    "image maps": lambda tokenizer, targets: FreePromptEdit(0.7, both_halves=True),
    "all of the image": lambda tokenizer, targets: ConsistEdit(0.7),
    "refine": words("refine"),
    "reflex": lambda tokenizer, targets: ReFlexEdit([SOURCE, *targets], tokenizer, layers=[1, 2]),
    "blended": lambda tokenizer, targets: (
        words("refine")(tokenizer, targets)
        + LocalBlend([SOURCE, *targets], tokenizer, ["car", *["a"] * len(targets)], 0.9, start=0.3)
    ),
    "where the car is": lambda tokenizer, targets: FreePromptEdit(
        1.0, mask=WordMask(SOURCE, "car", tokenizer, threshold=0.9)
    ),
}


@pytest.fixture(scope="module")
def stock():
    return solving(tiny_fibo_pipeline(decodes=True), "euler")


@pytest.fixture(scope="module")
def tiny(stock):
    made = FreePromptPipeline.from_pipe(stock)
    made.set_progress_bar_config(disable=True)
    return made


def run(**options):
    fixed = {"num_inference_steps": 3, "height": 48, "width": 80}
    return {**fixed, "generator": torch.Generator().manual_seed(2), **options}


@pytest.mark.parametrize("guided", few(GUIDED, "by nothing"))
@pytest.mark.parametrize("targets", few(TARGETS, "shorter"))
@pytest.mark.parametrize("edit", few(EDITS, "image maps"))
def test_edits_are_those_of_full_runs(tiny, edit, targets, guided, tmp_path):
    """Made before the targets were known, written and read again, in as many bytes as were foretold."""
    written = edit(tiny.tokenizer, targets)
    full = tiny(SOURCE, targets, edit=written, output_type="latent", **run(**guided)).images
    made = tiny.record(SOURCE, edit=edit(tiny.tokenizer, [SOURCE]), placement=tmp_path / "kept", **run(**guided))
    tiny.record(SOURCE, edit=edit(tiny.tokenizer, [SOURCE]), budget_bytes=made.nbytes, **run(**guided))
    recording = Recording.load(tmp_path / "kept")
    again = tiny.edit(recording, targets, edit=written, output_type="latent").images
    assert distance(again, full[1:]) <= EXACT
    alone = tiny(targets[0], output_type="latent", **run(**guided)).source
    assert distance(full[1:2], alone) > 1e-3


def test_a_photo(tiny):
    written, options = words("refine")(tiny.tokenizer, TARGETS["shorter"]), GUIDED["by nothing"]
    photo = np.random.default_rng(3).random((48, 80, 3))
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, height=48, width=80)
    full = tiny(
        inversion=inversion, target_prompt=TARGETS["shorter"], edit=written, output_type="latent", **options
    ).images
    recording = tiny.record(inversion=inversion, edit=written, **options)
    again = tiny.edit(recording, TARGETS["shorter"], edit=written, output_type="latent").images
    assert distance(again, full[1:]) <= EXACT


def test_an_empty_prompt_is_as_long_as_the_longest_beside_it(tiny):
    photo = np.random.default_rng(3).random((48, 80, 3))
    inversion = tiny.invert(photo, "", num_inference_steps=1, height=48, width=80)
    with pytest.warns(EditWarning, match="with a prompt of one token, .* it is held all the same"):
        tiny(inversion=inversion, target_prompt="a red car", self_replace_steps=1.0, output_type="latent")
    for source, targets in (("", ["a red car"]), (SOURCE, ["a red car", ""])):
        recording = tiny.record(source, **run())
        with pytest.raises(ValueError, match=r"expected prompts that say something, .* got an empty one among"):
            tiny.edit(recording, targets)
    full = tiny("", [""], output_type="latent", **run()).images
    recording = tiny.record("", **run())
    assert distance(tiny.edit(recording, "", output_type="latent").images, full[1:]) <= EXACT


class TestRefusals:
    @pytest.mark.parametrize("edit", [FreePromptEdit(0.5, scope="joint"), ValueInjectionEdit(0.7, layers=[1])])
    def test_what_a_recording_does_not_hold(self, tiny, edit):
        with pytest.raises(ValueError, match="ask for, or their values, which go on behind the text in longer ones"):
            tiny.record(SOURCE, edit=edit, **run())

    def test_tokens_of_several_latents(self, tiny):
        with pytest.raises(ValueError, match="do_patching=True makes a token of 2 x 2 latents"):
            tiny(SOURCE, "a red car", do_patching=True, **run())

    def test_pipelines_of_pictures(self, stock):
        edits = diffusers.BriaFiboEditPipeline.__new__(diffusers.BriaFiboEditPipeline)
        edits.transformer = stock.transformer
        with pytest.raises(TypeError, match="part of every call of Bria FIBO Edit"):
            FreePromptPipeline.from_pipe(edits)


@pytest.mark.slow
def test_a_folder_says_how_large_a_token_is(pipe, tmp_path):
    """Of an autoencoder that folds pixels before it halves their number."""
    assert find_model(str(saved_transformer(pipe, "bria_fibo", tmp_path))).vae_factor == 16
