"""What a flow model's run is made of outside its pipeline: the shift of its σ, latents and pictures."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift as flux_shift
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift as sd3_shift

from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.sampling.decoding import decoded
from fpe_pipeline.sampling.flow_model import shift_of
from fpe_pipeline.sampling.flow_models import flow_model
from tests.support.tiny_chroma import tiny_chroma_pipeline
from tests.support.tiny_cogview import tiny_cogview4_that_reads
from tests.support.tiny_flux2 import tiny_flux2_that_encodes
from tests.support.tiny_flux_kin import KIN
from tests.support.tiny_language import tiny_lumina_that_reads
from tests.support.tiny_transformers import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_vae
from tests.support.tiny_z_image import tiny_z_image_that_reads

RUNS = {
    "SD3": tiny_sd3_pipeline,
    "FLUX.1": tiny_flux_pipeline,
    "FLUX.2 dev": lambda pipe: tiny_flux2_that_encodes(),
    "FLUX.2 klein": lambda pipe: tiny_flux2_that_encodes("Flux2KleinPipeline"),
    **{name: model.make for name, model in KIN.items() if hasattr(diffusers, "LongCatImagePipeline")},
    "Chroma": tiny_chroma_pipeline,
    "Lumina 2": lambda pipe: tiny_lumina_that_reads(),
    "Z-Image": lambda pipe: tiny_z_image_that_reads(vae=tiny_vae().double()),
    "CogView 4": lambda pipe: tiny_cogview4_that_reads(),
}
if hasattr(diffusers, "Krea2Pipeline"):
    RUNS |= {"Krea 2": lambda pipe: krea2(), "Krea 2, distilled": lambda pipe: krea2(is_distilled=True)}


def krea2(**settings):
    from tests.support.tiny_krea2 import tiny_krea2_pipeline  # of a transformers that has its encoder

    made = tiny_krea2_pipeline()
    made.register_to_config(**settings)
    return made


if hasattr(diffusers, "QwenImage21Pipeline"):  # and a transformers that has its encoder
    from tests.support.tiny_qwen21 import tiny_qwen21_pipeline

    RUNS["Qwen-Image 2.1"] = tiny_qwen21_pipeline


if hasattr(diffusers, "Ideogram4Pipeline"):
    from tests.support.tiny_ideogram4 import tiny_ideogram4_pipeline

    RUNS["Ideogram 4"] = tiny_ideogram4_pipeline
if hasattr(diffusers, "NucleusMoEImagePipeline"):
    from tests.support.tiny_nucleus import tiny_nucleus_pipeline

    RUNS["Nucleus-Image"] = tiny_nucleus_pipeline
if hasattr(diffusers, "HunyuanImagePipeline"):
    from tests.support.tiny_hunyuan_guided import tiny_hunyuan_image_pipeline

    RUNS["HunyuanImage"] = lambda pipe: tiny_hunyuan_image_pipeline(decodes=True)
if hasattr(diffusers, "BriaFiboPipeline"):
    from tests.support.tiny_bria_fibo import tiny_fibo_pipeline

    RUNS["Bria FIBO"] = lambda pipe: tiny_fibo_pipeline(decodes=True)
if hasattr(diffusers, "Kandinsky5T2IPipeline"):
    from tests.support.tiny_kandinsky5 import tiny_kandinsky5_pipeline

    RUNS["Kandinsky 5"] = lambda pipe: tiny_kandinsky5_pipeline(pipe, torch.float32, decodes=True, sizes=[(160, 96)])
#: Which shift σ themselves, or for no size; for a pipeline whose own guidance is of other steps, another guidance.
GUIDED = {"Ideogram 4": {"guidance_scale": 3.0}, "HunyuanImage": {}, "Kandinsky 5": {}}


@pytest.mark.parametrize("shift", [flux_shift, sd3_shift])
def test_the_shift_is_diffusers(pipe, shift):
    scheduler = tiny_flux_pipeline(pipe).scheduler
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    for tokens in (1, 16, 256, 1024, 4096, 5000):
        assert shift_of(scheduler, tokens) == shift(tokens, *(scheduler.config[name] for name in names))


@pytest.mark.parametrize("family", RUNS)
def test_the_run_is_the_pipelines(pipe, family):
    """Sigmas too, of schedulers that shift them by the size of an image, or, as Lumina 2's pipeline has it, by its
    channels."""
    tiny = FreePromptPipeline.from_pipe(RUNS[family](pipe))
    tiny.set_progress_bar_config(disable=True)
    tiny.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=family not in GUIDED)
    options = {
        "num_inference_steps": 5,
        "height": 96,
        "width": 160,
        "max_sequence_length": 80,
        **GUIDED.get(family, {}),
    }
    tiny("a cat", output_type="latent", **options)
    expected = tiny.scheduler.sigmas
    tiny.scheduler.set_timesteps(2, mu=0.1)
    tiny.flow().set_timesteps(5, (96, 160))
    assert torch.equal(tiny.scheduler.sigmas, expected) and len(expected) == 6


@pytest.mark.parametrize("make", [tiny_sd3_pipeline, tiny_flux_pipeline])
def test_latents_become_the_pipelines_pictures(pipe, make):
    flow = FreePromptPipeline.from_pipe(make(pipe, dtype=torch.float32))
    asked = {"num_inference_steps": 2, "height": 48, "width": 80}
    latents, pictures = (
        flow("a cat", generator=torch.Generator().manual_seed(0), output_type=kind, **asked).images
        for kind in ("latent", "pil")
    )
    (picture,) = decoded(flow, latents, (48, 80))
    assert picture.size == (80, 48) and picture.tobytes() == pictures[0].tobytes()


def test_packed_latents_need_a_size(pipe):
    flow = flow_model(tiny_flux_pipeline(pipe))
    latents = torch.arange(2 * 16 * 4 * 6, dtype=torch.float64).reshape(2, 16, 4, 6)
    factor = flow.pipe.vae_scale_factor
    assert torch.equal(flow.unpacked(flow.latents(latents), (4 * factor, 6 * factor)), latents)
    with pytest.raises(ValueError, match="expected the size of the images"):
        flow.unpacked(flow.latents(latents))
