"""Models and options that would do nothing, or fail inside, are refused on entry with the reason."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, PromptToPromptEdit, ddim_scheduler, editing, heat_maps
from tests.support.silent import SOURCE, TARGET, dense_heat, embedded, noise
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.tiny_unets import tiny_unet

PHOTO = Image.new("RGB", (80, 80), (200, 30, 30))
FAST = {"num_inference_steps": 2, "output_type": "latent"}


def watched(pipe):
    """The calls of a pipeline's UNet, as they are made."""
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(None))
    return calls


@pytest.fixture(scope="module")
def distilled():
    """A latent consistency model: its UNet takes the guidance scale, and batches have no unconditional half."""
    base = embedded(FreePromptPipeline)
    unet = UNet2DConditionModel.from_config({**base.unet.config, "time_cond_proj_dim": 32}).eval()
    unet.load_state_dict(base.unet.state_dict(), strict=False)
    return embedded(FreePromptPipeline, unet=unet, scheduler=ddim_scheduler(base.scheduler))


@pytest.mark.parametrize("method", ["negative-prompt", "null-text"])
def test_guidance_based_inversions_of_distilled_models(distilled, method):
    calls = watched(distilled)
    with pytest.raises(ValueError, match=rf"{method} inversion lives in the unconditional half .* distilled"):
        distilled.invert(PHOTO, SOURCE, num_inference_steps=2, method=method)
    assert not calls


def test_an_inversion_made_elsewhere(distilled):
    """It was made with another UNet, and is refused where it is used."""
    plain = embedded(FreePromptPipeline, scheduler=ddim_scheduler(distilled.scheduler))
    inversion = plain.invert(PHOTO, SOURCE, num_inference_steps=2, method="negative-prompt")
    for use in (
        lambda: distilled(inversion=inversion, target_prompt=TARGET, output_type="latent"),
        lambda: distilled.record(inversion=inversion),
    ):
        with pytest.raises(ValueError, match="negative-prompt inversion lives in the unconditional half"):
            use()
    direct = distilled.invert(PHOTO, SOURCE, num_inference_steps=2, method="direct")
    assert distilled(inversion=direct, target_prompt=TARGET, output_type="latent").images.isfinite().all()


def test_negative_prompts_without_an_unconditional_half(distilled):
    with pytest.raises(ValueError, match=r"leave negative_prompt out"):
        distilled(SOURCE, TARGET, negative_prompt="a boat", **FAST)
    pipe = embedded(FreePromptPipeline)
    with pytest.warns(RuntimeWarning, match="the negative prompt does nothing at guidance_scale=1"):
        pipe(SOURCE, TARGET, negative_prompt="a boat", guidance_scale=1.0, **FAST)


def hidden_states(pipe, texts):
    ids = pipe.tokenizer(
        texts, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids, output_hidden_states=True)


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_clip_skip(skipped):
    """The last layers' output is left out, and the final norm applied to what is before them."""
    pipe = embedded(FreePromptPipeline)
    states = hidden_states(pipe, [SOURCE, TARGET])
    norm = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm
    with torch.no_grad():
        embeddings = norm(states.hidden_states[-(skipped + 1)])
    negative = hidden_states(pipe, ["", ""]).last_hidden_state
    right = pipe(prompt_embeds=embeddings, negative_prompt_embeds=negative, latents=noise(0), **FAST).images
    got = pipe(SOURCE, TARGET, clip_skip=skipped, latents=noise(0), **FAST).images
    torch.testing.assert_close(got, right, rtol=0, atol=1e-5)
    assert "text_model" not in vars(pipe.text_encoder)


@pytest.mark.parametrize("skipped", [-1, 99, True, 1.0])
def test_clip_skip_that_is_no_number_of_layers(skipped):
    pipe = embedded(FreePromptPipeline)
    calls = watched(pipe)
    with pytest.raises(ValueError, match="clip_skip must be a whole number of the text encoder's last layers"):
        pipe(SOURCE, TARGET, clip_skip=skipped, **FAST)
    assert not calls


def test_options_that_this_pipeline_has_no_use_for():
    pipe = embedded(FreePromptPipeline)
    calls = watched(pipe)
    with pytest.raises(ValueError, match=r"no IP-Adapter is loaded: call pipe\.load_ip_adapter"):
        pipe(SOURCE, TARGET, ip_adapter_image=PHOTO, **FAST)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"eta=1\.0 is DDIM's, and EulerDiscreteScheduler takes none"):
        pipe(SOURCE, TARGET, eta=1.0, **FAST)
    assert not calls


def test_weights_stored_in_float8():
    """Edits compute with them as the model itself does; gradients do not go through them."""
    pipe = embedded(FreePromptPipeline, scheduler=ddim_scheduler(DDIMScheduler()))
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    calls = watched(pipe)
    with pytest.raises(ValueError, match="weights are stored in float8"):
        pipe.invert(PHOTO, SOURCE, num_inference_steps=2, method="null-text")
    assert not calls
    images = pipe(SOURCE, TARGET, self_replace_steps=1.0, latents=noise(0), **FAST).images
    plain = pipe(SOURCE, latents=noise(0), **FAST).images
    torch.testing.assert_close(images[:1], plain, rtol=0, atol=1e-4)


def test_models_that_were_cast_to_float8():
    pipe = embedded(FreePromptPipeline)
    pipe.text_encoder.to(torch.float8_e4m3fn)
    for call in (lambda: pipe(SOURCE, TARGET, **FAST), lambda: pipe.record(SOURCE), lambda: pipe.invert(PHOTO)):
        with pytest.raises(ValueError, match=r"the text_encoder was cast to torch\.float8_e4m3fn, in which its layers"):
            call()
    pipe.unet.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"the unet was cast to .*\.enable_layerwise_casting"):
        editing(pipe, FreePromptEdit())


@pytest.fixture(scope="module")
def refiner():
    """As SDXL's: no first tokenizer and no first text encoder."""
    base = embedded()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 16, "num_hidden_layers": 2}
    tokens = {name: getattr(base.tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    length = base.tokenizer.model_max_length
    config = CLIPTextConfig(
        **size, **tokens, num_attention_heads=2, vocab_size=len(base.tokenizer), max_position_embeddings=length
    )
    unet = UNet2DConditionModel(
        sample_size=20,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=16,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 8 * 5,
    ).eval()
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=base.tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refine(pipe, prompts):
    generators = [torch.Generator().manual_seed(0) for _ in ([prompts] if isinstance(prompts, str) else prompts)]
    options = {"strength": 0.5, "num_inference_steps": 4, "output_type": "latent", "generator": generators}
    return pipe(prompts, image=PHOTO, **options).images


def test_heat_of_a_refiner(refiner):
    ids = refiner.tokenizer_2(SOURCE).input_ids
    tokens = [ids.index(refiner.tokenizer_2.convert_tokens_to_ids("car</w>"))]
    with heat_maps(refiner, ["car"]) as maps:
        refine(refiner, SOURCE)
    right = dense_heat(refiner, lambda: refine(refiner, SOURCE), tokens, lambda rows: rows - 1)
    torch.testing.assert_close(torch.tensor(maps.word("car")), right, rtol=0, atol=1e-5)


def test_words_of_a_refiner_are_aligned_by_its_second_tokenizer(refiner):
    prompts = [SOURCE, TARGET]
    edit = PromptToPromptEdit(prompts, refiner.tokenizer_2, cross_replace_steps=1.0, self_replace_steps=0)
    with editing(refiner, edit):
        edited = refine(refiner, prompts)
    torch.testing.assert_close(edited[:1], refine(refiner, prompts)[:1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is written for the prompts"), editing(refiner, edit):
        refine(refiner, [SOURCE, "a photo of a green house in the snow"])


def with_added_keys():
    """A UNet as DeepFloyd IF's and Kandinsky 2's are, whose layers hold keys of text and of image."""
    return tiny_unet(
        "sd2",
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        attention_head_dim=4,
        dtype=torch.float32,
        upcast_attention=False,
    )


def without_processors():
    return diffusers.UNet2DModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def of_a_video():
    return diffusers.UNet3DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )


@pytest.mark.parametrize(
    ("make", "error", "why", "said"),
    [
        (with_added_keys, ValueError, "added keys and values", "layers with added keys and values"),
        (without_processors, TypeError, "UNet2DModel without attn_processors", "UNets without `attn_processors`"),
        (of_a_video, ValueError, "makes videos", "UNets that make videos"),
    ],
)
def test_unets_that_are_refused_stand_among_what_is_refused(make, error, why, said):
    """The page of models says so of each."""
    page = (Path(__file__).parents[3] / "docs" / "write-an-adapter.md").read_text(encoding="utf-8")
    assert said in page.partition("## What is refused")[2].partition("\n## ")[0]
    words = PromptToPromptEdit([SOURCE, TARGET], embedded().tokenizer, self_replace_steps=0)
    unet = make()
    with pytest.raises(error, match=why), editing(unet, words, classifier_free_guidance=False) as session:
        session.step(0, 1)
        unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 16))


def test_perturbed_attention_leaves_the_layers_as_they_were(pipe):
    """Its pipelines put processors of their own into layers during a call, and leave them there where it fails."""
    tiny = StableDiffusionPAGPipeline(**tiny_pipeline(pipe).components, requires_safety_checker=False)
    tiny.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
    before = dict(tiny.unet.attn_processors)
    with pytest.raises(ValueError, match="perturbed-attention guidance adds rows"), editing(tiny, FreePromptEdit(1.0)):
        tiny(["a car", "a dog"], pag_scale=3.0, **options)
    assert tiny.unet.attn_processors == before
    tiny(["a car", "a dog"], pag_scale=0.0, **options)
