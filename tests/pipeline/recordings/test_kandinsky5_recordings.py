"""Kandinsky 5 in `FreePromptPipeline`: recordings of self- and cross-attention along a flow, sizes, and texts."""

import diffusers
import pytest

if not hasattr(diffusers, "Kandinsky5T2IPipeline"):
    pytest.skip("this diffusers has no pictures of Kandinsky 5", allow_module_level=True)

import warnings

import numpy as np
import torch
from diffusers.models.transformers import transformer_kandinsky

from fpe_pipeline import (
    FreePromptEdit,
    FreePromptPipeline,
    LocalBlend,
    MasaCtrlEdit,
    PromptToPromptEdit,
    Recording,
    WordMask,
)
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.sampling.decoding import decoded
from tests.support.flow_pipelines import distance, solving
from tests.support.slow_cases import few
from tests.support.tiny_kandinsky5 import tiny_kandinsky5_pipeline, with_a_plain_tokenizer
from tests.support.wide_torch import widened

EXACT = 1e-8
SOURCE = "a photo of a big dog on a mountain in winter"
TARGETS = {
    "as long": ["a photo of a red car on a mountain in winter"],
    "shorter": ["a red car", "a photo of a red car"],
}
LONGER = f"{SOURCE}, a photo"
GUIDED = {"guided": {"guidance_scale": 3.0, "negative_prompt": "a drawing"}, "unguided": {"guidance_scale": 1.0}}
SIZE = {"height": 48, "width": 80}


def words(align):
    return lambda tokenizer, targets: PromptToPromptEdit([SOURCE, *targets], tokenizer, align, self_replace_steps=0.5)


EDITS = {
    "maps": lambda tokenizer, targets: FreePromptEdit(0.7, both_halves=True),
    "masactrl": lambda tokenizer, targets: MasaCtrlEdit(start_step=1, start_layer=0),
    "refine": words("refine"),
    "blended": lambda tokenizer, targets: (
        words("refine")(tokenizer, targets)
        + LocalBlend([SOURCE, *targets], tokenizer, ["dog", *["a"] * len(targets)], 0.9, start=0.3)
    ),
    "where the dog is": lambda tokenizer, targets: FreePromptEdit(
        1.0, mask=WordMask(SOURCE, "dog", tokenizer, threshold=0.9)
    ),
}


@pytest.fixture(scope="module")
def tiny(pipe):
    stock = with_a_plain_tokenizer(tiny_kandinsky5_pipeline(pipe, decodes=True, sizes=[(80, 48), (48, 64)]))
    made = FreePromptPipeline.from_pipe(stock)
    made.set_progress_bar_config(disable=True)
    return solving(made, "euler")


@pytest.fixture(autouse=True)
def in_float64():
    with widened(transformer_kandinsky):
        yield


def run(**options):
    return {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(2), **SIZE, **options}


@pytest.mark.parametrize("guided", few(GUIDED, "guided"))
@pytest.mark.parametrize("targets", few(TARGETS, "shorter"))
@pytest.mark.parametrize("edit", few(EDITS, "blended"))
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
    """From whatever noise; the plain edit is that of its window, four fifths."""
    photo = np.random.default_rng(3).random((48, 80, 3))
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=5)
    assert inversion.image.size == (80, 48)
    full = tiny(inversion=inversion, target_prompt=TARGETS["shorter"], output_type="latent")
    assert {tuple(steps) for steps in full.report.layers.values()} == {(0, 1, 2, 3)}
    recording = tiny.record(inversion=inversion)
    again = tiny.edit(recording, TARGETS["shorter"], output_type="latent").images
    assert distance(again, full.images[1:]) <= EXACT


def test_a_longer_target_changes_the_source_and_that_is_said(tiny):
    inversion = tiny.invert(np.random.default_rng(3).random((48, 80, 3)), SOURCE, num_inference_steps=1)
    message = "text tokens and is denoised with .*, padding among them, .* it is held all the same"
    with pytest.warns(EditWarning, match=message):
        tiny(inversion=inversion, target_prompt=LONGER, self_replace_steps=1.0, output_type="latent")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditWarning)
        tiny(inversion=inversion, target_prompt=TARGETS["shorter"], self_replace_steps=1.0, output_type="latent")
    recording = tiny.record(SOURCE, **run())
    with pytest.raises(ValueError, match=r"takes \d+ tokens, and the recorded source \d+: Kandinsky 5 pads"):
        tiny.edit(recording, LONGER)


def test_a_text_that_the_pipeline_cuts(tiny):
    """Alone; beside it other texts would be cut too, where they end."""
    options = {"max_sequence_length": 6, **run()}
    texts, *_ = tiny.encode_prompt(LONGER, max_sequence_length=6)
    assert tiny.flow().own_text_tokens(LONGER, 6) == texts.shape[1]
    tiny(LONGER, output_type="latent", **options)
    cut, short = (tiny.encode_prompt([text, "a car"], max_sequence_length=6)[0] for text in (LONGER, "a car"))
    assert distance(cut[1:, : short.shape[1]], short[1:]) > 1e-3, "diffusers has mended it"
    message = r"at most 6 tokens in a call of several, got '.*' of 1\d: Kandinsky5T2IPipeline would cut all of them"
    with pytest.raises(ValueError, match=message):
        tiny(SOURCE, "a red car", **options)
    with pytest.raises(ValueError, match=message):
        tiny("a red car", "a car", negative_prompt=["a drawing", LONGER], **options)
    recording = tiny.record(SOURCE, **options)
    with pytest.raises(ValueError, match=message):
        tiny.edit(recording, "a red car")


def test_several_images_have_their_own_prompts_pooled_text(tiny):
    """diffusers repeats it in another order than the texts."""
    noise = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    both = tiny(
        SOURCE, TARGETS["as long"], output_type="latent", num_images_per_prompt=2, **run(generator=noise)
    ).images
    one = tiny(SOURCE, TARGETS["as long"], output_type="latent", **run()).images
    assert distance(both[::2], one) <= EXACT and distance(both[1::2], one) > 1e-3


def test_pictures_are_the_pipelines(tiny):
    """Whose decoder takes off no shift; latents of the size that is asked for, channels behind frames."""
    latents, pictures = (tiny(SOURCE, output_type=kind, **run()).images for kind in ("latent", "pil"))
    assert latents.shape == (1, 1, 6, 10, 16)
    assert decoded(tiny, latents)[0].tobytes() == pictures[0].tobytes()
    noise = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given, drawn = (
        tiny(SOURCE, TARGETS["as long"], output_type="latent", **run(**start)).images
        for start in ({"latents": noise}, {"latents": noise.expand(2, -1, -1, -1)})
    )
    assert distance(given, drawn) == 0


class TestRefusals:
    def test_a_size_that_the_pipeline_would_change(self, tiny):
        message = r"one of 48 x 80, 64 x 48, of which alone Kandinsky5T2IPipeline makes images, got 64 x 64"
        with pytest.raises(ValueError, match=message):
            tiny(SOURCE, TARGETS["shorter"], height=64, width=64)
        with pytest.raises(ValueError, match=message):
            tiny.invert(np.zeros((64, 64, 3)), SOURCE, height=64, width=64)

    def test_a_picture_is_cut_to_the_nearest(self, tiny):
        tall = np.random.default_rng(3).random((500, 400, 3))
        assert tiny.invert(tall, SOURCE, num_inference_steps=1).image.size == (48, 64)

    def test_embeddings(self, tiny):
        texts, pooled, ends = tiny.encode_prompt(SOURCE)
        with pytest.raises(TypeError, match="prompt_embeds_qwen"):
            tiny(prompt_embeds_qwen=texts, prompt_embeds_clip=pooled, prompt_cu_seqlens=ends, **run())

    def test_pipelines_of_videos(self, pipe):
        with pytest.raises(TypeError, match=r"got Kandinsky5T2VPipeline; put `with editing\(pipe, edit\):`"):
            FreePromptPipeline.from_pipe(tiny_kandinsky5_pipeline(pipe, kind="T2V", visual_cond=True))
