"""Wan from a video or a picture, and SkyReels-V2 from a picture, by their own autoencoders."""

from importlib import import_module
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanVideoToVideoPipeline
from PIL import Image

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, editing
from tests.support.slow_cases import few
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_t5
from tests.support.tiny_wan import PROMPTS, TEXTS, WAN, dense_wan, tiny_wan_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8
SIZE = {"height": 32, "width": 32, "max_sequence_length": TEXTS, "output_type": "latent"}
PICTURE = Image.radial_gradient("L").convert("RGB").resize((32, 32))


def autoencoder():
    torch.manual_seed(0)
    size = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**size, temperal_downsample=[False, True, True]).double().eval()


def generators(rows):
    return [torch.Generator().manual_seed(3) for _ in range(rows)]


def farthest(one, other):
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def wan(pipe):
    tiny = tiny_wan_pipeline(pipe, kind=WanVideoToVideoPipeline)
    tiny.register_modules(vae=autoencoder())
    tiny.vae_scale_factor_temporal, tiny.vae_scale_factor_spatial = 4, 8
    return tiny


class TestFromAVideo:
    @pytest.fixture(autouse=True)
    def _texts_as_they_are(self, monkeypatch):
        monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_video2video.prompt_clean", str)  # which needs ftfy

    def run(self, wan, generator, guidance=4.0):
        """The last three steps of five."""
        given = {"video": [PICTURE] * 5, "prompt": PROMPTS[:2], "strength": 0.6, "num_inference_steps": 5}
        return wan(**given, generator=generator, guidance_scale=guidance, **SIZE).frames

    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    def test_steps_are_of_the_whole_schedule(self, wan, guidance):
        """The pipeline starts part-way, and does not tell its scheduler where."""
        with editing(wan, MasaCtrlEdit(3, start_layer=0)) as session:
            late = self.run(wan, torch.Generator().manual_seed(3), guidance)
        assert {tuple(steps) for steps in session.report().layers.values()} == {(3, 4)}
        with editing(wan, FreePromptEdit(0.6)) as session:
            early = self.run(wan, torch.Generator().manual_seed(3), guidance)
        assert {tuple(steps) for steps in session.report().layers.values()} == {(2,)}
        plain = self.run(wan, generators(2), guidance)
        assert max(farthest(late[0], plain[0]), farthest(early[0], plain[0])) <= EXACT
        assert min(farthest(late[1], plain[1]), farthest(early[1], plain[1])) > 1e-3

    def test_the_first_call_of_a_step_sees_the_prompts(self, wan):
        with editing(wan, FreePromptEdit(1.0)):
            actual = self.run(wan, torch.Generator().manual_seed(3))
        followed = {}
        with dense_wan(wan, followed, range(5)) as state:

            def rule(row, rows, map_of, value):
                return map_of(0, 0) @ value[row] if row and state["calls"] % 2 else None

            followed["attn1"] = rule
            assert farthest(actual, self.run(wan, generators(2))) <= EXACT


def wan_from_a_picture(pipe, monkeypatch):
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.prompt_clean", str)
    given = {"image_encoder": None, "image_processor": None}
    tiny = tiny_wan_pipeline(pipe, kind=WanImageToVideoPipeline, given=given, in_channels=36)
    tiny.register_modules(vae=autoencoder())
    tiny.vae_scale_factor_temporal, tiny.vae_scale_factor_spatial = 4, 8
    return tiny


def skyreels_from_a_picture(pipe, monkeypatch):
    module = import_module("diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2_i2v")
    monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    torch.manual_seed(0)
    config = {**WAN, "in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}
    tiny = diffusers.SkyReelsV2ImageToVideoPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=tiny_t5(pipe.tokenizer).double(),
        image_encoder=None,
        image_processor=None,
        transformer=sharpened(diffusers.SkyReelsV2Transformer3DModel(**config)).double().eval(),
        vae=autoencoder(),
        scheduler=ExactEuler(),
    )
    seen = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tiny.encode_image = lambda *args, **kwargs: seen
    tiny.set_progress_bar_config(disable=True)
    return tiny


class _Forgetful(ExactEuler):
    """Keeps nothing of earlier steps, where ChronoEdit's scheduler keeps frames that are left out afterwards."""

    model_outputs, last_sample = (), None


def chronoedit(pipe, monkeypatch):
    monkeypatch.setattr("diffusers.pipelines.chronoedit.pipeline_chronoedit.prompt_clean", str)
    torch.manual_seed(0)
    config = {**WAN, "in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}
    tiny = diffusers.ChronoEditPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=tiny_t5(pipe.tokenizer).double(),
        image_encoder=None,
        image_processor=None,
        transformer=sharpened(diffusers.ChronoEditTransformer3DModel(**config)).double().eval(),
        vae=autoencoder(),
        scheduler=_Forgetful(),
    )
    seen = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tiny.encode_image = lambda *args, **kwargs: seen
    tiny.set_progress_bar_config(disable=True)
    return tiny


SHOWN = {"Wan": wan_from_a_picture, "SkyReels-V2": skyreels_from_a_picture, "ChronoEdit": chronoedit}


@pytest.mark.parametrize("name", few(SHOWN.keys(), "Wan", "SkyReels-V2", "ChronoEdit"))
def test_a_picture_is_repeated_once(pipe, monkeypatch, name):
    """Rows of one video draw the same noise, beside one picture that the pipeline itself repeats."""
    tiny = SHOWN[name](pipe, monkeypatch)

    def run(generator):
        given = {"image": PICTURE, "prompt": PROMPTS[:3], "num_frames": 5, "num_inference_steps": 2}
        return tiny(**given, generator=generator, **SIZE).frames

    with editing(tiny, FreePromptEdit(1.0)) as session:
        actual = run(torch.Generator().manual_seed(3))
    assert "draw the same noise" in session.report().noise and len(session.report().layers) == 2
    followed = {}
    with dense_wan(tiny, followed, range(2)) as state:

        def rule(row, rows, map_of, value):
            return map_of(0, 0) @ value[row] if row and state["calls"] % 2 else None

        followed["attn1"] = rule
        assert farthest(actual, run(generators(3))) <= EXACT


def test_frames_that_are_left_out_on_the_way(pipe, monkeypatch):
    """Of ChronoEdit, whose later steps are of the first frame and the last."""
    tiny = chronoedit(pipe, monkeypatch)

    def run():
        given = {"image": PICTURE, "prompt": PROMPTS[:2], "num_frames": 13, "num_inference_steps": 4}
        given |= {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2, "guidance_scale": 4.0}
        return tiny(**given, generator=generators(2), **SIZE).frames

    with editing(tiny, FreePromptEdit(0.75)) as session:
        actual = run()
    assert actual.shape[2] == 2 and set(map(tuple, session.report().layers.values())) == {(0, 1, 2)}
    followed = {}
    with dense_wan(tiny, followed, range(3)) as state:

        def rule(row, rows, map_of, value):
            return map_of(0, 0) @ value[row] if row and state["calls"] % 2 else None

        followed["attn1"] = rule
        assert farthest(actual, run()) <= EXACT < farthest(actual[1], actual[0])
