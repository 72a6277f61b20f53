"""Krea 2: where its image begins, what is refused, and heat; every edit of it is tested with those of other models."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.tiny_krea2 import KREA2, draw_krea2, tiny_krea2_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
PROMPTS = ["a photo of a red car on a mountain", "a big dog on a house in winter"]
SIZE = (6, 12)


@pytest.fixture(scope="module")
def krea():
    return tiny_krea2_pipeline()


def places(texts, height, width, shift=0):
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).reshape(-1, 2)
    return torch.cat([torch.full((texts, 3), shift), torch.nn.functional.pad(grid, (1, 0))])


def call(krea, given):
    tokens = {"hidden_states": torch.zeros(2, 18, 64), "encoder_hidden_states": torch.zeros(2, 5, 2, 16), "timestep": 1}
    return adapter_of(krea.transformer).read((), {**tokens, **given})


def test_what_a_call_is(krea):
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    read = call(krea, {"position_ids": places(5, 3, 6), "encoder_attention_mask": mask})
    assert read.size == (6, 12) and read.text_lengths == (3, 5)
    assert call(krea, {"position_ids": places(5, 3, 6)}).text_lengths is None


@pytest.mark.parametrize("wrong", [places(5, 3, 6, shift=1), places(5, 3, 5), places(4, 3, 6)])
def test_places_that_are_no_grid_behind_text_are_refused(krea, wrong):
    with pytest.raises(ValueError, match="text has to be at no place, and the image at a whole grid"):
        call(krea, {"position_ids": wrong if len(wrong) != 22 else wrong + torch.tensor([0, 1, 0])})


def test_heat_of_a_word_is_in_its_own_columns(krea):
    """Padding stands between the prompt and the end of the template, and takes none of it."""
    with heat_maps(krea, ["dog", "winter"]) as maps:
        draw_krea2(krea, PROMPTS, steps=1, guidance=0.0, size=SIZE)
    tokens = krea.tokenizer.convert_ids_to_tokens(krea.tokenizer(PROMPTS[1])["input_ids"])
    kept = []
    with KREA2.dense(krea, lambda row, rows: None, "", None):
        for block in krea.transformer.transformer_blocks:
            block.attn.processor.keep = lambda row, rows, seen: kept.append(seen) if row else None
        draw_krea2(krea, PROMPTS, steps=1, guidance=0.0, size=SIZE)
    heat = torch.stack([seen.mean(0) for seen in kept]).mean(0)
    for word in ("dog", "winter"):
        (place,) = [number for number, token in enumerate(tokens) if token.strip("Ġ") == word]
        found = torch.as_tensor(maps.word(word, 1))
        assert abs(found - heat[:, place].reshape(3, 6)).max() <= 1e-6
    assert len(kept) == 3


def test_without_guidance(krea):
    plain = draw_krea2(krea, PROMPTS, guidance=0.0, size=SIZE)
    with editing(krea, FreePromptEdit(0.5)):
        actual = draw_krea2(krea, PROMPTS, guidance=0.0, size=SIZE)

    def rule(row, rows):
        return [(1.0, {"q_image": 0, "k_image": 0})] if row and state["step"] < 2 else None

    with KREA2.dense(krea, rule, "", None) as state:
        assert float((actual - draw_krea2(krea, PROMPTS, guidance=0.0, size=SIZE)).abs().max()) <= 1e-8
    assert float((actual - plain).abs().max()) > 1e-3
