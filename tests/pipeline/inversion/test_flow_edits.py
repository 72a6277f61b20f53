"""Edits of inverted images on transformers: what holds the source, by which solver, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline import FreePromptEdit, Inversion, MasaCtrlEdit, editing
from fpe_pipeline.models.flow_solvers import SOLVERS
from tests.support.dense_joint import dense
from tests.support.flow_pipelines import (
    EXACT,
    FAMILIES,
    FAST,
    MADE,
    OTHER,
    SIZE,
    SOURCE,
    STEPS,
    TARGET,
    StandIn,
    distance,
    edited_with,
    repeated,
    solving,
)
from tests.support.free_prompt_pipelines import SOURCE as UNET_SOURCE
from tests.support.free_prompt_pipelines import free_prompt_pipeline
from tests.support.tiny_transformers import ExactEuler, draw


@pytest.fixture(scope="module")
def stock(pipe):
    return {family: MADE[family](pipe) for family in FAMILIES}


@pytest.fixture(scope="module")
def pipes(stock):
    return {family: edited_with(stock[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(3).random((48, 80, 3))


@pytest.fixture
def transformer_must_not_run(pipes, monkeypatch):
    def forward(*args, **kwargs):
        pytest.fail("the transformer ran before the arguments were checked")

    for tiny in pipes.values():
        monkeypatch.setattr(tiny.transformer, "forward", forward)


def image_maps(row, rows):
    """Image queries and keys of the source, in the conditional half."""
    half = rows if rows == 2 else rows // 2
    source = rows - half
    return [(1.0, {"q_image": source, "k_image": source})] if row > source else None


class TestInverted:
    def inverted(self, tiny, photo, **options):
        return tiny.invert(photo, SOURCE, num_inference_steps=STEPS, max_sequence_length=12, **SIZE, **options)

    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_direct_returns_the_encoded_image(self, pipes, photo, family, solver):
        """With any prompts and guidance; the other methods leave the last step, or all, to the solver."""
        tiny = solving(pipes[family], solver)
        images = {}
        for method in ("direct", "reference", "free"):
            inversion = self.inverted(tiny, photo, method=method)
            out = tiny(inversion=inversion, target_prompt=[TARGET, OTHER], guidance_scale=4.0, **FAST)
            images[method] = out.images
            assert out.prompts == (SOURCE, TARGET, OTHER)
            assert distance(out.targets[0], out.targets[1]) > 1e-3
        first = inversion.latents[0]
        assert torch.equal(images["direct"][:1], first)
        assert distance(images["reference"][:1], first) > 1e-4 and distance(images["free"][:1], first) > 1e-4
        assert distance(images["free"], images["reference"]) > 1e-4
        # The last step's targets look at source rows that are the same in both.
        assert distance(images["reference"][1:], images["direct"][1:]) == 0

    @pytest.mark.parametrize("family", FAMILIES)
    def test_as_many_tokens_of_text_as_the_inversion_had(self, pipes, photo, tmp_path, family):
        """Their padding takes attention, so that a free source goes back as it came with no other number."""
        tiny = solving(pipes[family], "rf-solver")
        inversion = Inversion.load(self.inverted(tiny, photo, method="free").save(tmp_path / "free.safetensors"))
        options = {"inversion": inversion, "guidance_scale": 1.0}
        edit = {**options, "target_prompt": TARGET, "output_type": "latent"}
        same = tiny(**edit).images
        assert torch.equal(same, tiny(**edit, max_sequence_length=12).images)
        assert distance(same, tiny(**edit, max_sequence_length=24).images) > 1e-3
        assert tiny.record(**options).text_length == 12

    @pytest.mark.parametrize("solver", ["euler", "rf-solver"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_targets_are_the_papers(self, stock, pipes, photo, family, solver):
        """The stock pipeline with dense processors, whose source row a callback puts back onto the trajectory."""
        tiny = solving(pipes[family], solver)
        inversion = self.inverted(tiny, photo)
        options = {**FAST, **SIZE, "guidance_scale": 4.0}
        actual = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.5, **FAST, guidance_scale=4.0)
        calls = {"euler": 1, "rf-solver": 2}[solver]

        plain, rows = stock[family], repeated(inversion.noise, 2)
        plain.scheduler = tiny.scheduler

        def reference(late):
            def put_back(pipe, index, timestep, tensors):
                latents = tensors["latents"].clone()
                if late is not None and index % calls == calls - 1:
                    latents[0] = inversion.latents[STEPS - 1 - index // calls + late][0]
                return {"latents": latents}

            with dense(plain, image_maps, steps=range(2 * calls)):
                return plain([SOURCE, TARGET], latents=rows, callback_on_step_end=put_back, **options).images

        assert distance(actual.images, reference(0)) <= EXACT[family]
        for wrong in (1, None):  # a step late, or not at all
            assert distance(actual.images[1], reference(wrong)[1]) > 1000 * EXACT[family]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_several_images(self, pipes, photo, family):
        tiny = solving(pipes[family], "fireflow")
        inversion = self.inverted(tiny, photo)
        edit = MasaCtrlEdit(0, layers=range(2))
        both = tiny(inversion=inversion, target_prompt=TARGET, num_images_per_prompt=2, edit=edit, **FAST)
        one = tiny(inversion=inversion, target_prompt=TARGET, edit=edit, **FAST)
        assert distance(both.targets[0][1], one.targets[0]) <= EXACT[family]
        assert torch.equal(both.source[1], inversion.latents[0][0])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_saved_and_loaded(self, pipes, photo, family, tmp_path):
        tiny = solving(pipes[family], "rf-solver")
        inversion = self.inverted(tiny, photo)
        loaded = Inversion.load(inversion.save(tmp_path / "inversion.safetensors"))
        assert loaded.method == "direct" and loaded.schedule == inversion.schedule and loaded.steps == STEPS
        options = {"target_prompt": TARGET, **FAST}
        assert torch.equal(tiny(inversion=loaded, **options).images, tiny(inversion=inversion, **options).images)

    def test_pictures(self, pipes, photo, tmp_path):
        tiny = solving(pipes["sd3"], "fireflow")
        Image.fromarray((photo * 255).astype(np.uint8)).save(tmp_path / "photo.png")
        inversion = tiny.invert(tmp_path / "photo.png", SOURCE, num_inference_steps=2)
        assert inversion.image.size == (80, 48)  # of the model's 64 x 64 pixels, at the picture's proportions
        out = tiny(inversion=inversion, target_prompt=TARGET)
        assert [image.size for image in out.images] == [(80, 48)] * 2
        assert out.grid().width > 160

    def test_inside_a_session_it_is_not_edited(self, pipes, photo):
        tiny = solving(pipes["sd3"], "euler")
        expected = self.inverted(tiny, photo).latents
        with editing(tiny, FreePromptEdit(1.0)):
            assert torch.equal(self.inverted(tiny, photo).latents, expected)
            draw(StandIn(tiny))


class TestRefusals:
    @pytest.mark.parametrize("method", ["ddim", "null-text"])
    def test_inversions_of_unets(self, pipes, photo, transformer_must_not_run, method):
        with pytest.raises(ValueError, match=f"got '{method}', which is for UNets"):
            pipes["sd3"].invert(photo, SOURCE, method=method)
        with pytest.raises(ValueError, match=r"method must be one of direct, reference, free, got 'sde'$"):
            pipes["sd3"].invert(photo, SOURCE, method="sde")

    def test_an_inversion_on_the_other_kind_of_model(self, pipe, pipes, photo):
        unet = free_prompt_pipeline(pipe)
        options = {"num_inference_steps": 2, "height": 32, "width": 32}
        of_unet = unet.invert(photo, UNET_SOURCE, method="direct", **options)
        with pytest.raises(ValueError, match="with DDIMScheduler, on a UNet, and this pipeline has a transf"):
            pipes["sd3"](inversion=of_unet, target_prompt=TARGET)
        of_flow = solving(pipes["sd3"], "fireflow").invert(photo, SOURCE, max_sequence_length=12, **options)
        with pytest.raises(ValueError, match=r"FireFlowScheduler, on a transformer .* has a UNet"):
            unet(inversion=of_flow, target_prompt=TARGET)
        with pytest.raises(ValueError, match="and this pipeline has a UNet"):
            unet.record(inversion=of_flow)
        with pytest.raises(ValueError, match="method must be one of ddim, direct"):
            unet.invert(photo, method="reference")

    def test_another_solver_or_number_of_steps(self, pipes, photo):
        tiny = solving(pipes["sd3"], "fireflow")
        inversion = tiny.invert(photo, SOURCE, num_inference_steps=2, max_sequence_length=12, **SIZE)
        with pytest.raises(ValueError, match="inverted in 2 steps, got num_inference_steps=4"):
            tiny(inversion=inversion, target_prompt=TARGET, num_inference_steps=4)
        with pytest.raises(ValueError, match="inverted at width 80, got 64"):
            tiny(inversion=inversion, target_prompt=TARGET, width=64)
        with pytest.raises(ValueError, match="the inversion decides sigmas"):
            tiny(inversion=inversion, target_prompt=TARGET, sigmas=[1.0, 0.5])
        solving(tiny, "rf-solver")
        with pytest.raises(ValueError, match="scheduler FireFlowScheduler there and RFSolverScheduler here"):
            tiny(inversion=inversion, target_prompt=TARGET)

    def test_schedulers_whose_steps_cannot_be_undone(self, pipes, photo):
        tiny = pipes["sd3"]
        tiny.scheduler = ExactEuler(stochastic_sampling=True)
        with pytest.raises(ValueError, match=r'flow_scheduler\(pipe\.scheduler, "euler"\)'):
            tiny.invert(photo, SOURCE)
