"""Nucleus-Image: texts that are padded on either side, and heat; every edit is tested with those of other models."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.tiny_nucleus import NUCLEUS, draw_nucleus, tiny_nucleus_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
PROMPTS = ["a photo of a red car on a mountain", "a big dog on a house in winter, a drawing"]
SIZE = (6, 12)


@pytest.fixture(scope="module", params=["left", "right"])
def nucleus(request):
    return tiny_nucleus_pipeline(padding=request.param)


def read(nucleus, **given):
    call = {"hidden_states": torch.zeros(2, 18, 64), "timestep": torch.ones(2), "img_shapes": [(1, 3, 6)] * 2}
    return adapter_of(nucleus.transformer).read((), {**call, "encoder_hidden_states": torch.zeros(2, 5, 16), **given})


def test_what_a_call_is(nucleus):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    call = read(nucleus, encoder_hidden_states_mask=mask)
    assert call.size == (6, 12) and call.text_lengths == (3, 5)
    assert read(nucleus).text_lengths is None
    with pytest.raises(ValueError, match="18 image tokens of an image that is said to be 1 x 3 x 5"):
        read(nucleus, img_shapes=[(1, 3, 5)] * 2)


@pytest.mark.parametrize("scope", ["image", "joint"])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_texts_are_found_wherever_their_padding_stands(nucleus, scope, guidance):
    names = ("q_image", "k_image") if scope == "image" else ("q_image", "k_image", "k_text")
    halves = 1 if guidance == 1 else 2

    def rule(row, rows):
        seen = state["calls"] % halves == 1 % halves
        return [(1.0, dict.fromkeys(names, 0))] if row and seen and state["step"] < 2 else None

    options = {"size": SIZE, "guidance": guidance}
    with editing(nucleus, FreePromptEdit(0.5, scope=scope)):
        actual = draw_nucleus(nucleus, PROMPTS, **options)
    with NUCLEUS.dense(nucleus, rule, "", None) as state:
        assert (actual - draw_nucleus(nucleus, PROMPTS, **options)).abs().max() <= 1e-8
    plain = draw_nucleus(nucleus, PROMPTS, **options)
    assert (actual - plain)[1].abs().max() > 1e-3 and (actual - plain)[0].abs().max() <= 1e-8


def test_heat_of_a_word_is_in_its_own_columns(nucleus):
    with heat_maps(nucleus, ["dog", "winter"]) as maps:
        draw_nucleus(nucleus, PROMPTS, steps=1, size=SIZE, guidance=1.0)
    tokenizer = nucleus.processor.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(nucleus._format_prompt(PROMPTS[1]))["input_ids"])
    kept = []
    with NUCLEUS.dense(nucleus, lambda row, rows: None, "", None):
        for block in nucleus.transformer.transformer_blocks:
            block.attn.processor.keep = lambda row, rows, seen: kept.append(seen) if row else None
        draw_nucleus(nucleus, PROMPTS, steps=1, size=SIZE, guidance=1.0)
    heat = torch.stack([seen[:, :18].mean(0) for seen in kept]).mean(0)
    for word in ("dog", "winter"):
        (place,) = [number for number, token in enumerate(tokens) if token.strip("Ġ") == word]
        found = torch.as_tensor(maps.word(word, 1))
        assert abs(found - heat[:, place].reshape(3, 6)).max() <= 1e-6
    assert len(kept) == 3


def test_kept_keys_of_the_text_are_refused(nucleus):
    kept = {"cached_txt_key": torch.zeros(2, 8, 2, 8), "cached_txt_value": torch.zeros(2, 8, 2, 8)}
    with editing(nucleus, FreePromptEdit(0.5)), pytest.raises(ValueError, match="were kept \\(cached_txt_key\\)"):
        draw_nucleus(nucleus, PROMPTS, size=SIZE, attention_kwargs=kept)
