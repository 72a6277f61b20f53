"""Words of EasyAnimate where its frames are one, and several; its edits are held in test_edited_transformers.py."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, WordMask, editing, heat_maps
from tests.support.dense_rows import farthest
from tests.support.tiny_easyanimate import draw_easyanimate, tiny_easyanimate_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
PROMPTS = ["a photo of a red car on a mountain", "a photo of a big dog on a mountain"]


@pytest.fixture(scope="module")
def tiny():
    return tiny_easyanimate_pipeline()


def test_heat_of_a_picture(tiny):
    with heat_maps(tiny, ["car", "mountain"]) as maps:
        draw_easyanimate(tiny, PROMPTS[:1], size=(4, 8), frames=1, steps=1)
    assert maps.word("car").shape == (2, 4) and farthest(maps.word("car"), maps.word("mountain")) > 1e-6


def test_heat_of_a_video_is_refused(tiny):
    mask = WordMask(PROMPTS[0], "car", tiny.tokenizer)
    with (
        pytest.raises(ValueError, match="has tokens of 2 frames, and heat is read of one picture"),
        editing(tiny, FreePromptEdit(0.5, mask=mask)),
    ):
        draw_easyanimate(tiny, PROMPTS, size=(4, 8), steps=1)


def test_noise_is_shared_between_the_rows(tiny):
    noise = {"prompts": [PROMPTS[0]] * 2, "size": (4, 8), "steps": 2}
    with editing(tiny, FreePromptEdit(0.5)):
        actual = drawn(tiny, torch.Generator().manual_seed(3), **noise)
    assert farthest(actual[0], actual[1]) <= 1e-8 < farthest(*drawn(tiny, torch.Generator().manual_seed(3), **noise))


def drawn(tiny, generator, prompts, size, steps):
    return tiny(
        list(prompts),
        negative_prompt=["a drawing"] * len(prompts),
        generator=generator,
        height=size[0] * 8,
        width=size[1] * 8,
        num_frames=5,
        num_inference_steps=steps,
        output_type="latent",
    ).frames
