"""Pipelines around transformers other than text to image: parts of a picture painted anew, and what is not served."""

import numpy as np
import pytest
import torch
from diffusers import FluxInpaintPipeline, FluxKontextPipeline, StableDiffusion3InpaintPipeline
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from PIL import Image

from fpe_pipeline import ConsistEdit, FreePromptEdit, FreePromptPipeline, StableFlowEdit, editing
from fpe_pipeline.inversion.flow import invert_flow
from tests.support.dense_joint import dense
from tests.support.slow_cases import few
from tests.support.tiny_transformers import PROMPTS, draw, tiny_flux_pipeline, tiny_sd3_pipeline
from tests.support.tiny_wan import tiny_wan_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8
PAINTED = {
    "sd3": (lambda pipe: tiny_sd3_pipeline(pipe, "sd3.5", kind=StableDiffusion3InpaintPipeline), 2),
    "flux": (lambda pipe: tiny_flux_pipeline(pipe, kind=FluxInpaintPipeline), 1),
}
TAKEN = {
    "FPE": (FreePromptEdit(1.0), ("q_image", "k_image"), False),
    "ConsistEdit": (ConsistEdit(1.0), ("q_image", "k_image"), True),
    "Stable Flow": (StableFlowEdit(layers=range(2)), ("k_image", "v_image"), True),
}


@pytest.mark.parametrize("edit", few(TAKEN.keys(), "FPE"))
@pytest.mark.parametrize("family", few(PAINTED.keys(), "sd3"))
def test_inpainting(pipe, family, edit):
    """Targets are edited where the mask is white; elsewhere all rows are the picture, as without an edit."""
    make, halves = PAINTED[family]
    tiny, (chosen, names, both) = make(pipe), TAKEN[edit]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    mask[..., 32:] = 1
    options = {"height": 64, "width": 64, "strength": 0.75, "num_inference_steps": 8, "max_sequence_length": 12}

    options |= {"mask_image": mask, "output_type": "latent", "guidance_scale": 4.0}

    def run(prompts, images, generator):
        return tiny(prompts, image=images, generator=generator, **options).images

    with editing(tiny, chosen) as session:
        actual = run(PROMPTS[:2], image, torch.Generator().manual_seed(0))
    assert session.report().layers and all(noted == [2, 3, 4, 5, 6, 7] for noted in session.report().layers.values())

    def rule(row, rows):
        source = row // (rows // halves) * (rows // halves)
        return [(1.0, dict.fromkeys(names, source))] if row > source and (both or row >= rows - 2) else None

    layers = "transformer_blocks" if edit == "Stable Flow" else ""
    if edit == "ConsistEdit" and family == "flux":
        layers = "single_transformer_blocks"
    if edit == "Stable Flow":  # its layers are the first two
        rule = _in_blocks(tiny, rule, 2)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with dense(tiny, rule, steps=range(2, 8), layers=layers):
        expected = run(PROMPTS[:2], image.repeat(2, 1, 1, 1), generators)
    assert (actual - expected).abs().max() <= EXACT
    plain = run(PROMPTS[:2], image.repeat(2, 1, 1, 1), [torch.Generator().manual_seed(0) for _ in range(2)])
    assert (actual - plain)[1].abs().max() > 1e-4 and (actual - plain)[0].abs().max() <= EXACT


def _in_blocks(tiny, rule, count):
    """A rule in the first blocks alone, told by which of them is computed."""
    state = {"block": -1}
    for index, block in enumerate(tiny.transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, index=index: state.update(block=index))
    return lambda row, rows: rule(row, rows) if state["block"] < count else None


class TestRefusals:
    def test_image_prompts_of_stable_diffusion_3(self, pipe):
        tiny = tiny_sd3_pipeline(pipe, dtype=torch.float32)
        adapter = SD3IPAdapterJointAttnProcessor2_0(hidden_size=16, ip_hidden_states_dim=16, head_dim=8)
        tiny.transformer.transformer_blocks[0].attn.set_processor(adapter)
        message = r"transformer_blocks\.0\.attn: its processor SD3IPAdapterJointAttnProcessor2_0 may do more"
        with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit()):
            draw(tiny)

    def test_conveniences_of_other_families(self, pipe):
        tiny = tiny_wan_pipeline(pipe)
        message = r"HunyuanImage 2\.1, CogView 3 Plus and Bria FIBO, got \w+Pipeline; put `with editing\(pipe, edit\):`"
        with pytest.raises(TypeError, match=message):
            FreePromptPipeline.from_pipe(tiny)
        with pytest.raises(TypeError, match=message):
            invert_flow(tiny, np.zeros((64, 64, 3)))

    def test_reference_pictures(self, pipe):
        """Kontext's calls hold one, which neither an inversion nor a recording knows."""
        tiny = tiny_flux_pipeline(pipe, kind=FluxKontextPipeline)
        message = "hold no reference picture, which is part of every call"
        with pytest.raises(TypeError, match=message):
            FreePromptPipeline.from_pipe(tiny)
        with pytest.raises(TypeError, match=message):
            invert_flow(tiny, Image.new("RGB", (64, 64)))
