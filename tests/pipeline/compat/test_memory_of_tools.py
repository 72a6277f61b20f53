"""No map is materialised: a step with a tool registered holds what it holds without, at 4096 tokens.

Allocations are counted, not timed: the numbers are the same on every run.
"""

from contextlib import ExitStack

import pytest
import torch

from benchmarks.memory import peak_bytes
from benchmarks.tools_cases import TOOLS as MEASURED
from benchmarks.unets import CONFIGS
from fpe_pipeline.compat import (
    attention_map_diffusers,
    daam,
    free_prompt_editing,
    masactrl,
    pnp_diffusers,
    pnp_inversion,
    prompt_to_prompt,
    style_aligned,
)
from fpe_pipeline.compat.consist_edit.attention_control import (
    regiter_attention_editor_diffusers_flux,
    regiter_attention_editor_diffusers_sd3,
)
from fpe_pipeline.compat.consist_edit.global_var import GlobalVars
from fpe_pipeline.compat.consist_edit.solver import register_flux_solver, register_sd3_solver
from fpe_pipeline.compat.free_flux import register_non_rigid_attention_control
from fpe_pipeline.compat.prompt_to_prompt.ptp_utils import register_attention_control, text2image_ldm_stable
from fpe_pipeline.compat.stable_flow import FluxPipeline
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline
from tests.support.tiny_transformers import draw, draw_flux, tiny_flux_pipeline, tiny_sd3_pipeline
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


def step(pipe, steps=1):
    return sample(pipe, 2, steps=steps, size=SIZE)


class Users(masactrl.AttentionBase):
    """An editor as users write it."""

    def forward(self, q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs):
        if is_cross:
            attn[:, :, 3] = 2 * attn[:, :, 3]
        else:
            attn = 0.5 * attn + 0.5 * (1.2 * sim).softmax(-1)
        return super().forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)


class UsersControl(prompt_to_prompt.AttentionControl):
    """A controller as users write it: a word is taken out, and a map mixed with the source's."""

    def forward(self, attn, is_cross, place_in_unet):
        if is_cross:
            attn[:, :, 3] = 0
            return attn / attn.sum(-1, keepdim=True)
        by_prompt = attn.reshape(2, -1, *attn.shape[1:])
        by_prompt[1:] = 0.5 * by_prompt[0][None] + 0.5 * by_prompt[1:]
        return attn


class UsersEdit(free_prompt_editing.SelfAttentionControlEdit):
    """Of a user's own, and so by lazy maps."""


def masa(editor):
    return lambda pipe: masactrl.regiter_attention_editor_diffusers(pipe, editor)


def p2p(make):
    return lambda pipe: register_attention_control(pipe, make(pipe))


def free_prompt(kind):
    return lambda pipe: free_prompt_editing.register_attention_control_new(pipe, kind(PROMPTS[:2], 1, 64, 1.0))


def of_pnp_inversion(pipe):
    factors = {"words": ("blue",), "values": (2.0,)}
    return pnp_inversion.make_controller(pipe, PROMPTS[:2], True, {"default_": 1.0}, 1.0, None, factors, 1)


def edit(name, steps=1, **options):
    return p2p(lambda pipe: getattr(prompt_to_prompt, name)(PROMPTS[:2], steps, 1.0, 1.0, **options))


#: What needs no numbers. A store that is asked for self-attention needs them: it is held to what it holds, below.
TOOLS = {
    "prompt_to_prompt, replacement": edit("AttentionReplace"),
    "prompt_to_prompt, refinement": edit("AttentionRefine"),
    "prompt_to_prompt, factors": edit("AttentionReweight", equalizer=torch.ones(1, 77)),
    "prompt_to_prompt, a store of words": p2p(lambda pipe: prompt_to_prompt.AttentionStore(keeps="cross")),
    "prompt_to_prompt, nothing": p2p(lambda pipe: prompt_to_prompt.EmptyControl()),
    "prompt_to_prompt, a controller of a user's own": p2p(lambda pipe: UsersControl()),
    "pnp_inversion": p2p(of_pnp_inversion),
    "free_prompt_editing": free_prompt(free_prompt_editing.SelfAttentionControlEdit),
    "free_prompt_editing, of a user's own": free_prompt(UsersEdit),
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


def test_later_steps_hold_no_more(pipe_of_4096_tokens, unwatched):
    with edit("AttentionReplace", steps=3)(pipe_of_4096_tokens):
        assert peak_bytes(lambda: step(pipe_of_4096_tokens, 3)) <= SHARE * unwatched


def test_a_local_blend_holds_no_more(pipe):
    """Of a UNet with a third level, whose layers it reads, by the notebook's own loop; both steps are blended."""
    three = {name: (part[0],) * 3 for name, part in CONFIGS["tiny"].items() if name.endswith("block_types")}
    large = tiny_pipeline(pipe, **{**CONFIGS["tiny"], **three, "block_out_channels": (32, 64, 64)})
    prompts = PROMPTS[:2]
    blend = prompt_to_prompt.LocalBlend(prompts, ["car", "car"])
    controller = prompt_to_prompt.AttentionReplace(prompts, 2, 1.0, 1.0, blend)
    latent = torch.randn(1, 4, *SIZE)

    def run(given):
        return text2image_ldm_stable(large, prompts, given, 2, latent=latent, return_type="latent")

    plain = peak_bytes(lambda: run(None))
    assert peak_bytes(lambda: run(controller)) <= SHARE * plain
    assert blend.counter == 2


def test_a_store_of_everything_holds_what_it_says(pipe_of_4096_tokens, unwatched):
    """Above the pipeline: never more than queries and keys of the rows that are kept, and of words the numbers."""
    store = prompt_to_prompt.AttentionStore()
    with register_attention_control(pipe_of_4096_tokens, store):
        peak = peak_bytes(lambda: step(pipe_of_4096_tokens))
    held = {key: sum(total.nbytes for total in maps) for key, maps in store.attention_store.items()}
    assert peak <= SHARE * unwatched + sum(held.values())
    numbers = sum(total.numel() * 4 for maps in store.attention_store.values() for total in maps)
    assert sum(held.values()) < numbers / 4


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
    assert all(view.nbytes <= view.shape.numel() * view.dtype.itemsize for view in layers.values())


@pytest.mark.parametrize("tool", ["attend-and-excite", "ledits++", "sag", "pix2pix-zero"])
def test_accelerated_pipelines_hold_no_more(tool):
    """Than the same step, or its gradient, by diffusers' fused processors.

    Pix2pix-zero's loss asks for the numbers of its cross-attention, and backward for those of all layers: they are
    added, with those of the earlier run and the differences of both.
    """
    case = MEASURED[tool](SIZE[0], "cpu")
    plain = peak_bytes(case.plain)
    with case.ours():
        peak = peak_bytes(case.step)
    tokens = 3 * 64**2 + 4 * 32**2
    asked = 3 * 2 * tokens * 77 * 4 if tool == "pix2pix-zero" else 0
    assert peak <= SHARE * plain + asked


FLOWS = {
    "free_flux": ("flux", lambda pipe: [register_non_rigid_attention_control(pipe, 0, 0, total_layers=5)], None),
    "consist_edit, flux": (
        "flux",
        lambda pipe: [register_flux_solver(pipe), regiter_attention_editor_diffusers_flux(pipe)],
        "denoise",
    ),
    "consist_edit, sd3": (
        "sd3",
        lambda pipe: [register_sd3_solver(pipe), regiter_attention_editor_diffusers_sd3(pipe)],
        "denoise",
    ),
}


@pytest.fixture(scope="module")
def flows(pipe):
    sides = {"sample_size": 128, "pos_embed_max_size": 64}
    made = {"flux": tiny_flux_pipeline(pipe), "sd3": tiny_sd3_pipeline(pipe, **sides)}
    return {name: one.to(torch.float32) for name, one in made.items()}


def flow_step(pipe, family, **options):
    """A call of one step with 4096 image tokens."""
    return (draw_flux if family == "flux" else draw)(pipe, steps=1, size=(128, 128), **options)


@pytest.mark.parametrize("tool", FLOWS)
def test_transformers_hold_no_more_with_a_tool(flows, tool, monkeypatch):
    family, register, call = FLOWS[tool]
    pipe = flows[family]
    plain = peak_bytes(lambda: flow_step(pipe, family))
    monkeypatch.setattr(GlobalVars, "TEST_QK_STEP", 1)
    with ExitStack() as stack:
        for one in register(pipe):
            stack.enter_context(one)
        own = _Called(pipe, call)
        assert peak_bytes(lambda: flow_step(own, family)) <= SHARE * plain


def test_stable_flow_holds_no_more(flows):
    pipe = FluxPipeline(**flows["flux"].components)
    pipe.set_progress_bar_config(disable=True)
    plain = peak_bytes(lambda: flow_step(pipe, "flux"))
    blocks = {"mm_copy_blocks": [0, 1], "single_copy_blocks": [0, 1, 2]}
    assert peak_bytes(lambda: flow_step(pipe, "flux", **blocks)) <= SHARE * plain


class _Called:
    """A pipeline, called by the name of one of its methods."""

    def __init__(self, pipe, name):
        self.transformer, self._call = pipe.transformer, pipe if name is None else getattr(pipe, name)

    def __call__(self, *arguments, **options):
        return self._call(*arguments, **options)


def test_maps_that_are_written_out_are_seen(pipe_of_4096_tokens, unwatched):
    """Were this to fail, the counter would not see maps, and the tests above would mean nothing."""
    with ExitStack() as stack:
        stack.enter_context(written_out_maps(pipe_of_4096_tokens))
        assert peak_bytes(lambda: step(pipe_of_4096_tokens)) > 3 * unwatched
