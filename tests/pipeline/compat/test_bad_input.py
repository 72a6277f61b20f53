"""Bad input, tool by tool: names that a tool never had, other prompts, layers that are not there, maps out of time."""

import importlib
import pkgutil
from contextlib import ExitStack

import pytest
import torch

from fpe_pipeline import compat
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
from fpe_pipeline.compat.free_flux import register_non_rigid_attention_control
from fpe_pipeline.compat.prompt_to_prompt import ptp_utils
from fpe_pipeline.compat.stable_flow import FluxPipeline
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline
from tests.support.tiny_transformers import draw_flux, tiny_flux_pipeline

TWO = PROMPTS[:2]
COMMON = {"controlled", "diffusers_maps", "given", "lazy", "names", "sessions", "switch"}
TOOLS = [module.name for module in pkgutil.iter_modules(compat.__path__) if module.name not in COMMON]
MODULES = [
    *TOOLS,
    "prompt_to_prompt.ptp_utils",
    "prompt_to_prompt.seq_aligner",
    "masactrl.masactrl",
    "masactrl.masactrl_utils",
    "masactrl.diffuser_utils",
    "consist_edit.attention_control",
    "consist_edit.global_var",
    "consist_edit.solver",
]


@pytest.mark.parametrize("tool", MODULES)
def test_names_that_a_tool_never_had(tool):
    module = importlib.import_module(f"fpe_pipeline.compat.{tool}")
    for name in module.__all__:
        assert getattr(module, name) is not None
        with pytest.raises(ImportError, match=rf"did you mean .*\b{name}\b"):
            exec(f"from {module.__name__} import {name}x")
    with pytest.raises(ImportError, match=rf"{module.__name__} has .*{module.__all__[0]}"):
        exec(f"from {module.__name__} import something_else_altogether")
    # What only looks, as pickle does in every module for a function without one, is answered as Python answers.
    assert not hasattr(module, "__wrapped__") and getattr(module, "something_else_altogether", None) is None
    with pytest.raises(AttributeError, match=rf"{module.__name__} has .*{module.__all__[0]}"):
        _ = module.something_else_altogether


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_as_attributes(tool, monkeypatch):
    monkeypatch.delattr(compat, tool, raising=False)
    assert getattr(compat, tool).__name__ == f"fpe_pipeline.compat.{tool}"


@pytest.fixture(scope="module")
def models(pipe):
    return {"unet": tiny_pipeline(pipe), "flux": tiny_flux_pipeline(pipe)}


def stable_flow(models, **options):
    pipe = FluxPipeline(**models["flux"].components)
    pipe.set_progress_bar_config(disable=True)
    return draw_flux(pipe, 2, steps=2, **options)


def injecting(models, **options):
    return pnp_diffusers.register_attention_control_efficient(models["unet"], [1], **options)


class Case:
    """Something that a user does wrong, and what is said of it.

    Args:
        does: is given the pipelines, and a stack for what has to be taken off again.
        error: that it raises; said: a part of its message.
    """

    def __init__(self, does, error, said):
        self.does, self.error, self.said = does, error, said


def of_controller(make, prompts, guided=True):
    """A controller on a call of other prompts than it is made for."""

    def does(models, stack):
        stack.enter_context(ptp_utils.register_attention_control(models["unet"], make(models)))
        sample(models["unet"], prompts, guidance_scale=5.0 if guided else 1.0)

    return does


def replacing(models):
    return prompt_to_prompt.AttentionReplace(TWO, 3, 0.8, 0.4)


def of_pnp_inversion(models):
    return pnp_inversion.make_controller(models["unet"], TWO, True, {"default_": 0.8}, 0.4, num_ddim_steps=3)


def of_free_prompt(prompts):
    def does(models, stack):
        controller = free_prompt_editing.SelfAttentionControlEdit(TWO, 3, 0.8)
        stack.enter_context(free_prompt_editing.register_attention_control_new(models["unet"], controller))
        sample(models["unet"], prompts)

    return does


def masked(models, stack):
    masks = {"mask_s": torch.ones(8, 8), "mask_t": torch.ones(1, 8, 8)}
    editor = masactrl.MutualSelfAttentionControlMask(start_step=0, start_layer=0, **masks)
    stack.enter_context(masactrl.regiter_attention_editor_diffusers(models["unet"], editor))
    sample(models["unet"], 3)


def injected(models, stack):
    stack.enter_context(injecting(models))
    pnp_diffusers.register_time(models["unet"], 1)
    models["unet"].unet(torch.randn(4, 4, 8, 8), 1, torch.randn(4, 7, 32))


def traced_as_the_original(models, stack):
    stack.enter_context(daam.trace(models["unet"], compat="original"))
    sample(models["unet"], 2)


def saved_for_other_prompts(models, stack):
    stack.enter_context(attention_map_diffusers.watched_pipeline(models["unet"]))
    sample(models["unet"], 2)
    attention_map_diffusers.save_attention_maps(
        attention_map_diffusers.attn_maps, models["unet"].tokenizer, PROMPTS[0], "nowhere"
    )


def aligned_without_targets(models, stack):
    stack.enter_context(
        style_aligned.Handler(models["unet"], compat="original").register(style_aligned.StyleAlignedArgs())
    )
    sample(models["unet"], 3, guidance_scale=1.0)


def of_free_flux(models, stack):
    options = {"start_step": 0, "start_layer": 0, "total_layers": 5, "compat": "original"}
    stack.enter_context(register_non_rigid_attention_control(models["flux"], **options))
    draw_flux(models["flux"], 3, steps=2)


def of_consist_edit(models, stack):
    stack.enter_context(regiter_attention_editor_diffusers_flux(models["flux"], compat="original"))
    GlobalVars.TEST_QK_STEP = 2
    draw_flux(models["flux"], 3, steps=2)


OTHER_PROMPTS = {
    "prompt_to_prompt": Case(of_controller(replacing, 3), ValueError, "made for 2 prompts"),
    "pnp_inversion": Case(of_controller(of_pnp_inversion, 3, guided=False), ValueError, "made for 2 prompts"),
    "free_prompt_editing": Case(of_free_prompt(3), ValueError, "made for 2 prompts"),
    "masactrl": Case(masked, ValueError, "masks of 1 targets, and the call has 2"),
    "pnp_diffusers": Case(injected, ValueError, "got 4 rows"),
    "daam": Case(traced_as_the_original, ValueError, "one prompt a call"),
    "attention_map_diffusers": Case(saved_for_other_prompts, ValueError, "2 conditional rows, for 1 prompts"),
    "style_aligned": Case(aligned_without_targets, ValueError, "rows"),
    "stable_flow": Case(
        lambda models, stack: stable_flow(models, guidance_scale=[1.0, 2.0, 3.0]), ValueError, "one for each of the 2"
    ),
    "free_flux": Case(of_free_flux, ValueError, "got 3 rows"),
    "consist_edit": Case(of_consist_edit, ValueError, "got 3 rows"),
}


def aggregated(models, stack):
    store = prompt_to_prompt.AttentionStore()
    stack.enter_context(ptp_utils.register_attention_control(models["unet"], store))
    sample(models["unet"], 2, steps=1)
    prompt_to_prompt.aggregate_attention(store, 16, ("up", "down"), True, 0)


def blended(models, stack):
    blend = prompt_to_prompt.LocalBlend(TWO, ["car", "car"])
    controller = pnp_inversion.make_controller(models["unet"], TWO, True, {"default_": 0.8}, 0.4, num_ddim_steps=1)
    controller.local_blend = blend
    ptp_utils.text2image_ldm_stable(models["unet"], TWO, controller, 1, latent=torch.randn(1, 4, 64, 64))


def of_no_unet(models, stack):
    controller = free_prompt_editing.SelfAttentionControlEdit(TWO, 3, 0.8)
    free_prompt_editing.register_attention_control_new(models["flux"], controller)


def of_masactrl(models, stack):
    editor = masactrl.MutualSelfAttentionControl(layer_idx=[99])
    masactrl.regiter_attention_editor_diffusers(models["unet"], editor)


def of_daam(models, stack):
    trace = stack.enter_context(daam.trace(models["unet"]))
    sample(models["unet"], 1)
    trace.compute_global_heat_map(layer_idx=99)


MISSING_LAYERS = {
    "prompt_to_prompt": Case(aggregated, ValueError, r"no cross-attention layer of 16 × 16 query tokens is kept"),
    "pnp_inversion": Case(blended, ValueError, "no maps to read"),
    "free_prompt_editing": Case(of_no_unet, ValueError, "expected a pipeline with a UNet"),
    "masactrl": Case(of_masactrl, ValueError, r"layer_idx=\[99\]"),
    "pnp_diffusers": Case(
        lambda models, stack: pnp_diffusers.register_attention_control_efficient(object(), [1]),
        TypeError,
        "with a unet",
    ),
    "daam": Case(of_daam, RuntimeError, "layers"),
    "attention_map_diffusers": Case(
        lambda models, stack: attention_map_diffusers.init_pipeline(models["unet"].vae),
        (TypeError, ValueError),
        "expected",
    ),
    "style_aligned": Case(
        lambda models, stack: style_aligned.Handler(models["flux"]), ValueError, "expected a pipeline with a UNet"
    ),
    "stable_flow": Case(
        lambda models, stack: stable_flow(models, single_copy_blocks=[99]), ValueError, "single_copy_blocks to be among"
    ),
    "free_flux": Case(
        lambda models, stack: register_non_rigid_attention_control(models["flux"], layer_idx=[99], total_layers=5),
        ValueError,
        "layer_idx to be among",
    ),
    "consist_edit": Case(
        lambda models, stack: regiter_attention_editor_diffusers_sd3(models["unet"]), TypeError, "Stable Diffusion 3"
    ),
}


def before_a_step(models, stack):
    store = prompt_to_prompt.AttentionStore()
    stack.enter_context(ptp_utils.register_attention_control(models["unet"], store))
    store.get_average_attention()


def after_a_reset(models, stack):
    controller = of_pnp_inversion(models)
    stack.enter_context(ptp_utils.register_attention_control(models["unet"], controller))
    sample(models["unet"], 2, steps=3)
    controller.reset()
    controller.get_average_attention()


def after_more_steps(models, stack):
    controller = free_prompt_editing.AttentionStore(keeps="cross")
    stack.enter_context(free_prompt_editing.register_attention_control_new(models["unet"], controller))
    sample(models["unet"], 2, steps=1)
    return controller.get_average_attention()["up_self"][0]


def after_the_last_step(models, stack):
    """What a controller has in its window is not to be had after its last step."""
    stack.enter_context(ptp_utils.register_attention_control(models["unet"], replacing(models)))
    sample(models["unet"], 2, steps=4)
    sample(models["unet"], 2, steps=4)


def before_the_time(models, stack):
    stack.enter_context(injecting(models))
    models["unet"].unet(torch.randn(3, 4, 8, 8), 1, torch.randn(3, 7, 32))


def before_a_trace(models, stack):
    stack.enter_context(daam.trace(models["unet"])).compute_global_heat_map()


def before_a_call(models, stack):
    attention_map_diffusers.attn_maps.clear()
    attention_map_diffusers.save_attention_maps(
        attention_map_diffusers.attn_maps, models["unet"].tokenizer, PROMPTS[0], "nowhere"
    )


def with_too_few(models, stack):
    stable_flow(models, inverted_latent_list=[torch.randn(1, 16, 64)])


#: Maps, or what else a tool has at a step, asked for before or after it. Other tools give no maps and keep no steps.
OUT_OF_TIME = {
    "prompt_to_prompt": [
        Case(before_a_step, RuntimeError, "no step has ended"),
        Case(after_the_last_step, RuntimeError, "made for 3 steps, and this is step 4"),
    ],
    "pnp_inversion": [Case(after_a_reset, RuntimeError, "no step has ended")],
    "free_prompt_editing": [Case(after_more_steps, LookupError, "AttentionStore keeps cross maps")],
    "pnp_diffusers": [Case(before_the_time, RuntimeError, "register_time")],
    "daam": [Case(before_a_trace, RuntimeError, "call the pipeline in")],
    "attention_map_diffusers": [Case(before_a_call, ValueError, "call a pipeline after init_pipeline")],
    "stable_flow": [Case(with_too_few, ValueError, "1 latents for 2 steps")],
}
WITHOUT_STEPS = {"masactrl", "style_aligned", "free_flux", "consist_edit"}
FEW = (
    "masactrl: other prompts",
    "free_prompt_editing: out of time 0",
)  # of others, the tools' own tests run by default
CASES = [
    *((f"{tool}: other prompts", case) for tool, case in OTHER_PROMPTS.items()),
    *((f"{tool}: missing layers", case) for tool, case in MISSING_LAYERS.items()),
    *((f"{tool}: out of time {n}", case) for tool, cases in OUT_OF_TIME.items() for n, case in enumerate(cases)),
]


def test_every_tool_is_here():
    assert OTHER_PROMPTS.keys() == MISSING_LAYERS.keys() == set(TOOLS)
    assert OUT_OF_TIME.keys() | WITHOUT_STEPS == set(TOOLS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in FEW else pytest.mark.slow) for name, case in CASES],
)
def test_what_is_said(models, case, monkeypatch):
    monkeypatch.setattr(GlobalVars, "TEST_QK_STEP", 0)
    before = dict(models["unet"].unet.attn_processors)
    with pytest.raises(case.error, match=case.said), ExitStack() as stack:
        case.does(models, stack)
    assert {name: id(one) for name, one in models["unet"].unet.attn_processors.items()} == {
        name: id(one) for name, one in before.items()
    }
