"""Inversion, reference latents and null-text optimisation give what the authors' code gives on a real image."""

import pytest
import torch

from fpe_pipeline import FreePromptPipeline, MasaCtrlEdit, NullText
from fpe_pipeline.session.hooks import SchedulerHook
from tests.support.free_prompt_pipelines import distance
from tests.support.golden_cases import load_case, source_image

REAL = ["fpe_real_sr08", "fpe_real_srcprompt_g1"]


@pytest.fixture(scope="module")
def fpe(pipe):
    return FreePromptPipeline.from_pipe(pipe)


def invert(fpe, case, **options):
    """The case's image, at its size rather than at the 512 px of the tiny model."""
    settings = case.settings
    return fpe.invert(
        source_image().numpy(),
        settings["prompts"][0],
        num_inference_steps=settings["steps"],
        height=256,
        width=256,
        **options,
    )


def edit(fpe, case, inversion, targets, **options):
    """(images, latents after each step): those that the originals keep, before the source is put back."""
    steps = []

    def keep(latents, timestep):
        steps.append(latents.clone())
        return latents

    hook = SchedulerHook(fpe.scheduler, keep)
    try:
        out = fpe(
            inversion=inversion,
            target_prompt=targets,
            guidance_scale=case.settings["guidance_scale"],
            max_tokens=32**2,
            output_type="latent",
            **{"self_replace_steps": case.settings["self_replace_steps"], **options},
        )
    finally:
        hook.remove(expected=True)
    return out, torch.stack(steps)


@pytest.fixture(scope="module")
def inversions(fpe):
    return {
        name: invert(fpe, load_case(name), guidance_scale=load_case(name).settings["inversion_guidance"])
        for name in REAL
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_inverted_latents(inversions, name):
    case = load_case(name)
    assert list(reversed(inversions[name].schedule.timesteps)) == case.settings["inversion_timesteps"]
    assert distance(inversions[name].latents, case.tensors["out.inverted_list"]) <= case.atol("inverted_list")


@pytest.mark.parametrize("name", [REAL[0], pytest.param(REAL[1], marks=pytest.mark.slow)])
def test_edits_with_reference_latents(fpe, inversions, name):
    case = load_case(name)
    out, steps = edit(fpe, case, inversions[name], case.settings["prompts"][1])
    assert distance(steps[0], case.tensors["out.latents_step1"]) <= case.atol("latents_step1")
    assert distance(out.images, case.tensors["out.latents"]) <= case.atol("latents")
    assert distance(out.images, case.tensors["f64.latents"]) <= case.atol("latents")
    if "out.trajectory" in case.tensors:
        assert distance(steps, case.tensors["out.trajectory"]) <= case.atol("trajectory")


@pytest.mark.slow
def test_without_the_edit_the_case_is_missed_by_far(fpe, inversions):
    case = load_case(REAL[1])
    out, _ = edit(fpe, case, inversions[REAL[1]], case.settings["prompts"][1], self_replace_steps=0)
    assert distance(out.images, case.tensors["off.latents"]) <= case.atol("latents")
    assert distance(out.images, case.tensors["out.latents"]) >= 1000 * case.atol("latents")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL[1:])
def test_more_targets_leave_the_first_as_it_is(fpe, inversions, name):
    """The original takes one target; every one of several is what it is alone."""
    case = load_case(name)
    target = case.settings["prompts"][1]
    out, _ = edit(fpe, case, inversions[name], ["a photo of a dog", target])
    assert distance(out.images[[0, 2]], case.tensors["out.latents"]) <= case.atol("latents")
    assert distance(out.images[1], out.images[2]) > 1000 * case.atol("latents")


@pytest.mark.slow
def test_null_text(fpe):
    case = load_case("nulltext_fpe_4x2")
    losses = []
    inversion = invert(
        fpe,
        case,
        method=NullText(
            guidance_scale=case.settings["guidance_scale"],
            inner_steps=case.settings["inner_steps"],
            early_stop=case.settings["early_stop_epsilon"],
            on_step=lambda index, total, iterations, loss: losses.append((index, total, iterations, loss)),
        ),
    )
    assert distance(inversion.latents, case.tensors["out.ddim_latents"]) <= case.atol("ddim_latents")
    assert distance(inversion.unconditional, case.tensors["out.uncond_embeddings"]) <= case.atol("uncond_embeddings")
    assert distance(inversion.unconditional, case.tensors["f64.uncond_embeddings"]) <= case.atol("uncond_embeddings")
    assert [entry[:3] for entry in losses] == [(index, 4, 2) for index in range(4)]
    assert [loss for *_, loss in losses] == pytest.approx(case.settings["inner_losses"][1::2], rel=1e-3)

    out, steps = edit(fpe, case, inversion, case.settings["prompts"][1])
    assert distance(steps[0], case.tensors["out.latents_step1"]) <= case.atol("latents_step1")
    assert distance(steps, case.tensors["out.trajectory"]) <= case.atol("trajectory")
    assert distance(out.images, case.tensors["out.latents"]) <= case.atol("latents")


@pytest.mark.slow
def test_masactrl_from_inverted_noise(fpe):
    """MasaCtrl's real-image example: the inversion's noise starts both rows, and nothing holds the source after."""
    case = load_case("masa_real")
    inversion = invert(fpe, case, guidance_scale=case.settings["guidance_scale"])
    assert distance(inversion.latents, case.tensors["out.inverted_list"]) <= case.atol("inverted_list")
    control = case.settings["controller_kwargs"]
    latents = fpe(
        case.settings["prompts"],
        edit=MasaCtrlEdit(**control),
        latents=inversion.noise,
        num_inference_steps=case.settings["steps"],
        guidance_scale=case.settings["guidance_scale"],
        output_type="latent",
    ).images
    assert distance(latents, case.tensors["out.latents"]) <= case.atol("latents")
    assert distance(latents, case.tensors["off.latents"]) >= 100 * case.atol("latents")
