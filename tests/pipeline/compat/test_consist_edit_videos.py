"""ConsistEdit's surface on CogVideoX, against layers that are written out."""

import pytest
import torch

from fpe_pipeline import ConsistEdit
from fpe_pipeline.compat.consist_edit.attention_control import (
    regiter_attention_editor_diffusers_cog,
    regiter_attention_editor_diffusers_sd3,
)
from fpe_pipeline.compat.consist_edit.global_var import GlobalVars
from fpe_pipeline.compat.consist_edit.solver import register_cog_solver, register_sd3_solver
from tests.support.tiny_cogvideox import TEXTS, dense_cogvideox, draw_cogvideox, tiny_cogvideox_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")

PROMPTS = ["a photo of a red car on a mountain", "a photo of a big dog on a mountain"]
EXACT = 1e-8


@pytest.fixture(scope="module")
def video(pipe):
    return tiny_cogvideox_pipeline(pipe)


@pytest.fixture
def two_steps():
    GlobalVars.TEST_QK_STEP = 2
    yield
    GlobalVars.TEST_QK_STEP = 0


def farthest(one, other):
    return float((one - other).abs().max())


def densely(pipe, steps, prompts=PROMPTS, **options):
    def rule(row, rows):
        source = row // len(prompts) * len(prompts)
        follows = row != source and state["step"] in steps
        return [(1.0, {"q_image": source, "k_image": source})] if follows else None

    with dense_cogvideox(pipe, rule) as state:
        return draw_cogvideox(pipe, prompts, **options)


@pytest.mark.parametrize(("compat", "steps"), [(None, range(2)), ("original", range(4))])
def test_steps(video, two_steps, compat, steps):
    """The original edits every step; both halves of the batch follow."""
    with regiter_attention_editor_diffusers_cog(video, compat=compat):
        actual = draw_cogvideox(video, PROMPTS)
    assert GlobalVars.NUM_ATT_LAYERS == 3
    assert farthest(actual, densely(video, steps)) <= EXACT
    assert farthest(actual, densely(video, range(6) if compat is None else range(2))) > 1e-5


def test_any_number_of_targets(video, two_steps):
    three = [*PROMPTS, "a red car on a house"]
    with regiter_attention_editor_diffusers_cog(video):
        actual = draw_cogvideox(video, three, guidance_scale=1.0)
    assert farthest(actual, densely(video, range(2), three, guidance_scale=1.0)) <= EXACT
    original = regiter_attention_editor_diffusers_cog(video, compat="original")
    with (
        original,
        pytest.raises(ValueError, match="a guided batch of sources and as many targets, got 6 rows: leave comp"),
    ):
        draw_cogvideox(video, three)


def test_denoise(video, two_steps):
    """As the original's script calls it."""
    noise = torch.randn(1, 2, 16, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"height": 64, "width": 64, "num_frames": 5, "max_sequence_length": TEXTS, "output_type": "latent"}
    with register_cog_solver(video), regiter_attention_editor_diffusers_cog(video):
        given = {"latents": noise.expand(2, -1, -1, -1, -1), "guidance_scale": 6, "num_inference_steps": 4}
        frames = video.denoise(PROMPTS, negative_prompt=["a drawing"] * 2, **given, **options).frames
        assert (GlobalVars.TOTAL_STEPS, GlobalVars.CUR_STEP) == (4, 4)
    assert farthest(frames, densely(video, range(2), guidance_scale=6)) <= EXACT
    assert not hasattr(video, "denoise")


def test_refusals(video):
    with pytest.raises(TypeError, match="expected a pipeline of Stable Diffusion 3, got one with CogVideoX"):
        regiter_attention_editor_diffusers_sd3(video)
    with pytest.raises(TypeError, match="expected a pipeline of Stable Diffusion 3, got CogVideoXPipeline"):
        register_sd3_solver(video)
    with pytest.raises(ImportError, match="masks of a word are of one picture"):
        from fpe_pipeline.compat.consist_edit.attention_control import (  # noqa: F401
            regiter_attention_editor_diffusers_cog_mask,
        )


def test_a_picture_as_mask_holds_for_every_frame(video):
    """What is said in the stead of the original's masked editor."""
    from fpe_pipeline import editing

    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    share = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4).double()

    def rule(row, rows):
        source = row // 2 * 2
        mixed = (source, row, share)
        early = {"q_image": source, "k_image": source, "v_image": mixed}
        late = dict.fromkeys(("q_image", "k_image", "v_image"), mixed)
        return [(1.0, early if state["step"] < 2 else late)] if row != source else None

    with editing(video, ConsistEdit(0.5, mask=mask)):
        actual = draw_cogvideox(video, PROMPTS, frames=3)
    with dense_cogvideox(video, rule) as state:
        assert farthest(actual, draw_cogvideox(video, PROMPTS, frames=3)) <= EXACT
