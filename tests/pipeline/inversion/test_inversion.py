"""Inversion on tiny pipelines and on the embedded model; golden cases are in test_golden_real.py."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, IPNDMScheduler, PNDMScheduler

from fpe_pipeline import FreePromptPipeline, LocalBlend, NullText, PromptToPromptEdit, ddim_scheduler
from fpe_pipeline.inversion.trajectory import METHODS
from fpe_pipeline.sampling.noise_schedule import NoiseSchedule, ddim_inverse_step
from tests.support.free_prompt_pipelines import OTHER, SOURCE, TARGET, distance, free_prompt_pipeline

STEPS = 3


@pytest.fixture(scope="module")
def tiny(pipe):
    return free_prompt_pipeline(pipe)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(3).random((24, 32, 3))


def inverted(tiny, photo, method="ddim", **options):
    settings = {"num_inference_steps": STEPS, "height": 24, "width": 32, **options}
    return tiny.invert(photo, SOURCE, method=method, **settings)


@pytest.fixture(scope="module")
def inversions(tiny, photo):
    return {method: inverted(tiny, photo, method) for method in METHODS}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_step_back_undoes_a_step(prediction, spacing):
    scheduler = ddim_scheduler(DDIMScheduler(prediction_type=prediction, timestep_spacing=spacing, steps_offset=1))
    scheduler.set_timesteps(7)
    sample, output = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        noisier = ddim_inverse_step(scheduler, output, int(timestep), sample)
        # The prediction that sees the same noise from the noisier end.
        again = output
        if prediction == "v_prediction":
            level = scheduler.alphas_cumprod.double()
            before = int(timestep) - 1000 // 7
            less = level[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
            clean, noise = (
                less.sqrt() * sample - (1 - less).sqrt() * output,
                less.sqrt() * output + (1 - less).sqrt() * sample,
            )
            again = level[timestep].sqrt() * noise - (1 - level[timestep]).sqrt() * clean
        assert distance(scheduler.step(again, timestep, noisier).prev_sample, sample) <= 1e-5


@pytest.mark.slow
def test_what_an_inversion_holds(tiny, inversions):
    for method, inversion in inversions.items():
        assert inversion.method == method
        assert inversion.latents.shape == (STEPS + 1, 1, 4, 12, 16)
        assert torch.equal(inversion.latents, inversions["ddim"].latents)
        assert inversion.image.size == (32, 24)
        assert (inversion.unconditional is not None) == (method == "null-text")
        assert inversion.steps == STEPS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images", [1, 2])
def test_every_method_edits_several_targets(tiny, inversions, method, images):
    out = tiny(
        inversion=inversions[method], target_prompt=[TARGET, OTHER], num_images_per_prompt=images, output_type="latent"
    )
    assert out.images.shape == (3 * images, 4, 12, 16)
    single = tiny(inversion=inversions[method], target_prompt=OTHER, output_type="latent").targets[0]
    assert distance(out.images[2 * images], single) <= 1e-4
    assert distance(out.images[2 * images], out.images[images]) > 1e-2


def test_direct_returns_the_encoded_image(tiny, inversions):
    """With any prompts and guidance; the reference latents of plain DDIM leave the last step to the sampler."""
    out = tiny(inversion=inversions["direct"], target_prompt=TARGET, guidance_scale=9.0, output_type="latent")
    assert torch.equal(out.source[None], inversions["direct"].latents[0])
    ddim = tiny(inversion=inversions["ddim"], target_prompt=TARGET, guidance_scale=9.0, output_type="latent")
    assert torch.equal(ddim.targets[0], out.targets[0])
    assert distance(ddim.source[None], inversions["ddim"].latents[0]) > 1e-4


def test_a_local_blend_keeps_the_image_outside_its_words(tiny, inversions):
    """To the bit, after every step: what it takes over is the source that was put back, live and from a recording."""
    inversion = inversions["direct"]
    edit = PromptToPromptEdit([SOURCE, TARGET], tiny.tokenizer) + LocalBlend(
        [SOURCE, TARGET], tiny.tokenizer, ("green", "rubber"), 0.98
    )
    kept = []

    def compare(pipe, index, timestep, tensors):
        source, target = tensors["latents"]
        assert torch.equal(source, inversion.latents[STEPS - 1 - index][0])
        kept.append((source == target).all(0).float().mean().item())
        return {}

    live = tiny(
        inversion=inversion, target_prompt=TARGET, edit=edit, output_type="latent", callback_on_step_end=compare
    ).images
    assert len(kept) == STEPS
    assert all(0.2 < share < 1 for share in kept)
    recording = tiny.record(inversion=inversion, edit=edit)
    assert torch.equal(recording.latents, inversion.latents.flip(0))
    replayed = tiny.edit(recording, TARGET, edit=edit, output_type="latent").images[0]
    assert (replayed == inversion.latents[0][0]).all(0).float().mean().item() == pytest.approx(kept[-1], abs=0.02)
    assert distance(replayed, live[1]) <= 1e-4
    assert "step" not in vars(tiny.scheduler)


def test_the_source_may_be_dropped_and_another_prompt_named(tiny, inversions):
    options = {"inversion": inversions["ddim"], "output_type": "latent", "self_replace_steps": 0.5}
    kept, dropped = (tiny(target_prompt=TARGET, keep_source=keep, **options).targets[0] for keep in (True, False))
    assert distance(kept, dropped) <= 1e-4
    named = tiny(OTHER, TARGET, **options)
    assert distance(named.targets[0], kept) > 1e-4
    assert torch.equal(tiny([SOURCE, TARGET], **options).targets[0], kept)


@pytest.mark.parametrize("method", ["null-text", "negative-prompt"])
def test_null_text_and_negative_prompt_follow_the_image_better_than_nothing(tiny, inversions, method):
    def error(**options):
        return distance(tiny(output_type="latent", **options).source[None], inversions[method].latents[0])

    plain = error(prompt=SOURCE, latents=inversions[method].noise, num_inference_steps=STEPS)
    assert error(inversion=inversions[method]) < 0.9 * plain


def test_each_step_has_its_own_embedding(tiny, inversions):
    """The embeddings of the later steps count too: with the first one throughout, the image is another."""
    inversion = inversions["null-text"]
    first = tiny(
        SOURCE,
        latents=inversion.noise,
        num_inference_steps=STEPS,
        negative_prompt_embeds=inversion.unconditional[0],
        output_type="latent",
    ).source
    assert distance(tiny(inversion=inversion, output_type="latent").source, first) > 1e-4


@pytest.mark.parametrize("options", [{"eta": 1.0}, {"clip_skip": 1}, {"guidance_rescale": 0.7}], ids=str)
def test_options_that_move_targets_alone(tiny, inversions, options):
    """Where the source is put back onto the image's latents, it is the image whatever they are."""
    options |= {"target_prompt": TARGET, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    out = tiny(inversion=inversions["direct"], **options)
    assert distance(out.source, inversions["direct"].latents[0, 0]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_edits_in_another_precision(tiny, inversions, method):
    """Null-text takes gradients, so that an image may be inverted in float32 for edits in half precision."""
    half = FreePromptPipeline(**copy.deepcopy(tiny.components)).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    options = {"inversion": inversions[method], "target_prompt": TARGET, "output_type": "latent"}
    out = half(**options).images
    assert out.dtype is torch.bfloat16
    exact = tiny(**options).images
    assert (out.float() - exact).norm() <= 0.1 * exact.norm()


def test_numbers_of_steps_and_guidance(tiny, photo):
    assert inverted(tiny, photo, num_inference_steps=np.int64(2)).steps == 2
    for steps in (True, 0, 2.0, "2"):
        with pytest.raises(ValueError, match="num_inference_steps must be a whole number from 1 on"):
            inverted(tiny, photo, num_inference_steps=steps)
    for scale in (float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
            inverted(tiny, photo, guidance_scale=scale)


def test_schedulers_without_noise_levels(tiny, monkeypatch):
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="IPNDMScheduler has no noise level for each timestep"):
        NoiseSchedule.of(scheduler)
    monkeypatch.setattr(tiny, "scheduler", scheduler)
    monkeypatch.setattr(tiny.unet, "forward", lambda *a, **k: pytest.fail("denoised before it was checked"))
    with pytest.raises(ValueError, match="IPNDMScheduler has no noise level for each timestep"):
        tiny.record(SOURCE, num_inference_steps=STEPS)


class TestNullText:
    @pytest.mark.slow
    def test_under_inference_mode(self, tiny, photo):
        settings = NullText(inner_steps=2)
        with torch.inference_mode():
            found = inverted(tiny, photo, settings)
        assert torch.equal(found.unconditional, inverted(tiny, photo, settings).unconditional)

    def test_weights_made_under_inference_mode(self, tiny, photo, monkeypatch):
        with torch.inference_mode():
            monkeypatch.setattr(tiny, "unet", copy.deepcopy(tiny.unet))
        with pytest.raises(ValueError, match=r"weights were made under torch\.inference_mode"):
            inverted(tiny, photo, "null-text")

    def test_checkpointing_changes_nothing_but_memory(self, tiny, photo):
        found = [
            inverted(tiny, photo, NullText(inner_steps=2, gradient_checkpointing=on)).unconditional
            for on in (True, False)
        ]
        assert distance(*found) <= 1e-5
        assert not tiny.unet.is_gradient_checkpointing

    def test_early_stop(self, tiny, photo):
        counts = []
        settings = NullText(early_stop=1e9, on_step=lambda *report: counts.append(report[2]))
        inverted(tiny, photo, settings)
        assert counts == [1] * STEPS

    def test_weights_are_left_alone(self, tiny, photo):
        parameters = dict(tiny.unet.named_parameters())
        before = {name: (p.requires_grad, p.sum().item()) for name, p in parameters.items()}
        inverted(tiny, photo, NullText(inner_steps=1))
        assert before == {name: (p.requires_grad, p.sum().item()) for name, p in parameters.items()}
        assert all(p.grad is None for p in parameters.values())

    @pytest.mark.slow
    def test_more_iterations_come_nearer(self, tiny, photo):
        losses = {}
        for inner in (1, 5):
            losses[inner] = []
            inverted(
                tiny,
                photo,
                NullText(inner_steps=inner, early_stop=0, on_step=lambda *r, n=inner: losses[n].append(r[3])),
            )
        assert losses[5][0] < losses[1][0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"method": "ddpm"}, ValueError, "method must be one of ddim, direct, null-text, negative-prompt"),
            ({"num_inference_steps": 0}, ValueError, "whole number from 1 on"),
            ({"width": 31}, ValueError, "width must be a positive multiple of 2 px, got 31; use 32"),
            ({"method": "null-text", "guidance_scale": 7.5}, ValueError, "follows the unguided trajectory"),
        ],
    )
    def test_of_inversions(self, tiny, photo, options, error, message):
        with pytest.raises(error, match=message):
            inverted(tiny, photo, **options)

    @pytest.mark.parametrize(
        "scheduler", [PNDMScheduler(), EulerDiscreteScheduler(), DDIMScheduler(clip_sample=True)], ids=type
    )
    def test_schedulers_whose_steps_cannot_be_undone(self, tiny, photo, monkeypatch, inversions, scheduler):
        monkeypatch.setattr(tiny, "scheduler", scheduler)
        with pytest.raises(ValueError, match=r"pipe.scheduler = fpe_pipeline.ddim_scheduler\(pipe.scheduler\)"):
            inverted(tiny, photo)
        with pytest.raises(ValueError, match="needs DDIM"):
            tiny(inversion=inversions["ddim"], target_prompt=TARGET)
        monkeypatch.setattr(tiny, "scheduler", ddim_scheduler(scheduler))
        assert inverted(tiny, photo, num_inference_steps=1).steps == 1

    @pytest.mark.parametrize(
        ("method", "options", "error", "message"),
        [
            ("ddim", {"num_inference_steps": 9}, ValueError, "inverted in 3 steps, got num_inference_steps=9"),
            ("ddim", {"latents": torch.zeros(1, 4, 12, 16)}, ValueError, "decides latents"),
            ("ddim", {"timesteps": [5, 3, 1]}, ValueError, "decides timesteps"),
            ("ddim", {"height": 32}, ValueError, "latents of 12 x 16 make images of 24 x 32"),
            ("null-text", {"guidance_scale": 5.0}, ValueError, "optimised for guidance_scale=7.5, got 5"),
            ("null-text", {"negative_prompt": "cars"}, ValueError, "leave negative_prompt out"),
            ("negative-prompt", {"guidance_scale": 1.0}, ValueError, "switches off"),
            ("negative-prompt", {"eta": 1.0}, ValueError, "leaves the source free.* which eta would change"),
            ("null-text", {"clip_skip": 1, "guidance_rescale": 0.7}, ValueError, "clip_skip, guidance_rescale would"),
        ],
    )
    def test_of_edits(self, tiny, inversions, method, options, error, message):
        with pytest.raises(error, match=message):
            tiny(inversion=inversions[method], target_prompt=TARGET, **options)

    def test_another_schedule(self, tiny, inversions, monkeypatch):
        monkeypatch.setattr(tiny, "scheduler", DDIMScheduler.from_config(tiny.scheduler.config, beta_end=0.013))
        with pytest.raises(ValueError, match="another noise schedule: levels of 4"):
            tiny(inversion=inversions["ddim"], target_prompt=TARGET)

    def test_the_same_schedule_as_another_cpu_rounds_it(self, tiny, inversions, monkeypatch):
        other = DDIMScheduler.from_config(tiny.scheduler.config)
        other.alphas_cumprod = torch.nextafter(other.alphas_cumprod, torch.zeros(()))
        monkeypatch.setattr(tiny, "scheduler", other)
        assert len(tiny(inversion=inversions["ddim"], target_prompt=TARGET, output_type="latent").targets) == 1

    def test_what_is_no_inversion(self, tiny):
        with pytest.raises(TypeError, match=r"what pipe\.invert returns"):
            tiny(inversion=torch.zeros(1), target_prompt=TARGET)

    @pytest.mark.parametrize(
        "settings",
        [
            {"guidance_scale": 1}, {"guidance_scale": "7"}, {"inner_steps": 0}, {"inner_steps": 1.5},
            {"early_stop": float("nan")}, {"early_stop": "1e-5"},
        ],
        ids=str,
    )  # fmt: skip
    def test_of_null_text_settings(self, settings):
        with pytest.raises(ValueError, match="got"):
            NullText(**settings)

    def test_half_precision_gradients(self, tiny, photo):
        # Copies: a pipeline made from another shares its modules, which would come back from float16 rounded.
        half = FreePromptPipeline(**copy.deepcopy(tiny.components)).to(torch.float16)
        half.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match="vanish in float16"):
            inverted(half, photo, "null-text")
