"""Which models and schedulers a recording serves: those that make the same images, however they are computed."""

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from fpe_pipeline import FreePromptPipeline, ddim_scheduler
from fpe_pipeline.recordings.fingerprint import fingerprint
from tests.support.free_prompt_pipelines import SOURCE, TARGET, distance, free_prompt_pipeline, noise
from tests.support.tiny_models import add_image_prompts, image_embeds, tiny_inpaint_pipeline
from tests.support.tiny_pipelines import tiny_pipeline, tiny_sdxl_pipeline

STEPS = 3
RUN = {"num_inference_steps": STEPS, "latents": noise()}


@pytest.fixture
def tiny(pipe):
    tiny = free_prompt_pipeline(pipe)
    tiny.scheduler = ddim_scheduler(tiny.scheduler)
    return tiny


def edited(tiny, recorded):
    return tiny.edit(recorded, TARGET, output_type="latent").images


def refused(tiny, recorded):
    with pytest.raises(ValueError, match=r"the recording is of another model: .* adapters and their strengths, FreeU"):
        edited(tiny, recorded)


class TestSwitches:
    @pytest.mark.slow
    def test_adapters(self, pipe, tiny):
        peft = pytest.importorskip("peft")
        donor = tiny_pipeline(pipe)
        donor.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
        weights = peft.get_peft_model_state_dict(donor.unet)
        plain = tiny.record(SOURCE, **RUN)
        tiny.load_lora_weights({f"unet.{name}": tensor for name, tensor in weights.items()}, adapter_name="style")
        refused(tiny, plain)
        recorded = tiny.record(SOURCE, **RUN)
        expected = edited(tiny, recorded)
        tiny.set_adapters(["style"], [0.1])
        refused(tiny, recorded)
        tiny.disable_lora()
        refused(tiny, recorded)
        tiny.enable_lora()
        tiny.set_adapters(["style"], [1.0])
        assert torch.equal(edited(tiny, recorded), expected)
        tiny.unload_lora_weights()
        edited(tiny, plain)

    @pytest.mark.slow
    def test_free_u(self, tiny):
        recorded = tiny.record(SOURCE, **RUN)
        tiny.enable_freeu(0.9, 0.2, 1.5, 1.6)
        refused(tiny, recorded)
        changed = tiny.record(SOURCE, **RUN)
        tiny.enable_freeu(0.9, 0.2, 1.5, 1.4)
        refused(tiny, changed)
        tiny.disable_freeu()
        edited(tiny, recorded)


def test_words_that_a_text_encoder_has_learnt(pipe):
    """By textual inversion: the last of several vectors too, of a name that another model has learnt otherwise."""

    def learnt(*seeds):
        made = FreePromptPipeline.from_pipe(tiny_pipeline(pipe))
        made.text_encoder, made.tokenizer = copy.deepcopy(made.text_encoder), copy.deepcopy(made.tokenizer)
        width = made.text_encoder.config.hidden_size
        vectors = [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        made.load_textual_inversion({"<mine>": torch.stack(vectors)})
        return made

    assert fingerprint(learnt(1, 2)) == fingerprint(learnt(1, 2))
    assert len({fingerprint(learnt(*seeds)) for seeds in ((1, 2), (1, 3), (3, 2))}) == 3
    recorded = learnt(1, 2).record("a photo of <mine>", **RUN)
    with pytest.raises(ValueError, match="the recording is of another model"):
        learnt(1, 3).edit(recorded, "a drawing of <mine>")


class TestSameModel:
    """What changes only how a model is computed."""

    def test_compiled(self, tiny):
        before = fingerprint(tiny)
        unet = tiny.unet
        tiny.unet = torch.compile(unet, backend="eager")
        assert fingerprint(tiny) == before
        tiny.unet = unet
        tiny.unet.mid_block = torch.compile(tiny.unet.mid_block, backend="eager")
        assert fingerprint(tiny) == before

    def test_fused_projections(self, tiny):
        recorded = tiny.record(SOURCE, **RUN)
        expected = edited(tiny, recorded)
        tiny.fuse_qkv_projections(vae=False)
        assert distance(edited(tiny, recorded), expected) <= 1e-4
        tiny.unfuse_qkv_projections(vae=False)
        assert torch.equal(edited(tiny, recorded), expected)

    @pytest.mark.slow
    def test_sequential_offloading(self, tiny):
        """As ``enable_sequential_cpu_offload``: a weight is nowhere but while its own module runs."""
        accelerate = pytest.importorskip("accelerate")
        recorded = tiny.record(SOURCE, **RUN)
        expected = edited(tiny, recorded)
        tiny.unet = copy.deepcopy(tiny.unet)
        accelerate.cpu_offload(tiny.unet, execution_device="cpu", offload_buffers=True)
        assert {parameter.device.type for parameter in tiny.unet.parameters()} == {"meta"}
        assert torch.equal(edited(tiny, recorded), expected)
        assert torch.equal(edited(tiny, tiny.record(SOURCE, **RUN)), expected)
        with torch.no_grad():
            tiny.unet.conv_in._hf_hook.weights_map.dataset["conv_in.weight"].mul_(1.001)
        refused(tiny, recorded)

    def test_weights_that_are_nowhere(self, tiny):
        tiny.unet = copy.deepcopy(tiny.unet).to("meta")
        with pytest.raises(ValueError, match="is on the meta device and no hook of accelerate holds it"):
            fingerprint(tiny)


class TestSchedulers:
    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"solver_order": 1}, "solver_order 3 there and 1 here"),
            ({"solver_type": "heun"}, "solver_type midpoint there and heun here"),
            ({"lower_order_final": False}, "lower_order_final True there and False here"),
            ({"algorithm_type": "sde-dpmsolver++"}, "adds noise in each step"),
        ],
    )
    def test_other_options(self, tiny, option, message):
        config = dict(tiny.scheduler.config)
        tiny.scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=3)
        recorded = tiny.record(SOURCE, **RUN)
        tiny.scheduler = DPMSolverMultistepScheduler.from_config(config, **{"solver_order": 3, **option})
        with pytest.raises(ValueError, match=message):
            edited(tiny, recorded)
        tiny.scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=3)
        edited(tiny, recorded)

    def test_another_class(self, tiny):
        recorded = tiny.record(SOURCE, **RUN)
        tiny.scheduler = EulerDiscreteScheduler.from_config(tiny.scheduler.config)
        with pytest.raises(ValueError, match="scheduler DDIMScheduler there and EulerDiscreteSch"):
            edited(tiny, recorded)

    def test_options_of_a_former_class(self, tiny):
        """They stay in a converted scheduler's configuration and do nothing."""
        recorded = tiny.record(SOURCE, **RUN)
        tiny.scheduler = type(tiny.scheduler).from_config({**tiny.scheduler.config, "skip_prk_steps": True})
        edited(tiny, recorded)


class TestClasses:
    def test_image_prompts(self, tiny, monkeypatch):
        """Edits of generated images take them; what is kept of a source does not."""
        recorded = tiny.record(SOURCE, **RUN)
        tiny.unet = copy.deepcopy(tiny.unet)
        add_image_prompts(tiny)
        tiny(SOURCE, TARGET, ip_adapter_image_embeds=image_embeds(1), output_type="latent", **RUN)
        monkeypatch.setattr(tiny.unet, "forward", lambda *a, **k: pytest.fail("denoised before it was checked"))
        for call in (
            lambda: tiny.record(SOURCE, **RUN),
            lambda: edited(tiny, recorded),
            lambda: tiny.invert(torch.rand(3, 24, 32), SOURCE, num_inference_steps=2),
        ):
            with pytest.raises(ValueError, match=r"takes no image prompts, .*pipe.unload_ip_adapter\(\)"):
                call()

    def test_further_input_channels(self, pipe, tiny):
        inpainting = FreePromptPipeline.from_pipe(tiny)
        inpainting.unet = tiny_inpaint_pipeline(pipe).unet
        recorded = tiny.record(SOURCE, **RUN)
        for call in (
            lambda: inpainting(SOURCE, TARGET, **RUN),
            lambda: inpainting.record(SOURCE, **RUN),
            lambda: edited(inpainting, recorded),
            lambda: inpainting.invert(torch.rand(3, 24, 32), SOURCE, num_inference_steps=2),
            lambda: FreePromptPipeline.from_pipe(tiny_inpaint_pipeline(pipe)),
        ):
            with pytest.raises(ValueError, match=r"takes the 4 channels .* one that takes 9, .*editing\(pipe, edit\)"):
                call()

    def test_sdxl_in_the_place_of_its_own_unet(self, pipe, tiny):
        tiny.unet = tiny_sdxl_pipeline(pipe).unet
        for call in (lambda: tiny(SOURCE, TARGET, **RUN), lambda: tiny.record(SOURCE, **RUN)):
            with pytest.raises(ValueError, match=r"addition_embed_type='text_time': .*FreePromptXLPipeline"):
                call()
