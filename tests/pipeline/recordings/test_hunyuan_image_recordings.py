"""Recordings of HunyuanImage, whose texts are two, padded and masked: edits from them are those of full runs."""

import diffusers
import pytest

if not hasattr(diffusers, "HunyuanImagePipeline"):
    pytest.skip("this diffusers has no HunyuanImage", allow_module_level=True)

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
)
from tests.support.flow_pipelines import distance, solving
from tests.support.slow_cases import few
from tests.support.tiny_hunyuan_guided import tiny_hunyuan_image_pipeline

EXACT = 1e-8
SOURCE = "a photo of a red car on a mountain"
TARGETS = {
    "shorter": ["a red car"],
    "of all lengths": ["a red car", "a photo of a red car on a snow mountain in winter, a photo of a red dog"],
}
QUOTES = 'a photo of a "red car" on a mountain'
QUOTED = {
    "by the source": (QUOTES, "a red car"),
    "by the target": (SOURCE, 'a "red car"'),
    "by both": (QUOTES, 'a "car"'),
}
GUIDED = {"guided": {"guidance_scale": 3.0, "negative_prompt": "a drawing"}, "unguided": {"guidance_scale": 1.0}}


def words(align):
    return lambda tokenizer, targets: PromptToPromptEdit([SOURCE, *targets], tokenizer, align, self_replace_steps=0.5)


EDITS = {
    "image maps": lambda tokenizer, targets: FreePromptEdit(0.7),
    "all maps": lambda tokenizer, targets: FreePromptEdit(0.7, scope="joint"),
    "all of the image": lambda tokenizer, targets: ConsistEdit(0.7),
    "values": lambda tokenizer, targets: ValueInjectionEdit(0.7, layers=[1]),
    "refine": words("refine"),
    "reflex": lambda tokenizer, targets: ReFlexEdit([SOURCE, *targets], tokenizer, layers=[1, 2]),
    "blended": lambda tokenizer, targets: (
        words("refine")(tokenizer, targets)
        + LocalBlend([SOURCE, *targets], tokenizer, ["car", *["a"] * len(targets)], 0.9, start=0.3)
    ),
}
OF_WORDS = {"refine", "reflex", "blended"}


@pytest.fixture(scope="module")
def tiny():
    made = FreePromptPipeline.from_pipe(tiny_hunyuan_image_pipeline(decodes=True))
    made.set_progress_bar_config(disable=True)
    return solving(made, "euler")


def run(**options):
    fixed = {"num_inference_steps": 3, "height": 48, "width": 80}
    return {**fixed, "generator": torch.Generator().manual_seed(2), **options}


@pytest.mark.parametrize("guided", few(GUIDED, "guided"))
@pytest.mark.parametrize("targets", few(TARGETS, "of all lengths"))
@pytest.mark.parametrize("edit", few(EDITS, "all maps"))
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
    assert distance(full[1:2], alone) > 1e-5


@pytest.mark.parametrize("quoted", few(QUOTED, "by the target"))
@pytest.mark.parametrize("edit", few({name: edit for name, edit in EDITS.items() if name not in OF_WORDS}, "all maps"))
def test_what_prompts_quote(tiny, edit, quoted):
    source, target = quoted
    written = edit(tiny.tokenizer, [target])
    full = tiny(source, target, edit=written, output_type="latent", **run()).images
    recording = tiny.record(source, edit=written, **run())
    tiny.record(source, edit=written, budget_bytes=recording.nbytes, **run())
    again = tiny.edit(recording, target, edit=written, output_type="latent").images
    assert distance(again, full[1:]) <= EXACT


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
