"""CogView 3 Plus in `FreePromptPipeline`: DDIM of shifted noise levels, under layers of joint attention."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler, DiffusionPipeline

from fpe_pipeline import (
    ConsistEdit,
    FreePromptCogView3PlusPipeline,
    FreePromptEdit,
    FreePromptPipeline,
    Inversion,
    LocalBlend,
    MasaCtrlEdit,
    PromptToPromptEdit,
    Recording,
    ReFlexEdit,
    ValueInjectionEdit,
    ddim_scheduler,
    editing,
)
from fpe_pipeline.sampling.decoding import decoded
from fpe_pipeline.sampling.noise_schedule import ddim_inverse_step
from tests.support.flow_pipelines import distance
from tests.support.slow_cases import few
from tests.support.tiny_cogview import tiny_cogview3_that_decodes

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
SOURCE = "a photo of a red car on a mountain"
TARGETS = ["a red car", "a photo of a big dog on a house in winter"]
GUIDED = {
    "guided": {"guidance_scale": 3.0, "negative_prompt": "a drawing"},
    "by nothing": {"guidance_scale": 3.0},
    "unguided": {"guidance_scale": 1.0},
}
SIZE = {"height": 48, "width": 80}


def words(align):
    return lambda tokenizer, targets: PromptToPromptEdit([SOURCE, *targets], tokenizer, align, self_replace_steps=0.5)


EDITS = {
    "image maps": lambda tokenizer, targets: FreePromptEdit(0.7, both_halves=True),
    "all maps": lambda tokenizer, targets: FreePromptEdit(0.7, scope="joint"),
    "all of the image": lambda tokenizer, targets: ConsistEdit(0.7),
    "masactrl": lambda tokenizer, targets: MasaCtrlEdit(start_step=1, layers=[1, 2]),
    "values": lambda tokenizer, targets: ValueInjectionEdit(0.7, layers=[1]),
    "refine": words("refine"),
    "reflex": lambda tokenizer, targets: ReFlexEdit([SOURCE, *targets], tokenizer, layers=[1, 2]),
    "blended": lambda tokenizer, targets: (
        words("refine")(tokenizer, targets)
        + LocalBlend([SOURCE, *targets], tokenizer, ["car", *["a"] * len(targets)], 0.9, start=0.3)
    ),
}


@pytest.fixture(scope="module")
def stock(pipe):
    return tiny_cogview3_that_decodes(pipe)


@pytest.fixture
def tiny(stock):
    made = FreePromptPipeline.from_pipe(stock)
    assert type(made) is FreePromptCogView3PlusPipeline
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(3).random((48, 80, 3))


def run(**options):
    return {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(2), **SIZE, **options}


def levels_of(scheduler, steps):
    """Of DDIM's steps, noisiest first: (timestep, ᾱ at it, ᾱ behind it)."""
    scheduler.set_timesteps(steps)
    known, width = scheduler.alphas_cumprod.double(), 1000 // steps
    behind = [known[at - width] if at >= width else torch.tensor(1.0) for at in scheduler.timesteps]
    return list(zip(scheduler.timesteps.tolist(), known[scheduler.timesteps], behind, strict=True))


@pytest.mark.parametrize("guided", few(GUIDED, "guided"))
def test_it_is_what_editing_makes_of_the_pipeline_of_diffusers(tiny, stock, guided):
    """Bit for bit; each of several images is the one alone, to rounding."""
    edit, options = FreePromptEdit(0.5, both_halves=True), {"output_type": "latent", **guided}
    noise = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    out = tiny(SOURCE, TARGETS[0], edit=edit, **run(**options)).images
    several = tiny(SOURCE, TARGETS[0], edit=edit, num_images_per_prompt=2, **run(**options, generator=noise)).images
    with editing(stock, edit):
        same = [torch.Generator().manual_seed(2) for _ in range(2)]
        negative = guided.get("negative_prompt")
        options["negative_prompt"] = None if negative is None else [negative] * 2
        expected = stock([SOURCE, TARGETS[0]], **run(**options, generator=same)).images
    assert distance(out, expected) == 0
    assert distance(several[::2], out) <= EXACT and distance(several[1::2], out) > 1e-3


def test_the_window_is_that_of_joint_attention(tiny):
    report = tiny(SOURCE, TARGETS[0], **run(num_inference_steps=5, output_type="latent")).report
    assert {tuple(steps) for steps in report.layers.values()} == {(0,)}


def test_its_scheduler_is_ddim_of_other_levels(tiny):
    """A step that the model would not bend is undone, from noise without any signal too."""
    scheduler = ddim_scheduler(CogVideoXDPMScheduler.from_config(tiny.scheduler.config))
    assert type(scheduler) is CogVideoXDDIMScheduler and scheduler.config == tiny.scheduler.config
    plain = DDIMScheduler.from_config(tiny.scheduler.config)
    assert distance(plain.alphas_cumprod, scheduler.alphas_cumprod) > 0.1
    clean, noise = torch.randn(2, 1, 16, 6, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    levels = levels_of(scheduler, 5)
    assert levels[0][1] == 0
    for timestep, level, behind in levels:
        noisy, less = (a**0.5 * clean + (1 - a) ** 0.5 * noise for a in (level, behind))
        velocities = [a**0.5 * noise - (1 - a) ** 0.5 * clean for a in (level, behind)]
        assert distance(scheduler.step(velocities[0], timestep, noisy).prev_sample, less) <= EXACT
        assert distance(ddim_inverse_step(scheduler, velocities[1], timestep, less), noisy) <= EXACT


@pytest.mark.parametrize("scale", few({"unguided": 1.0, "guided": 3.0}, "guided"))
def test_inversion_is_the_papers_formula(tiny, photo, scale):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, guidance_scale=scale, **SIZE)
    pixels = (torch.from_numpy(photo * 255).round().to(torch.float32) / 127.5 - 1).permute(2, 0, 1)[None].double()
    z = tiny.vae.encode(pixels).latent_dist.mean * tiny.vae.config.scaling_factor
    texts = tiny.encode_prompt(SOURCE, None, False)[0]
    told = {name: torch.tensor([[48.0, 80.0]]).double() for name in ("original_size", "target_size")}

    def predicted(states, timestep):
        told["crop_coords"] = torch.zeros(1, 2).double()
        with torch.no_grad():
            return tiny.transformer(z, encoder_hidden_states=states, timestep=torch.tensor([timestep]), **told).sample

    assert distance(inversion.latents[0], z) <= EXACT
    for (timestep, level, behind), reached in zip(
        reversed(levels_of(tiny.scheduler, 3)), inversion.latents[1:], strict=True
    ):
        velocity = predicted(texts, timestep)
        if scale > 1:
            away = predicted(torch.zeros_like(texts), timestep)
            velocity = away + scale * (velocity - away)
        clean = behind**0.5 * z - (1 - behind) ** 0.5 * velocity
        noise = behind**0.5 * velocity + (1 - behind) ** 0.5 * z
        z = level**0.5 * clean + (1 - level) ** 0.5 * noise
        assert distance(reached, z) <= EXACT


@pytest.mark.parametrize("method", few(["ddim", "direct", "negative-prompt"]))
def test_what_holds_the_source(tiny, photo, method, tmp_path):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, method=method, **SIZE)
    loaded = Inversion.load(inversion.save(tmp_path / "inversion.safetensors"))
    options = {"self_replace_steps": 0.5, "guidance_scale": 3.0}
    latents, pictures, again = (
        tiny(inversion=one, target_prompt=TARGETS[0], output_type=kind, **options).images
        for one, kind in ((inversion, "latent"), (inversion, "pil"), (loaded, "pil"))
    )
    assert bool(distance(latents[:1], inversion.latents[0]) == 0) is (method == "direct")
    assert distance(latents[1:], latents[:1]) > 1e-3
    assert [image.tobytes() for image in pictures] == [image.tobytes() for image in again]
    assert [image.tobytes() for image in pictures] == [image.tobytes() for image in decoded(tiny, latents)]


@pytest.mark.slow
def test_a_source_that_is_free_comes_back_as_far_as_ddim_goes(tiny, photo):
    def apart(steps):
        inversion = tiny.invert(photo, SOURCE, num_inference_steps=steps, method="negative-prompt", **SIZE)
        out = tiny(
            inversion=inversion,
            target_prompt=TARGETS[0],
            self_replace_steps=0.0,
            guidance_scale=3.0,
            output_type="latent",
        )
        return float((out.source - inversion.latents[0]).norm() / inversion.latents[0].norm())

    assert apart(24) < 0.75 * apart(6)


@pytest.mark.parametrize("guided", few(GUIDED, "by nothing"))
@pytest.mark.parametrize("edit", few(EDITS, "refine"))
def test_recordings_are_full_runs(tiny, edit, guided, tmp_path):
    """Made before the targets were known, written and read again, in as many bytes as were foretold."""
    written = edit(tiny.tokenizer, TARGETS)
    full = tiny(SOURCE, TARGETS, edit=written, output_type="latent", **run(**guided)).images
    made = tiny.record(SOURCE, edit=edit(tiny.tokenizer, [SOURCE]), placement=tmp_path / "kept", **run(**guided))
    tiny.record(SOURCE, edit=edit(tiny.tokenizer, [SOURCE]), budget_bytes=made.nbytes, **run(**guided))
    recording = Recording.load(tmp_path / "kept")
    again = tiny.edit(recording, TARGETS, edit=written, output_type="latent").images
    assert distance(again, full[1:]) <= EXACT
    alone = tiny(TARGETS[0], output_type="latent", **run(**guided)).source
    assert distance(full[1:2], alone) > 1e-5


def test_a_recording_of_a_photo(tiny, photo):
    """Made for the plain edit, in its window."""
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=5, method="direct", **SIZE)
    full = tiny(inversion=inversion, target_prompt=TARGETS, output_type="latent").images
    recording = tiny.record(inversion=inversion)
    assert recording.window == (0.0, 0.2)
    assert distance(tiny.edit(recording, TARGETS, output_type="latent").images, full[1:]) <= EXACT
    half = tiny.record(inversion=inversion, precision="half")
    assert 0 < half.error < 1e-2


@pytest.mark.slow
def test_saved_models_load_in_diffusers_and_here(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    assert type(FreePromptPipeline.from_pretrained(tmp_path)) is FreePromptCogView3PlusPipeline
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is FreePromptCogView3PlusPipeline.parent


class TestRefusals:
    def test_a_source_that_is_dropped(self, tiny):
        with pytest.raises(ValueError, match="cannot drop the source's rows"):
            tiny(SOURCE, TARGETS, keep_source=False, **run())

    def test_null_text(self, tiny, photo):
        with pytest.raises(ValueError, match="loop keeps sizes of images to itself"):
            tiny.invert(photo, SOURCE, method="null-text", **SIZE)

    def test_negative_embeddings(self, tiny):
        texts = tiny.encode_prompt([SOURCE, TARGETS[0]], None, False)[0]
        with pytest.raises(ValueError, match="puts zeros in the place of negative_prompt_embeds"):
            tiny(prompt_embeds=texts, negative_prompt_embeds=texts, **run())
        tiny(prompt_embeds=texts, output_type="latent", **run())

    def test_a_size_between_tokens(self, tiny):
        with pytest.raises(ValueError, match="positive multiple of 16"):
            tiny(SOURCE, TARGETS, height=40, width=64)

    def test_precisions_of_other_layers(self, tiny):
        with pytest.raises(ValueError, match="must be exact or half for layers of joint attention, got 'int8-keys'"):
            tiny.record(SOURCE, precision="int8-keys", **run())

    def test_samplers_that_add_noise(self, tiny, photo):
        tiny.scheduler = CogVideoXDPMScheduler.from_config(tiny.scheduler.config)
        with pytest.raises(ValueError, match="CogVideoXDPMScheduler adds noise in each step"):
            tiny.record(SOURCE, **run())
        with pytest.raises(ValueError, match="needs DDIM, whose steps can be undone, got CogVideoXDPMScheduler"):
            tiny.invert(photo, SOURCE, **SIZE)
