"""``accelerate`` beside what people set on these pipelines: offloading, guiders, FreeU, IP-Adapters, other processors.

Each setting is made first; then a pipeline gives, accelerated, what it gave before.
"""

from contextlib import contextmanager

import pytest
import torch
from diffusers import LayerSkipConfig, PerturbedAttentionGuidance, SkipLayerGuidance, StableDiffusionPipeline
from diffusers.hooks import HookRegistry, SmoothedEnergyGuidanceConfig
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from diffusers.models.attention_processor import Attention, AttnProcessor, IPAdapterAttnProcessor

from fpe_pipeline.compat import accelerate
from tests.support.dropin import load_dropin_pipeline
from tests.support.map_users import MAP_USERS, generator
from tests.support.tiny_models import add_image_prompts, draw, image_embeds
from tests.support.tiny_pipelines import tiny_pipeline

FLOAT32 = 1e-4
BLOCKS = "mid_block.attentions.0.transformer_blocks"
SHORT = {"Attend-and-Excite": {"max_iter_to_alter": 1}}
pytestmark = pytest.mark.slow


@contextmanager
def offloaded(pipe, method):
    """By diffusers' own method, with the CPU as the accelerator: the same hooks, no second memory."""
    pytest.importorskip("accelerate")
    getattr(pipe, method)(device="cpu")
    try:
        yield
    finally:
        pipe.remove_all_hooks()


@contextmanager
def free_u(pipe):
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        yield
    finally:
        pipe.unet.disable_freeu()


@contextmanager
def hooked(pipe, apply):
    """What guiders do to a model for their perturbed pass."""
    registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
    apply(pipe.unet)
    try:
        yield
    finally:
        registry.remove_hook("perturbed", recurse=True)


def skipping(**what):
    from diffusers.hooks.layer_skip import _apply_layer_skip_hook

    config = LayerSkipConfig(indices=[0], fqn=BLOCKS, **what)
    return lambda pipe: hooked(pipe, lambda unet: _apply_layer_skip_hook(unet, config, name="perturbed"))


#: What diffusers' own processors cannot do, accelerated or not: keep the map of a layer that is skipped, be smoothed in
#: place and then go backward.
FAILING = {
    ("SAG", "skipped block (SLG)"): AttributeError,
    ("Attend-and-Excite", "skipped block (SLG)"): KeyError,
    ("Attend-and-Excite", "smoothed queries (SEG)"): RuntimeError,
    ("pix2pix-zero", "smoothed queries (SEG)"): RuntimeError,
}


def smoothing(pipe):
    config = SmoothedEnergyGuidanceConfig(indices=[0], fqn=BLOCKS)
    return hooked(pipe, lambda unet: _apply_smoothed_energy_guidance_hook(unet, config, 9999999.0, name="perturbed"))


SETTINGS = {
    "model offloading": lambda pipe: offloaded(pipe, "enable_model_cpu_offload"),
    "FreeU": free_u,
    "skipped feed-forward (SLG)": skipping(skip_attention=False, skip_ff=True),
    "skipped block (SLG)": skipping(),
    "skipped scores (PAG)": skipping(skip_attention=False, skip_attention_scores=True, skip_ff=False),
    "smoothed queries (SEG)": smoothing,
}


@pytest.fixture(scope="module")
def pipes():
    """In float64: thresholds and several gradient steps would turn float32's rounding into another picture."""
    return {model: load_dropin_pipeline(model).to(torch.float64) for model in ("tiny-sd15", "tiny-sdxl")}


def run_of(name, pipes):
    pipe = pipes["tiny-sdxl" if name.endswith("XL") else "tiny-sd15"]
    return MAP_USERS[name](pipe, **{"num_inference_steps": 1, **SHORT.get(name, {})} if "LEDITS" not in name else {})


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MAP_USERS)
def test_the_same_before_and_after(pipes, name, setting):
    tiny, run = run_of(name, pipes)
    before_all = dict(tiny.unet.attn_processors)
    plain, error = run(tiny).images, FAILING.get((name, setting))
    tiny.unet.set_attn_processor(dict(before_all))
    try:
        with SETTINGS[setting](tiny):
            if error is not None:
                with pytest.raises(error):
                    run(tiny)
                with accelerate(tiny), pytest.raises(error):
                    run(tiny)
                return
            before = run(tiny).images
            with accelerate(tiny) as acceleration:
                after = run(tiny).images
    finally:
        tiny.unet.set_attn_processor(before_all)
    assert acceleration.served and not acceleration.left_alone
    torch.testing.assert_close(after, before, atol=1e-8, rtol=1e-8)
    # Scores are skipped of fused processors alone, which not all of these pipelines leave where the hook is.
    assert setting in ("model offloading", "skipped scores (PAG)") or (before - plain).abs().max() > FLOAT32


@pytest.mark.parametrize("name", MAP_USERS)
def test_sequential_offloading(name):
    """A weight of the UNet is nowhere but while its own module runs: on ``meta`` before, and after."""
    offloading = pytest.importorskip("accelerate")
    model = "tiny-sdxl" if name.endswith("XL") else "tiny-sd15"
    tiny, run = run_of(name, {model: load_dropin_pipeline(model)})
    before = run(tiny).images
    offloading.cpu_offload(tiny.unet, execution_device="cpu", offload_buffers=True)
    with accelerate(tiny) as acceleration:
        assert {parameter.device.type for parameter in tiny.unet.parameters()} == {"meta"}
        after = run(tiny).images
        assert {parameter.device.type for parameter in tiny.unet.parameters()} == {"meta"}
    assert acceleration.served
    assert (after - before).abs().max() <= FLOAT32 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("kind", [SkipLayerGuidance, PerturbedAttentionGuidance])
@torch.no_grad()
def test_guiders_of_modular_pipelines(pipe, kind):
    """Three passes of a step, of which the guider perturbs the last, in a model whose processors ask for maps; scores
    are skipped of fused processors alone, which an acceleration leaves as they are."""
    unet = tiny_pipeline(pipe).unet
    skips_scores = kind is PerturbedAttentionGuidance
    if not skips_scores:
        unet.set_attn_processor(AttnProcessor())
    given = torch.randn(2, 4, 8, 8, generator=generator()), 10, torch.randn(2, 5, 32, generator=generator())
    config = LayerSkipConfig(
        indices=[0],
        fqn=BLOCKS,
        skip_attention=not skips_scores,
        skip_attention_scores=skips_scores,
        skip_ff=not skips_scores,
    )
    what = "perturbed_guidance" if skips_scores else "skip_layer"
    start = "perturbed_guidance" if skips_scores else "skip_layer_guidance"

    def passes():
        guider = kind(**{f"{what}_config": config, f"{start}_start": 0.0, f"{start}_stop": 1.0})
        guider.set_state(1, 4, torch.tensor(10))
        for _ in range(3):
            guider.prepare_models(unet)
            yield unet(*given).sample
            guider.cleanup_models(unet)

    before = list(passes())
    with accelerate(unet) as acceleration:
        after = list(passes())
    assert ("AttnProcessor" in acceleration.served) != skips_scores
    assert (before[2] - before[0]).abs().max() > 1e-4
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_processors_that_ask_for_maps_skip_no_scores(pipe):
    """PAG's hook catches PyTorch's fused attention: a product of a lazy map is none, as one of a matrix is none.

    In float32, where the product on a CPU is that very operator; of one row too, and of rows that are the same.
    """
    tiny = tiny_pipeline(pipe)
    layer = next(layer for layer in tiny.unet.modules() if isinstance(layer, Attention))
    layer.set_processor(AttnProcessor())
    hidden = torch.randn(2, 16, layer.to_q.in_features, generator=generator())
    given = (hidden, hidden[:1].expand_as(hidden), hidden[:1])
    plain = [layer(one) for one in given]
    with accelerate(tiny), AttentionScoreSkipFunctionMode():
        for one, before in zip(given, plain, strict=True):
            torch.testing.assert_close(layer(one), before, atol=1e-5, rtol=1e-5)


def test_image_prompts(pipe):
    """An IP-Adapter whose processors ask for maps, of the text's keys and of the image's."""
    tiny = tiny_pipeline(pipe)
    add_image_prompts(tiny)
    mapping = {}
    for name, fused in tiny.unet.attn_processors.items():
        mapping[name] = AttnProcessor()
        if hasattr(fused, "to_k_ip"):
            sizes = fused.hidden_size, fused.cross_attention_dim
            mapping[name] = IPAdapterAttnProcessor(*sizes, num_tokens=fused.num_tokens, scale=fused.scale)
            mapping[name].load_state_dict(fused.state_dict())
    fused = draw(tiny, ip_adapter_image_embeds=image_embeds(1))
    tiny.unet.set_attn_processor(mapping)
    before = draw(tiny, ip_adapter_image_embeds=image_embeds(1))
    torch.testing.assert_close(before, fused, atol=1e-4, rtol=1e-4)
    with accelerate(tiny) as acceleration:
        after = draw(tiny, ip_adapter_image_embeds=image_embeds(1))
        others = draw(tiny, ip_adapter_image_embeds=[2 * one for one in image_embeds(1)])
    assert acceleration.served["IPAdapterAttnProcessor"] and not acceleration.left_alone
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert (others - after).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["SAG", "Attend-and-Excite", "pix2pix-zero", "Prompt-to-Prompt"])
def test_properties_stay(pipes, name, tmp_path):
    """As diffusers' own tests have them: a tuple or an output, callbacks, saved and loaded."""
    tiny, run = run_of(name, pipes)
    before_all = tiny.unet.attn_processors
    _, tupled = MAP_USERS[name](
        pipes["tiny-sd15"], **{"num_inference_steps": 1, **SHORT.get(name, {})}, return_dict=False
    )
    seen = []
    if name == "Prompt-to-Prompt":
        seeing = {"callback_on_step_end": lambda pipe, step, t, tensors: seen.append(step) or tensors}
    else:
        seeing = {"callback": lambda step, t, latents: seen.append(step), "callback_steps": 1}
    _, called = MAP_USERS[name](pipes["tiny-sd15"], **{"num_inference_steps": 2, **SHORT.get(name, {})}, **seeing)
    with accelerate(tiny):
        images = run(tiny).images
        torch.testing.assert_close(tupled(tiny)[0], images, atol=1e-5, rtol=1e-5)
        called(tiny)
        assert seen == [0, 1]
        tiny.unet.save_pretrained(tmp_path / "unet")
    tiny.unet.set_attn_processor(before_all)
    loaded = type(tiny.unet).from_pretrained(tmp_path / "unet")
    assert all(map(torch.equal, loaded.state_dict().values(), tiny.unet.state_dict().values()))
    assert not any("get_attention_scores" in vars(module) for module in loaded.modules())


@pytest.mark.parametrize("name", ["SAG", "Prompt-to-Prompt"])
def test_gradients_of_latents(pipe, name):
    """Of all that a pipeline's processors do in one call of the UNet, in float32."""
    tiny = tiny_pipeline(pipe)
    given = torch.randn(2, 4, 8, 8, generator=generator()), torch.randn(2, 5, 32, generator=generator())
    pipeline, _ = MAP_USERS[name](tiny)
    assert isinstance(pipeline, StableDiffusionPipeline) or name == "SAG"
    pipeline.unet.set_attn_processor(AttnProcessor())

    def gradient():
        latents, text = (part.clone().requires_grad_(True) for part in given)
        return torch.autograd.grad(pipeline.unet(latents, 10, text).sample.square().sum(), [latents, text])

    before = gradient()
    with accelerate(pipeline) as acceleration:
        after = gradient()
    assert acceleration.served["AttnProcessor"]
    for one, other in zip(before, after, strict=True):
        assert (one - other).abs().max() <= FLOAT32 * max(1.0, float(one.abs().max()))
