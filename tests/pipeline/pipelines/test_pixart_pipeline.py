"""FreePromptPipeline around PixArt: images, generated and real, and recordings, in float64 against formulas."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback

from fpe_pipeline import (
    FreePromptEdit,
    FreePromptPipeline,
    FreePromptPixArtAlphaPipeline,
    FreePromptPixArtSigmaPipeline,
    Inversion,
    MasaCtrlEdit,
    PromptToPromptEdit,
    Recording,
    editing,
)
from fpe_pipeline.inversion.trajectory import encode_image
from tests.support.slow_cases import few
from tests.support.tiny_pixart import dense_pixart, source_maps, tiny_pixart_pipeline

EXACT = 1e-9
STEPS = 3
SIZE = {"height": 64, "width": 96}
FAST = {"num_inference_steps": STEPS, "output_type": "latent"}
SOURCE, TARGET, OTHER = "a photo of a red car", "a photo of a big dog", "a photo of a house"

pytestmark = pytest.mark.filterwarnings("ignore::fpe_pipeline.errors.RequestWarning")


def served(pipe, kind, **options):
    made = FreePromptPipeline.from_pipe(tiny_pixart_pipeline(pipe, kind, **options))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module", params=["alpha", "sigma"])
def tiny(pipe, request):
    return served(pipe, request.param)


@pytest.fixture(scope="module")
def sigma(pipe):
    return served(pipe, "sigma")


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(3).random((64, 96, 3))


@pytest.fixture(scope="module")
def direct(tiny, photo):
    return inverted(tiny, photo)


def start(rows=1):
    return torch.randn(rows, 16, 8, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def inverted(tiny, photo, method="direct", **options):
    return tiny.invert(photo, SOURCE, method=method, num_inference_steps=STEPS, **SIZE, **options)


def distance(actual, expected):
    return (actual - expected).abs().max().item()


def stock_of(tiny):
    """diffusers' own pipeline around the same modules."""
    stock = tiny.parent(**tiny.components)
    stock.set_progress_bar_config(disable=True)
    return stock


def drawn(stock, prompts, **options):
    """Latents that diffusers' pipeline draws of noise that its prompts share."""
    noise = start().repeat(len(prompts), 1, 1, 1)
    return stock(prompts, **({"latents": noise, "use_resolution_binning": False} | SIZE | FAST | options)).images


def by_hand(tiny, prompt, guidance=1.0):
    """The model's prediction of noise in latents [1, C, h, w] at a timestep, as PixArt's authors condition it."""
    states, mask, away, away_mask = tiny.encode_prompt(prompt, True, clean_caption=True)
    told = {"resolution": None, "aspect_ratio": None}
    if isinstance(tiny, FreePromptPixArtAlphaPipeline):
        told = {
            "resolution": torch.tensor([[64.0, 96.0]], dtype=torch.float64),
            "aspect_ratio": torch.tensor([[64 / 96]], dtype=torch.float64),
        }

    def one(latents, timestep, states, mask):
        named = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "added_cond_kwargs": told}
        return tiny.transformer(latents, timestep=torch.tensor([timestep]), **named).sample[:, :16]

    def predicted(latents, timestep):
        towards = one(latents, timestep, states, mask)
        if guidance == 1:
            return towards
        return guidance * towards + (1 - guidance) * one(latents, timestep, away, away_mask)

    return predicted


def path_to_noise(tiny, begin, predicted):
    """DDIM followed backwards: x' = sqrt(a') x0 + sqrt(1 - a') e at every level that the run goes through."""
    levels = tiny.scheduler.alphas_cumprod.double()
    tiny.scheduler.set_timesteps(STEPS)
    found, less = [begin], tiny.scheduler.final_alpha_cumprod.double()
    for timestep in reversed(tiny.scheduler.timesteps.tolist()):
        sample, more = found[-1], levels[timestep]
        error = predicted(sample, timestep)
        clean = (sample - (1 - less).sqrt() * error) / less.sqrt()
        found.append(more.sqrt() * clean + (1 - more).sqrt() * error)
        less = more
    return torch.stack(found)


@contextmanager
def first_row_held(scheduler, trajectory):
    """Steps of a scheduler after each of which the first row is the trajectory's latent."""
    own, held = scheduler.step, list(trajectory[:-1])

    def step(*args, **kwargs):
        latents = own(*args, **kwargs)[0]
        return (torch.cat([held.pop(), latents[1:]]),)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


class TestGenerated:
    @pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "bad"}], ids=str)
    def test_as_editing_around_the_pipeline_of_diffusers(self, tiny, options):
        made = tiny(SOURCE, [TARGET, OTHER, SOURCE], latents=start(), **FAST, **options).images
        stock, prompts = stock_of(tiny), [SOURCE, TARGET, OTHER, SOURCE]
        negative = {name: [text] * 4 for name, text in options.items() if name == "negative_prompt"}
        with editing(stock, FreePromptEdit(0.8)):
            expected = drawn(stock, prompts, **{**options, **negative})
        unedited = drawn(stock, prompts, **{**options, **negative})
        assert distance(made, expected) <= EXACT
        assert distance(made[1:3], unedited[1:3]) > 1e-3
        assert distance(made[0], unedited[0]) <= EXACT
        assert distance(made[3], made[0]) <= EXACT  # its own prompt gives the source

    def test_guidance_is_that_of_the_pipeline_of_diffusers(self, sigma):
        made = [sigma(SOURCE, TARGET, latents=start(), **FAST, **told).images for told in ({}, {"guidance_scale": 4.5})]
        assert torch.equal(*made)

    def test_noise_is_shared(self, sigma):
        seeds = {"generator": torch.Generator().manual_seed(0), "num_images_per_prompt": 2}
        made = sigma(SOURCE, [SOURCE], **seeds, **SIZE, **FAST).images
        assert distance(made[:2], made[2:]) <= EXACT
        assert distance(made[0], made[1]) > 1e-3

    def test_pictures_and_sizes_of_the_model(self, sigma):
        assert sigma.native_size == (256, 256)
        out = sigma(SOURCE, TARGET, num_inference_steps=2, **SIZE)
        assert out.source.size == out.targets[0].size == (96, 64)

    def test_sizes_that_the_model_was_trained_for(self, sigma):
        told = {"height": 192, "width": 192, "num_inference_steps": 2, "output_type": "latent"}
        assert sigma(SOURCE, **told).images.shape == (1, 16, 24, 24)
        assert sigma(SOURCE, use_resolution_binning=True, **told).images.shape == (1, 16, 32, 32)


class TestReal:
    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_the_path_to_noise(self, tiny, photo, guidance):
        inversion = inverted(tiny, photo, guidance_scale=guidance)
        begin = encode_image(tiny, inversion.image)
        expected = path_to_noise(tiny, begin, by_hand(tiny, SOURCE, guidance))
        assert distance(inversion.latents, expected) <= 1e-6  # the scheduler takes roots of its levels in float32
        assert distance(inversion.latents, path_to_noise(tiny, begin, by_hand(tiny, TARGET, guidance))) > 1e-3

    def test_the_way_back(self, pipe, photo):
        """DDIM's two ways differ by how far the noise moves within a step: little, where the model says little."""
        tiny = served(pipe, "alpha")
        with torch.no_grad():
            tiny.transformer.proj_out.weight.mul_(0.02)
        inversion = tiny.invert(photo, SOURCE, method="negative-prompt", num_inference_steps=12, **SIZE)
        back = tiny(inversion=inversion, output_type="latent").images[0]
        assert distance(back, inversion.latents[0][0]) < 0.01
        for off in ({"latents": inversion.latents[-2]}, {"prompt": OTHER, "latents": inversion.noise}):
            told = {"prompt": SOURCE, "num_inference_steps": 12, "guidance_scale": 1.0, "output_type": "latent", **off}
            assert distance(tiny(**told).images[0], inversion.latents[0][0]) > 0.05

    def test_edited_beside_the_picture(self, tiny, photo, direct):
        made = tiny(inversion=direct, target_prompt=[TARGET, OTHER], **FAST).images
        stock = stock_of(tiny)
        noise = direct.noise.repeat(3, 1, 1, 1)
        for rules, is_close in (({"attn1": source_maps}, True), ({}, False)):
            with first_row_held(stock.scheduler, direct.latents), dense_pixart(stock, rules, (0, 1)):
                expected = drawn(stock, [SOURCE, TARGET, OTHER], latents=noise)
            assert (distance(made, expected) <= 1e-8) is is_close
        assert torch.equal(made[0], direct.latents[0][0])

    def test_the_prompt_in_the_place_of_the_empty_one(self, tiny, photo):
        inversion = inverted(tiny, photo, "negative-prompt")
        made = tiny(inversion=inversion, target_prompt=[TARGET, SOURCE], **FAST).images
        noise = inversion.noise.repeat(3, 1, 1, 1)
        stock = stock_of(tiny)
        with editing(stock, FreePromptEdit(0.8)):
            expected = drawn(stock, [SOURCE, TARGET, SOURCE], latents=noise, negative_prompt=[SOURCE] * 3)
        assert distance(made, expected) <= EXACT
        assert distance(made[2], made[0]) <= EXACT
        # Guidance cancels in the source.
        alone = tiny(SOURCE, latents=inversion.noise, guidance_scale=1.0, **FAST).images
        assert distance(made[:1], alone) <= EXACT

    def test_the_last_step_is_the_samplers_own(self, tiny, photo, direct):
        made = tiny(inversion=inverted(tiny, photo, "ddim"), target_prompt=TARGET, **FAST).images
        assert distance(made[0], direct.latents[0][0]) > 0
        held = tiny(inversion=direct, target_prompt=TARGET, **FAST).images
        assert distance(made[1], held[1]) <= EXACT  # until the last step's end both are the same

    def test_prompts_are_cleaned_as_a_call_cleans_them(self, sigma, photo, monkeypatch):
        asked, own = [], sigma._text_preprocessing

        def note(text, clean_caption=False):
            asked.append(clean_caption)
            return own(text, clean_caption=clean_caption)

        monkeypatch.setattr(sigma, "_text_preprocessing", note)
        inverted(sigma, photo)
        sigma(SOURCE, latents=start(), **FAST)
        assert set(asked) == {True}

    def test_saved_and_read_again(self, tiny, direct, tmp_path):
        again = Inversion.load(direct.save(tmp_path / "photo.safetensors"))
        made = [tiny(inversion=one, target_prompt=TARGET, **FAST).images for one in (direct, again)]
        assert torch.equal(*made)


class TestRecorded:
    @pytest.mark.parametrize(
        "edit", [FreePromptEdit(0.8), MasaCtrlEdit(1, start_layer=1)], ids=lambda edit: type(edit).__name__
    )
    @pytest.mark.parametrize("guidance", few({"guided": 4.5, "unguided": 1.0}, "guided"))
    def test_a_replay_is_the_full_run(self, tiny, edit, guidance):
        told = {"num_inference_steps": STEPS, "guidance_scale": guidance, "latents": start()}
        recording = tiny.record(SOURCE, edit=edit, **told)
        full = tiny(SOURCE, [TARGET, OTHER], edit=edit, output_type="latent", **told).images
        replayed = tiny.edit(recording, [TARGET, OTHER], edit=edit, output_type="latent").images
        assert distance(replayed, full[1:]) <= EXACT
        assert distance(recording.latents[-1], full[:1]) <= EXACT
        plain = tiny(SOURCE, [TARGET, OTHER], edit=FreePromptEdit(0), output_type="latent", **told).images
        assert distance(replayed, plain[1:]) > 1e-3

    @pytest.mark.parametrize("method", ["direct", "negative-prompt"])
    def test_of_a_picture(self, tiny, photo, method, tmp_path):
        inversion = inverted(tiny, photo, method)
        tiny.record(inversion=inversion, placement=tmp_path / "recording")
        replayed = tiny.edit(Recording.load(tmp_path / "recording"), TARGET, output_type="latent").images
        full = tiny(inversion=inversion, target_prompt=TARGET, output_type="latent").images
        assert distance(replayed, full[1:]) <= EXACT

    def test_bytes_are_said_beforehand(self, sigma):
        recording = sigma.record(SOURCE, latents=start(), num_inference_steps=STEPS)
        with pytest.raises(ValueError, match="more than budget_bytes"):
            sigma.record(SOURCE, latents=start(), num_inference_steps=STEPS, budget_bytes=recording.nbytes - 1)
        sigma.record(SOURCE, latents=start(), num_inference_steps=STEPS, budget_bytes=recording.nbytes)

    def test_another_model_is_told(self, pipe, sigma):
        recording = sigma.record(SOURCE, latents=start(), num_inference_steps=2)
        with pytest.raises(ValueError, match="of another model"):
            served(pipe, "sigma", num_layers=2).edit(recording, TARGET)


class TestCallbacks:
    def test_sees_and_changes_what_the_next_step_starts_from(self, sigma, photo):
        inversion, seen = inverted(sigma, photo), []

        def note(pipe, index, timestep, tensors):
            seen.append((index, tensors["latents"].clone()))
            return {"latents": tensors["latents"] * 0} if index == STEPS - 1 else {}

        made = sigma(inversion=inversion, target_prompt=TARGET, callback_on_step_end=note, **FAST).images
        assert [index for index, _ in seen] == list(range(STEPS))
        assert torch.equal(made, torch.zeros_like(made))
        for index, latents in seen:  # put back onto the picture's path before
            assert torch.equal(latents[:1], inversion.latents[STEPS - 1 - index])

    def test_tensors_that_the_loop_keeps(self, sigma):
        for callback in (
            {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "callback_on_step_end": lambda *_: {}},
            {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)},
        ):
            with pytest.raises(ValueError, match="must be among"):
                sigma(SOURCE, latents=start(), **callback, **FAST)

    def test_schedulers_are_left_as_they_were(self, sigma):
        def refuse(*_):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            sigma(SOURCE, TARGET, latents=start(), callback_on_step_end=refuse, **FAST)
        assert "step" not in vars(sigma.scheduler)


@pytest.mark.parametrize(
    ("kind", "made"), [("alpha", FreePromptPixArtAlphaPipeline), ("sigma", FreePromptPixArtSigmaPipeline)]
)
def test_saved_pipelines(pipe, kind, made, tmp_path):
    tiny = served(pipe, kind)
    assert type(tiny) is made
    tiny.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == made.parent.__name__
    again = FreePromptPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert type(again) is made
    again.set_progress_bar_config(disable=True)
    assert distance(*(one(SOURCE, TARGET, latents=start(), **FAST).images for one in (tiny, again))) <= EXACT
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is made.parent


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"keep_source": False}, "keep_source=False cannot drop .* PixArtSigmaPipeline's loop"),
            ({"height": 72}, "positive multiple of 16 pixels, which one token"),
            ({"latents": start(), "use_resolution_binning": True}, "leave out one or the other"),
            ({"latents": torch.zeros(1, 4, 8, 12)}, r"expected latents \[1, 16, h, w\]"),
        ],
        ids=lambda given: "" if isinstance(given, str) else next(iter(given)),
    )
    def test_calls(self, sigma, options, said):
        with pytest.raises(ValueError, match=said):
            sigma(SOURCE, TARGET, **options, **FAST)

    def test_options_of_other_pipelines(self, sigma):
        with pytest.raises(TypeError, match="unknown option clip_skip"):
            sigma(SOURCE, TARGET, clip_skip=1)

    def test_embeddings_that_change_between_steps(self, sigma, photo):
        with pytest.raises(ValueError, match="invert by 'direct', 'ddim' or 'negative-prompt'"):
            inverted(sigma, photo, "null-text")

    def test_schedulers_whose_steps_cannot_be_undone(self, pipe, photo):
        tiny = served(pipe, "sigma")
        tiny.scheduler = EulerDiscreteScheduler()
        with pytest.raises(ValueError, match="needs DDIM"):
            inverted(tiny, photo)

    def test_texts_that_are_encoded_otherwise_than_the_pictures(self, sigma, photo):
        inversion = inverted(sigma, photo, "negative-prompt")
        for option in ({"max_sequence_length": 30}, {"clean_caption": False}):
            with pytest.raises(ValueError, match=f"the inversion decides {next(iter(option))}"):
                sigma(inversion=inversion, target_prompt=TARGET, **option)

    def test_runs_of_one_step_of_alpha(self, pipe):
        with pytest.raises(ValueError, match="take two steps or more"):
            served(pipe, "alpha").record(SOURCE, latents=start(), num_inference_steps=1)

    def test_recordings_of_masked_text(self, sigma):
        edit = PromptToPromptEdit([SOURCE, SOURCE], sigma.tokenizer)
        with pytest.raises(ValueError, match="recordings hold no masks"):
            sigma.record(SOURCE, edit=edit, latents=start(), num_inference_steps=STEPS)
