"""Real images on Ovis-Image, LongCat-Image and Bria: inverted by the papers' formulas, edited, saved, refused."""

import dataclasses

import diffusers
import pytest
import torch

if not hasattr(diffusers, "LongCatImagePipeline"):
    pytest.skip("this diffusers has no LongCat-Image", allow_module_level=True)

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, Inversion, editing, flow_scheduler
from fpe_pipeline.pipelines import flux_kin as ours
from fpe_pipeline.sampling.decoding import decoded
from tests.support import edited_transformers
from tests.support.flow_formulas import path_to_noise
from tests.support.flow_pipelines import StandIn, distance
from tests.support.slow_cases import few
from tests.support.tiny_flux_kin import KIN
from tests.support.tiny_transformers import ExactEuler

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
SOURCE, TARGET, OTHER = "a photo of a red car on a mountain", "a photo of a big dog on a house in winter", "a red car"
SIZE, STEPS, TEXTS = {"height": 48, "width": 80}, 3, 40
RUN = {"max_sequence_length": TEXTS, "output_type": "latent"}
GUIDED = {"negative_prompt": "a drawing", "guidance_scale": 3.0}
CLASSES = {
    "Ovis-Image": ours.FreePromptOvisImagePipeline,
    "LongCat-Image": ours.FreePromptLongCatImagePipeline,
    "Bria": ours.FreePromptBriaPipeline,
}
ROWS, COLUMNS = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")


def grid(first, *start):
    """Places of the image's 3 x 5 tokens."""
    top, left = start or (0, 0)
    return torch.stack([torch.full((15,), float(first)), ROWS.flatten() + top, COLUMNS.flatten() + left], 1).double()


def line(first):
    """Places of the text's tokens, one after the other."""
    along = torch.arange(float(TEXTS))
    return torch.stack([torch.full((TEXTS,), float(first)), along, along], 1).double()


PLACES = {
    "Ovis-Image": (line(0), grid(0)),
    "LongCat-Image": (line(0), grid(1, TEXTS, TEXTS)),
    "Bria": (torch.zeros(TEXTS, 3).double(), grid(0)),
}


@pytest.fixture(scope="module")
def stocks(pipe):
    return {name: model.make(pipe) for name, model in KIN.items()}


def made(stocks, name, solver="euler"):
    tiny = FreePromptPipeline.from_pipe(stocks[name])
    euler = ExactEuler(shift=3.0)
    tiny.scheduler = euler if solver == "euler" else flow_scheduler(euler, solver)
    tiny.set_progress_bar_config(disable=True)
    assert type(tiny) is CLASSES[name]
    return tiny


@pytest.fixture(scope="module")
def photo():
    return torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0).numpy()


@pytest.fixture
def inverted(stocks, photo):
    def make(name, **options):
        tiny = made(stocks, name)
        given = {"num_inference_steps": STEPS, "max_sequence_length": TEXTS, **SIZE, **options}
        return tiny, tiny.invert(photo, SOURCE, **given)

    return make


every_model = pytest.mark.parametrize("name", KIN)


def start(tiny, photo):
    """The photo as the model takes it: 2 x 2 of the autoencoder's mean to a token."""
    pixels = (torch.from_numpy(photo * 255).round().float() / 127.5 - 1).permute(2, 0, 1)[None].double()
    mean = tiny.vae.encode(pixels).latent_dist.mean[0]
    scaled = (mean - tiny.vae.config.shift_factor) * tiny.vae.config.scaling_factor
    return scaled.reshape(16, 3, 2, 5, 2).permute(1, 3, 0, 2, 4).reshape(1, 15, 64)


def embedded(tiny, name, text):
    if name == "LongCat-Image":
        tiny.tokenizer_max_length = TEXTS
        return tiny.encode_prompt(text)[0]
    if name == "Bria":
        return tiny.encode_prompt(text, max_sequence_length=TEXTS)[0] if text else torch.zeros(1, TEXTS, 32).double()
    return tiny.encode_prompt(text, max_sequence_length=TEXTS)[0]


def velocity(tiny, name, guidance):
    """v(z, σ) as the pipeline asks for it, guided by the empty prompt, or by zeros."""
    texts, away = (embedded(tiny, name, text) for text in (SOURCE, ""))
    of_text, of_image = PLACES[name]

    def one(z, sigma, texts):
        time = (1000 * sigma).double().expand(1) / (1 if name == "Bria" else 1000)
        given = {"encoder_hidden_states": texts, "txt_ids": of_text, "img_ids": of_image}
        return tiny.transformer(hidden_states=z, timestep=time, return_dict=False, **given)[0]

    def found(z, sigma):
        towards = one(z, sigma, texts)
        if guidance == 1:
            return towards
        other = one(z, sigma, away)
        guided = other + guidance * (towards - other)
        if name != "LongCat-Image":
            return guided
        lengths = [(each**2).sum(-1, keepdim=True).sqrt() for each in (towards, guided)]
        return guided * (lengths[0] / (lengths[1] + 1e-8)).clip(0, 1)

    return found


def sigmas(name):
    """Of the nodes: from 1 to 1 / 3, or Bria's, of the training's timesteps; shifted, as the scheduler is told."""
    plain = torch.tensor([1.0, 1 - 499 / 1000, 1 / 1000] if name == "Bria" else [1.0, 2 / 3, 1 / 3])
    return torch.cat([3 * plain / (1 + 2 * plain), torch.zeros(1)])


@torch.no_grad()
@every_model
@pytest.mark.parametrize(
    "run",
    few({"euler": ("euler", 1.0), "rf": ("rf-solver", 1.0), "guided fireflow": ("fireflow", 3.0)}, "guided fireflow"),
)
def test_the_papers_formulas(stocks, photo, name, run):
    solver, guidance = run
    tiny = made(stocks, name, solver)
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance, "max_sequence_length": TEXTS, **SIZE}
    inversion = tiny.invert(photo, SOURCE, **options)
    expected = path_to_noise(start(tiny, photo), velocity(tiny, name, guidance), sigmas(name), solver)
    assert distance(inversion.latents, expected) <= EXACT


@every_model
@pytest.mark.parametrize("method", few(["direct", "reference", "free"], "direct"))
def test_what_holds_the_source(inverted, name, method):
    tiny, inversion = inverted(name, method=method)
    out = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.5, **GUIDED, **RUN)
    assert (distance(out.source, inversion.latents[0]) == 0) is (method == "direct")
    assert distance(out.targets[0], out.source) > 1e-3
    assert out.prompts == (SOURCE, TARGET)


@pytest.mark.parametrize("name", few(KIN.keys(), "Bria"))
def test_a_source_that_is_free_comes_back_as_far_as_the_solver_goes(inverted, name):
    def apart(steps):
        tiny, inversion = inverted(name, num_inference_steps=steps, method="free")
        out = tiny(inversion=inversion, target_prompt=SOURCE, self_replace_steps=0.0, guidance_scale=1.0, **RUN)
        assert distance(out.targets[0], out.source) <= EXACT  # by its own prompt
        return float((out.source - inversion.latents[0]).norm() / inversion.latents[0].norm())

    assert apart(12) < 0.75 * apart(3)


HELD = ["FPE", "FPE, the whole map", "ConsistEdit, a mask", "KV-Edit", "Prompt-to-Prompt, refined", "ReFlex"]


@pytest.mark.parametrize("name", few(KIN.keys(), "LongCat-Image"))
@pytest.mark.parametrize("edit", few(HELD, "KV-Edit"))
def test_edits_are_those_of_dense_layers_around_a_source_that_is_held(stocks, photo, name, edit):
    model, tiny = KIN[name], made(stocks, name)
    texts = 12 if name == "Bria" else 60  # as many as those of the dense runs
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=4, max_sequence_length=texts, **SIZE)
    tiny.tokenizer_max_length = texts  # of LongCat-Image's dense run
    prompts = (SOURCE, TARGET, OTHER)
    case = edited_transformers.EDITS[edit][0](model, tiny, prompts, (6, 10))
    plain = {"enable_cfg_renorm": False} if name == "LongCat-Image" else {}
    options = {**GUIDED, **RUN, "max_sequence_length": texts, **plain}
    actual = tiny(inversion=inversion, target_prompt=prompts[1:], edit=case.edit, **options).images
    held = inversion.latents[:-1].flip(0)[:, 0]
    follows = {"latents": inversion.noise.repeat(3, 1, 1), "size": (6, 10)}
    of_diffusers = dataclasses.replace(model, run=lambda pipe, *args, **given: model.run(StandIn(pipe), *args, **given))
    expected, late = (
        edited_transformers.reference(tiny, of_diffusers, case, prompts, held=path, **follows)
        for path in (held, held.roll(-1, 0))
    )
    assert distance(actual, expected) <= EXACT
    assert distance(actual, late) > 1e-5


@every_model
def test_it_is_what_editing_makes_of_the_pipeline_of_diffusers(stocks, name):
    """From the same seed too, by the defaults of guidance."""
    edit, stock, before = FreePromptEdit(0.5), stocks[name], stocks[name].scheduler
    options = {"num_inference_steps": 2, "negative_prompt": ["a drawing", "a car"], "output_type": "latent", **SIZE}
    lengths = {} if name == "LongCat-Image" else {"max_sequence_length": TEXTS}
    seed = torch.Generator().manual_seed(5)
    out = made(stocks, name)(SOURCE, TARGET, edit=edit, generator=seed, **options, **lengths)
    stock.scheduler = ExactEuler(shift=3.0)
    if name == "LongCat-Image":
        options["enable_prompt_rewrite"] = False
    try:
        with editing(stock, edit):
            noise = [torch.Generator().manual_seed(5) for _ in range(2)]
            expected = stock([SOURCE, TARGET], generator=noise, **options, **lengths).images
    finally:
        stock.scheduler = before
    assert distance(out.images, expected) <= EXACT


@every_model
def test_pictures_and_files(inverted, name, tmp_path):
    tiny, inversion = inverted(name, num_inference_steps=2)
    loaded = Inversion.load(inversion.save(tmp_path / "inversion.safetensors"))
    options = {"self_replace_steps": 0.5, "target_prompt": TARGET}  # and texts as long as those of the inversion
    out, again = (tiny(inversion=one, **options) for one in (inversion, loaded))
    assert [image.size for image in out.images] == [(80, 48)] * 2
    assert out.images[1].tobytes() == again.images[1].tobytes()
    (picture,) = decoded(tiny, inversion.latents[0], (48, 80))
    assert picture.tobytes() == out.images[0].tobytes()


@every_model
def test_saved_models_load_in_diffusers_and_here(stocks, name, tmp_path):
    tiny = made(stocks, name)
    tiny.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tiny.save_pretrained(tmp_path)
    assert type(FreePromptPipeline.from_pretrained(tmp_path)) is CLASSES[name]
    options = {"text_processor": None} if name == "LongCat-Image" else {}
    assert type(DiffusionPipeline.from_pretrained(tmp_path, **options)) is tiny.parent


@pytest.mark.parametrize("solver", few(["euler", "rf-solver", "fireflow"], "fireflow"))
@pytest.mark.parametrize("guidance", few({"guided": 3.0, "unguided": 1.0}, "guided"))
def test_rows_of_the_source_are_dropped_from_bria(stocks, solver, guidance):
    """FireFlow's too, which holds the latents of the end of a step, packed."""
    bria, rows = made(stocks, "Bria", solver), []
    options = {"num_inference_steps": 4, "self_replace_steps": 0.5, "guidance_scale": guidance, **SIZE, **RUN}
    seed = torch.Generator().manual_seed(5)
    kept = bria(SOURCE, [TARGET, OTHER], generator=seed, **options)
    handle = bria.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    dropped = bria(SOURCE, [TARGET, OTHER], keep_source=False, generator=seed.manual_seed(5), **options)
    handle.remove()
    halves = 2 if guidance > 1 else 1
    assert (rows[0], rows[-1]) == (3 * halves, 2 * halves) and dropped.source is None
    assert distance(dropped.images, kept.images[1:]) <= EXACT


@pytest.mark.parametrize("name", ["Ovis-Image", "Bria"])
def test_embeddings_stand_in_for_prompts(stocks, name):
    tiny = made(stocks, name)
    noise = torch.randn(1, 15, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"num_inference_steps": 2, "latents": noise, "self_replace_steps": 0.5, **SIZE, "output_type": "latent"}
    expected = tiny(SOURCE, TARGET, max_sequence_length=TEXTS, **GUIDED, **options).images
    texts, away, *_ = tiny.encode_prompt([SOURCE, TARGET], negative_prompt=["a drawing"] * 2, max_sequence_length=TEXTS)
    given = {"prompt_embeds": texts, "negative_prompt_embeds": away, "guidance_scale": 3.0}
    assert distance(tiny(**given, **options).images, expected) <= EXACT


class TestLongCat:
    def test_texts_are_as_long_as_a_call_says(self, stocks):
        tiny = made(stocks, "LongCat-Image")
        noise = torch.randn(1, 15, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        options = {"num_inference_steps": 2, "latents": noise, "output_type": "latent", **SIZE}
        by_call = tiny(SOURCE, TARGET, max_sequence_length=TEXTS, **options).images
        told = tiny.tokenizer_max_length
        assert told != TEXTS and distance(tiny(SOURCE, TARGET, **options).images, by_call) > 1e-4
        tiny.tokenizer_max_length = TEXTS
        assert distance(tiny(SOURCE, TARGET, **options).images, by_call) == 0

    @pytest.mark.parametrize("solver", ["euler", "fireflow"])
    def test_a_callback_is_told_of_each_call_of_the_model(self, stocks, solver):
        """As loops of diffusers tell one; what it gives back is gone on from."""
        tiny, seen = made(stocks, "LongCat-Image", solver), []

        def callback(pipe, index, timestep, tensors):
            seen.append(index)
            is_last = len(seen) == len(pipe.scheduler.timesteps)
            return {"latents": torch.zeros_like(tensors["latents"])} if is_last else {}

        out = tiny(SOURCE, num_inference_steps=2, callback_on_step_end=callback, **SIZE, **RUN)
        assert seen == list(range(2 if solver == "euler" else 3))
        assert not out.images.any()

    def test_what_is_refused(self, stocks):
        tiny = made(stocks, "LongCat-Image")
        with pytest.raises(ValueError, match=r"other prompts than an edit.*rewire_prompt"):
            tiny(SOURCE, TARGET, enable_prompt_rewrite=True)
        with pytest.raises(ValueError, match=r"must be among \['latents'\], got \['prompt_embeds'\]"):
            tiny(SOURCE, TARGET, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        with pytest.raises(ValueError, match="counts its rows by prompts, which prompt_embeds does not go with"):
            tiny(prompt_embeds=torch.zeros(2, TEXTS, 32))


class TestRefusals:
    @pytest.mark.parametrize("name", ["Ovis-Image", "LongCat-Image"])
    def test_a_source_that_is_dropped(self, stocks, name):
        with pytest.raises(ValueError, match="cannot drop the source's rows"):
            made(stocks, name)(SOURCE, TARGET, keep_source=False)

    def test_what_bria_makes_of_rows_together(self, stocks):
        bria = made(stocks, "Bria")
        with pytest.raises(ValueError, match="spread of all rows"):
            bria(SOURCE, TARGET, keep_source=False, normalize=True)
        with pytest.raises(ValueError, match=r"where the first one, the source's, is empty, got \['', 'a drawing'\]"):
            bria(SOURCE, TARGET, negative_prompt=["", "a drawing"])

    @every_model
    def test_a_guidance_for_each_prompt(self, stocks, name):
        with pytest.raises(ValueError, match="is not: pass one number"):
            made(stocks, name)(SOURCE, TARGET, guidance_scale=[1.0, 3.0])

    @every_model
    def test_a_size_between_tokens(self, stocks, name):
        with pytest.raises(ValueError, match="positive multiple of 16"):
            made(stocks, name)(SOURCE, TARGET, height=40, width=64)

    def test_pictures_that_are_shown(self, stocks):
        shown = type("LongCatImageEditPipeline", (), {"transformer": stocks["LongCat-Image"].transformer})()
        with pytest.raises(TypeError, match="part of every call of LongCat-Image-Edit"):
            FreePromptPipeline.from_pipe(shown)
