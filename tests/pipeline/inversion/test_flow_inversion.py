"""Inversion of flow models: each solver against the papers' formulas, written out here on the bare transformer."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fpe_pipeline import flow_scheduler
from fpe_pipeline.inversion.flow import invert_flow
from fpe_pipeline.models.flow_solvers import SOLVERS
from tests.support.slow_cases import few
from tests.support.tiny_transformers import PROMPTS, ExactEuler, tiny_flux_pipeline, tiny_sd3_pipeline

STEPS = 4
EXACT = 1e-8
SIZE = (48, 80)  # height, width in pixels
FAMILIES = ["sd3", "flux"]
# σ of the nodes of each family's run, as its pipeline sets them.
SHIFTED = {"dynamic": {"use_dynamic_shifting": True}, "shift 3": {"shift": 3.0}}


@pytest.fixture(scope="module")
def pipes(pipe):
    return {"sd3": tiny_sd3_pipeline(pipe), "flux": tiny_flux_pipeline(pipe)}


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(3).random((*SIZE, 3))


def solving(pipe, solver, **config):
    """The pipeline with a scheduler of this solver, whose steps are made in float64."""
    euler = ExactEuler(**({"shift": 3.0} | config))
    pipe.scheduler = euler if solver == "euler" else flow_scheduler(euler, solver)
    return pipe


def inverted(pipe, photo, **options):
    given = {"num_inference_steps": STEPS, "max_sequence_length": 12, "height": SIZE[0], "width": SIZE[1], **options}
    return invert_flow(pipe, photo, PROMPTS[0], **given)


def nodes(pipe, steps=STEPS, size=SIZE):
    """σ from noise to image as diffusers' own scheduler has them in a call of the pipeline."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = []

    def look(pipe, index, timestep, tensors):
        seen.append(pipe.scheduler.sigmas)
        return {}

    ours, pipe.scheduler = pipe.scheduler, scheduler
    try:
        options = {"height": size[0], "width": size[1], "num_inference_steps": steps, "max_sequence_length": 12}
        pipe(PROMPTS[0], callback_on_step_end=look, output_type="latent", **options)
    finally:
        pipe.scheduler = ours
    return seen[0]


def velocity_of(pipe, guidance, size=SIZE):
    """v(z, t) of the transformer with the first prompt; t is the scheduler's timestep."""
    options = {"prompt": PROMPTS[0], "prompt_2": None, "device": "cpu", "max_sequence_length": 12}
    if type(pipe).__name__.startswith("Flux"):
        texts, pooled, places = pipe.encode_prompt(**options)
        rows, columns = size[0] // 16, size[1] // 16
        grid = torch.tensor([[0, row, column] for row in range(rows) for column in range(columns)], dtype=texts.dtype)

        def flux(z, t):
            return pipe.transformer(
                z, texts, pooled, (t.double() / 1000).expand(1), grid, places, guidance=torch.tensor([guidance])
            ).sample

        return flux
    texts, away, pooled, pooled_away = pipe.encode_prompt(prompt_3=None, do_classifier_free_guidance=True, **options)

    def sd3(z, t):
        towards = pipe.transformer(z, texts, pooled, t.expand(1)).sample
        if guidance <= 1:
            return towards
        unconditional = pipe.transformer(z, away, pooled_away, t.expand(1)).sample
        return unconditional + guidance * (towards - unconditional)

    return sd3


def euler(velocity, z, sigmas):
    for now, then in pairwise(sigmas):
        z = z + (then.double() - now.double()) * velocity(z, 1000 * now)
        yield z


def rf_solver(velocity, z, sigmas):
    """The Taylor expansion as the paper has it, its derivative a difference over half a step."""
    for now, then in pairwise(sigmas):
        width = then.double() - now.double()
        here = velocity(z, 1000 * now)
        slope = (velocity(z + width / 2 * here, 1000 * ((now + then) / 2)) - here) / (width / 2)
        z = z + width * here + width**2 / 2 * slope
        yield z


def fireflow(velocity, z, sigmas):
    before = velocity(z, 1000 * sigmas[0])
    for now, then in pairwise(sigmas):
        width = then.double() - now.double()
        before = velocity(z + width / 2 * before, 1000 * ((now + then) / 2))
        z = z + width * before
        yield z


RULES = {"euler": euler, "rf-solver": rf_solver, "fireflow": fireflow}


def encoded(pipe, photo):
    """The photo as the model takes it."""
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] * 255
    mean = pipe.vae.encode((pixels.round().float() / 127.5 - 1).double()).latent_dist.mean  # pictures are float32
    latents = (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    if not type(pipe).__name__.startswith("Flux"):
        return latents
    _, channels, height, width = latents.shape
    tokens = latents.reshape(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    return tokens.reshape(1, -1, 4 * channels)


def distance(actual, expected):
    return (actual - expected).abs().max().item()


def expected_latents(pipe, photo, rule, guidance=1.0, sigmas=None):
    sigmas = nodes(pipe).flip(0) if sigmas is None else sigmas
    with torch.no_grad():
        start = encoded(pipe, photo)
        return torch.stack([start, *rule(velocity_of(pipe, guidance), start, sigmas)])


@pytest.mark.parametrize("shift", SHIFTED.values(), ids=SHIFTED)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_the_papers(pipes, photo, family, solver, shift):
    tiny = solving(pipes[family], solver, **shift)
    inversion = inverted(tiny, photo)
    assert inversion.latents.dtype == torch.float64 and inversion.steps == STEPS
    assert distance(inversion.latents, expected_latents(tiny, photo, RULES[solver])) <= EXACT
    assert distance(inversion.latents[0], inversion.noise) > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_guidance(pipes, photo, family, solver):
    tiny = solving(pipes[family], solver)
    actual = inverted(tiny, photo, guidance_scale=3.0).latents
    assert distance(actual, expected_latents(tiny, photo, RULES[solver], 3.0)) <= EXACT
    assert distance(actual, inverted(tiny, photo).latents) > 1e-4


def one_late(sigmas):
    return torch.cat([sigmas[1:], sigmas[-1:]])


def velocity_at_the_other_end(velocity, z, sigmas):
    for now, then in pairwise(sigmas):
        z = z + (then.double() - now.double()) * velocity(z, 1000 * then)
        yield z


def half_a_slope(velocity, z, sigmas):
    for now, then in pairwise(sigmas):
        width = then.double() - now.double()
        here = velocity(z, 1000 * now)
        slope = (velocity(z + width / 2 * here, 1000 * ((now + then) / 2)) - here) / width
        z = z + width * here + width**2 / 2 * slope
        yield z


def middle_forgotten(velocity, z, sigmas):
    for now, then in pairwise(sigmas):
        width = then.double() - now.double()
        z = z + width * velocity(z + width / 2 * velocity(z, 1000 * now), 1000 * now)
        yield z


PLANTED = {
    "a step late": ("euler", lambda v, z, s: euler(v, z, one_late(s))),
    "σ of the other end": ("euler", velocity_at_the_other_end),
    "first order for second": ("rf-solver", euler),
    "half a slope": ("rf-solver", half_a_slope),
    "the middle at the node's σ": ("rf-solver", middle_forgotten),
    "no velocity carried over": ("fireflow", rf_solver),
    "σ not reversed": ("fireflow", lambda v, z, s: fireflow(v, z, s.flip(0))),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_rules_are_told_apart(pipes, photo, family, planted):
    solver, wrong = planted
    tiny = solving(pipes[family], solver)
    assert distance(inverted(tiny, photo).latents, expected_latents(tiny, photo, wrong)) > 1000 * EXACT


def denoised(pipe, inversion, prompt=PROMPTS[0], **options):
    """The stock pipeline from an inversion's noise, at the guidance of the inversion."""
    height, width = inversion.image.size[::-1]
    return pipe(
        prompt,
        latents=inversion.noise,
        height=height,
        width=width,
        num_inference_steps=inversion.steps,
        guidance_scale=inversion.guidance_scale,
        max_sequence_length=12,
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize("family", few(FAMILIES, "sd3"))
@pytest.mark.slow
def test_second_order_follows_the_image_better(pipes, photo, family):
    """At as many steps, there and back.

    A step of Euler's takes the velocity of one end on the way there and that of the other on the way back, which differ
    by the step's width times v'; the velocity in the middle is the same both ways to second order. Twice the steps
    divide what is left by four, rather than by two.
    """
    errors = {}
    for solver in SOLVERS:
        tiny = solving(pipes[family], solver)
        for steps in (16, 32):
            found = inverted(tiny, photo, num_inference_steps=steps)
            errors[solver, steps] = distance(denoised(tiny, found), found.latents[0])
    for solver in ("rf-solver", "fireflow"):
        assert errors[solver, 16] < 0.5 * errors["euler", 16]
        assert errors[solver, 32] < 0.4 * errors[solver, 16]
    assert 0.35 * errors["euler", 16] < errors["euler", 32] < errors["euler", 16]
    # RF-Solver at 16 steps calls the model as often as Euler at 32.
    assert errors["rf-solver", 16] < errors["euler", 32]
