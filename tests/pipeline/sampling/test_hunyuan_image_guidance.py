"""HunyuanImage in `FreePromptPipeline`: its guiders, what distilled models are told, and what is refused."""

import diffusers
import pytest

if not hasattr(diffusers, "HunyuanImagePipeline"):
    pytest.skip("this diffusers has no HunyuanImage", allow_module_level=True)

import torch
from diffusers import HunyuanImageRefinerPipeline
from diffusers.guiders import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, editing
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.models.loading import identity
from tests.support.flow_pipelines import distance, solving
from tests.support.tiny_hunyuan_guided import tiny_hunyuan_image_pipeline

EXACT = 1e-8
SOURCE, TARGET, QUOTES = "a photo of a red car", "a photo of a big dog", 'a photo of a "big dog"'
SIZE = {"height": 48, "width": 80}
PROJECTED = {"adaptive_projected_guidance_start_step": 1}


@pytest.fixture(scope="module")
def stock():
    return tiny_hunyuan_image_pipeline(decodes=True)


@pytest.fixture(scope="module")
def told():
    """A model that was distilled, and has no guider."""
    made = tiny_hunyuan_image_pipeline(decodes=True, guidance_embeds=True)
    made.guider = None
    return made


@pytest.fixture(scope="module")
def photo():
    return torch.rand(48, 80, 3, generator=torch.Generator().manual_seed(3)).numpy()


def ours(stock, **parts):
    made = FreePromptPipeline.from_pipe(solving(stock, "euler"), **parts)
    made.set_progress_bar_config(disable=True)
    return made


def run(**options):
    fixed = {"num_inference_steps": 3, "output_type": "latent", **SIZE}
    return {**fixed, "generator": torch.Generator().manual_seed(5), **options}


def by_diffusers(stock, prompts, **options):
    """What `editing` makes of the pipeline of diffusers, as it is."""
    noise = [torch.Generator().manual_seed(5) for _ in prompts]
    with editing(stock, FreePromptEdit(0.5)):
        return stock(prompts, **run(generator=noise, **options)).images


def edited(tiny, target=TARGET, **options):
    return tiny(SOURCE, target, self_replace_steps=0.5, **run(**options)).images


def test_a_guider_that_looks_back_guides_as_in_diffusers(stock):
    """By its own scale or by another, and each call from its beginning; the pipeline's own is as it was."""
    tiny = ours(stock, guider=AdaptiveProjectedMixGuidance(guidance_scale=3.0, **PROJECTED))
    stock.guider, before = tiny.guider, stock.guider
    try:
        expected = by_diffusers(stock, [SOURCE, TARGET])
        assert distance(edited(tiny), expected) <= EXACT
        assert distance(edited(tiny, guidance_scale=3.0), expected) <= EXACT
        assert distance(edited(tiny, guidance_scale=5.0), expected) > 1e-3
        assert tiny.guider.guidance_scale == 3.0
        stock.guider = ClassifierFreeGuidance(guidance_scale=1.0)
        assert distance(edited(tiny, guidance_scale=0.0), by_diffusers(stock, [SOURCE, TARGET])) <= EXACT
    finally:
        stock.guider = before


def test_a_guider_that_stops_is_asked_anew_in_every_call(stock):
    """diffusers asks it before a call's first step what it did at the latest one, and would encode no negative text."""
    tiny = ours(stock, guider=ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5))
    first, second = (edited(tiny) for _ in range(2))
    assert distance(first, second) == 0
    with pytest.raises(ValueError, match=r"all of its steps, or in none, got a guider from start=0 to stop=0\.5"):
        tiny.record(SOURCE, **run_of_recording())
    tiny.record(SOURCE, guidance_scale=1.0, **run_of_recording())


def run_of_recording():
    return {"num_inference_steps": 3, **SIZE}


def test_prompts_that_quote_have_a_guider_of_their_own(stock):
    quoting = AdaptiveProjectedMixGuidance(guidance_scale=3.0, **PROJECTED)
    tiny = ours(stock, guider=ClassifierFreeGuidance(guidance_scale=3.0), ocr_guider=quoting)
    stock.ocr_guider = quoting
    try:
        assert distance(edited(tiny, QUOTES), by_diffusers(stock, [SOURCE, QUOTES])) <= EXACT
    finally:
        stock.ocr_guider = None
    recording = tiny.record(QUOTES, generator=torch.Generator().manual_seed(5), **run_of_recording())
    full = tiny(QUOTES, TARGET, **run(max_sequence_length=recording.text_length)).images
    assert distance(tiny.edit(recording, TARGET, output_type="latent").images, full[1:]) <= EXACT
    recording = tiny.record(SOURCE, generator=torch.Generator().manual_seed(5), **run_of_recording())
    with pytest.raises(ValueError, match="quotes something, and the recorded source does not"):
        tiny.edit(recording, [TARGET, QUOTES])


def test_a_recording_knows_how_it_was_guided(stock):
    tiny = ours(stock, guider=AdaptiveProjectedMixGuidance(guidance_scale=3.0, **PROJECTED))
    recording, same = tiny.record(SOURCE, **run_of_recording()), identity(tiny)
    tiny.guider.guidance_scale = 5.0  # the recording says which
    tiny.edit(recording, TARGET, output_type="latent")
    assert identity(tiny) == same
    tiny.guider.eta = 0.5
    with pytest.raises(ValueError, match="the recording is of another model"):
        tiny.edit(recording, TARGET)
    assert identity(tiny) != same


def test_a_distilled_model_is_told_its_guidance(told):
    tiny = ours(told)
    own, other = (
        by_diffusers(told, [SOURCE, TARGET]),
        by_diffusers(told, [SOURCE, TARGET], distilled_guidance_scale=2.0),
    )
    assert distance(edited(tiny), own) <= EXACT and distance(own, other) > 1e-6
    assert distance(edited(tiny, guidance_scale=2.0), other) <= EXACT
    of_rows = edited(tiny, guidance_scale=[3.25, 2.0])
    assert distance(of_rows[:1], own[:1]) <= EXACT and distance(of_rows[1:], other[1:]) > 1e-9
    alone = tiny(TARGET, self_replace_steps=0.0, **run(guidance_scale=2.0)).images
    both = tiny(SOURCE, TARGET, self_replace_steps=0.0, **run(guidance_scale=[3.25, 2.0])).images
    assert distance(both[1:], alone) <= EXACT
    noise = torch.Generator().manual_seed(5)
    recording = tiny.record(SOURCE, generator=noise, self_replace_steps=0.5, **run_of_recording())
    assert distance(tiny.edit(recording, TARGET, output_type="latent").images, own[1:]) <= EXACT
    again = tiny.edit(recording, TARGET, guidance_scale=2.0, output_type="latent").images
    assert distance(again, of_rows[1:]) <= EXACT
    with pytest.warns(EditWarning, match=r"at guidance_scale=3\.25, which this model is told and not guided by"):
        tiny(SOURCE, TARGET, negative_prompt="a drawing", **run())


def test_a_photo_on_a_distilled_model(told, photo):
    tiny = ours(told)
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, guidance_scale=2.0, **SIZE)
    texts, mask, quoted, quoted_mask = tiny.encode_prompt(SOURCE)
    nodes, z = tiny.scheduler.sigmas.flip(0), inversion.latents[0]
    for now, then, reached in zip(nodes, nodes[1:], inversion.latents[1:], strict=False):
        with torch.no_grad():
            velocity = tiny.transformer(
                z,
                timestep=(1000 * now).expand(1).double(),
                guidance=torch.tensor([2000.0]).double(),
                encoder_hidden_states=texts,
                encoder_attention_mask=mask,
                encoder_hidden_states_2=quoted.double(),
                encoder_attention_mask_2=quoted_mask,
            ).sample
        z = z + (then - now) * velocity
        assert distance(z, reached) <= EXACT


class TestRefusals:
    @pytest.mark.parametrize(
        "guider",
        [
            AdaptiveProjectedMixGuidance(guidance_scale=3.0),
            ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.5),
            ClassifierFreeGuidance(guidance_scale=3.0, start=0.5),
        ],
        ids=["mixed", "rescaled", "late"],
    )
    def test_inversions_that_such_guiders_guide(self, stock, photo, guider):
        tiny = ours(stock, guider=guider)
        named = rf"got {type(guider).__name__}, which may look .* leave guidance_scale at 1"
        with pytest.raises(ValueError, match=named):
            tiny.invert(photo, SOURCE, num_inference_steps=2, guidance_scale=3.0, **SIZE)
        tiny.invert(photo, SOURCE, num_inference_steps=2, **SIZE)

    def test_inversions_by_mean_velocities(self, photo):
        made = tiny_hunyuan_image_pipeline(decodes=True, guidance_embeds=True, use_meanflow=True)
        made.guider = None
        tiny = ours(made)
        assert distance(edited(tiny), by_diffusers(made, [SOURCE, TARGET])) <= EXACT
        with pytest.raises(ValueError, match=r"got a HunyuanImage that was distilled to mean velocities"):
            tiny.invert(photo, SOURCE, num_inference_steps=2, **SIZE)

    def test_guidance_without_a_guider(self, stock):
        tiny = ours(stock, guider=None)
        edited(tiny)
        edited(tiny, guidance_scale=1.0)
        with pytest.raises(ValueError, match=r"for guidance_scale=3, got guider=None: pass one to from_pipe"):
            edited(tiny, guidance_scale=3.0)
        with pytest.raises(ValueError, match="for transformers that are told it"):
            edited(tiny, guidance_scale=[1.0, 3.0])

    def test_texts_of_no_tokens(self, stock, photo):
        """Which would be as long as the pipeline has them."""
        made, refused = ours(stock), r"max_sequence_length must be a whole number from 1 on, got 0"
        for call in (
            lambda: made(SOURCE, TARGET, **run(max_sequence_length=0)),
            lambda: made.invert(photo, SOURCE, num_inference_steps=3, max_sequence_length=0, **SIZE),
            lambda: made.record(SOURCE, num_inference_steps=3, max_sequence_length=0, **SIZE),
        ):
            with pytest.raises(ValueError, match=refused):
                call()

    def test_guiders_that_do_not_go_together(self, stock):
        with pytest.raises(ValueError, match="got an ocr_guider alone"):
            edited(ours(stock, guider=None, ocr_guider=ClassifierFreeGuidance()))
        counted = ClassifierFreeGuidance(use_original_formulation=True)
        with pytest.raises(ValueError, match="got ClassifierFreeGuidance with use_original_formulation=True"):
            edited(ours(stock, guider=counted))

    def test_the_refiner(self, stock):
        refiner = HunyuanImageRefinerPipeline.__new__(HunyuanImageRefinerPipeline)
        refiner.transformer = stock.transformer
        with pytest.raises(TypeError, match="part of every call of HunyuanImage's refiner"):
            FreePromptPipeline.from_pipe(refiner)

    def test_words_of_a_call_in_diffusers(self, stock):
        with pytest.raises(TypeError, match="distilled_guidance_scale"):
            edited(ours(stock), distilled_guidance_scale=2.0)
