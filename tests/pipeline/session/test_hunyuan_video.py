"""Edits of HunyuanVideo: sizes, guidance, kinds of blocks, what is refused; every edit of it is tested with others'."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanSkyreelsImageToVideoPipeline
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_skyreels_image2video
from PIL import Image

from fpe_pipeline import ConsistEdit, FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.own_maps import OwnMaps
from tests.support.slow_cases import few
from tests.support.tiny_hunyuan_video import (
    TEXTS,
    dense_hunyuan_video,
    draw_hunyuan_video,
    template_of,
    tiny_hunyuan_video_pipeline,
    wide_hunyuan_video,
)
from tests.support.wide_torch import widened

EXACT = 1e-8
PROMPTS = ["a photo of a red car on a mountain", "a big dog", "a red car on a house in winter"]


@pytest.fixture(autouse=True)
def _wide():
    with wide_hunyuan_video():
        yield


@pytest.fixture(scope="module")
def video(pipe):
    return tiny_hunyuan_video_pipeline(pipe)


def edited(pipe, edit, prompts=PROMPTS, **options):
    with editing(pipe, edit) as session:
        out = draw_hunyuan_video(pipe, prompts, **options)
    return out, session.report()


def reference(pipe, names, steps, *, both=False, layers="", guidance=3.0, prompts=PROMPTS, **options):
    def rule(row, rows):
        follows = state["step"] in steps and (both or guidance <= 1 or state["calls"] % 2)
        return [(1.0, dict.fromkeys(names, 0))] if row and follows else None

    with dense_hunyuan_video(pipe, rule, layers=layers) as state:
        return draw_hunyuan_video(pipe, prompts, guidance=guidance, **options)


def farthest(one, other):
    return float((one - other).abs().max())


SIZES = {
    "one frame": {"frames": 1},
    "three frames, not square": {"frames": 3, "size": (6, 12)},
    "no guidance": {"guidance": 1.0},
}


@pytest.mark.parametrize("options", few(SIZES, "three frames, not square"))
@pytest.mark.parametrize("kind", few([None, "token_replace"], "token_replace"))
def test_targets_are_the_papers(pipe, kind, options):
    tiny = tiny_hunyuan_video_pipeline(pipe, image_condition_type=kind)
    plain = draw_hunyuan_video(tiny, PROMPTS, **options)
    for edit, names, steps, both, layers in (
        (FreePromptEdit(0.5), ("q_image", "k_image"), (0, 1), False, ""),
        (ConsistEdit(0.5), ("q_image", "k_image"), (0, 1), True, "single"),
        (MasaCtrlEdit(1, layers=range(3)), ("k_image", "v_image"), (1, 2, 3), True, ""),
    ):
        actual, report = edited(tiny, edit, **options)
        assert farthest(actual, reference(tiny, names, steps, both=both, layers=layers, **options)) <= EXACT
        assert farthest(actual[0], plain[0]) <= EXACT
        assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-5
        paths = ["transformer_blocks.0.attn", *(f"single_transformer_blocks.{index}.attn" for index in range(2))]
        assert {path: tuple(at) for path, at in report.layers.items()} == dict.fromkeys(
            [path for path in paths if path.startswith(layers)], steps
        )


@pytest.mark.parametrize("dtype", few({"float64": torch.float64, "float32": torch.float32}, "float32"))
def test_the_source_is_the_one_without_an_edit(pipe, dtype):
    tiny = tiny_hunyuan_video_pipeline(pipe, dtype)
    out, _ = edited(tiny, FreePromptEdit(1.0), guidance=1.0)
    own, _ = edited(tiny, OwnMaps(), guidance=1.0)
    plain = draw_hunyuan_video(tiny, PROMPTS, guidance=1.0)
    bound = 1e-4 if dtype is torch.float32 else 1e-11
    assert farthest(out[0], own[0]) <= bound and farthest(own, plain) <= bound
    idle, _ = edited(tiny, FreePromptEdit(0.0), guidance=1.0)
    assert torch.equal(idle, plain)


def test_one_negative_prompt_for_all_rows(video):
    edit, each = MasaCtrlEdit(1, layers=range(3)), ["a drawing"] * len(PROMPTS)
    together, _ = edited(video, edit, negative_prompt="a drawing")
    assert farthest(together, edited(video, edit, negative_prompt=each)[0]) <= EXACT


def test_a_template_that_does_not_say_where_prompts_begin(pipe):
    """The pipeline counts its tokens, and takes the last two of them for what stands behind the prompt's place."""
    tiny = tiny_hunyuan_video_pipeline(pipe)
    tiny.tokenizer.model_max_length = int(1e30)  # which pads no template
    said = template_of(tiny)["template"]
    counted = {"template": said, "crop_start": len(tiny.tokenizer(said)["input_ids"]) - 2}

    def drawn(template):
        edit = PromptToPromptEdit(PROMPTS[:2], tiny.tokenizer, "refine")
        return edited(tiny, edit, PROMPTS[:2], prompt_template=template, guidance=1.0)[0]

    assert torch.equal(drawn({"template": said}), drawn(counted))


def test_from_a_picture_by_calls_without_names(pipe):
    """Skyreels' pipeline names no contexts: of a step's two calls the first sees the prompts."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ["HunyuanVideoDownBlock3D"] * 4, "up_block_types": ["HunyuanVideoUpBlock3D"] * 4}
    vae = AutoencoderKLHunyuanVideo(block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=2, **kinds)
    tiny = tiny_hunyuan_video_pipeline(pipe, kind=HunyuanSkyreelsImageToVideoPipeline, in_channels=32)
    tiny.register_modules(vae=vae.double().eval())
    picture = Image.radial_gradient("L").convert("RGB").resize((64, 64))

    def drawn():
        noise = [torch.Generator().manual_seed(3) for _ in PROMPTS]
        return draw_hunyuan_video(tiny, PROMPTS, image=[picture] * 3, latents=None, generator=noise)

    with widened(pipeline_hunyuan_skyreels_image2video):
        with editing(tiny, FreePromptEdit(0.5)):
            actual = drawn()

        def rule(row, rows):
            follows = row and state["step"] in (0, 1) and state["calls"] % 2
            return [(1.0, {"q_image": 0, "k_image": 0})] if follows else None

        with dense_hunyuan_video(tiny, rule) as state:
            expected = drawn()
        assert farthest(actual, expected) <= EXACT < 1e-5 < farthest(actual, drawn())


def test_heat_of_a_picture(video):
    """Of one frame; the words are behind the first tokens, which the pipeline drops."""
    dropped = template_of(video)["crop_start"]
    ids = video.tokenizer(template_of(video)["template"].format(PROMPTS[0]))["input_ids"][dropped:]
    (place,) = [place for place, token in enumerate(ids) if video.tokenizer.decode([token]).strip() == "car"]
    kept = []
    with heat_maps(video, ["car"]) as maps:
        draw_hunyuan_video(video, PROMPTS[:1], frames=1, steps=1, guidance=1.0, size=(4, 12))
    with dense_hunyuan_video(video, lambda row, rows: None):
        for block in (*video.transformer.transformer_blocks, *video.transformer.single_transformer_blocks):
            block.attn.processor.keep = lambda row, rows, seen: kept.append(seen)
        draw_hunyuan_video(video, PROMPTS[:1], frames=1, steps=1, guidance=1.0, size=(4, 12))
    heat = torch.stack([seen[..., place].mean(0) for seen in kept]).mean(0).reshape(2, 6).numpy()
    assert kept[0].shape[-1] == TEXTS and abs(maps.word("car") - heat).max() <= 1e-6


class TestRefused:
    def test_heat_of_a_video(self, video):
        refused = "has tokens of 2 frames, and heat is read of one picture"
        with pytest.raises(ValueError, match=refused), heat_maps(video, ["car"]):
            draw_hunyuan_video(video, PROMPTS)

    def test_masks_with_holes(self, video):
        given = {"hidden_states": torch.zeros(1, 16, 2, 8, 8), "timestep": 1, "encoder_hidden_states": None}
        given |= {"pooled_projections": None, "encoder_attention_mask": torch.tensor([[1, 0, 1, 0]])}
        with pytest.raises(ValueError, match="leaves out some that are followed by others"):
            adapter_of(video.transformer).read((), given)
        given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0]])
        call = adapter_of(video.transformer).read((), given)
        assert call.text_lengths == (3,) and call.size == (8, 8, 2)

    def test_a_processor_that_may_do_more(self, pipe):
        tiny = tiny_hunyuan_video_pipeline(pipe)
        layer = tiny.transformer.transformer_blocks[0].attn
        layer.set_processor(type("Other", (), {"__call__": layer.processor.__call__.__func__})())
        with pytest.raises(ValueError, match="its processor Other may do more than attention"):
            edited(tiny, FreePromptEdit(0.5))
