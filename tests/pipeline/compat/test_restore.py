"""However a tool ends, the model is bit for bit what it was: by its way back, an error, Ctrl-C, an error in a layer."""

from contextlib import contextmanager

import pytest
import torch

from fpe_pipeline.compat import (
    accelerate,
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

TWO = PROMPTS[:2]
ERRORS = [RuntimeError, KeyboardInterrupt]


def with_both(first, second):
    """Two registrations of one tool: a way back and a block for both."""

    @contextmanager
    def block():
        with first, second:
            yield

    return block(), lambda: (second.restore(), first.restore())


def watched(pipe):
    attention_map_diffusers.init_pipeline(pipe)
    return None, lambda: attention_map_diffusers.restore_pipeline(pipe)


def watching(pipe):
    return attention_map_diffusers.watched_pipeline(pipe), None


def traced(pipe):
    trace = daam.trace(pipe)
    trace.hook()
    return None, trace.unhook


def injecting(pipe):
    pnp_diffusers.register_attention_control_efficient(pipe, [1], branches=2)
    registered = pnp_diffusers.register_conv_control_efficient(pipe, [1], branches=2)
    pnp_diffusers.register_time(pipe, 1)
    return registered


class Lazy(free_prompt_editing.SelfAttentionControlEdit):
    """Of a user's own, by lazy maps."""


def controller(make):
    return lambda pipe: register_attention_control(pipe, make(pipe))


def free_prompt(kind):
    return lambda pipe: free_prompt_editing.register_attention_control_new(pipe, kind(TWO, 2, 64, 1.0))


def masa(make):
    return lambda pipe: masactrl.regiter_attention_editor_diffusers(pipe, make())


def of_pnp_inversion(pipe):
    return pnp_inversion.make_controller(pipe, TWO, True, {"default_": 1.0}, 1.0, num_ddim_steps=2)


#: By tool: what registers it on a pipeline, and gives what restores it, or (a block, a way back).
UNETS = {
    "prompt_to_prompt": controller(lambda pipe: prompt_to_prompt.AttentionReplace(TWO, 2, 1.0, 1.0)),
    "prompt_to_prompt, a store": controller(lambda pipe: prompt_to_prompt.AttentionStore()),
    "pnp_inversion": controller(of_pnp_inversion),
    "free_prompt_editing": free_prompt(free_prompt_editing.SelfAttentionControlEdit),
    "free_prompt_editing, of a user's own": free_prompt(Lazy),
    "masactrl": masa(lambda: masactrl.MutualSelfAttentionControl(0, 0)),
    "masactrl, masks from words": masa(lambda: masactrl.MutualSelfAttentionControlMaskAuto(0, 0, ref_token_idx=[3])),
    "pnp_diffusers": injecting,
    "style_aligned": lambda pipe: style_aligned.Handler(pipe).register(style_aligned.StyleAlignedArgs()),
    "daam": daam.trace,
    "daam, hooked": traced,
    "attention_map_diffusers": watching,
    "attention_map_diffusers, initialised": watched,
    "accelerate": accelerate,
}
FLOWS = {
    "free_flux": lambda pipe: register_non_rigid_attention_control(pipe, 0, 0, total_layers=5),
    "consist_edit, flux": lambda pipe: with_both(
        register_flux_solver(pipe), regiter_attention_editor_diffusers_flux(pipe)
    ),
    "consist_edit, sd3": lambda pipe: with_both(
        register_sd3_solver(pipe), regiter_attention_editor_diffusers_sd3(pipe)
    ),
}
REGISTERED = UNETS | FLOWS
FEW = ("prompt_to_prompt",)  # what runs by default


def tools(names):
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def models(pipe):
    return {"unet": tiny_pipeline(pipe), "flux": tiny_flux_pipeline(pipe), "sd3": tiny_sd3_pipeline(pipe)}


@pytest.fixture(autouse=True)
def edited_steps(monkeypatch):
    monkeypatch.setattr(GlobalVars, "TEST_QK_STEP", 2)


def pipeline_of(tool, models):
    return models["unet" if tool in UNETS else "sd3" if tool.endswith("sd3") else "flux"]


def drawn(pipe, **options):
    """Latents of two prompts; of a UNet without guidance, so that there are as many rows as pnp-diffusers' branches."""
    if hasattr(pipe, "unet"):
        return sample(pipe, 2, steps=2, guidance_scale=1.0, **options)
    return (draw_flux if "Flux" in type(pipe).__name__ else draw)(pipe, 2, steps=2, **options)


def state(pipe):
    """What a tool could leave behind: processors, hooks, attributes and functions of every module, and the weights."""
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    of_modules = {
        name: (
            id(getattr(module, "processor", None)),
            {key: id(value) if callable(value) else None for key, value in vars(module).items()},
            [len(getattr(module, hooks)) for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")],
        )
        for name, module in model.named_modules()
    }
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return of_modules, weights, sorted(vars(pipe))


@contextmanager
def left_as_it_was(pipe):
    plain = drawn(pipe)
    modules, weights, own = state(pipe)
    yield
    after, weights_after, own_after = state(pipe)
    assert after == modules and own_after == own
    assert all(torch.equal(weights_after[name], weight) for name, weight in weights.items())
    torch.testing.assert_close(drawn(pipe), plain, atol=0, rtol=0)


def registered(tool, pipe):
    """A block for a tool, and its way back; either may be None."""
    given = REGISTERED[tool](pipe)
    if isinstance(given, tuple):
        return given
    return given, getattr(given, "restore", None) or getattr(given, "remove", None)


@pytest.mark.parametrize("tool", tools(REGISTERED))
def test_after_a_run(models, tool):
    pipe = pipeline_of(tool, models)
    with left_as_it_was(pipe):
        block, back = registered(tool, pipe)
        if back is None:
            with block:
                drawn(pipe)
            return
        drawn(pipe)
        back()


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("tool", tools(REGISTERED))
def test_after_an_error(models, tool, error):
    def fail(*arguments):
        raise error("in the user's callback")

    pipe = pipeline_of(tool, models)
    with left_as_it_was(pipe):
        broken(tool, pipe, error, lambda: drawn(pipe, callback_on_step_end=fail))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("tool", tools(REGISTERED))
def test_after_an_error_inside_a_layer(models, tool, error):
    def fail(*arguments):
        raise error("inside a layer")

    pipe = pipeline_of(tool, models)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    projections = [module for name, module in model.named_modules() if name.endswith("to_out.0")]
    with left_as_it_was(pipe):
        handle = projections[len(projections) // 2].register_forward_pre_hook(fail)
        try:
            broken(tool, pipe, error, lambda: drawn(pipe))
        finally:
            handle.remove()


def broken(tool, pipe, error, run):
    """A run that ends by an error, in the tool's block, or before its way back is called."""
    block, back = registered(tool, pipe)
    if block is None:
        with pytest.raises(error):
            run()
        back()
        return
    with pytest.raises(error), block:
        run()


class UsersControl(prompt_to_prompt.AttentionControl):
    error = RuntimeError

    def forward(self, attn, is_cross, place_in_unet):
        attn[:, :, 1] = 0
        if place_in_unet == "up":
            raise self.error("in the user's forward")
        return attn


class UsersEdit(Lazy):
    error = RuntimeError

    def forward(self, attn, is_cross, place_in_unet):
        if place_in_unet == "up":
            raise self.error("in the user's forward")
        return super().forward(attn, is_cross, place_in_unet)


class UsersEditor(masactrl.AttentionBase):
    error = RuntimeError

    def forward(self, q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs):
        if place_in_unet == "up":
            raise self.error("in the user's forward")
        return super().forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("kind", [UsersControl, UsersEdit, UsersEditor])
def test_after_an_error_in_a_users_forward(models, kind, error, monkeypatch):
    monkeypatch.setattr(kind, "error", error)
    register = {
        UsersControl: controller(lambda pipe: UsersControl()),
        UsersEdit: free_prompt(UsersEdit),
        UsersEditor: masa(UsersEditor),
    }[kind]
    pipe = models["unet"]
    with left_as_it_was(pipe), pytest.raises(error, match="in the user's forward"), register(pipe):
        drawn(pipe)


class FailingControl(prompt_to_prompt.EmptyControl):
    """Breaks off after the first step, where a loop hands it the latents."""

    def __init__(self, error):
        self.error = error

    def step_callback(self, x_t):
        raise self.error("in the user's step")


def loop(pipe, error):
    text2image_ldm_stable(pipe, TWO, FailingControl(error), 2, latent=torch.randn(1, 4, 8, 8), return_type="latent")


def inverted_and_edited(pipe, error):
    latent = torch.randn(1, 4, 8, 8)
    pnp_inversion.direct_inversion_p2p_guidance_forward(
        pipe, TWO, FailingControl(error), latent, 2, noise_loss_list=[latent] * 2
    )


def stable_flow(pipe, error):
    def fail(*arguments):
        raise error("in the user's callback")

    copied = FluxPipeline(**pipe.components)
    copied.set_progress_bar_config(disable=True)
    draw_flux(copied, 2, steps=2, mm_copy_blocks=[0], single_copy_blocks=[0], callback_on_step_end=fail)


#: Calls that register, run and restore by themselves.
CALLS = {"prompt_to_prompt, its loop": loop, "pnp_inversion, its loop": inverted_and_edited, "stable_flow": stable_flow}


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("call", CALLS)
def test_after_an_error_in_a_call(models, call, error):
    pipe = models["flux" if call == "stable_flow" else "unet"]
    with left_as_it_was(pipe), pytest.raises(error, match="in the user's"):
        CALLS[call](pipe, error)


@pytest.mark.slow
def test_what_is_left_behind_is_seen(models):
    """Were this to fail, the tests above would mean nothing."""
    pipe = models["unet"]
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    before = layer.processor
    for leave, undo in (
        (lambda: setattr(layer, "processor", type(before)()), lambda: setattr(layer, "processor", before)),
        (lambda: setattr(layer, "forward", layer.forward), lambda: delattr(layer, "forward")),
        (lambda: layer.register_forward_hook(lambda *given: None), layer._forward_hooks.clear),
        (lambda: layer.to_q.weight.data.mul_(1.5), lambda: layer.to_q.weight.data.div_(1.5)),
    ):
        with pytest.raises(AssertionError), left_as_it_was(pipe):
            leave()
        undo()
