"""Recordings of Nucleus-Image, whose text tokens look at nothing: edits of them are those of full runs."""

import diffusers
import pytest

if not hasattr(diffusers, "NucleusMoEImagePipeline"):
    pytest.skip("this diffusers has no Nucleus-Image", allow_module_level=True)

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
from tests.support.flow_pipelines import distance, solving
from tests.support.slow_cases import few
from tests.support.tiny_nucleus import tiny_nucleus_pipeline

EXACT = 1e-8
SOURCE = "a photo of a red car on a mountain"
TARGETS = {
    "shorter": ["a red car"],
    "as long": ["a photo of a big dog on a mountain"],
    "of all lengths": ["a red car", "a photo of a red car on a snow mountain in winter, a photo of a red dog"],
}
GUIDED = {"guided": {"guidance_scale": 3.0, "negative_prompt": "a drawing"}, "unguided": {"guidance_scale": 1.0}}


def words(align):
    return lambda tokenizer, targets: PromptToPromptEdit([SOURCE, *targets], tokenizer, align, self_replace_steps=0.5)


EDITS = {
    "image maps": lambda tokenizer, targets: FreePromptEdit(0.7),
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
def tiny():
    made = FreePromptPipeline.from_pipe(tiny_nucleus_pipeline())
    made.set_progress_bar_config(disable=True)
    return solving(made, "euler")


def run(**options):
    fixed = {"num_inference_steps": 3, "height": 48, "width": 80}
    return {**fixed, "generator": torch.Generator().manual_seed(2), **options}


@pytest.mark.parametrize("guided", few(GUIDED, "guided"))
@pytest.mark.parametrize("targets", few(TARGETS, "of all lengths"))
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_are_those_of_full_runs(tiny, edit, targets, guided, tmp_path):
    """Made before the targets were known, written and read again."""
    written = edit(tiny.tokenizer, targets)
    full = tiny(SOURCE, targets, edit=written, output_type="latent", **run(**guided)).images
    tiny.record(SOURCE, edit=edit(tiny.tokenizer, [SOURCE]), placement=tmp_path / "kept", **run(**guided))
    recording = Recording.load(tmp_path / "kept")
    again = tiny.edit(recording, targets, edit=written, output_type="latent").images
    assert distance(again, full[1:]) <= EXACT
    alone = tiny(targets[0], output_type="latent", **run(**guided)).source
    assert distance(full[1:2], alone) > 1e-3


def test_a_photo(tiny):
    written, options = words("refine")(tiny.tokenizer, TARGETS["shorter"]), GUIDED["guided"]
    photo = np.random.default_rng(3).random((48, 80, 3))
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, height=48, width=80)
    full = tiny(
        inversion=inversion, target_prompt=TARGETS["shorter"], edit=written, output_type="latent", **options
    ).images
    recording = tiny.record(inversion=inversion, edit=written, **options)
    again = tiny.edit(recording, TARGETS["shorter"], edit=written, output_type="latent").images
    assert distance(again, full[1:]) <= EXACT


@pytest.mark.parametrize("edit", [FreePromptEdit(0.5, scope="joint"), ValueInjectionEdit(0.7, layers=[1])])
def test_what_a_recording_does_not_hold(tiny, edit):
    with pytest.raises(ValueError, match="ask for, which is nothing in this model, or their values"):
        tiny.record(SOURCE, edit=edit, **run())
