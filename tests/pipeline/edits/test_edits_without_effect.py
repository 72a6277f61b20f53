"""An edit that did nothing in a run says so; one that was asked to do nothing does not."""

import re
import warnings

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from fpe_pipeline import (
    FreePromptEdit,
    FreePromptPipeline,
    LocalBlend,
    MasaCtrlEdit,
    PlugAndPlayEdit,
    PromptToPromptEdit,
    StyleAlignedEdit,
    editing,
)
from fpe_pipeline.app.cli import main
from fpe_pipeline.edits import Edit
from tests.support.silent import SOURCE, TARGET, embedded, noise

PROMPTS = [SOURCE, TARGET]


@pytest.fixture(scope="module")
def pipe():
    return embedded()


@pytest.fixture(scope="module")
def free():
    return embedded(FreePromptPipeline)


def run(pipe, steps, **options):
    return pipe(
        PROMPTS,
        latents=noise(0, 0),
        num_inference_steps=steps,
        guidance_scale=0.0,
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize(
    ("edit", "steps"),
    [
        (FreePromptEdit(), 1),
        (FreePromptEdit((0.5, 0.6)), 4),
        (MasaCtrlEdit(start_layer=0), 4),
        (MasaCtrlEdit(start_layer=0, steps=(2, 7)), 2),
        (PlugAndPlayEdit(), 1),
        (StyleAlignedEdit(0.2), 4),
    ],
    ids=repr,
)
def test_windows_that_hold_no_step(free, edit, steps):
    options = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "latent", "latents": noise(0)}
    with pytest.warns(RuntimeWarning, match=f"{type(edit).__name__} did nothing by .* of {steps} that the run made"):
        out = free(SOURCE, TARGET, edit=edit, **options)
    assert not out.report.layers
    assert "without effect: " in out.report.explain()
    torch.testing.assert_close(out.images, free(SOURCE, TARGET, self_replace_steps=0, **options).images)


def test_a_run_that_begins_behind_the_window(pipe):
    """Image to image: a strength of 0.2 makes the last fifth of the steps, and the window is the first four fifths."""
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "guidance_scale": 0.0, "output_type": "latent"}
    with (
        pytest.warns(RuntimeWarning, match=r"none of the steps 8 to 9 of 10 that the run made"),
        editing(img2img, FreePromptEdit(0.8)),
    ):
        generators = [torch.Generator().manual_seed(0) for _ in PROMPTS]
        img2img(PROMPTS, image=Image.new("RGB", (80, 80)), strength=0.2, generator=generators, **options)


def test_a_part_of_an_edit(pipe):
    """Cross-attention is replaced in the one step, self-attention in none."""
    with (
        pytest.warns(RuntimeWarning, match=r"did nothing by self_replace_steps=\(0\.0, 0\.4\)"),
        editing(pipe, PromptToPromptEdit(PROMPTS, pipe.tokenizer)) as session,
    ):
        run(pipe, 1)
    assert session.report().layers


def test_an_edit_of_a_combination(pipe):
    both = FreePromptEdit((0.0, 0.1)) + LocalBlend(PROMPTS, pipe.tokenizer, ("red", "blue"))
    with pytest.warns(RuntimeWarning, match="FreePromptEdit's self_replace_steps"), editing(pipe, both):
        run(pipe, 2)


def test_every_run_of_a_session(pipe):
    with editing(pipe, FreePromptEdit()):
        run(pipe, 1)
        with pytest.warns(RuntimeWarning, match="of 1 that the run made"):
            run(pipe, 4)


class Nowhere(Edit):
    def select(self, sites):
        return ()

    def products(self, site, step, roles):
        return {}


class Nothing(Edit):
    def products(self, site, step, roles):
        return {}


def test_an_edit_that_selects_nothing_is_refused(pipe):
    with pytest.raises(ValueError, match="Nowhere selects none of the model's"):
        editing(pipe, Nowhere())


def test_an_edit_without_products(pipe):
    with pytest.warns(RuntimeWarning, match="Nothing did nothing: .* its products are empty"), editing(pipe, Nothing()):
        run(pipe, 2)
    with (
        pytest.warns(RuntimeWarning, match="its products are empty"),
        editing(pipe, FreePromptEdit(1.0, mask=torch.zeros(80, 80))),
    ):
        run(pipe, 2)


def test_edits_that_are_asked_to_do_nothing_are_silent(pipe):
    plain = run(pipe, 2)
    for edit in (
        FreePromptEdit(0),
        FreePromptEdit(max_tokens=0),
        FreePromptEdit(strength=0.0),
        MasaCtrlEdit(max_tokens=0),
        PromptToPromptEdit(PROMPTS, pipe.tokenizer, cross_replace_steps=0, self_replace_steps=0),
        PromptToPromptEdit(PROMPTS, pipe.tokenizer, cross_replace_steps=0, max_tokens=0),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with editing(pipe, edit):
                assert torch.equal(run(pipe, 2), plain)


def test_the_command_line_says_it_in_a_line(tmp_path, capfd):
    options = ["--source", SOURCE, "--target", TARGET, "--steps", "1", "--no-control", "--quiet", "-o", str(tmp_path)]
    assert main(["edit", *options]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "did nothing" in line]
    assert len(lines) == 1
    assert re.match(r"fpe: warning: FreePromptEdit did nothing by self_replace_steps=\(0\.0, 0\.8\)", lines[0])
    assert main(["edit", *options, "--self-replace", "1"]) == 0
    assert "did nothing" not in capfd.readouterr().err
