"""Values that are not finite never become a picture: the run stops and says from which step and layer on."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, PromptToPromptEdit, ddim_scheduler, editing, heat_maps
from fpe_pipeline.app.cli import main
from fpe_pipeline.models.steps import locate_step
from tests.support.silent import SOURCE, TARGET, embedded, noise

PROMPTS = [SOURCE, TARGET]
STEPS = 4
LAYER = "up_blocks.0.attentions.0.transformer_blocks.0.attn1"
FAST = {"num_inference_steps": STEPS, "output_type": "latent"}


def break_layer(pipe, step, path=LAYER, value=math.inf):
    """From a step on, one entry of a layer's output is no finite number."""

    def spoil(module, args, output):
        if spoil.step is not None and spoil.step >= step:
            output = output.clone()
            output[-1, 0, 0] = value
            return output
        return None

    def note(module, args, kwargs):
        spoil.step = locate_step(pipe.scheduler, args[1] if len(args) > 1 else kwargs["timestep"]).index

    spoil.step = None
    pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    pipe.unet.get_submodule(path).to_out[0].register_forward_hook(spoil)


@pytest.mark.parametrize("value", [math.inf, pytest.param(-math.inf, marks=pytest.mark.slow), math.nan])
@pytest.mark.parametrize("step", [0, pytest.param(2, marks=pytest.mark.slow), STEPS - 1])
def test_the_step_and_the_layer(step, value):
    pipe = embedded(FreePromptPipeline)
    break_layer(pipe, step, value=value)
    made = []
    with pytest.raises(FloatingPointError, match=rf"from step {step} of {STEPS} on: .*{LAYER}"):
        pipe(SOURCE, TARGET, latents=noise(0), callback_on_step_end=lambda *given: made.append(None) or {}, **FAST)
    assert len(made) == step


@pytest.mark.slow
def test_a_source_alone_and_heat_maps():
    for kind in (FreePromptPipeline, StableDiffusionPipeline):
        pipe = embedded(kind)
        break_layer(pipe, 1)
        with (
            pytest.raises(FloatingPointError, match=rf"from step 1 of {STEPS} on: .*{LAYER}"),
            heat_maps(pipe, ["car"]),
        ):
            pipe(SOURCE, latents=noise(0), **FAST)
    pipe = embedded(FreePromptPipeline)
    break_layer(pipe, 1)
    with pytest.raises(FloatingPointError, match=rf"from step 1 of {STEPS} on: .*{LAYER}"):
        pipe(SOURCE, latents=noise(0), **FAST)
    assert "step" not in vars(pipe.scheduler)


def test_a_session_and_a_loop_of_ones_own():
    pipe = embedded()
    break_layer(pipe, 2)
    with (
        pytest.raises(FloatingPointError, match=rf"from step 2 of {STEPS} on: .*{LAYER}"),
        editing(pipe, FreePromptEdit()),
    ):
        pipe(PROMPTS, latents=noise(0, 0), **FAST)
    refused_in_a_loop_of_ones_own()


def refused_in_a_loop_of_ones_own():
    unet = embedded().unet
    unet.get_submodule(LAYER).to_out[0].register_forward_hook(lambda module, args, output: output * math.nan)
    with (
        pytest.raises(FloatingPointError, match=rf"from step 1 of 3 on: .*{LAYER}"),
        torch.no_grad(),
        editing(unet, FreePromptEdit(1.0), classifier_free_guidance=False) as session,
    ):
        session.step(1, 3)
        unet(noise(0, 0), 500, torch.zeros(2, 24, unet.config.cross_attention_dim))


def test_guidance_that_is_too_large():
    """The UNet's prediction is finite, what guidance makes of it is not."""
    pipe = embedded(FreePromptPipeline)
    message = r"from step 0 of 4 on: the UNet's prediction is finite, and what guidance \(guidance_scale=1e\+300\)"
    with pytest.raises(FloatingPointError, match=message):
        pipe(SOURCE, TARGET, latents=noise(0), guidance_scale=1e300, **FAST)


def test_weights_of_words_that_are_too_large():
    """The first layer with an edited map is where they act."""
    pipe = embedded(FreePromptPipeline)
    edit = PromptToPromptEdit(PROMPTS, pipe.tokenizer, weights={"blue": 1e300})
    with editing(pipe, edit) as session:
        first = next(site.path for site in session.sites if site.kind == "cross")
    with pytest.raises(FloatingPointError, match=rf"from step 0 of 4 on: the first such layer is {first}"):
        pipe(SOURCE, TARGET, edit=edit, latents=noise(0), **FAST)


def test_latents_and_embeddings_to_start_from():
    pipe = embedded(FreePromptPipeline)
    bad = noise(0)
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="latents to start from hold values that are not finite"):
        pipe(SOURCE, TARGET, latents=bad, **FAST)
    embeddings, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["", ""])
    embeddings[1, 3, 0] = math.inf
    with pytest.raises(FloatingPointError, match="text embeddings that are not finite"):
        pipe(prompt_embeds=embeddings, negative_prompt_embeds=negative, latents=noise(0), **FAST)


def test_an_autoencoder_that_overflows():
    """As SDXL's does in float16: latents are finite, the picture would be black."""
    for kind in (FreePromptPipeline, StableDiffusionPipeline):
        pipe = embedded(kind)
        with torch.no_grad():
            pipe.vae.decoder.conv_norm_out.weight[0] = math.inf
        options = {"latents": noise(0) if kind is FreePromptPipeline else noise(0, 0), "num_inference_steps": 1}
        with pytest.raises(FloatingPointError, match=r"autoencoder makes values .* first in decoder\.conv_norm_out"):
            if kind is FreePromptPipeline:
                pipe(SOURCE, TARGET, self_replace_steps=1.0, **options)
            else:
                with editing(pipe, FreePromptEdit(1.0)):
                    pipe(PROMPTS, **options)
        assert not pipe.vae.decoder._forward_hooks


@pytest.mark.slow
def test_inversions():
    photo = Image.fromarray((np.random.default_rng(0).random((80, 80, 3)) * 255).astype("uint8"))
    for method in ("ddim", "null-text"):
        pipe = embedded(FreePromptPipeline)
        pipe.scheduler = ddim_scheduler(pipe.scheduler)
        break_layer(pipe, 0)
        with pytest.raises(FloatingPointError, match="not finite"):
            pipe.invert(photo, SOURCE, num_inference_steps=2, method=method)


def test_recordings(tmp_path):
    pipe = embedded(FreePromptPipeline)
    break_layer(pipe, 1)
    with pytest.raises(FloatingPointError, match=rf"from step 1 of {STEPS} on: .*{LAYER}"):
        pipe.record(SOURCE, latents=noise(0), num_inference_steps=STEPS, placement=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("options", [["--guidance", "1e30"], ["--method", "p2p-replace", "--option", "weights=W"]])
def test_the_command_line_writes_nothing(tmp_path, capfd, options):
    options = [option.replace("W", json.dumps({"blue": 1e300})) for option in options]
    out = tmp_path / "out"
    given = ["--source", SOURCE, "--target", TARGET, "--steps", "2", "--no-control", "--quiet", "-o", str(out)]
    assert main(["edit", *given, *options]) == 1
    assert "not finite" in capfd.readouterr().err
    assert not out.exists()


def test_a_call_that_cannot_be_made_once_more():
    """Then it is not said that the prediction was finite, which nobody knows."""
    unet = embedded().unet
    forward = unet.forward
    calls = []

    def once(*args, **kwargs):
        calls.append(None)
        if len(calls) > 1:
            raise MemoryError
        return (forward(*args, **kwargs)[0] * math.nan,)

    unet.forward = once
    message = "from step 0 of 3 on: what the UNet, guidance and the scheduler make of the latents is not;"
    with (
        pytest.raises(FloatingPointError, match=message),
        torch.no_grad(),
        editing(unet, FreePromptEdit(1.0), classifier_free_guidance=False) as session,
    ):
        session.step(0, 3)
        unet(noise(0, 0), 500, torch.zeros(2, 24, unet.config.cross_attention_dim))
    assert len(calls) == 2
