"""Every class of model that a session claims to edit, as an ordinary diffusers pipeline with random weights."""

import pytest
import torch

from fpe_pipeline import BatchRoles, editing
from fpe_pipeline.session.processors.unet import EditAttnProcessor
from tests.support.tiny_models import (
    EVERYWHERE,
    check_edit,
    check_restored,
    draw,
    tiny_inpaint_pipeline,
    tiny_instruct_pipeline,
    tiny_sd2_pipeline,
)
from tests.support.tiny_pipelines import sample, tiny_controlnet_pipeline, tiny_pipeline, tiny_sdxl_pipeline

PICTURE = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_stable_diffusion_2(pipe):
    """Predicts velocities; linear projections, a number of heads for each level, upcast attention."""
    tiny = tiny_sd2_pipeline(pipe)
    assert tiny.scheduler.config.prediction_type == "v_prediction"
    assert {site.heads for site in editing(tiny, EVERYWHERE).sites} == {1, 2}
    edited = check_edit(tiny)
    tiny.scheduler.register_to_config(prediction_type="epsilon")
    with editing(tiny, EVERYWHERE):
        assert (sample(tiny, 3) - edited).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_stable_diffusion_xl(pipe, guidance):
    tiny = tiny_sdxl_pipeline(pipe)
    seen = []
    hook = tiny.unet.add_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    check_edit(tiny, guidance_scale=guidance, steps=2)
    hook.remove()
    # Pooled text of the second encoder (8) and six numbers of sizes (4 channels each), for every row.
    assert set(seen) == {(6 if guidance > 1 else 3, 32)}


def test_stable_diffusion_xl_with_its_own_conditions(pipe):
    """The second encoder's prompt and the sizes reach the UNet in an edited call as in any other."""
    tiny = tiny_sdxl_pipeline(pipe)
    with editing(tiny, EVERYWHERE):
        edited = sample(tiny, 2, steps=2)
        for changed in ({"prompt_2": ["a sketch", "an etching"]}, {"original_size": (512, 1024)}):
            assert (sample(tiny, 2, steps=2, **changed) - edited).abs().max() > 1e-4, changed


def test_controlnet_is_not_edited_itself(pipe):
    tiny = tiny_controlnet_pipeline(pipe)
    processors = tiny.controlnet.attn_processors
    seen = []

    def watch(module, args, kwargs, output):
        assert not any(isinstance(p, EditAttnProcessor) for p in module.attn_processors.values())
        assert module.attn_processors == processors
        seen.append((args, kwargs, output))

    handle = tiny.controlnet.register_forward_hook(watch, with_kwargs=True)
    with editing(tiny, EVERYWHERE):
        sample(tiny, 3, image=PICTURE)
    handle.remove()
    args, kwargs, output = seen[-1]
    with torch.no_grad():  # outside the session, with what it was given inside
        again = tiny.controlnet(*args, **kwargs)
    assert torch.equal(again[1], output[1])
    assert len(seen) == 3
    check_edit(tiny, image=PICTURE, controlnet_conditioning_scale=0.8)


def test_inpainting(pipe):
    """Nine channels: latents, the mask, and the picture's latents under it."""
    mask = torch.zeros(3, 1, 64, 64)
    mask[..., 16:48, :] = 1.0
    tiny = tiny_inpaint_pipeline(pipe)
    seen = []
    hook = tiny.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    check_edit(tiny, image=PICTURE, mask_image=mask, strength=1.0)
    hook.remove()
    assert set(seen) == {(6, 9, 8, 8)}


class TestInstructPix2Pix:
    """Batches of three parts: [with text and image, with the image alone, with neither]."""

    @staticmethod
    def sample(tiny):
        return tiny(
            ["make it red", "make it blue"],
            image=PICTURE[:2],
            latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1),
            num_inference_steps=2,
            guidance_scale=5.0,
            output_type="latent",
        ).images

    def test_three_parts_are_not_taken_for_two(self, pipe):
        tiny = tiny_instruct_pipeline(pipe)
        with pytest.raises(ValueError, match=r"Pix2PixPipeline guides by image too.*roles="), editing(tiny, EVERYWHERE):
            self.sample(tiny)
        assert not any(isinstance(p, EditAttnProcessor) for p in tiny.unet.attn_processors.values())

    def test_with_its_layout(self, pipe):
        tiny = tiny_instruct_pipeline(pipe)
        plain = self.sample(tiny)
        layout = BatchRoles(conditional=(True, True) + (False,) * 4, source_of=(0, 0, 2, 2, 4, 4))
        with editing(tiny, EVERYWHERE, roles=layout):
            change = (self.sample(tiny) - plain).abs().amax((1, 2, 3))
        assert change[0] < 1e-4 and change[1] > 1e-3


class TestLora:
    """Adapters loaded into a pipeline by its own methods."""

    @pytest.fixture
    def tiny(self, pipe):
        peft = pytest.importorskip("peft")
        donor, tiny = tiny_pipeline(pipe), tiny_pipeline(pipe)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        donor.unet.add_adapter(config)
        weights = peft.get_peft_model_state_dict(donor.unet)
        tiny.load_lora_weights({f"unet.{name}": weight for name, weight in weights.items()}, adapter_name="style")
        return tiny

    def test_loaded(self, tiny):
        loaded = check_restored(tiny)
        with editing(tiny, EVERYWHERE):
            half = draw(tiny, cross_attention_kwargs={"scale": 0.5})
            tiny.disable_lora()
            without = draw(tiny)
            tiny.enable_lora()
            assert torch.equal(draw(tiny), loaded)
        assert (half - loaded).abs().max() > 1e-3
        assert (half - without).abs().max() > 1e-3

    @pytest.mark.slow
    def test_fused(self, tiny):
        """With its weights merged, the adapter is in the dense mathematics too."""
        with editing(tiny, EVERYWHERE):
            loaded = draw(tiny)
        tiny.fuse_lora()
        tiny.unload_lora_weights()
        torch.testing.assert_close(check_edit(tiny), loaded, rtol=0, atol=1e-4)
