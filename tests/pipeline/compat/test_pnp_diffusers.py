"""pnp-diffusers' surface against its own outputs, and against maps that are written out."""

import types

import pytest
import torch
from diffusers import DDIMScheduler

from fpe_pipeline.compat import pnp_diffusers
from fpe_pipeline.compat.pnp_diffusers import (
    load_source_latents_t,
    register_attention_control_efficient,
    register_conv_control_efficient,
    register_time,
    seed_everything,
)
from tests.support.dropin import DDIM, load_dropin, load_dropin_pipeline
from tests.support.tiny_pipelines import unedited
from tests.support.tiny_unets import tiny_unet
from tests.support.written_out import dense_attention, softmax_map

ONE_BLOCK = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
CASES = ("pnp_attention_only", "pnp_conv_only")


@pytest.fixture(scope="module")
def sd15():
    return load_dropin_pipeline("tiny-sd15")


def embedded(pipe, text):
    ids = pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(ids)[0]


@torch.no_grad()
def edited(pipe, case, change=lambda name, steps: steps):
    """The original's sampling loop, with schedules that are changed by ``change``."""
    given, scheduler = case.settings, DDIMScheduler(**DDIM)
    scheduler.set_timesteps(given["steps"])
    assert scheduler.timesteps.tolist() == given["timesteps"]
    for name, register in (
        ("qk_steps", register_attention_control_efficient),
        ("conv_steps", register_conv_control_efficient),
    ):
        steps = change(name, given[name])
        if steps is not None:
            registered = register(pipe, scheduler.timesteps[steps], compat="original")
    texts = [embedded(pipe, text) for text in (given["source_prompt"], given["negative_prompt"], given["prompts"][0])]
    *sources, latents = case.tensors["in.source_latents"][:, None]
    with registered:
        for t, source in zip(scheduler.timesteps, sources, strict=True):
            register_time(pipe, t.item())
            noise = pipe.unet(torch.cat([source, latents, latents]), t, torch.cat(texts)).sample
            _, negative, positive = noise.chunk(3)
            guided = negative + given["guidance_scale"] * (positive - negative)
            latents = scheduler.step(guided, t, latents).prev_sample
    assert unedited(pipe.unet)
    return latents


@pytest.mark.parametrize("name", CASES)
def test_is_what_the_original_computes(sd15, name, no_whole_maps):
    case = load_dropin(name)
    assert case.miss("latents", edited(sd15, case)) <= 1


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("pnp_attention_only", {"qk_steps": [0, 1, 2, 3]}),  # a window in the place of members
        ("pnp_attention_only", {"conv_steps": [0, 2, 3]}),
        ("pnp_conv_only", {"conv_steps": [0, 1, 2]}),
        ("pnp_conv_only", {"qk_steps": [0]}),
    ],
)
def test_other_schedules_are_seen(sd15, name, planted):
    case = load_dropin(name)
    assert case.miss("latents", edited(sd15, case, lambda key, steps: planted.get(key, steps))) > 10


class Loop(types.SimpleNamespace):
    """What the original's functions are given: an object with a UNet."""


@pytest.fixture(scope="module")
def loop():
    return Loop(unet=tiny_unet("sd1", torch.float64, block_out_channels=(16, 32, 32), attention_head_dim=8))


def inputs(rows, size=(8, 12)):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(rows, 4, *size, generator=generator, dtype=torch.float64)
    return sample, torch.randn(rows, 7, 16, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("branches", [3, 2])
@torch.no_grad()
def test_any_prompts_heads_and_proportions(loop, branches, no_whole_maps):
    sample, text = inputs(3 * branches)
    first = "up_blocks.1.attentions.0."
    resnet = loop.unet.up_blocks[1].resnets[1].conv2
    plain = loop.unet(sample, 501, text).sample

    def attend(path, query, key, value, scale):
        attention = softmax_map(query, key, scale)
        if path.endswith("attn1") and path.startswith("up_blocks") and not path.startswith(first):
            attention = attention[:3].repeat(branches, 1, 1, 1)
        return attention @ value

    def inject(module, args, output):
        return output[:3].repeat(branches, 1, 1, 1)

    with dense_attention(loop.unet, attend):
        expected = loop.unet(sample, 501, text).sample
        handle = resnet.register_forward_hook(inject)
        both = loop.unet(sample, 501, text).sample
        handle.remove()
    assert (expected - plain).abs().max() > 1e-4 and (both - expected).abs().max() > 1e-4
    with register_attention_control_efficient(loop, torch.tensor([501, 1]), branches=branches):
        register_time(loop, torch.tensor(501))
        torch.testing.assert_close(loop.unet(sample, 501, text).sample, expected, rtol=0, atol=1e-10)
        register_conv_control_efficient(loop, [501], branches=branches)  # the timestep is still known
        torch.testing.assert_close(loop.unet(sample, 501, text).sample, both, rtol=0, atol=1e-10)
        register_time(loop, 301)
        torch.testing.assert_close(loop.unet(sample, 301, text).sample, _plain(loop, sample, 301, text))
    torch.testing.assert_close(loop.unet(sample, 501, text).sample, plain, rtol=0, atol=0)


@pytest.mark.slow
@torch.no_grad()
def test_other_injections_are_seen(loop):
    """Of the first attention module too, of the conditional branch alone, and at a timestep out of the schedule."""
    sample, text = inputs(9)
    first = "up_blocks.1.attentions.0."

    def attend(which, rows):
        def layer(path, query, key, value, scale):
            attention = softmax_map(query, key, scale)
            if path.endswith("attn1") and path.startswith("up_blocks") and which(path):
                attention = torch.cat([attention[:rows], attention[:3].repeat((9 - rows) // 3, 1, 1, 1)])
            return attention @ value

        return layer

    def dense_of(which, rows):
        with dense_attention(loop.unet, attend(which, rows)):
            return loop.unet(sample, 501, text).sample

    right = dense_of(lambda path: not path.startswith(first), 3)
    wrong = [dense_of(lambda path: True, 3), dense_of(lambda path: not path.startswith(first), 6)]
    with register_attention_control_efficient(loop, [501]):
        register_time(loop, 501)
        found = loop.unet(sample, 501, text).sample
        register_time(loop, 301)
        wrong.append(loop.unet(sample, 501, text).sample)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)
    assert all((one - right).abs().max() > 1e-7 for one in wrong)


def _plain(loop, sample, t, text):
    other = tiny_unet("sd1", torch.float64, block_out_channels=(16, 32, 32), attention_head_dim=8)
    other.load_state_dict(loop.unet.state_dict())
    return other(sample, t, text).sample


@pytest.mark.parametrize("compat", [None, "original"])
@torch.no_grad()
def test_the_noisiest_timestep_is_injected_as_the_original_does(loop, compat):
    sample, text = inputs(3)
    plain = loop.unet(sample, 1000, text).sample
    with register_attention_control_efficient(loop, [], compat=compat):
        register_time(loop, 1000)
        changed = not torch.allclose(loop.unet(sample, 1000, text).sample, plain, atol=1e-8)
    assert changed == (compat == "original")


@torch.no_grad()
def test_the_unet_is_left_as_it_was(loop):
    before = dict(loop.unet.attn_processors)
    sample, text = inputs(3)
    with pytest.raises(KeyError), register_conv_control_efficient(loop, [1]):
        register_attention_control_efficient(loop, [1])
        register_time(loop, 1)
        loop.unet(sample, 1, text)
        raise KeyError
    registered = register_attention_control_efficient(loop, None)
    registered.restore()
    registered.restore()
    assert unedited(loop.unet)
    assert all(loop.unet.attn_processors[name] is processor for name, processor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loop.unet.modules())


@torch.no_grad()
def test_what_cannot_be_asked(loop, tmp_path):
    sample, text = inputs(4)
    with pytest.raises(RuntimeError, match="nothing is registered on this model"):
        register_time(loop, 1)
    with register_attention_control_efficient(loop, [1]):
        with pytest.raises(RuntimeError, match=r"call register_time\(model, t\) before each call"):
            loop.unet(sample, 1, text)
        register_time(loop, 1)
        with pytest.raises(ValueError, match=r"got 4 rows: pass branches=2"):
            loop.unet(sample, 1, text)
        for wrong in (0.5, 1001, -1, True):
            with pytest.raises(ValueError, match="expected a timestep"):
                register_time(loop, wrong)
    with pytest.raises(ValueError, match="expected branches to be 3"):
        register_attention_control_efficient(loop, [1], branches=4)
    with pytest.raises(ValueError, match="has no module"):
        register_conv_control_efficient(Loop(unet=tiny_unet("sd1", **ONE_BLOCK)), [1])
    with pytest.raises(TypeError, match="a model with a unet"):
        register_attention_control_efficient(object(), [1])
    with pytest.raises(ImportError, match="no 'register_times' here: did you mean register_time"):
        from fpe_pipeline.compat.pnp_diffusers import register_times  # noqa: F401
    with pytest.raises(FileNotFoundError, match="missing latents at t 5"):
        load_source_latents_t(5, str(tmp_path))
    torch.save(torch.ones(2), tmp_path / "noisy_latents_5.pt")
    assert load_source_latents_t(5, str(tmp_path)).sum() == 2
    assert unedited(loop.unet)


def test_seeds():
    seed_everything(3)
    first = torch.rand(1)
    pnp_diffusers.seed_everything(3)
    assert torch.rand(1) == first
