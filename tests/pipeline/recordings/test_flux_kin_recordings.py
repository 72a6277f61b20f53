"""Recordings on Ovis-Image, LongCat-Image and Bria: edits from them are those of full runs, of words too."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "LongCatImagePipeline"):
    pytest.skip("this diffusers has no LongCat-Image", allow_module_level=True)

from PIL import Image

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    FreePromptPipeline,
    KVEdit,
    LocalBlend,
    PromptToPromptEdit,
    Recording,
    ReFlexEdit,
    ValueInjectionEdit,
    WordMask,
)
from fpe_pipeline.recordings.keys import Part
from tests.support.flow_pipelines import StandIn, distance, solving
from tests.support.slow_cases import few
from tests.support.tiny_flux_kin import KIN

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-12  # within rounding, in float64
SOURCE, TARGETS = "a photo of a red car on a mountain", ["a photo of a big car on a house", "a big dog"]
OPTIONS = {"num_inference_steps": 3, "max_sequence_length": 40, "height": 48, "width": 80}
GUIDED, UNGUIDED = {"negative_prompt": "a drawing", "guidance_scale": 3.0}, {"guidance_scale": 1.0}
MASK = Image.linear_gradient("L").resize((80, 48)).point(lambda level: 255 * (level > 127))
EDITS = {
    "image maps": lambda tiny, prompts: FreePromptEdit(0.5),
    "both halves": lambda tiny, prompts: FreePromptEdit((0.25, 1.0), both_halves=True),
    "whole maps": lambda tiny, prompts: FreePromptEdit(0.7, scope="joint", both_halves=True),
    "consistedit": lambda tiny, prompts: ConsistEdit(0.5),
    "kv-edit": lambda tiny, prompts: KVEdit(mask=MASK),
    "values": lambda tiny, prompts: ValueInjectionEdit(0.7, layers=[3, 4]),
}


def refined(tiny, prompts):
    return PromptToPromptEdit(prompts, tiny.tokenizer, "refine", cross_replace_steps=0.7)


def blended(tiny, prompts):
    return refined(tiny, prompts) + LocalBlend(prompts, tiny.tokenizer, ["car", "car", "dog"], 0.5, start=0.3)


WORDS = {
    "words": refined,
    "blended": blended,
    "blocks of the map": lambda tiny, prompts: ReFlexEdit(prompts, tiny.tokenizer, layers=[2, 3]),
    "masks of words": lambda tiny, prompts: FreePromptEdit(1.0, mask=WordMask(SOURCE, "car", tiny.tokenizer)),
}


@pytest.fixture(scope="module")
def pipes(pipe):
    made = {name: FreePromptPipeline.from_pipe(model.make(pipe)) for name, model in KIN.items()}
    for tiny in made.values():
        tiny.set_progress_bar_config(disable=True)
    return made


every_model = pytest.mark.parametrize("name", KIN)


def run(**options):
    return {**OPTIONS, "generator": torch.Generator().manual_seed(2), **options}


@pytest.fixture
def tiny(pipes, name):
    return solving(pipes[name], "euler")


def check(tiny, edit, options, placement="device"):
    full = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **run(**options)).images
    recording = tiny.record(SOURCE, edit=edit, placement=placement, **run(**options))
    kept = recording if placement == "device" else Recording.load(placement)
    replayed = tiny.edit(kept, TARGETS, edit=edit, output_type="latent")
    assert distance(replayed.images, full[1:]) <= EXACT
    assert distance(recording.latents[-1], full[:1]) <= EXACT
    alone = tiny(TARGETS[0], output_type="latent", **run(**options)).source
    assert distance(replayed.images[:1], alone) > 1e-4  # and the edit does something
    assert set(replayed.report.replayed) == set(recording.contents)
    return recording


@every_model
@pytest.mark.parametrize("edit", few(EDITS, "whole maps"))
@pytest.mark.parametrize("options", few({"guided": GUIDED, "unguided": UNGUIDED}, "guided"))
def test_edits_are_those_of_full_runs(tiny, edit, options, tmp_path):
    check(tiny, edit(tiny, [SOURCE, *TARGETS]), options, tmp_path / "kept")


@pytest.mark.parametrize("name", few(KIN.keys(), "Bria"))
@pytest.mark.parametrize("edit", few(WORDS, "blended"))
def test_words_are_placed_among_the_sources_tokens(tiny, edit):
    assert check(tiny, edit(tiny, [SOURCE, *TARGETS]), GUIDED).source_text


@pytest.mark.parametrize("name", few(KIN.keys(), "LongCat-Image", "Bria"))
@pytest.mark.parametrize("solver", few(["rf-solver", "fireflow"], "fireflow"))
def test_of_a_real_image_by_solvers_that_call_the_model_within_a_step(tiny, name, solver):
    """A blend mixes the source's latents at the end of a step, which LongCat-Image's loop tells nobody of."""
    solving(tiny, solver)
    photo, edit = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3)), KVEdit(mask=MASK)
    inversion = tiny.invert(photo, SOURCE, **OPTIONS)
    full = tiny(inversion=inversion, target_prompt=TARGETS, edit=edit, output_type="latent", **GUIDED).images
    recording = tiny.record(inversion=inversion, edit=edit, **GUIDED)
    assert len(recording.latents) == len(tiny.scheduler.timesteps) + 1
    assert distance(tiny.edit(recording, TARGETS, edit=edit, output_type="latent").images, full[1:]) <= 1e-9
    assert distance(full[0], inversion.latents[0, 0]) <= EXACT


@every_model
def test_a_source_alone_is_the_pipelines(tiny, name):
    """From its seed, and by the defaults of guidance."""
    plain = {"enable_prompt_rewrite": False} if name == "LongCat-Image" else {}
    options = run(negative_prompt=["a drawing"])
    expected = StandIn(tiny)([SOURCE], output_type="latent", **without_length(tiny, name, options), **plain).images
    assert distance(tiny(SOURCE, output_type="latent", **run(negative_prompt="a drawing")).images, expected) <= EXACT
    recording = tiny.record(SOURCE, edit=FreePromptEdit(0.5), **run(negative_prompt="a drawing"))
    assert distance(recording.latents[-1], expected) <= EXACT


def without_length(tiny, name, options):
    """Options of diffusers' call, where LongCat-Image's is told by an attribute how long texts are."""
    if name != "LongCat-Image":
        return options
    tiny.tokenizer_max_length = options.pop("max_sequence_length")
    return options


@every_model
def test_what_is_kept(tiny):
    """Of both halves; counted beforehand."""
    edit = FreePromptEdit(1 / 3, both_halves=True, scope="joint")
    recording = tiny.record(SOURCE, edit=edit, **run(**GUIDED))
    names = ("image-query", "image-key", "text-query", "text-key")
    parts = {Part(half, name): (0,) for half in (True, False) for name in names}
    assert all(dict(kept) == parts for kept in recording.contents.values())
    with pytest.raises(ValueError, match=f"more than budget_bytes={recording.nbytes - 1} "):
        tiny.record(SOURCE, edit=edit, budget_bytes=recording.nbytes - 1, **run(**GUIDED))
    tiny.record(SOURCE, edit=edit, budget_bytes=recording.nbytes, **run(**GUIDED))


@every_model
def test_a_guidance_of_the_targets(tiny):
    recording = tiny.record(SOURCE, self_replace_steps=1 / 3, **run(**GUIDED))
    with pytest.raises(ValueError, match="is the recording's, of both halves"):
        tiny.edit(recording, TARGETS, guidance_scale=4.0)
