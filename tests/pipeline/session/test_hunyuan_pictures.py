"""Edits of HunyuanVideo's pipeline that begins with a picture, which its language model sees beside the prompt."""

import pytest
import torch
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing
from fpe_pipeline.prompts.joint_text import encoded_prompts
from fpe_pipeline.prompts.words import tokenize
from tests.support.slow_cases import few
from tests.support.tiny_hunyuan_pictures import draw_from_picture, tiny_hunyuan_from_picture
from tests.support.tiny_hunyuan_video import dense_hunyuan_video, wide_hunyuan_video
from tests.support.wide_torch import widened

EXACT = 1e-8
PROMPTS = ["a photo of a red car", "a big dog on a house", "a photo of a red car"]


@pytest.fixture(autouse=True)
def _wide():
    with wide_hunyuan_video(), widened(pipeline_hunyuan_video_image2video):
        yield


@pytest.fixture(scope="module", params=few(["token_replace", "latent_concat"], "token_replace"))
def video(request, pipe):
    return tiny_hunyuan_from_picture(pipe, kind=request.param)


def each(seed=3):
    return [torch.Generator().manual_seed(seed) for _ in PROMPTS]


def farthest(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize("guidance", few({"alone": 1.0, "guided": 3.0}, "guided"))
def test_targets_are_the_papers(video, guidance):
    plain = draw_from_picture(video, PROMPTS, guidance=guidance, generator=each())
    for edit, names, steps, both in (
        (FreePromptEdit(0.7), ("q_image", "k_image"), (0, 1), False),
        (MasaCtrlEdit(1, layers=range(3)), ("k_image", "v_image"), (1, 2), True),
    ):
        with editing(video, edit):
            actual = draw_from_picture(video, PROMPTS, guidance=guidance, generator=each())

        def rule(row, rows, names=names, steps=steps, both=both):
            follows = row and state["step"] in steps and (both or guidance <= 1 or state["calls"] % 2)
            return [(1.0, dict.fromkeys(names, 0))] if follows else None

        with dense_hunyuan_video(video, rule) as state:
            expected = draw_from_picture(video, PROMPTS, guidance=guidance, generator=each())
        assert farthest(actual, expected) <= EXACT
        assert farthest(actual[0], plain[0]) <= EXACT and farthest(actual[2], actual[0]) <= EXACT
        assert farthest(actual[1], plain[1]) > 1e-5


def test_rows_of_one_image_draw_the_same_noise(video):
    """The pipeline draws it before it encodes the prompts."""
    with editing(video, FreePromptEdit(1.0)) as session:
        for _ in range(2):
            out = draw_from_picture(video, PROMPTS, steps=1, generator=torch.Generator().manual_seed(3))
            assert farthest(out[2], out[0]) <= EXACT
    assert "draw the same noise" in session.report().noise
    with editing(video, FreePromptEdit(1.0)):
        assert torch.equal(draw_from_picture(video, PROMPTS, steps=1, generator=each()), out)
    with editing(video, FreePromptEdit(1.0), noise="separate"):
        apart = draw_from_picture(video, PROMPTS, steps=1, generator=torch.Generator().manual_seed(3))
    assert farthest(apart[2], apart[0]) > 0.1


def test_words_stand_behind_the_picture(video):
    """A language model looks back alone: of two prompts that differ in a word, texts differ from that word on."""
    prompts, texts, found = ["a photo of a red car", "a photo of a red dog"], [], []

    class Placed(PromptToPromptEdit):
        def encoded(self, encoding):
            found.extend(encoded_prompts(encoding, [tokenize(text, video.tokenizer) for text in prompts]))
            return super().encoded(encoding)

    hook = video.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: texts.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with editing(video, Placed(prompts, video.tokenizer, "replace")):
        draw_from_picture(video, prompts, guidance=1.0, generator=each()[:2])
    hook.remove()
    differ = ((texts[0][0] - texts[0][1]).abs() > EXACT).any(-1).nonzero().flatten().tolist()
    assert found[0].length == texts[0].shape[1]
    assert found[0].find("car")[0] == found[1].find("dog")[0] == differ[0]
