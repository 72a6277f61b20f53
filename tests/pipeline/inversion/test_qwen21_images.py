"""Real images on Qwen-Image 2.1: inverted by the papers' formulas, edited, saved, decoded, and what is refused."""

import dataclasses
import warnings

import diffusers
import pytest
import torch

if not hasattr(diffusers, "QwenImage21Pipeline"):
    pytest.skip("this diffusers has no Qwen-Image 2.1", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, Inversion, editing, flow_scheduler
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.pipelines.qwen21 import FreePromptQwenImage21Pipeline
from fpe_pipeline.sampling.decoding import decoded
from tests.support import edited_transformers
from tests.support.flow_formulas import path_to_noise
from tests.support.flow_pipelines import StandIn, distance
from tests.support.slow_cases import few
from tests.support.tiny_qwen21 import QWEN21, tiny_qwen21_pipeline
from tests.support.tiny_transformers import ExactEuler

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
SOURCE, TARGET, OTHER = "a photo of a red car on a mountain", "a photo of a big dog on a house in winter", "a red car"
SIZE = {"height": 64, "width": 96}  # 4 x 6 tokens
GUIDED = {"negative_prompt": "a drawing", "true_cfg_scale": 3.0}


@pytest.fixture(scope="module")
def stock():
    made = tiny_qwen21_pipeline()
    made.vae.register_to_config(latents_mean=[0.1 * c for c in range(16)], latents_std=[1 + 0.1 * c for c in range(16)])
    return made


def ours(stock, solver="euler"):
    made = FreePromptPipeline.from_pipe(stock)
    euler = ExactEuler(shift=3.0)
    made.scheduler = euler if solver == "euler" else flow_scheduler(euler, solver)
    made.set_progress_bar_config(disable=True)
    assert type(made) is FreePromptQwenImage21Pipeline
    return made


@pytest.fixture
def tiny(stock):
    return ours(stock)


@pytest.fixture(scope="module")
def photo():
    return torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0).numpy()


def start(tiny, photo):
    """The photo as the model takes it: opaque, each channel of the autoencoder's mean normalised, a latent a token."""
    pixels = (torch.from_numpy(photo * 255).round().float() / 127.5 - 1).permute(2, 0, 1).double()
    shown = torch.cat([pixels, torch.ones(1, 64, 96).double()])[None, :, None]
    mean = tiny.vae.encode(shown).latent_dist.mean[0, :, 0]
    config = tiny.vae.config
    parts = zip(mean, config.latents_mean, config.latents_std, strict=True)
    return torch.stack([((part - shift) / spread).flatten() for part, shift, spread in parts], 1)[None]


@torch.no_grad()
@pytest.mark.parametrize("solver", few(["euler", "rf-solver", "fireflow"], "fireflow"))
@pytest.mark.parametrize("padded", few({"as they are": 0, "padded": 5}))
def test_the_papers_formulas(stock, photo, solver, padded):
    tiny = ours(stock, solver)
    texts = tiny.encode_prompt(SOURCE)[0]
    count = texts.shape[1]
    lengths = {"max_sequence_length": count + padded} if padded else {}
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, **SIZE, **lengths)

    def velocity(z, sigma):
        given = {
            "encoder_hidden_states": torch.cat([texts, torch.randn(1, padded, texts.shape[2]).double()], 1),
            "encoder_hidden_states_mask": torch.tensor([[1] * count + [0] * padded]),
            "img_shapes": [[(1, 4, 6)]],
            "img_mask": torch.tensor([[0] * (count + padded) + [1] * 6]).bool(),
        }
        return tiny.transformer(z, timestep=(1000 * sigma).double().expand(1) / 1000, **given).sample[:, -24:]

    plain = torch.tensor([1.0, 2 / 3, 1 / 3])
    sigmas = torch.cat([3 * plain / (1 + 2 * plain), torch.zeros(1)])
    expected = path_to_noise(start(tiny, photo), velocity, sigmas, solver)
    assert distance(inversion.latents, expected) <= EXACT


@pytest.mark.parametrize("method", few(["direct", "reference", "free"], "direct"))
def test_what_holds_the_source(tiny, photo, method):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, method=method, **SIZE)
    out = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.5, output_type="latent", **GUIDED)
    assert (distance(out.source, inversion.latents[0]) == 0) is (method == "direct")
    assert distance(out.targets[0], out.source) > 1e-3
    assert out.prompts == (SOURCE, TARGET)


def test_a_longer_target_moves_an_inverted_image_and_that_is_said(tiny, photo):
    longer = " ".join([TARGET] * 2)
    options = {"target_prompt": longer, "self_replace_steps": 1.0, "output_type": "latent"}
    alone, padded = (
        tiny.invert(photo, SOURCE, num_inference_steps=1, method="free", **SIZE, **lengths)
        for lengths in ({}, {"max_sequence_length": 60})
    )
    with pytest.warns(EditWarning, match="stands elsewhere: invert with max_sequence_length=.* less exactly than it"):
        tiny(inversion=alone, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditWarning)
        tiny(inversion=padded, **options)
        tiny(inversion=alone, **options | {"target_prompt": SOURCE})


def test_a_source_that_is_free_comes_back_as_far_as_the_solver_goes(tiny, photo):
    def apart(steps):
        inversion = tiny.invert(photo, SOURCE, num_inference_steps=steps, method="free", **SIZE)
        out = tiny(inversion=inversion, target_prompt=SOURCE, self_replace_steps=0.0, output_type="latent")
        assert distance(out.targets[0], out.source) <= EXACT  # by its own prompt
        return float((out.source - inversion.latents[0]).norm() / inversion.latents[0].norm())

    assert apart(12) < 0.75 * apart(3)


HELD = ["FPE", "ConsistEdit, a mask", "KV-Edit", "Prompt-to-Prompt, refined", "ReFlex"]


@pytest.mark.parametrize("edit", few(HELD, "KV-Edit"))
def test_edits_are_those_of_dense_layers_around_a_source_that_is_held(tiny, photo, edit):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=4, **SIZE)
    model, prompts = QWEN21["Qwen-Image 2.1"], (SOURCE, TARGET, OTHER)
    case = edited_transformers.EDITS[edit][0](model, tiny, prompts, (8, 12))
    actual = tiny(inversion=inversion, target_prompt=prompts[1:], edit=case.edit, output_type="latent", **GUIDED).images
    held = inversion.latents[:-1].flip(0)[:, 0]
    follows = {"latents": inversion.noise.repeat(3, 1, 1), "size": (8, 12)}
    of_diffusers = dataclasses.replace(model, run=lambda pipe, *args, **given: model.run(StandIn(pipe), *args, **given))
    expected, late = (
        edited_transformers.reference(tiny, of_diffusers, case, prompts, held=path, **follows)
        for path in (held, held.roll(-1, 0))
    )
    assert distance(actual, expected) <= EXACT
    assert distance(actual, late) > 1e-5


@pytest.mark.parametrize("keeps", few({"kept": True, "nothing kept": False}, "kept"))
def test_it_is_what_editing_makes_of_the_pipeline_of_diffusers(stock, keeps):
    edit, before = FreePromptEdit(0.5), stock.scheduler
    options = {"num_inference_steps": 2, "output_type": "latent", "use_kv_cache": keeps, **SIZE, **GUIDED}
    options["negative_prompt"] = ["a drawing", "a car"]
    out = ours(stock)(SOURCE, TARGET, edit=edit, generator=torch.Generator().manual_seed(5), **options)
    stock.scheduler = ExactEuler(shift=3.0)
    try:
        with editing(stock, edit):
            noise = [torch.Generator().manual_seed(5) for _ in range(2)]
            expected = stock([SOURCE, TARGET], generator=noise, **options).images
    finally:
        stock.scheduler = before
    assert distance(out.images, expected) <= EXACT


def test_texts_are_as_long_as_a_call_says(tiny):
    """An image stands behind the longest text of its call: a source alone as beside a longer target, if it is told."""
    longer = tiny.encode_prompt(TARGET)[0].shape[1]
    assert longer > tiny.encode_prompt(SOURCE)[0].shape[1]
    noise = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"num_inference_steps": 2, "latents": noise, "output_type": "latent", **SIZE, **GUIDED}
    beside = tiny(SOURCE, TARGET, self_replace_steps=0.0, **options).source
    assert distance(tiny(SOURCE, max_sequence_length=longer, **options).source, beside) <= EXACT
    assert distance(tiny(SOURCE, **options).source, beside) > 1e-4


def test_pictures_and_files(tiny, photo, tmp_path):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=2, **SIZE)
    loaded = Inversion.load(inversion.save(tmp_path / "inversion.safetensors"))
    out, again = (tiny(inversion=one, target_prompt=TARGET, self_replace_steps=0.5) for one in (inversion, loaded))
    assert [image.size for image in out.images] == [(96, 64)] * 2
    assert out.images[1].tobytes() == again.images[1].tobytes()
    (picture,) = decoded(tiny, inversion.latents[0], (64, 96))
    assert picture.tobytes() == out.images[0].tobytes()


def test_a_saved_pipeline_is_loaded_as_ours(tiny, tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text(tiny.to_json_string())
    loads = classmethod(lambda kind, folder: (kind, folder))  # the tiny processor is no file's
    monkeypatch.setattr(FreePromptQwenImage21Pipeline, "from_pretrained", loads)
    assert FreePromptPipeline.from_pretrained(tmp_path) == (FreePromptQwenImage21Pipeline, tmp_path)
    assert tiny.load_config(tmp_path)["_class_name"] == "QwenImage21Pipeline"


def test_sigmas_of_the_models_own(stock, photo):
    tiny = ours(stock)
    tiny.register_to_config(sample_sigmas=[1.0, 0.7, 0.2])
    assert FreePromptPipeline.from_pipe(tiny).config.sample_sigmas == [1.0, 0.7, 0.2]
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, **SIZE)
    plain = torch.tensor([1.0, 0.7, 0.2])
    assert torch.allclose(tiny.scheduler.sigmas[:-1], 3 * plain / (1 + 2 * plain))
    out = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.5, output_type="latent")
    assert distance(out.source, inversion.latents[0]) == 0
    with pytest.raises(ValueError, match="make 3 steps, got 28: pass num_inference_steps=3"):
        tiny.invert(photo, SOURCE, **SIZE)


class TestRefusals:
    def test_guided_inversions(self, tiny, photo):
        with pytest.raises(ValueError, match="an inversion has none of, got guidance_scale=3: leave it at 1"):
            tiny.invert(photo, SOURCE, guidance_scale=3.0, num_inference_steps=2, **SIZE)

    def test_calls(self, tiny, photo):
        with pytest.raises(ValueError, match="keeps masks of padding to itself"):
            tiny(SOURCE, TARGET, keep_source=False)
        with pytest.raises(ValueError, match="positive multiple of 32"):
            tiny(SOURCE, TARGET, height=48, width=64)
        with pytest.raises(ValueError, match=r"image= shows the model a reference picture.* QwenImage21Pipeline,"):
            tiny(SOURCE, TARGET, image=photo)
        with pytest.raises(TypeError, match="unknown option output_resolution"):
            tiny(SOURCE, TARGET, output_resolution=512)

    def test_texts_that_are_too_long(self, tiny, photo):
        tokens = tiny.encode_prompt(SOURCE)[0].shape[1]
        message = f"at most {tokens - 1} tokens, .* of {tokens}: record or invert with max_sequence_length={tokens}"
        with pytest.raises(ValueError, match=message):
            tiny(OTHER, SOURCE, max_sequence_length=tokens - 1, **SIZE)
        with pytest.raises(ValueError, match=message):
            tiny.invert(photo, SOURCE, max_sequence_length=tokens - 1, **SIZE)
