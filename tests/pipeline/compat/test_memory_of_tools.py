"""No map is materialised: a step with a tool registered holds what it holds without, at 4096 tokens.

Allocations are counted, not timed: the numbers are the same on every run.
"""

from contextlib import ExitStack

import pytest
import torch

from benchmarks.memory import peak_bytes
from benchmarks.unets import CONFIGS
from fpe_pipeline.compat import attention_map_diffusers, daam, masactrl, pnp_diffusers, style_aligned
from tests.support.tiny_pipelines import sample, tiny_pipeline
from tests.support.written_out import written_out_maps

SIZE = (64, 64)
SHARE = 1.1
WINDOW = {"start_step": 0, "start_layer": 0}
HALF = torch.cat([torch.ones(32, 64), torch.zeros(32, 64)])

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipe_of_4096_tokens(pipe):
    return tiny_pipeline(pipe, **CONFIGS["tiny"])


@pytest.fixture(scope="module")
def unwatched(pipe_of_4096_tokens):
    return peak_bytes(lambda: step(pipe_of_4096_tokens))


def step(pipe):
    return sample(pipe, 2, steps=1, size=SIZE)


class Users(masactrl.AttentionBase):
    """An editor as users write it."""

    def forward(self, q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs):
        if is_cross:
            attn[:, :, 3] = 2 * attn[:, :, 3]
        else:
            attn = 0.5 * attn + 0.5 * (1.2 * sim).softmax(-1)
        return super().forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)


def masa(editor):
    return lambda pipe: masactrl.regiter_attention_editor_diffusers(pipe, editor)


TOOLS = {
    "daam": daam.trace,
    "masactrl": masa(masactrl.MutualSelfAttentionControl(**WINDOW)),
    "masactrl, masks": masa(masactrl.MutualSelfAttentionControlMask(**WINDOW, mask_s=HALF, mask_t=HALF)),
    "masactrl, masks from words": masa(masactrl.MutualSelfAttentionControlMaskAuto(**WINDOW, ref_token_idx=[3])),
    "masactrl, an editor of a user's own": masa(Users()),
    "style_aligned": lambda pipe: style_aligned.Handler(pipe).register(style_aligned.StyleAlignedArgs()),
    "style_aligned, shifted": lambda pipe: style_aligned.Handler(pipe).register(
        style_aligned.StyleAlignedArgs(shared_score_shift=0.7, adain_values=True)
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_step_holds_no_more_with_a_tool(pipe_of_4096_tokens, unwatched, tool):
    with TOOLS[tool](pipe_of_4096_tokens):
        assert peak_bytes(lambda: step(pipe_of_4096_tokens)) <= SHARE * unwatched


@torch.no_grad()
def test_injection_holds_no_more(pipe_of_4096_tokens):
    unet = pipe_of_4096_tokens.unet
    sample, text = torch.randn(3, 4, *SIZE), torch.randn(3, 77, 32)
    plain = peak_bytes(lambda: unet(sample, 1, text).sample)
    with pnp_diffusers.register_attention_control_efficient(unet, [1]):
        pnp_diffusers.register_conv_control_efficient(unet, [1])
        pnp_diffusers.register_time(unet, 1)
        assert peak_bytes(lambda: unet(sample, 1, text).sample) <= SHARE * plain


def test_maps_that_are_kept_cost_what_they_are_made_from(pipe_of_4096_tokens, unwatched):
    with attention_map_diffusers.watched_pipeline(pipe_of_4096_tokens):
        peak = peak_bytes(lambda: step(pipe_of_4096_tokens))
    (layers,) = attention_map_diffusers.attn_maps.values()
    kept = sum(view.nbytes for view in layers.values())
    assert peak <= SHARE * unwatched + kept
    whole = sum(view.shape.numel() * view.dtype.itemsize for view in layers.values())
    assert kept < whole


def test_maps_that_are_written_out_are_seen(pipe_of_4096_tokens, unwatched):
    """Were this to fail, the counter would not see maps, and the tests above would mean nothing."""
    with ExitStack() as stack:
        stack.enter_context(written_out_maps(pipe_of_4096_tokens))
        assert peak_bytes(lambda: step(pipe_of_4096_tokens)) > 3 * unwatched
