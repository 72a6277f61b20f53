"""Recordings on FLUX.2 [dev] and [klein]: edits from them are those of full runs, of words too."""

import diffusers
import pytest
import torch
from PIL import Image

if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("this diffusers has no FLUX.2 [klein]", allow_module_level=True)

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    FreePromptPipeline,
    KVEdit,
    PromptToPromptEdit,
    Recording,
    ReFlexEdit,
    ValueInjectionEdit,
    WordMask,
)
from fpe_pipeline.recordings.keys import Part
from tests.support.dense_rows import wide
from tests.support.flow_pipelines import StandIn, distance, solving
from tests.support.slow_cases import few
from tests.support.tiny_flux2 import tiny_flux2_that_encodes

EXACT = 1e-8
SOURCE, TARGETS = "a photo of a red car on a mountain", ["a photo of a big car on a house", "a big dog"]
OPTIONS = {"num_inference_steps": 3, "max_sequence_length": 60, "height": 48, "width": 80}
MODELS = {
    "dev": {"guidance_scale": 3.0},
    "klein": {"guidance_scale": 3.0},
    "klein, unguided": {"guidance_scale": 1.0},
    "klein, distilled": {},
}
MASK = Image.linear_gradient("L").resize((80, 48)).point(lambda level: 255 * (level > 127))
EDITS = {
    "image maps": lambda tiny, prompts: FreePromptEdit(0.5),
    "both halves": lambda tiny, prompts: FreePromptEdit((0.25, 1.0), both_halves=True),
    "whole maps": lambda tiny, prompts: FreePromptEdit(0.7, scope="joint"),
    "consistedit": lambda tiny, prompts: ConsistEdit(0.5),
    "kv-edit": lambda tiny, prompts: KVEdit(mask=MASK),
    "values": lambda tiny, prompts: ValueInjectionEdit(0.7, layers=[3, 4]),
}
WORDS = {
    "words": lambda tiny, prompts: PromptToPromptEdit(prompts, tiny.tokenizer, "refine", cross_replace_steps=0.7),
    "blocks of the map": lambda tiny, prompts: ReFlexEdit(prompts, tiny.tokenizer, layers=[2, 3]),
    "masks of words": lambda tiny, prompts: FreePromptEdit(1.0, mask=WordMask(SOURCE, "car", tiny.tokenizer)),
}


@pytest.fixture(autouse=True)
def _wide():
    with wide():
        yield


@pytest.fixture(scope="module")
def pipes():
    klein = "Flux2KleinPipeline"
    stocks = {"dev": tiny_flux2_that_encodes(), "klein": tiny_flux2_that_encodes(klein)}
    stocks["klein, distilled"] = tiny_flux2_that_encodes(klein, is_distilled=True)
    made = {name: FreePromptPipeline.from_pipe(stock) for name, stock in stocks.items()}
    for tiny in made.values():
        tiny.set_progress_bar_config(disable=True)
        solving(tiny, "euler")
    return made | {"klein, unguided": made["klein"]}


def run(model):
    return {**OPTIONS, **MODELS[model], "generator": torch.Generator().manual_seed(2)}


def check(tiny, model, edit, placement="device"):
    full = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **run(model)).images
    recording = tiny.record(SOURCE, edit=edit, placement=placement, **run(model))
    kept = recording if placement == "device" else Recording.load(placement)
    replayed = tiny.edit(kept, TARGETS, edit=edit, output_type="latent")
    assert distance(replayed.images, full[1:]) <= EXACT
    alone = tiny(TARGETS[0], output_type="latent", **run(model)).source
    assert distance(replayed.images[:1], alone) > 1e-6  # and the edit does something
    assert set(replayed.report.replayed) == set(recording.contents)
    return recording


@pytest.mark.parametrize("model", few(list(MODELS), "dev", "klein"))
@pytest.mark.parametrize("edit", few(EDITS, "whole maps"))
def test_edits_are_those_of_full_runs(pipes, model, edit, tmp_path):
    check(pipes[model], model, edit(pipes[model], [SOURCE, *TARGETS]), tmp_path / "kept")


@pytest.mark.parametrize("model", few(["dev", "klein", "klein, distilled"], "dev", "klein"))
@pytest.mark.parametrize("edit", few(WORDS, "words"))
def test_words_are_placed_among_the_sources_tokens(pipes, model, edit):
    tiny = pipes[model]
    assert check(tiny, model, edit(tiny, [SOURCE, *TARGETS])).source_text


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["rf-solver", "fireflow"])
def test_guidance_by_solvers_that_call_the_model_within_a_step(pipes, solver):
    tiny = solving(pipes["klein"], solver)
    try:
        check(tiny, "klein", FreePromptEdit((0.25, 1.0), both_halves=True))
        alone = StandIn(tiny)(prompt=SOURCE, output_type="latent", **run("klein")).images
        assert distance(tiny(SOURCE, output_type="latent", **run("klein")).images, alone) <= EXACT
    finally:
        solving(tiny, "euler")


@pytest.mark.slow
def test_of_a_real_image(pipes):
    """The source is the image's own trajectory; a replay starts from its noise."""
    tiny, photo = pipes["klein"], torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3))
    inversion = tiny.invert(photo, SOURCE, **OPTIONS)
    full = tiny(inversion=inversion, target_prompt=TARGETS, self_replace_steps=0.7, output_type="latent").images
    recording = tiny.record(inversion=inversion, self_replace_steps=0.7)
    assert distance(recording.latents, inversion.latents.flip(0)) <= EXACT
    assert distance(tiny.edit(recording, TARGETS, output_type="latent").images, full[1:]) <= EXACT


@pytest.mark.parametrize("model", few(["dev", "klein", "klein, distilled"], "klein"))
def test_what_is_kept(pipes, model):
    """Of one row where the model is told its guidance, or has none; of two where a second call guides."""
    tiny, edit = pipes[model], FreePromptEdit(1 / 3, both_halves=True)
    recording = tiny.record(SOURCE, edit=edit, **run(model))
    halves = (True, False) if model == "klein" else (True,)
    parts = {Part(half, name): (0,) for half in halves for name in ("image-query", "image-key")}
    assert all(dict(kept) == parts for kept in recording.contents.values())
    with pytest.raises(ValueError, match=f"more than budget_bytes={recording.nbytes - 1} "):
        tiny.record(SOURCE, edit=edit, budget_bytes=recording.nbytes - 1, **run(model))
    tiny.record(SOURCE, edit=edit, budget_bytes=recording.nbytes, **run(model))


@pytest.mark.slow
def test_a_guidance_for_each_target(pipes):
    tiny, scales = pipes["dev"], [1.0, 5.0]
    recording = tiny.record(SOURCE, self_replace_steps=1 / 3, **run("dev"))
    replayed = tiny.edit(recording, TARGETS, guidance_scale=scales, output_type="latent").images
    options = {**run("dev"), "guidance_scale": [3.0, *scales], "output_type": "latent"}
    full = tiny(SOURCE, TARGETS, self_replace_steps=1 / 3, **options).images
    assert distance(replayed, full[1:]) <= EXACT
    klein = pipes["klein"].record(SOURCE, self_replace_steps=1 / 3, **run("klein"))
    with pytest.raises(ValueError, match="is the recording's, of both halves"):
        pipes["klein"].edit(klein, TARGETS, guidance_scale=4.0)


class TestRefusals:
    def test_what_these_pipelines_do_not_take(self, pipes):
        for option in ("negative_prompt", "image", "true_cfg_scale"):
            with pytest.raises(TypeError, match=f"unknown option {option}"):
                pipes["klein"].record(SOURCE, **{option: "a drawing"}, **run("klein"))
