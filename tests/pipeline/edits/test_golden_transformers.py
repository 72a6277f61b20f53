"""Edits of transformers are what the authors' own code computes, through the public API."""

import pytest
import torch

from fpe_pipeline import ConsistEdit, FreeFluxEdit, StableFlowEdit, editing
from tests.support.golden_transformers import golden_flux, golden_sd3, load_dropin


@pytest.fixture(scope="module")
def flux():
    return golden_flux()


@pytest.fixture(scope="module")
def sd3():
    return golden_sd3()


def drawn(pipe, case, edit, **options):
    settings = case.settings
    prompts = settings["prompts"]
    latents = case.tensors["in.start_latents"]
    with editing(pipe, edit):
        return pipe(
            prompts,
            latents=latents.expand(len(prompts), *latents.shape[1:]).clone(),
            height=settings["height"],
            width=settings["width"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            max_sequence_length=settings["max_sequence_length"],
            output_type="latent",
            **options,
        ).images


def miss(case, actual):
    """The largest difference, in tolerances that the case asks for."""
    return float((actual - case.tensors["out.latents"]).abs().max()) / case.atol("latents")


def stable_flow_layers(settings):
    return [*settings["mm_copy_blocks"], *(3 + single for single in settings["single_copy_blocks"])]


class TestConsistEdit:
    def test_stable_diffusion_3(self, sd3):
        case = load_dropin("consistedit_sd3")
        assert miss(case, drawn(sd3, case, ConsistEdit(case.settings["alpha"]))) <= 1

    @pytest.mark.parametrize(
        "wrong",
        [ConsistEdit(0.75), ConsistEdit(0.25), ConsistEdit(0.5, both_halves=False), ConsistEdit(0.5, layers=[0, 1, 2])],
        ids=["a step more", "a step less", "the conditional half alone", "a layer less"],
    )
    def test_wrong_variants(self, sd3, wrong):
        case = load_dropin("consistedit_sd3")
        assert miss(case, drawn(sd3, case, wrong)) > 20

    @pytest.mark.slow
    def test_flux_counts_steps_twice_in_the_original(self, flux):
        case = load_dropin("consistedit_flux")
        assert miss(case, drawn(flux, case, ConsistEdit(case.settings["alpha"], compat="original"))) <= 1
        assert miss(case, drawn(flux, case, ConsistEdit(case.settings["alpha"] / 2))) <= 1

    @pytest.mark.parametrize(
        "wrong",
        [ConsistEdit(1.0), ConsistEdit(0.5, compat="original")],
        ids=["steps counted once", "half as many"],
    )
    def test_wrong_variants_on_flux(self, flux, wrong):
        case = load_dropin("consistedit_flux")
        assert miss(case, drawn(flux, case, wrong)) > 20


class TestStableFlow:
    def test_two_targets(self, flux):
        case = load_dropin("stableflow_flux")
        assert miss(case, drawn(flux, case, StableFlowEdit(layers=stable_flow_layers(case.settings)))) <= 1

    @pytest.mark.parametrize("layers", [[0, 2], [0, 1, 4, 6]], ids=["dual alone", "another dual one"])
    def test_wrong_variants(self, flux, layers):
        case = load_dropin("stableflow_flux")
        assert miss(case, drawn(flux, case, StableFlowEdit(layers=layers))) > 20

    def test_a_real_image(self, flux):
        """Its latents are inverted at guidance 1, and every step hands the source's row its own of the inversion."""
        case = load_dropin("stableflow_flux_real")
        assert miss(case, self.real(flux, case, StableFlowEdit(layers=stable_flow_layers(case.settings)))) <= 1
        assert miss(case, self.real(flux, case, StableFlowEdit(layers=[0, 2]))) > 20

    def real(self, flux, case, edit):
        inverted, guidance = case.tensors["out.inverted_list"], torch.tensor(case.settings["guidance_scale"]).float()

        def give_each_row_its_guidance(module, args, kwargs):
            return args, {**kwargs, "guidance": guidance}

        def follow_the_inversion(pipe, step, timestep, values):
            values["latents"][0] = inverted[-step][0]
            return values

        case.tensors["in.start_latents"] = inverted[-1]
        hook = flux.transformer.register_forward_pre_hook(give_each_row_its_guidance, with_kwargs=True)
        case.settings["guidance_scale"] = 1.0
        try:
            return drawn(flux, case, edit, callback_on_step_end=follow_the_inversion)
        finally:
            hook.remove()
            case.settings["guidance_scale"] = guidance.tolist()


class TestFreeFlux:
    def test_non_rigid(self, flux):
        case = load_dropin("freeflux_nonrigid")
        assert miss(case, drawn(flux, case, FreeFluxEdit(layers=case.settings["layer_idx"]))) <= 1

    @pytest.mark.parametrize(
        "wrong",
        [
            FreeFluxEdit(layers=[0, 2, 4, 6]),
            FreeFluxEdit(layers=[0, 2, 4, 7], steps=0.75),
            FreeFluxEdit("background", mask=torch.ones(16, 20), layers=[0, 2, 4, 7], steps=1.0),
        ],
        ids=["another layer", "a step less", "values alone"],
    )
    def test_wrong_variants(self, flux, wrong):
        case = load_dropin("freeflux_nonrigid")
        assert miss(case, drawn(flux, case, wrong)) > 20
