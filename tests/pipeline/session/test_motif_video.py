"""Edits of Motif-Video with a decoder, texts padded in front, and words that are not looked for."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "MotifVideoPipeline"):
    pytest.skip("this diffusers has no Motif-Video", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing, heat_maps
from tests.support.dense_rows import farthest
from tests.support.slow_cases import few
from tests.support.tiny_motif_video import (
    WITH_A_DECODER,
    dense_motif_video,
    draw_motif_video,
    tiny_motif_video_pipeline,
)

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
PROMPTS = ["a red car", "a photo of a red car on a mountain", "a red dog"]


@pytest.fixture(scope="module")
def decoding(pipe):
    return tiny_motif_video_pipeline(pipe, **WITH_A_DECODER)


def taking(*names):
    return lambda source, target: [(1.0, dict.fromkeys(names, source))]


def reference(pipe, rule, steps, both=False, **options):
    """A guided step's first call sees the prompts."""

    def at_step(row, rows):
        return rule(0, row) if row and state["step"] in steps and (both or state["calls"] % 2) else None

    with dense_motif_video(pipe, at_step) as state:
        return draw_motif_video(pipe, PROMPTS, **options)


RULES = {
    "image": (FreePromptEdit(0.5), taking("q_image", "k_image"), (0, 1), False),
    "masactrl": (MasaCtrlEdit(1, layers=range(4)), taking("k_image", "v_image"), (1, 2, 3), True),
}


def check(pipe, rule, **options):
    edit, dense_rule, steps, both = RULES[rule]
    with editing(pipe, edit) as session:
        actual = draw_motif_video(pipe, PROMPTS, **options)
    plain = draw_motif_video(pipe, PROMPTS, **options)
    assert farthest(actual, reference(pipe, dense_rule, steps, both, **options)) <= EXACT
    assert farthest(actual[0], plain[0]) <= EXACT and farthest(actual[1], plain[1]) > 1e-4
    return session.report()


@pytest.mark.parametrize("rule", few(RULES.keys(), "image"))
def test_a_decoder_is_left_as_it_is(decoding, rule):
    report = check(decoding, rule, size=(4, 8))
    blocks = [f"{kind}transformer_blocks.{index}" for kind in ("", "single_") for index in (0, 1)]
    assert list(report.layers) == [f"{block}.attn" for block in blocks]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES.keys())
def test_texts_that_are_padded_in_front(pipe, monkeypatch, rule):
    monkeypatch.setattr(pipe.tokenizer, "padding_side", "left")
    check(tiny_motif_video_pipeline(pipe, num_single_layers=2), rule, size=(4, 8))


def test_noise_is_shared_between_the_rows(decoding):
    def drawn():
        prompts, generator = [PROMPTS[0]] * 2, torch.Generator().manual_seed(3)
        given = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
        given |= {"negative_prompt": "a drawing", "max_sequence_length": 24}
        return decoding(prompts, generator=generator, **given).frames

    with editing(decoding, FreePromptEdit(0.5)):
        actual = drawn()
    assert farthest(actual[0], actual[1]) <= EXACT < farthest(*drawn())


def test_words(pipe, decoding, monkeypatch):
    words = PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer, "refine")
    with pytest.raises(ValueError, match=r"attend to the text a second time, .* where no edit of words reaches"):
        editing(decoding, words)
    plain = tiny_motif_video_pipeline(pipe)
    with heat_maps(plain, ["car"]) as maps:
        draw_motif_video(plain, PROMPTS[:1], size=(4, 8), frames=1, steps=1)
    assert maps.word("car").shape == (2, 4)
    monkeypatch.setattr(pipe.tokenizer, "padding_side", "left")
    with pytest.raises(ValueError, match=r"padded in front, .*padding_side = \"right\""):
        editing(plain, words)


def test_words_beside_a_picture(pipe):
    parts = tiny_motif_video_pipeline(pipe).components
    shown = diffusers.MotifVideoImage2VideoPipeline(**parts)
    with pytest.raises(ValueError, match="tokens of a picture stand before those of the text"):
        editing(shown, PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer, "refine"))
    editing(shown, FreePromptEdit(0.5))
