"""Edits of CogVideoX: the kinds of its models, schedulers and pipelines; every edit of it is tested with others'."""

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXVideoToVideoPipeline,
)

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    MasaCtrlEdit,
    WordMask,
    editing,
    heat_maps,
)
from fpe_pipeline.models.adapters.families import adapter_of
from fpe_pipeline.session.hooks import SchedulerHook
from tests.support.own_maps import OwnMaps
from tests.support.slow_cases import few
from tests.support.tiny_cogvideox import KINDS, dense_cogvideox, draw_cogvideox, tiny_cogvideox_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8
PROMPTS = ["a photo of a red car on a mountain", "a photo of a big dog on a mountain", "a red car on a house"]


@pytest.fixture(scope="module")
def video(pipe):
    return tiny_cogvideox_pipeline(pipe)


def edited(pipe, edit, prompts=PROMPTS, **options):
    with editing(pipe, edit) as session:
        out = draw_cogvideox(pipe, prompts, **options)
    return out, session.report()


def reference(pipe, names, steps, *, both=False, prompts=PROMPTS, **options):
    def rule(row, rows):
        source = row // len(prompts) * len(prompts)
        seen = source > 0 or rows == len(prompts)
        return (
            [(1.0, dict.fromkeys(names, source))]
            if row != source and state["step"] in steps and (seen or both)
            else None
        )

    with dense_cogvideox(pipe, rule) as state:
        return draw_cogvideox(pipe, prompts, **options)


def farthest(one, other):
    return float((one - other).abs().max())


SIZES = {
    "one frame": {"frames": 1},
    "three frames, not square": {"frames": 3, "size": (6, 12)},
    "no guidance": {"guidance_scale": 1.0},
}


@pytest.mark.parametrize("options", few(SIZES, "three frames, not square"))
@pytest.mark.parametrize("kind", few(["2B", "5B", "1.5"], "2B"))
def test_targets_are_the_papers(pipe, kind, options):
    if kind == "1.5":
        options = {**options, "frames": 4}
    tiny = tiny_cogvideox_pipeline(pipe, kind)
    plain = draw_cogvideox(tiny, PROMPTS, **options)
    for edit, names, steps, both in (
        (FreePromptEdit(0.5), ("q_image", "k_image"), (0, 1), False),
        (ConsistEdit(0.5), ("q_image", "k_image"), (0, 1), True),
        (MasaCtrlEdit(1, layers=range(3)), ("k_image", "v_image"), (1, 2, 3), True),
    ):
        actual, report = edited(tiny, edit, **options)
        assert farthest(actual, reference(tiny, names, steps, both=both, **options)) <= EXACT
        assert farthest(actual[0], plain[0]) <= EXACT
        assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-5
        assert {path: tuple(at) for path, at in report.layers.items()} == {
            f"transformer_blocks.{index}.attn1": steps for index in range(3)
        }


def test_a_tokens_frames(pipe):
    """In CogVideoX 1.5 a token is of two frames; latents of another number are refused with the reason."""
    site = adapter_of(tiny_cogvideox_pipeline(pipe, "1.5")).sites[0]
    assert site.at(6, 12, 2).tokens == 2 * 3 * 6
    adapter = adapter_of(tiny_cogvideox_pipeline(pipe, "1.5"))
    call = adapter.read(
        (), {"hidden_states": torch.zeros(2, 4, 16, 6, 12), "encoder_hidden_states": None, "timestep": 1}
    )
    assert call.size == (6, 12, 2) and call.rows == 2
    with pytest.raises(ValueError, match="a multiple of 2 frames, which this model takes together, got 3"):
        adapter.read((), {"hidden_states": torch.zeros(2, 3, 16, 6, 12), "encoder_hidden_states": None, "timestep": 1})


def test_dpm_solver(pipe):
    """Its steps take the prediction before beside the present one, and draw noise that rows share."""
    tiny = tiny_cogvideox_pipeline(pipe, scheduler=CogVideoXDPMScheduler())
    steps = []

    class Followed(FreePromptEdit):
        def active(self, step):
            steps.append(step.index)
            return super().active(step)

    options = {"latents": None, "use_dynamic_cfg": True}
    out, report = edited(tiny, Followed(1.0), generator=torch.Generator().manual_seed(4), **options)
    assert "draw the same noise" in report.noise and set(steps) == {0, 1, 2, 3}
    noise = [torch.Generator().manual_seed(4) for _ in PROMPTS]
    assert farthest(out, reference(tiny, ("q_image", "k_image"), range(4), generator=noise, **options)) <= EXACT
    seen = []
    hook = SchedulerHook(tiny.scheduler, lambda latents, timestep: seen.append(int(timestep)) or latents)
    draw_cogvideox(tiny, PROMPTS)
    hook.remove(expected=True)
    assert seen == tiny.scheduler.timesteps.tolist()


def test_fused_projections(pipe):
    tiny = tiny_cogvideox_pipeline(pipe)
    expected, _ = edited(tiny, FreePromptEdit(0.5))
    tiny.transformer.fuse_qkv_projections()
    assert farthest(edited(tiny, FreePromptEdit(0.5))[0], expected) <= EXACT
    tiny.transformer.unfuse_qkv_projections()
    assert farthest(edited(tiny, FreePromptEdit(0.5))[0], expected) <= EXACT


@pytest.mark.parametrize("dtype", few({"float64": torch.float64, "float32": torch.float32}, "float32"))
def test_the_source_is_the_one_without_an_edit(pipe, dtype):
    tiny = tiny_cogvideox_pipeline(pipe, dtype=dtype)
    out, _ = edited(tiny, FreePromptEdit(1.0))
    own, _ = edited(tiny, OwnMaps())
    plain = draw_cogvideox(tiny, PROMPTS)
    bound = 1e-4 if dtype is torch.float32 else 1e-11
    assert farthest(out[0], own[0]) <= bound and farthest(own, plain) <= bound
    idle, _ = edited(tiny, FreePromptEdit(0.0))
    assert torch.equal(idle, plain)


def tiny_autoencoder():
    torch.manual_seed(0)
    kinds = ["CogVideoXDownBlock3D"] * 4, ["CogVideoXUpBlock3D"] * 4
    channels = {"block_out_channels": [8] * 4, "latent_channels": 16, "norm_num_groups": 2}
    return AutoencoderKLCogVideoX(
        down_block_types=kinds[0],
        up_block_types=kinds[1],
        layers_per_block=1,
        sample_height=64,
        sample_width=64,
        **channels,
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CogVideoXVideoToVideoPipeline, CogVideoXImageToVideoPipeline])
def test_from_a_video_and_from_a_picture(pipe, kind):
    from PIL import Image

    picture, options = Image.radial_gradient("L").convert("RGB").resize((64, 64)), {}
    tiny = tiny_cogvideox_pipeline(pipe, dtype=torch.float32, kind=kind, vae=tiny_autoencoder())
    if kind is CogVideoXImageToVideoPipeline:
        from diffusers import CogVideoXTransformer3DModel

        from tests.support.tiny_cogvideox import COGVIDEOX

        tiny.register_modules(
            transformer=CogVideoXTransformer3DModel(**{**COGVIDEOX, **KINDS["5B"], "in_channels": 32}).eval()
        )
        options = {"image": picture, "num_frames": 5}
    else:
        options = {"video": [picture] * 5, "strength": 0.5}

    def made(edit, prompts):
        with editing(tiny, edit) as session:
            given = {"prompt": prompts, "height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 12}
            noise = torch.Generator().manual_seed(2)
            out = tiny(**given, generator=noise, output_type="latent", **options).frames
        return out, session.report()

    out, report = made(FreePromptEdit(1.0), PROMPTS[:2])
    alone, _ = made(FreePromptEdit(0.0), PROMPTS[:2])
    assert farthest(out[0], alone[0]) <= 1e-4 < farthest(out[1], alone[1])
    assert len(report.layers) == 3


class TestRefused:
    def test_heat_of_a_video(self, video):
        refused = "has tokens of 2 frames, and heat is read of one picture"
        with pytest.raises(ValueError, match=refused), heat_maps(video, ["car"]):
            draw_cogvideox(video, PROMPTS)
        edit = FreePromptEdit(0.5, mask=WordMask(PROMPTS[0], "car", video.tokenizer))
        with pytest.raises(ValueError, match="has tokens of 2 frames"):
            edited(video, edit)

    def test_a_processor_that_may_do_more(self, pipe):
        class Other:
            def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
                return hidden_states, encoder_hidden_states

        tiny = tiny_cogvideox_pipeline(pipe)
        tiny.transformer.set_attn_processor(Other())
        with pytest.raises(ValueError, match="its processor Other may do more than attention"):
            edited(tiny, FreePromptEdit(0.5))
        with editing(tiny, FreePromptEdit(0.5), override_processors=(Other,)):
            draw_cogvideox(tiny, PROMPTS)
