"""Real images on Chroma, Lumina 2 and Z-Image: inverted by the papers' formulas, edited, saved, and what is refused."""

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from fpe_pipeline import (
    FreePromptChromaPipeline,
    FreePromptEdit,
    FreePromptLumina2Pipeline,
    FreePromptPipeline,
    FreePromptZImagePipeline,
    Inversion,
    flow_scheduler,
)
from fpe_pipeline.errors import EditWarning
from tests.support.dense_rows import narrow
from tests.support.flow_formulas import path_to_noise
from tests.support.slow_cases import few
from tests.support.tiny_chroma import tiny_chroma_pipeline
from tests.support.tiny_language import tiny_lumina_that_reads
from tests.support.tiny_transformers import ExactEuler, tiny_vae
from tests.support.tiny_z_image import tiny_z_image_that_reads, wide_z_image

EXACT = 1e-8
SOURCE, TARGET = "a photo of a red car on a mountain", "a photo of a big dog on a house in winter"
SIZE, STEPS = {"height": 48, "width": 80}, 3
SOLVERS = ["euler", "rf-solver", "fireflow"]
TEXTS = 40  # tokens of T5, most of them padding


class OnChroma:
    kind = FreePromptChromaPipeline

    def __init__(self, pipe):
        self.options = {"max_sequence_length": TEXTS}
        self.stock = tiny_chroma_pipeline(pipe)

    @staticmethod
    def start(mean):
        """Latents as the model takes them: 2 x 2 to a token."""
        channels, height, width = mean.shape
        tokens = mean.reshape(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
        return tokens.reshape(1, -1, 4 * channels)

    @staticmethod
    def velocity(tiny, guidance=1.0):
        """v(z, σ) as the pipeline asks for it."""
        texts, _, mask, negative, _, negative_mask = tiny.encode_prompt(SOURCE, "", max_sequence_length=TEXTS)
        places = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij"), -1).reshape(15, 2)
        places = torch.cat([torch.zeros(15, 1), places], 1).double()

        def one(z, sigma, texts, mask):
            return tiny.transformer(
                z,
                timestep=(1000 * sigma).double().expand(1) / 1000,
                encoder_hidden_states=texts,
                txt_ids=torch.zeros(TEXTS, 3).double(),
                img_ids=places,
                attention_mask=torch.cat([mask, torch.ones(1, 15, dtype=torch.bool)], 1),
            ).sample

        def velocity(z, sigma):
            towards = one(z, sigma, texts, mask)
            if guidance == 1:
                return towards
            away = one(z, sigma, negative, negative_mask)
            return away + guidance * (towards - away)

        return velocity


class OnLumina2:
    kind = FreePromptLumina2Pipeline

    def __init__(self, pipe):
        self.options = {"max_sequence_length": 128}
        self.stock = tiny_lumina_that_reads()

    @staticmethod
    def start(mean):
        return mean[None]

    @staticmethod
    def velocity(tiny, guidance=1.0):
        towards, away = (
            tiny._get_gemma_prompt_embeds(text, max_sequence_length=128)
            for text in (f"Write of a photo <Prompt Start> {SOURCE}", "")
        )

        def velocity(z, sigma):
            turned = 1 - (1000 * sigma).expand(1) / 1000
            given, other = (-tiny.transformer(z, turned, *texts, return_dict=False)[0] for texts in (towards, away))
            if guidance == 1:
                return given
            guided = other + guidance * (given - other)
            return guided / guided.norm(dim=3, keepdim=True) * given.norm(dim=3, keepdim=True)

        return velocity


class OnZImage:
    kind = FreePromptZImagePipeline

    def __init__(self, pipe):
        self.options = {"max_sequence_length": 128}
        self.stock = tiny_z_image_that_reads(vae=tiny_vae().double())

    @staticmethod
    def start(mean):
        return mean[None]

    @staticmethod
    def velocity(tiny):
        captions, _ = tiny.encode_prompt(SOURCE, do_classifier_free_guidance=False, max_sequence_length=128)

        def velocity(z, sigma):
            turned = (1000 - (1000 * sigma).expand(1)) / 1000
            return -tiny.transformer([z[0][:, None]], turned, captions, return_dict=False)[0][0][None, :, 0]

        return velocity


@pytest.fixture(autouse=True)
def _wide():
    with wide_z_image():
        yield


@pytest.fixture(scope="module", params=[OnChroma, OnLumina2, OnZImage])
def family(request, pipe):
    return request.param(pipe)


@pytest.fixture
def tiny(family):
    made = FreePromptPipeline.from_pipe(family.stock)
    made.scheduler = ExactEuler(shift=3.0)
    made.set_progress_bar_config(disable=True)
    assert type(made) is family.kind
    return made


@pytest.fixture(scope="module")
def photo():
    return torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0).numpy()


def path(tiny, family, photo, solver, velocity):
    """The latents at every node, by the papers' formulas."""
    pixels = (torch.from_numpy(photo * 255).round().float() / 127.5 - 1).permute(2, 0, 1)[None].double()
    mean = tiny.vae.encode(pixels).latent_dist.mean[0]
    z = family.start((mean - tiny.vae.config.shift_factor) * tiny.vae.config.scaling_factor)
    nodes = ExactEuler(shift=3.0)
    nodes.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    return path_to_noise(z, velocity, nodes.sigmas, solver)


@torch.no_grad()
@pytest.mark.parametrize("solver", few(SOLVERS, "fireflow"))
def test_the_papers_formulas(tiny, family, photo, solver):
    tiny.scheduler = tiny.scheduler if solver == "euler" else flow_scheduler(tiny.scheduler, solver)
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=STEPS, **SIZE, **family.options)
    expected = path(tiny, family, photo, solver, family.velocity(tiny))
    assert (inversion.latents - expected).abs().max() <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("family", [OnChroma, OnLumina2])
def test_guidance_is_by_the_empty_prompt(pipe, family, photo):
    family = family(pipe)
    tiny = FreePromptPipeline.from_pipe(family.stock)
    tiny.scheduler = ExactEuler(shift=3.0)
    tiny.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, **SIZE, **family.options}
    expected = path(tiny, family, photo, "euler", family.velocity(tiny, 3.0))
    assert (tiny.invert(photo, SOURCE, **options).latents - expected).abs().max() <= EXACT


@pytest.mark.parametrize("method", few(["direct", "reference", "free"]))
def test_what_holds_the_source(tiny, family, photo, method):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=STEPS, method=method, **SIZE, **family.options)
    guided = {"negative_prompt": "a drawing", "guidance_scale": 3.0, "output_type": "latent"}
    out = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.5, **guided, **family.options)
    apart = (out.source - inversion.latents[0]).abs().max()
    assert bool(apart == 0) is (method == "direct")
    assert (out.targets[0] - out.source).abs().max() > 1e-3
    assert out.prompts == (SOURCE, TARGET)


def test_a_source_that_is_free_comes_back_as_far_as_the_solver_goes(tiny, family, photo):
    """Unguided, more steps bring the reconstruction nearer: what is solved there and back is one equation."""
    unguided = {"guidance_scale": tiny.unguided, "output_type": "latent", **family.options}

    def distance(steps):
        inversion = tiny.invert(photo, SOURCE, num_inference_steps=steps, method="free", **SIZE, **family.options)
        out = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.0, **unguided)
        return float((out.source - inversion.latents[0]).norm() / inversion.latents[0].norm())

    assert distance(12) < 0.75 * distance(3)


def test_the_sources_own_prompt_gives_the_source(tiny, family, photo):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=2, method="free", **SIZE, **family.options)
    out = tiny(
        inversion=inversion, target_prompt=SOURCE, self_replace_steps=0.5, output_type="latent", **family.options
    )
    assert (out.targets[0] - out.source).abs().max() <= EXACT


@pytest.mark.slow
def test_pictures_and_files(tiny, family, photo, tmp_path):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=2, **SIZE, **family.options)
    loaded = Inversion.load(inversion.save(tmp_path / "inversion.safetensors"))
    options = {"self_replace_steps": 0.5, "negative_prompt": "a drawing", **family.options}
    out, again = (tiny(inversion=one, target_prompt=TARGET, **options) for one in (inversion, loaded))
    assert [image.size for image in out.images] == [(80, 48)] * 2
    assert out.images[1].tobytes() == again.images[1].tobytes()
    options |= {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    generated = tiny(SOURCE, TARGET, **options, **SIZE)
    assert generated.source.size == (80, 48) and generated.report.layers


def test_it_is_what_editing_makes_of_the_pipeline_of_diffusers(tiny, family):
    from fpe_pipeline import editing

    edit, options = FreePromptEdit(0.5), {"num_inference_steps": 2, "output_type": "latent", **SIZE, **family.options}
    out = tiny(SOURCE, TARGET, edit=edit, generator=torch.Generator().manual_seed(5), **options)
    stock, before = family.stock, family.stock.scheduler
    stock.scheduler = ExactEuler(shift=3.0)
    try:
        with editing(stock, edit):
            noise = [torch.Generator().manual_seed(5) for _ in range(2)]
            expected = stock([SOURCE, TARGET], generator=noise, **options).images
    finally:
        stock.scheduler = before
    assert (out.images - expected).abs().max() <= EXACT


def test_embeddings_of_z_image_stand_in_for_prompts():
    """They are a list, as captions differ in length, where other models take a tensor."""
    tiny = FreePromptPipeline.from_pipe(OnZImage(None).stock)
    tiny.set_progress_bar_config(disable=True)
    tiny.scheduler = ExactEuler(shift=3.0)
    options = {
        "num_inference_steps": 2,
        "guidance_scale": 0.0,
        "self_replace_steps": 0.5,
        "output_type": "latent",
        **SIZE,
    }
    options["latents"] = torch.randn(1, 16, 6, 10, dtype=torch.float64)
    encoded, _ = tiny.encode_prompt([SOURCE, TARGET], do_classifier_free_guidance=False, max_sequence_length=128)
    expected = tiny(SOURCE, TARGET, max_sequence_length=128, **options).images
    assert (tiny(prompt_embeds=encoded, **options).images - expected).abs().max() <= EXACT


def test_lumina_2_keeps_the_text_of_its_system():
    stock = OnLumina2(None).stock
    stock.system_prompt = "a drawing of"
    assert FreePromptPipeline.from_pipe(stock).system_prompt == "a drawing of"


def test_embeddings_of_lumina_2_come_with_their_masks():
    tiny = FreePromptPipeline.from_pipe(OnLumina2(None).stock)
    tiny.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "self_replace_steps": 0.5, "output_type": "latent", **SIZE}
    options["latents"] = torch.randn(1, 16, 6, 10, dtype=torch.float64)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    encoded = dict(zip(names, tiny.encode_prompt([SOURCE, TARGET], max_sequence_length=128), strict=True))
    expected = tiny(SOURCE, TARGET, max_sequence_length=128, **options).images
    assert (tiny(**encoded, **options).images - expected).abs().max() <= EXACT


def test_lumina_2_in_bfloat16(photo):
    """Its pipeline hands latents to the model as they come, and those of an inversion are float32."""
    tiny = FreePromptPipeline.from_pipe(tiny_lumina_that_reads(torch.bfloat16))
    tiny.set_progress_bar_config(disable=True)
    with narrow():
        inversion = tiny.invert(photo, SOURCE, num_inference_steps=2, max_sequence_length=128, **SIZE)
        out = tiny(inversion=inversion, target_prompt=TARGET, output_type="latent")
    assert inversion.latents.dtype == torch.float32 and out.images.dtype == torch.bfloat16
    assert torch.equal(out.source, inversion.latents[0, 0].bfloat16())


def test_saved_models_load_in_diffusers_and_here(tiny, family, tmp_path):
    tiny.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tiny.save_pretrained(tmp_path)
    assert type(FreePromptPipeline.from_pretrained(tmp_path)) is family.kind
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is family.kind.parent


class TestRefusals:
    def test_a_source_that_is_dropped(self, tiny):
        with pytest.raises(ValueError, match="cannot drop the source's rows"):
            tiny(SOURCE, TARGET, keep_source=False)

    def test_a_size_between_tokens(self, tiny):
        with pytest.raises(ValueError, match="positive multiple of 16"):
            tiny(SOURCE, TARGET, height=40, width=64)

    def test_a_size_that_lumina_2_has_no_places_for(self):
        tiny = FreePromptPipeline.from_pipe(OnLumina2(None).stock)
        with pytest.raises(ValueError, match=r"at most 512 pixels, .* got 528 x 16"):
            tiny(SOURCE, TARGET, height=528, width=16)

    def test_z_images_guidance(self, photo):
        tiny = FreePromptPipeline.from_pipe(OnZImage(None).stock)
        with pytest.raises(ValueError, match=r"counts guidance from 0 .* got guidance_scale=3: leave it at 1"):
            tiny.invert(photo, SOURCE, guidance_scale=3.0, num_inference_steps=2, **SIZE)

    def test_a_negative_prompt_without_guidance(self, tiny):
        options = {"negative_prompt": "a drawing", "guidance_scale": tiny.unguided, "num_inference_steps": 1}
        with pytest.warns(EditWarning, match="negative prompt does nothing"):
            tiny(SOURCE, TARGET, output_type="latent", **options, **SIZE)
