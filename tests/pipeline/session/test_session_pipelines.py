"""Sessions on every kind of pipeline, and what an edited step computes."""

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

from fpe_pipeline import FreePromptEdit, editing
from tests.support.tiny_pipelines import (
    PROMPTS,
    sample,
    shared_noise,
    tiny_controlnet_pipeline,
    tiny_pipeline,
    tiny_sdxl_pipeline,
    unedited,
)
from tests.support.tiny_unets import tiny_unet, unet_inputs

FPE = FreePromptEdit(0.8)


def check_edits_the_targets(pipe, **kwargs):
    """Only targets change, and the pipeline gives its own images again afterwards."""
    plain = sample(pipe, 3, **kwargs)
    with editing(pipe, FPE) as session:
        edited = sample(pipe, 3, **kwargs)
    change = (edited - plain).abs().amax((1, 2, 3))
    assert change[0] < 1e-4
    assert change[1:].min() > 1e-3
    assert len(session.report().layers) == len(FPE.select(session.sites))
    assert torch.equal(sample(pipe, 3, **kwargs), plain)


def test_stable_diffusion(tiny):
    check_edits_the_targets(tiny)


def test_without_guidance(tiny):
    check_edits_the_targets(tiny, guidance_scale=1.0)


def test_not_square(tiny):
    check_edits_the_targets(tiny, size=(6, 12))


def test_stable_diffusion_xl(pipe):
    check_edits_the_targets(tiny_sdxl_pipeline(pipe))


def test_controlnet(pipe):
    image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    check_edits_the_targets(tiny_controlnet_pipeline(pipe), image=image)


def test_images_per_prompt(tiny):
    """Image i of every prompt is what it is alone."""
    with editing(tiny, FPE, images_per_prompt=2):
        both = sample(tiny, images=2)
    for image in range(2):
        with editing(tiny, FPE):
            alone = tiny(
                PROMPTS[:2],
                latents=shared_noise(1, images=2)[image].expand(2, -1, -1, -1),
                num_inference_steps=3,
                guidance_scale=5.0,
                output_type="latent",
            ).images
        torch.testing.assert_close(both[image::2], alone, rtol=0, atol=1e-4)


def test_several_sources(tiny):
    def run(prompts):
        noise = shared_noise(len(prompts))
        return tiny(prompts, latents=noise, num_inference_steps=3, guidance_scale=5.0, output_type="latent").images

    with editing(tiny, FPE, source_of=(0, 0, 2, 2)):
        both = run(PROMPTS[:4])
    with editing(tiny, FPE):
        alone = torch.cat([run(PROMPTS[:2]), run(PROMPTS[2:4])])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-4)


def test_an_adapter_in_peft_layers(pipe):
    """LoRA lives in the projections: edited layers use it, for the rows that they project."""
    peft = pytest.importorskip("peft")
    tiny = tiny_pipeline(pipe)
    without = sample(tiny)
    tiny.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    check_edits_the_targets(tiny)
    with editing(tiny, FPE):
        edited = sample(tiny)
    assert not torch.equal(sample(tiny), without)

    # The same weights merged by hand, edited without peft.
    tiny.unet.fuse_lora()
    tiny.unet.unload_lora()
    with editing(tiny, FPE):
        torch.testing.assert_close(sample(tiny), edited, rtol=0, atol=1e-4)


def test_fused_projections(pipe):
    tiny = tiny_pipeline(pipe)
    with editing(tiny, FPE):
        separate = sample(tiny)
    tiny.unet.fuse_qkv_projections()
    with editing(tiny, FPE):
        torch.testing.assert_close(sample(tiny), separate, rtol=0, atol=1e-4)
    assert unedited(tiny.unet)


def test_processors_that_are_modules_stay_registered(tiny):
    """An IP-Adapter's weights live in the processors of its cross-attention layers."""
    before = tiny.unet.attn_processors
    adapter = IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=32)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    try:
        tiny.unet.get_submodule(path).set_processor(adapter)
        weights = list(tiny.unet.state_dict())
        assert any(".processor." in name for name in weights)
        session = editing(tiny, FPE)
        with pytest.warns(RuntimeWarning, match="without a call"), session:
            assert tiny.unet.get_submodule(path).processor is adapter
            assert list(tiny.unet.state_dict()) == weights
        assert list(tiny.unet.state_dict()) == weights
    finally:
        tiny.unet.set_attn_processor(dict(before))


def test_channels_last(pipe):
    tiny = tiny_pipeline(pipe)
    with editing(tiny, FPE):
        expected = sample(tiny)
    tiny.unet.to(memory_format=torch.channels_last)
    with editing(tiny, FPE):
        torch.testing.assert_close(sample(tiny), expected, rtol=0, atol=1e-3)


def test_queries_and_keys_of_targets_are_not_projected(tiny):
    rows = {}
    layers = {site.path for site in FPE.select(editing(tiny, FPE).sites)}
    hooks = []
    for name in tiny.unet.attn_processors:
        path = name.removesuffix(".processor")
        for projection in ("to_q", "to_k", "to_v"):
            seen = rows.setdefault((path, projection), [])
            module = tiny.unet.get_submodule(f"{path}.{projection}")
            hooks.append(module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].shape[0])))
    try:
        with editing(tiny, FPE):
            sample(tiny, 4, steps=5)
    finally:
        for hook in hooks:
            hook.remove()
    # Of 8 rows, 4 are unconditional and 1 is the source; the last step is outside the window.
    for (path, projection), seen in rows.items():
        assert seen == [5 if path in layers and projection != "to_v" else 8] * 4 + [8], (path, projection)


def one_level_unet():
    """As small as a UNet with self-attention gets, because tracing takes seconds a layer."""
    unet = tiny_unet(
        "sd2",
        torch.float32,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
    )
    return unet, *unet_inputs(unet, 4)


def six_steps(unet, args, kwargs, **options):
    """The outputs of six steps of which the first three are edited."""
    edit = FreePromptEdit(0.5, layers="mid_block", **options)
    with torch.no_grad(), editing(unet, edit, classifier_free_guidance=True) as session:
        for index in range(6):
            session.step(index, 6)
            yield unet(*args, **kwargs).sample
    assert list(session.report().layers.values()) == [[0, 1, 2]]


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"strength": 0.5, "mask": torch.eye(16)}, marks=pytest.mark.slow)],
    ids=["replaced", "by degrees"],
)
def test_a_compiled_unet(options):
    """One graph without breaks for the steps inside the window and one for those outside, however many steps."""
    from torch._dynamo.testing import CompileCounter

    unet, args, kwargs = one_level_unet()
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    eager = list(six_steps(unet, args, kwargs, **options))
    for index, output in enumerate(six_steps(compiled, args, kwargs, **options)):
        torch.testing.assert_close(output, eager[index], rtol=0, atol=1e-5)
        assert counter.frame_count == (1 if index < 3 else 2)


@pytest.mark.slow
def test_a_unet_compiled_in_place():
    """`unet.compile()` traces hooks along with the UNet: a session's are left out of the graphs."""
    unet, args, kwargs = one_level_unet()
    eager = list(six_steps(unet, args, kwargs))
    unet.compile(backend="eager")
    for output, expected in zip(six_steps(unet, args, kwargs), eager, strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
