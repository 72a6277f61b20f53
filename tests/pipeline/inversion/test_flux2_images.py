"""Real images on FLUX.2 [dev] and [klein]: inverted by the papers' formulas, edited, saved, and what is refused."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("this diffusers has no FLUX.2 [klein]", allow_module_level=True)

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from fpe_pipeline import (
    FreePromptEdit,
    FreePromptFlux2KleinPipeline,
    FreePromptFlux2Pipeline,
    FreePromptPipeline,
    Inversion,
    KVEdit,
    editing,
    flow_scheduler,
)
from fpe_pipeline.sampling.decoding import decoded
from tests.support import edited_transformers
from tests.support.dense_rows import wide
from tests.support.flow_formulas import path_to_noise
from tests.support.slow_cases import few
from tests.support.tiny_flux2 import tiny_flux2_that_encodes
from tests.support.tiny_transformers import ExactEuler

EXACT = 1e-8
SOURCE, TARGET = "a photo of a red car on a mountain", "a photo of a big dog on a house in winter"
SIZE, STEPS, TEXTS = {"height": 48, "width": 80}, 3, 60
RUN = {"max_sequence_length": TEXTS, "output_type": "latent"}
MAKE = {
    "dev": lambda: tiny_flux2_that_encodes(),
    "klein": lambda: tiny_flux2_that_encodes("Flux2KleinPipeline"),
    "klein, distilled": lambda: tiny_flux2_that_encodes("Flux2KleinPipeline", is_distilled=True),
}
KINDS = {"dev": FreePromptFlux2Pipeline}


@pytest.fixture(autouse=True)
def _wide():
    with wide():
        yield


@pytest.fixture(scope="module")
def stocks():
    return {name: make() for name, make in MAKE.items()}


def ours(stock, solver="euler"):
    made = FreePromptPipeline.from_pipe(stock)
    euler = ExactEuler(shift=3.0)
    made.scheduler = euler if solver == "euler" else flow_scheduler(euler, solver)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def photo():
    return torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0).numpy()


def start(tiny, photo):
    """The photo as the model takes it: 2 x 2 of the autoencoder's mean to a token, each channel normalised by its
    average and its spread."""
    pixels = (torch.from_numpy(photo * 255).round().float() / 127.5 - 1).permute(2, 0, 1)[None].double()
    mean = tiny.vae.encode(pixels).latent_dist.mean[0]
    tokens = mean.reshape(16, 3, 2, 5, 2).permute(1, 3, 0, 2, 4).reshape(15, 64)
    average, spread = tiny.vae.bn.running_mean, (tiny.vae.bn.running_var + tiny.vae.config.batch_norm_eps).sqrt()
    assert average.abs().min() > 0 and spread.max() < 1
    return ((tokens - average) / spread)[None]


def velocity(tiny, guidance=1.0):
    """v(z, σ) as the pipeline asks for it."""
    where = torch.cartesian_prod(torch.tensor([0]), torch.arange(3), torch.arange(5), torch.tensor([0]))[None]
    texts, away = (tiny.encode_prompt(text, max_sequence_length=TEXTS)[0] for text in (SOURCE, ""))
    places = torch.cartesian_prod(*[torch.tensor([0])] * 3, torch.arange(TEXTS))[None]
    is_told = isinstance(tiny, FreePromptFlux2Pipeline)
    told = torch.tensor([guidance]) if is_told else None

    def one(z, sigma, texts):
        time = (1000 * sigma).double().expand(1) / 1000
        given = {"encoder_hidden_states": texts, "txt_ids": places, "img_ids": where, "guidance": told}
        return tiny.transformer(hidden_states=z, timestep=time, return_dict=False, **given)[0]

    def found(z, sigma):
        towards = one(z, sigma, texts)
        if is_told or guidance == 1:
            return towards
        other = one(z, sigma, away)
        return other + guidance * (towards - other)

    return found


@torch.no_grad()
@pytest.mark.parametrize("model", ["dev", "klein"])
@pytest.mark.parametrize("solver", few(["euler", "rf-solver", "fireflow"], "fireflow"))
def test_the_papers_formulas(stocks, photo, model, solver):
    check_inverted(ours(stocks[model], solver), photo, solver, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("model", few(["dev", "klein"], "klein"))
def test_guidance_is_told_or_by_the_empty_prompt(stocks, photo, model):
    check_inverted(ours(stocks[model]), photo, "euler", 3.0)


def check_inverted(tiny, photo, solver, guidance):
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance, "max_sequence_length": TEXTS, **SIZE}
    inversion = tiny.invert(photo, SOURCE, **options)
    nodes = ExactEuler(shift=3.0)
    nodes.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    expected = path_to_noise(start(tiny, photo), velocity(tiny, guidance), nodes.sigmas, solver)
    assert (inversion.latents - expected).abs().max() <= EXACT


@pytest.fixture
def inverted(stocks, photo):
    def make(model, **options):
        tiny = ours(stocks[model])
        given = {"num_inference_steps": STEPS, "max_sequence_length": TEXTS, **SIZE, **options}
        return tiny, tiny.invert(photo, SOURCE, **given)

    return make


def shown(tiny, held):
    """Latents as the scheduler has them as ``output_type="latent"`` gives them: [klein]'s are its autoencoder's."""
    return held if isinstance(tiny, FreePromptFlux2Pipeline) else tiny.flow().unpacked(held, (48, 80))


@pytest.mark.parametrize("model", few(["dev", "klein", "klein, distilled"], "klein"))
@pytest.mark.parametrize("method", few(["direct", "reference", "free"], "direct", "free"))
def test_what_holds_the_source(inverted, model, method):
    tiny, inversion = inverted(model, method=method)
    out = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.5, guidance_scale=3.0, **RUN)
    apart = (out.source - shown(tiny, inversion.latents[0])[0]).abs().max()
    assert bool(apart <= EXACT) is (method == "direct")
    assert (out.targets[0] - out.source).abs().max() > 1e-3
    assert out.prompts == (SOURCE, TARGET)


@pytest.mark.slow
def test_a_source_that_is_free_comes_back_as_far_as_the_solver_goes(inverted):
    def distance(steps):
        tiny, inversion = inverted("klein", num_inference_steps=steps, method="free")
        out = tiny(inversion=inversion, target_prompt=SOURCE, self_replace_steps=0.0, guidance_scale=1.0, **RUN)
        assert (out.targets[0] - out.source).abs().max() <= EXACT  # by its own prompt
        image = shown(tiny, inversion.latents[0])[0]
        return float((out.source - image).norm() / image.norm())

    assert distance(12) < 0.75 * distance(3)


def drawn(tiny, prompts, size, **options):
    """The pipeline of diffusers, inside ours."""
    given = {"num_inference_steps": edited_transformers.STEPS, "guidance_scale": 3.0, **SIZE, **RUN}
    return tiny.parent.__call__(tiny, prompt=list(prompts), **given, **options).images


HELD = ["FPE", "FPE, the whole map", "MasaCtrl", "ConsistEdit, a mask", "KV-Edit"]


@pytest.mark.parametrize("model", few(["dev", "klein"], "klein"))
@pytest.mark.parametrize("edit", few(HELD, "FPE"))
def test_edits_are_those_of_dense_layers_around_a_source_that_is_held(inverted, model, edit):
    tiny, inversion = inverted(model, num_inference_steps=edited_transformers.STEPS)
    of = edited_transformers.Model(None, drawn, is_guided=model == "klein")
    prompts = (SOURCE, TARGET, "a red car")
    case = edited_transformers.EDITS[edit][0](of, tiny, prompts, (6, 10))
    actual = tiny(inversion=inversion, target_prompt=prompts[1:], edit=case.edit, guidance_scale=3.0, **RUN).images
    noise = inversion.noise.transpose(1, 2).unflatten(2, (3, 5)).repeat(3, 1, 1, 1)
    held = inversion.latents[:-1].flip(0)[:, 0]
    follows = {"held": held, "latents": noise, "size": (6, 10)}
    expected = edited_transformers.reference(tiny, of, case, prompts, **follows)
    assert (actual - expected).abs().max() <= EXACT
    late = edited_transformers.reference(tiny, of, case, prompts, **{**follows, "held": held.roll(-1, 0)})
    assert (actual - late).abs().max() > 1e-5


@pytest.mark.slow
def test_what_a_mask_keeps_is_the_picture(inverted):
    tiny, inversion = inverted("klein")
    mask = Image.new("L", (80, 48), 0)
    mask.paste(255, (32, 0, 80, 48))
    out = tiny(inversion=inversion, target_prompt=TARGET, edit=KVEdit(mask=mask), **RUN)
    apart = (out.targets[0] - shown(tiny, inversion.latents[0])[0]).abs().amax((0, 1))
    assert (apart[:4] > 1e-3).all() and (apart[4:] <= EXACT).all()


@pytest.mark.parametrize("model", few(list(MAKE), "dev", "klein"))
def test_it_is_what_editing_makes_of_the_pipeline_of_diffusers(stocks, model):
    edit, options = FreePromptEdit(0.5), {"num_inference_steps": 2, **SIZE, **RUN}
    out = ours(stocks[model])(SOURCE, TARGET, edit=edit, generator=torch.Generator().manual_seed(5), **options)
    stock, before = stocks[model], stocks[model].scheduler
    stock.scheduler = ExactEuler(shift=3.0)
    try:
        with editing(stock, edit):
            noise = [torch.Generator().manual_seed(5) for _ in range(2)]
            expected = stock(prompt=[SOURCE, TARGET], generator=noise, **options).images
    finally:
        stock.scheduler = before
    assert (out.images - expected).abs().max() <= EXACT
    latents = torch.randn(1, 64, 3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given = ours(stocks[model])(SOURCE, TARGET, edit=edit, latents=latents, **{**options, "height": None})
    assert (given.images - expected).abs().max() <= EXACT


def test_a_guidance_for_each_prompt(stocks):
    tiny, options = ours(stocks["dev"]), {"num_inference_steps": 2, "self_replace_steps": 0.0, **SIZE, **RUN}
    options["latents"] = torch.randn(1, 64, 3, 5, dtype=torch.float64)
    both = tiny(SOURCE, SOURCE, guidance_scale=[1.0, 5.0], **options).images
    for row, scale in enumerate((1.0, 5.0)):
        assert (both[row] - tiny(SOURCE, guidance_scale=scale, **options).images[0]).abs().max() <= EXACT
    with pytest.raises(ValueError, match="is not: pass one number"):
        ours(stocks["klein"])(SOURCE, SOURCE, guidance_scale=[1.0, 5.0], **options)


def test_pictures_and_files(inverted, tmp_path):
    tiny, inversion = inverted("dev")
    loaded = Inversion.load(inversion.save(tmp_path / "inversion.safetensors"))
    options = {"self_replace_steps": 0.5, "max_sequence_length": TEXTS, "target_prompt": TARGET}
    out, again = (tiny(inversion=one, **options) for one in (inversion, loaded))
    assert [image.size for image in out.images] == [(80, 48)] * 2
    assert out.images[1].tobytes() == again.images[1].tobytes()
    (picture,) = decoded(tiny, inversion.latents[0], (48, 80))
    assert picture.tobytes() == out.images[0].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("model", few(["klein", "klein, distilled"], "klein, distilled"))
def test_saved_models_load_in_diffusers_and_here(stocks, model, tmp_path):
    tiny = ours(stocks[model])
    tiny.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tiny.save_pretrained(tmp_path)
    for loader, kind in ((FreePromptPipeline, FreePromptFlux2KleinPipeline), (DiffusionPipeline, tiny.parent)):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is kind and loaded.config.is_distilled is (model != "klein")


def test_what_the_pipeline_was_told_goes_along(stocks):
    stock, before = stocks["dev"], stocks["dev"].system_message
    stock.system_message = "a drawing"
    try:
        assert FreePromptPipeline.from_pipe(stock).system_message == "a drawing"
    finally:
        stock.system_message = before
    assert FreePromptPipeline.from_pipe(stocks["klein, distilled"]).config.is_distilled


class TestRefusals:
    def test_reference_pictures(self, stocks, photo):
        with pytest.raises(ValueError, match=r"image= shows the model a reference picture.* Flux2Pipeline,"):
            ours(stocks["dev"])(SOURCE, TARGET, image=photo)

    def test_negative_prompts(self, stocks):
        with pytest.raises(TypeError, match="unknown option negative_prompt"):
            ours(stocks["klein"])(SOURCE, TARGET, negative_prompt="a drawing")

    def test_guidance_of_a_distilled_model(self, stocks, photo):
        with pytest.raises(ValueError, match=r"was distilled to be without guidance, got guidance_scale=3: leave it"):
            ours(stocks["klein, distilled"]).invert(photo, SOURCE, guidance_scale=3.0, **SIZE)

    def test_latents_of_another_shape(self, stocks):
        tokens = torch.zeros(1, 15, 64)
        with pytest.raises(ValueError, match=r"expected latents \[1, 64, h, w\]"):
            ours(stocks["klein"])(SOURCE, latents=tokens)

    def test_a_source_that_is_dropped(self, stocks):
        with pytest.raises(ValueError, match="cannot drop the source's rows"):
            ours(stocks["klein"])(SOURCE, TARGET, keep_source=False)

    def test_a_size_between_tokens(self, stocks):
        with pytest.raises(ValueError, match="positive multiple of 16"):
            ours(stocks["klein"])(SOURCE, TARGET, height=40, width=64)
