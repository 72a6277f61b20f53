"""What Stable Flow's, FreeFlux's and ConsistEdit's surfaces do beside the originals' own cases."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline as DiffusersFlux

from fpe_pipeline import ConsistEdit, FreeFluxEdit, StableFlowEdit, editing
from fpe_pipeline.compat import set_compat
from fpe_pipeline.compat.consist_edit.attention_control import (
    regiter_attention_editor_diffusers_flux,
    regiter_attention_editor_diffusers_sd3,
)
from fpe_pipeline.compat.consist_edit.global_var import GlobalVars
from fpe_pipeline.compat.consist_edit.solver import register_flux_solver, register_sd3_solver
from fpe_pipeline.compat.free_flux import register_non_rigid_attention_control
from fpe_pipeline.compat.stable_flow import FluxPipeline
from tests.support.tiny_transformers import tiny_flux_pipeline, tiny_sd3_pipeline

PROMPTS = ["a red car", "a blue car", "a green bus"]
SIZE = {"height": 32, "width": 48}
STEPS = 3


@pytest.fixture(scope="module")
def flux(pipe):
    return tiny_flux_pipeline(pipe)


@pytest.fixture(scope="module")
def sd3(pipe):
    return tiny_sd3_pipeline(pipe)


@pytest.fixture(autouse=True)
def state_of_its_own(monkeypatch):
    monkeypatch.setattr(GlobalVars, "TEST_QK_STEP", 0)


def noise(pipe, rows):
    generator = torch.Generator().manual_seed(1)
    if isinstance(pipe, DiffusersFlux):
        channels = pipe.transformer.config.in_channels
        tokens = SIZE["height"] * SIZE["width"] // (2 * pipe.vae_scale_factor) ** 2
        return torch.randn(1, tokens, channels, generator=generator, dtype=torch.float64).repeat(rows, 1, 1)
    sides = (side // pipe.vae_scale_factor for side in SIZE.values())
    channels = pipe.transformer.config.in_channels
    return torch.randn(1, channels, *sides, generator=generator, dtype=torch.float64).repeat(rows, 1, 1, 1)


def drawn(pipe, prompts=PROMPTS, call=None, **options):
    call = pipe if call is None else call
    given = {"num_inference_steps": STEPS, "max_sequence_length": 16, "output_type": "latent", **SIZE}
    return call(prompts, latents=noise(pipe, len(prompts)), **{**given, **options}).images


def processors(pipe):
    return {name: id(processor) for name, processor in pipe.transformer.attn_processors.items()}


def blocks(pipe):
    return len(pipe.transformer.transformer_blocks), len(pipe.transformer.single_transformer_blocks)


class TestStableFlow:
    def test_three_prompts_of_no_square_are_the_edits(self, flux):
        dual, _ = blocks(flux)
        pipe = FluxPipeline(**flux.components)
        pipe.set_progress_bar_config(disable=True)
        before = processors(pipe)
        out = drawn(pipe, mm_copy_blocks=[0], single_copy_blocks=[0])
        with editing(flux, StableFlowEdit(layers=[0, dual])):
            torch.testing.assert_close(out, drawn(flux), atol=0, rtol=0)
        with editing(flux, StableFlowEdit(layers=[0])):
            assert (out - drawn(flux))[1:].abs().max() > 1e-5
        assert processors(pipe) == before
        torch.testing.assert_close(drawn(pipe), drawn(flux), atol=0, rtol=0)

    def test_bad_input(self, flux):
        dual, _ = blocks(flux)
        pipe = FluxPipeline(**flux.components)
        with pytest.raises(ValueError, match=f"mm_copy_blocks to be among 0 to {dual - 1}"):
            drawn(pipe, mm_copy_blocks=[dual])
        with pytest.raises(ValueError, match="one for each of the 3 prompts"):
            drawn(pipe, guidance_scale=[1.0, 3.0])
        with pytest.raises(ValueError, match="one prompt and the packed latents"):
            drawn(pipe, invert_image=True)
        with pytest.raises(ValueError, match="2 latents for 3 steps"):
            drawn(pipe, inverted_latent_list=[noise(pipe, 1)] * 2)
        with pytest.raises(ImportError, match="Stable Flow has no 'StableFlow' here"):
            from fpe_pipeline.compat.stable_flow import StableFlow  # noqa: F401


class TestFreeFlux:
    def test_three_prompts_have_one_source(self, flux):
        total = sum(blocks(flux))
        before = processors(flux)
        with register_non_rigid_attention_control(
            flux, layer_idx=[0, total - 1], step_idx=[0, 2], total_layers=total, total_steps=STEPS
        ):
            out = drawn(flux)
        with editing(flux, FreeFluxEdit(layers=[0, total - 1])):
            whole = drawn(flux)
        assert processors(flux) == before
        assert (out[1:] - whole[1:]).abs().max() > 1e-5  # step 1 was left alone
        torch.testing.assert_close(out[0], drawn(flux)[0], atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    def test_the_originals_halves(self, flux):
        total, four = sum(blocks(flux)), [*PROMPTS, "a dog"]
        options = {"layer_idx": range(total), "start_step": 0, "total_layers": total, "total_steps": STEPS}
        with register_non_rigid_attention_control(flux, **options, compat="original"):
            out = drawn(flux, four)
        with editing(flux, FreeFluxEdit(layers=range(total)), source_of=[0, 1, 0, 1]):
            torch.testing.assert_close(out, drawn(flux, four), atol=0, rtol=0)
        with (
            register_non_rigid_attention_control(flux, **options, compat="original"),
            pytest.raises(ValueError, match="as many targets, got 3 rows"),
        ):
            drawn(flux)

    def test_registering_anew_takes_the_earlier_one_off(self, flux):
        total, before = sum(blocks(flux)), processors(flux)
        first = register_non_rigid_attention_control(flux, layer_idx=[0], total_layers=total)
        second = register_non_rigid_attention_control(flux, layer_idx=[1], total_layers=total)
        first.restore()
        assert processors(flux) != before
        second.restore()
        second.restore()
        assert processors(flux) == before

    def test_bad_input(self, flux, sd3):
        total = sum(blocks(flux))
        with pytest.raises(ValueError, match=f"total_layers to be {total}"):
            register_non_rigid_attention_control(flux)
        with pytest.raises(ValueError, match="layer_idx to be among"):
            register_non_rigid_attention_control(flux, layer_idx=[total], total_layers=total)
        with pytest.raises(TypeError, match=r"expected a pipeline of FLUX\.1"):
            register_non_rigid_attention_control(sd3)
        with pytest.raises(ImportError, match="FreeFluxEdit"):
            from fpe_pipeline.compat.free_flux import register_add_object_attention_control  # noqa: F401


class TestConsistEdit:
    def test_three_prompts_of_no_square_are_the_edits(self, sd3):
        before = processors(sd3)
        with register_sd3_solver(sd3), regiter_attention_editor_diffusers_sd3(sd3):
            GlobalVars.TEST_QK_STEP = 2
            out = drawn(sd3, call=sd3.denoise)
        with editing(sd3, ConsistEdit(0.7)):  # two of three steps
            torch.testing.assert_close(out, drawn(sd3), atol=0, rtol=0)
        with editing(sd3, ConsistEdit(1.0)):
            assert (out - drawn(sd3))[1:].abs().max() > 1e-5
        assert processors(sd3) == before
        assert not hasattr(sd3, "denoise")

    @pytest.mark.slow
    def test_the_originals_batches(self, sd3):
        """Of six rows it edits none, and of two it takes one prompt's halves for a source and a target."""
        GlobalVars.TEST_QK_STEP = STEPS
        with regiter_attention_editor_diffusers_sd3(sd3, compat="original"):
            three, alone = drawn(sd3), drawn(sd3, PROMPTS[:1])
        torch.testing.assert_close(three, drawn(sd3), atol=1e-4, rtol=1e-4)
        assert (alone - drawn(sd3, PROMPTS[:1])).abs().max() > 1e-3
        with regiter_attention_editor_diffusers_sd3(sd3):
            one = drawn(sd3, PROMPTS[:1])
        torch.testing.assert_close(one, drawn(sd3, PROMPTS[:1]), atol=0, rtol=0)

    def test_the_switch_stands_for_the_keyword(self, flux):
        GlobalVars.TEST_QK_STEP = 2  # of which the original edits one, as it counts every step twice
        with set_compat("original"), regiter_attention_editor_diffusers_flux(flux):
            switched = drawn(flux, PROMPTS[:2])
        with regiter_attention_editor_diffusers_flux(flux, compat="original"):
            torch.testing.assert_close(drawn(flux, PROMPTS[:2]), switched, atol=0, rtol=0)
        with regiter_attention_editor_diffusers_flux(flux):
            assert (drawn(flux, PROMPTS[:2]) - switched)[1].abs().max() > 1e-5

    def test_denoise_hands_on_callbacks_and_tuples(self, flux):
        seen = []

        def note(pipe, step, timestep, tensors):
            seen.append((step, GlobalVars.CUR_STEP))
            return tensors

        with register_flux_solver(flux):
            given = {"num_inference_steps": STEPS, "max_sequence_length": 16, "output_type": "latent", **SIZE}
            out = flux.denoise(PROMPTS[:1], return_dict=False, callback_on_step_end=note, **given)
            assert isinstance(out, tuple)
            with pytest.raises(NotImplementedError, match="FreePromptPipeline"):
                flux.invert(PROMPTS[:1])
        assert seen == [(0, 0), (1, 1), (2, 2)]

    def test_settings_that_nothing_would_come_of(self):
        """A typo edited nothing, and so did NaN and what was set on an instance; the rest failed in the first call."""
        with pytest.raises(AttributeError, match=r"no 'TEST_QK_STEPS'.* did you mean TEST_QK_STEP\? "):
            GlobalVars.TEST_QK_STEPS = 2
        with pytest.raises(AttributeError, match=r"write GlobalVars\.TEST_QK_STEP = 2"):
            GlobalVars().TEST_QK_STEP = 2
        for wrong in ("2", None, float("nan"), -1, True, [2]):
            with pytest.raises(ValueError, match="expected TEST_QK_STEP to be a number of steps from 0 on"):
                GlobalVars.TEST_QK_STEP = wrong
        for mask in (torch.ones(4), torch.zeros(1), np.ones((2, 2))):
            with pytest.raises(AttributeError, match="MASK is not served: masks are made by ConsistEdit"):
                GlobalVars.MASK = mask
        assert GlobalVars.TEST_QK_STEP == 0
        for steps in (2.5, np.int64(2), torch.tensor(2)):
            GlobalVars.TEST_QK_STEP = steps
            assert steps == GlobalVars.TEST_QK_STEP
        GlobalVars.CUR_ATT_LAYER = 0  # which the original counts

    def test_bad_input(self, flux, sd3):
        with pytest.raises(TypeError, match="expected a pipeline of Stable Diffusion 3"):
            regiter_attention_editor_diffusers_sd3(flux)
        with pytest.raises(TypeError, match=r"expected a pipeline of FLUX\.1"):
            register_flux_solver(sd3)
        with pytest.raises(AttributeError, match="GENERATE_MASK is not served"):
            GlobalVars.GENERATE_MASK = True
        GlobalVars.GENERATE_MASK = False  # which the scripts set in any case
        with pytest.raises(ImportError, match="WordMask"):
            from fpe_pipeline.compat.consist_edit.attention_control import (  # noqa: F401
                regiter_attention_editor_diffusers_sd3_mask,
            )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_an_error_in_a_call(flux, error):
    total, before = sum(blocks(flux)), processors(flux)
    plain = drawn(flux)

    def fail(*arguments):
        raise error("in the user's callback")

    with pytest.raises(error), register_non_rigid_attention_control(flux, 0, total_layers=total):
        drawn(flux, callback_on_step_end=fail)
    GlobalVars.TEST_QK_STEP = STEPS
    with pytest.raises(error), register_flux_solver(flux), regiter_attention_editor_diffusers_flux(flux):
        drawn(flux, call=flux.denoise, callback_on_step_end=fail)
    pipe = FluxPipeline(**flux.components)
    with pytest.raises(error):
        drawn(pipe, mm_copy_blocks=[0], callback_on_step_end=fail)
    assert processors(flux) == before
    assert not flux.transformer._forward_pre_hooks
    torch.testing.assert_close(drawn(flux), plain, atol=0, rtol=0)


def test_two_tools_on_one_model(flux):
    """The later registration takes the place of the earlier one; a session of our own refuses both."""
    total, before = sum(blocks(flux)), processors(flux)
    first = register_non_rigid_attention_control(flux, layer_idx=[0], total_layers=total)
    second = regiter_attention_editor_diffusers_flux(flux)
    with pytest.raises(RuntimeError, match="already being edited"), editing(flux, ConsistEdit()):
        pass
    second.restore()
    first.restore()
    assert processors(flux) == before
    with editing(flux, ConsistEdit()), pytest.raises(RuntimeError, match="already being edited"):
        regiter_attention_editor_diffusers_flux(flux)
    assert processors(flux) == before
