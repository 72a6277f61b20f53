"""LTX-2: a video's attention to itself against maps that are written out, in float64; sound stays each row's own."""

import pytest
import torch
from diffusers.models.transformers import transformer_ltx2

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing
from tests.support.tiny_ltx2 import dense_ltx2, draw_ltx2, tiny_ltx2, tiny_ltx2_pipeline
from tests.support.wide_torch import widened

EXACT = 1e-8


@pytest.fixture(autouse=True)
def _wide():
    with widened(transformer_ltx2):
        yield


@pytest.fixture(scope="module", params=["interleaved", "split, gated, perturbed"])
def ltx2(request):
    if request.param == "interleaved":
        return tiny_ltx2_pipeline()
    return tiny_ltx2_pipeline(rope_type="split", gated_attn=True, audio_gated_attn=True, perturbed_attn=True)


def same(rows):
    return [torch.Generator().manual_seed(0) for _ in range(rows)]


def maps_of_source(row, rows, map_of, value):
    """Free-Prompt-Editing, in the rows that see their prompts."""
    source = rows // 2 if rows > 3 else 0
    return map_of(source, source) @ value[row] if row > source else None


def memory_of_source(row, rows, map_of, value):
    half = rows // 2 if rows > 3 else rows
    return map_of(row, row // half * half) @ value[row // half * half] if row % half else None


@pytest.mark.parametrize(
    ("edit", "rule", "steps"),
    [(FreePromptEdit(0.5), maps_of_source, (0, 1)), (MasaCtrlEdit(1, start_layer=0), memory_of_source, (1, 2, 3))],
    ids=["fpe", "masactrl"],
)
def test_targets_are_the_papers(ltx2, edit, rule, steps):
    plain = draw_ltx2(ltx2, 3, generator=same(3))
    with dense_ltx2(ltx2, {"attn1": rule}, steps):
        expected = draw_ltx2(ltx2, 3, generator=same(3))
    with editing(ltx2, edit):
        actual = draw_ltx2(ltx2, 3)  # one generator: rows of one image, and of its sound, draw the same noise
    for found, meant, before in zip(actual, expected, plain, strict=True):
        assert (found - meant).abs().max() <= EXACT
        assert (found - before)[0].abs().max() <= EXACT
        assert (found - before)[1:].abs().max() > 1e-4  # what sound hears of the video changes too


@pytest.mark.parametrize(
    "guidance",
    [{"modality_scale": 2.0}, {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1]}],
    ids=["apart", "stg"],
)
def test_guidance_by_calls_of_its_own(guidance):
    """Their rows see the prompts, and are edited; where attention is perturbed there is no map to give away."""
    pipe = tiny_ltx2_pipeline(perturbed_attn=True)
    guidance = {**guidance, **{f"audio_{name}": value for name, value in guidance.items() if name.endswith("scale")}}
    with dense_ltx2(pipe, {"attn1": maps_of_source}, (0, 1)):
        expected = draw_ltx2(pipe, 2, generator=same(2), **guidance) if "modality_scale" in guidance else None
    with editing(pipe, FreePromptEdit(0.5)) as session:
        actual = draw_ltx2(pipe, 2, **guidance)
    if expected is not None:
        assert (actual[0] - expected[0]).abs().max() <= EXACT
    else:
        assert "perturbed guidance replaces the layer's attention by its values" in session.explain()
    plain = draw_ltx2(pipe, 2, generator=same(2), **guidance)
    assert (actual[0] - plain[0])[0].abs().max() <= EXACT and (actual[0] - plain[0])[1].abs().max() > 1e-4


def test_words_and_other_sizes(pipe):
    with pytest.raises(ValueError, match="LTX-2's connectors make other tokens of a prompt's"):
        editing(tiny_ltx2_pipeline(), PromptToPromptEdit(["a cat", "a dog"], pipe.tokenizer))
    model = tiny_ltx2()
    given = {"hidden_states": torch.zeros(2, 7, 16), "timestep": torch.zeros(2)}
    given |= {"height": 2, "width": 3, "num_frames": 1}
    with editing(model, FreePromptEdit(0.5), classifier_free_guidance=False) as session:
        session.step(0, 4)
        with pytest.raises(ValueError, match=r"the model got 7 tokens for \(height, width, frames\) = \(2, 3, 1\)"):
            model(audio_hidden_states=None, encoder_hidden_states=None, audio_encoder_hidden_states=None, **given)
