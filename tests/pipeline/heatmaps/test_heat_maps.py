"""Heat maps against dense maps, and around ordinary pipeline calls."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fpe_kernels import AttentionMap, blend
from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.heatmaps.views import overlay, principal_components
from fpe_pipeline.prompts.alignment import tokenize
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_sdxl_pipeline

SIZE = (8, 12)


class Recorder:
    """Wraps a layer's own processor, and writes its maps [B, H, N, M] down beside it."""

    def __init__(self, inner):
        self.inner, self.maps = inner, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x):
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        scores = heads(attn.to_q(hidden_states)) @ heads(attn.to_k(context)).transpose(2, 3) * attn.scale
        self.maps.append(scores.softmax(-1))
        return self.inner(attn, hidden_states, encoder_hidden_states=encoder_hidden_states)


@pytest.fixture(scope="module")
def recorded(tiny):
    """The latents of an unedited run, and each layer's maps at its steps."""
    processors = {name: Recorder(inner) for name, inner in tiny.unet.attn_processors.items()}
    before = dict(tiny.unet.attn_processors)
    tiny.unet.set_attn_processor(dict(processors))
    try:
        latents = sample(tiny, size=SIZE)
    finally:
        tiny.unet.set_attn_processor(before)
    return latents, {name.removesuffix(".processor"): recorder.maps for name, recorder in processors.items()}


def test_words_are_means_of_columns(tiny, recorded):
    latents, maps = recorded
    with heat_maps(tiny, ["car", "red", "blue"]) as heat:
        watched = sample(tiny, size=SIZE)
    torch.testing.assert_close(watched, latents, rtol=0, atol=1e-4)
    assert not any(type(p).__name__ == "EditAttnProcessor" for p in tiny.unet.attn_processors.values())
    assert "encode_prompt" not in vars(tiny)

    with editing(tiny, FreePromptEdit()) as session:
        sites = [site.at(*SIZE) for site in session.sites if site.kind == "cross"]
        with session.paused():
            tiny.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 32))
    for image, word in ((0, "car"), (1, "car"), (0, "red"), (1, "blue")):
        tokens = list(tokenize(PROMPTS[image], tiny.tokenizer).find(word))
        layers = [
            F.interpolate(a[2 + image, :, :, tokens].sum(-1).mean(0).reshape(1, 1, *site.grid), SIZE, mode="bilinear")
            for site in sites
            for a in maps[site.path]
        ]
        expected = torch.stack(layers).mean(0)[0, 0]
        np.testing.assert_allclose(heat.word(word, image), expected.detach().numpy(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no heat of 'blue' was read for image 0"):
        heat.word("blue", 0)


def test_a_pixel_and_components_are_those_of_dense_maps(tiny, recorded):
    _, maps = recorded
    with heat_maps(tiny, pixels=[(70.0, 20.0)], components=2, levels=1) as heat:
        sample(tiny, size=SIZE)
    dense = [a[2] for path, steps in maps.items() if "attn1" in path for a in steps if a.shape[2] == 4 * 6]
    mean = torch.stack(dense).mean((0, 1)).double()  # [N, N]
    expected = mean[(20 // 16) * 6 + 70 // 16].reshape(4, 6)
    np.testing.assert_allclose(heat.pixel((70.0, 20.0)), expected.detach().numpy(), rtol=0, atol=1e-5)
    later = mean[(40 // 16) * 6 + 5 // 16].reshape(4, 6)  # a point that was not read: from what components keep
    np.testing.assert_allclose(heat.pixel((5.0, 40.0)), later.detach().numpy(), rtol=0, atol=1e-5)
    left, values, _ = torch.linalg.svd(mean - mean.mean(0))
    scores = heat.principal_components().reshape(2, -1)
    for index in range(2):
        reference = (left[:, index] * values[index]).detach().numpy()
        reference = reference * np.sign(reference[np.abs(reference).argmax()])
        np.testing.assert_allclose(scores[index], reference, rtol=0, atol=1e-3 * float(values[0]))


def test_components_of_operators_in_float64():
    torch.manual_seed(0)
    query, key = 3 * torch.randn(2, 1, 3, 20, 4, dtype=torch.float64)
    attention = AttentionMap(query, key, backend="reference")
    weights = torch.rand(20, dtype=torch.float64)
    operator = blend(weights, attention, AttentionMap(key, query))
    dense = operator.dense()[0]
    left, values, _ = torch.linalg.svd(dense.mean(0) - dense.mean((0, 1)))
    scores = principal_components([operator], 3)
    torch.testing.assert_close(scores.abs(), (left * values)[:, :3].T.abs(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="1 to 19 components"):
        principal_components([operator], 20)


def test_inside_a_session_the_maps_are_the_edited_ones(tiny):
    edit = PromptToPromptEdit(PROMPTS[:2], tiny.tokenizer, cross_replace_steps=1.0, self_replace_steps=0)
    with editing(tiny, edit):
        plain = sample(tiny, size=SIZE)
    with editing(tiny, edit) as session, heat_maps(tiny, ["red", "blue"], steps=0.34) as heat:
        watched = sample(tiny, size=SIZE)
        assert session.report().layers
    torch.testing.assert_close(watched, plain, rtol=0, atol=1e-4)
    np.testing.assert_allclose(heat.word("blue", 1), heat.word("red", 0), rtol=0, atol=1e-5)
    with heat_maps(tiny, ["red", "blue"], steps=0.34) as unedited:
        sample(tiny, size=SIZE)
    assert np.abs(unedited.word("blue", 1) - heat.word("blue", 1)).max() > 1e-4


def test_a_second_call_starts_afresh(tiny):
    with heat_maps(tiny, ["car"], pixels=[(1, 1)]) as heat:
        sample(tiny, size=SIZE)
        first = heat.word("car"), heat.pixel((1, 1))
        sample(tiny, size=SIZE)
    np.testing.assert_array_equal(heat.word("car"), first[0])
    np.testing.assert_array_equal(heat.pixel((1, 1)), first[1])


def test_words_are_not_looked_for_in_embeddings_of_another_prompt(tiny):
    """Embeddings that are encoded inside the block are known, for as many calls as they serve; others are not."""
    run = {"num_inference_steps": 1, "output_type": "latent", "height": 16, "width": 16}

    def given(prompt):
        embeddings = tiny.encode_prompt(prompt, "cpu", 1, True)
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeddings, strict=True))

    other = given("on the beach there is a car")
    with heat_maps(tiny, ["car"]) as heat:
        known = given("a red car")
        for _ in range(2):
            tiny(**known, **run)
            assert heat.words_of() == ("car",)
        tiny("a red car", **run)
        with pytest.raises(ValueError, match=r"this pipeline call encodes none: pass heat_maps\(\.\.\., prompts=\)"):
            tiny(**other, **run)
        tiny("a red car", **run)
        assert heat.words_of() == ("car",)


def test_sdxl(pipe):
    tiny = tiny_sdxl_pipeline(pipe)
    with heat_maps(tiny, ["car"]) as heat:
        sample(tiny, steps=1, size=(16, 8))
    assert heat.word("car").shape == (8, 4)
    assert (heat.word("car") > 0).all()


def call(tiny, *args, **kwargs):
    with heat_maps(tiny, *args, **kwargs) as heat:
        sample(tiny, 1, steps=1, size=SIZE)
    return heat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got none of them"),
        ({"words": ["dog"]}, r"\['dog'\] are in none of the prompts"),
        ({"words": ["dog"], "prompts": "a cat"}, r"\['dog'\] are in none of the prompts"),
        ({"pixels": [(96, 0)]}, "outside the image of 96 x 64"),
        ({"pixels": (3, 4)}, r"points \(x, y\)"),
        ({"components": -1}, "integers >= 0, got -1"),
        ({"components": 999, "levels": 1}, "expected 1 to 23 components of maps 24 x 24, got 999"),
        ({"words": ["car", 3]}, "expected words as text, got 'car', 3"),
        ({"components": 2, "max_bytes": 100}, "max_bytes=100"),
        ({"components": 2, "levels": (0, 1)}, "one grid"),
        ({"words": ["car"], "levels": 7}, "levels"),
    ],
)
def test_bad_input(tiny, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(tiny, **arguments)
    assert "encode_prompt" not in vars(tiny)


def test_one_word_and_points_of_any_kind(tiny):
    heat = call(tiny, "car", pixels=np.array([[3, 3]]))
    assert heat.words == ("car",)
    assert heat.word("car").shape == SIZE
    np.testing.assert_array_equal(heat.pixel([3, 3]), heat.pixel((3.0, 3.0)))


def test_asking_for_what_was_not_read(tiny):
    heat = call(tiny, ["car"], pixels=[(0, 0)])
    with pytest.raises(ValueError, match="no heat of 'dog'"):
        heat.word("dog")
    with pytest.raises(ValueError, match="0 to 0, got 1"):
        heat.word("car", image=1)
    with pytest.raises(ValueError, match="was not read"):
        heat.pixel((3, 3))
    with pytest.raises(ValueError, match="components=k"):
        heat.principal_components()


def test_an_overlay_is_strongest_where_the_heat_is():
    heat = np.zeros((4, 8), dtype=np.float32)
    heat[:, 4:] = 2.0
    picture = overlay(heat, Image.new("L", (64, 32), 255), 1.0)
    assert picture.size == (64, 32)
    assert picture.getpixel((2, 16)) == (255, 255, 255)
    assert picture.getpixel((61, 16)) == (220, 20, 20)
    for alike in (heat > 1, np.where(heat > 1, 127, -128).astype(np.int8), heat.astype(int)):
        assert overlay(alike, Image.new("L", (64, 32), 255), 1.0).tobytes() == picture.tobytes()
    white = np.ones((32, 64, 3), np.float32)
    for same in (white, torch.ones(1, 3, 32, 64), torch.ones(3, 32, 64).bfloat16()):
        assert overlay(heat, same, 1.0).tobytes() == picture.tobytes()
    latents = torch.rand(2, 4, 32, 64)
    for bad in (
        {"image": latents},
        {"image": [picture]},
        {"strength": 2.0},
        {"heat": heat[0]},
        {"heat": heat * np.nan},
    ):
        with pytest.raises(ValueError, match="expected"):
            overlay(**{"heat": heat, "image": picture, **bad})
