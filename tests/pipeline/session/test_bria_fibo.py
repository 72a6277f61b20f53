"""Bria FIBO: padding in the middle, pictures that are shown, what is refused; its edits are tested with others'."""

import diffusers
import pytest
import torch
from PIL import Image

if not hasattr(diffusers, "BriaFiboPipeline"):
    pytest.skip("this diffusers has no Bria FIBO", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.tiny_bria_fibo import dense_fibo, draw_fibo, tiny_fibo_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
PROMPTS = ["a photo of a red car on a mountain", "a big dog"]
SIZE = (6, 12)


@pytest.fixture(scope="module")
def fibo():
    return tiny_fibo_pipeline()


def farthest(one, other):
    return float((one - other).abs().max())


def places(height, width, picture=0):
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).reshape(-1, 2)
    return torch.nn.functional.pad(grid, (1, 0), value=picture)


def call(fibo, mask, shown=0):
    given = {"hidden_states": torch.zeros(2, 18 + shown, 8), "encoder_hidden_states": torch.zeros(2, 5, 64)}
    given |= {"timestep": 1, "img_ids": torch.cat([places(3, 6), places(1, shown, picture=1)])}
    return adapter_of(fibo.transformer).read((), {**given, "joint_attention_kwargs": {"attention_mask": mask}})


def test_what_a_call_is(fibo):
    mask = torch.ones(2, 1, 1, 25, dtype=torch.bool)
    read = call(fibo, mask, shown=2)
    assert read.size == (3, 6) and read.references == 2 and read.text_lengths is None
    mask[1, ..., 3:5] = False
    assert call(fibo, mask, shown=2).text_lengths == (5, 3)
    with pytest.raises(ValueError, match=r"expected a mask of truth values \[rows, 1, 1, tokens\], got torch.float"):
        call(fibo, torch.zeros(2, 1, 23, 23))


def test_texts_that_are_padded_in_front_are_refused(fibo):
    fibo.tokenizer.padding_side = "left"
    try:
        with pytest.raises(ValueError, match="pad texts at their ends"), editing(fibo, FreePromptEdit(0.5)):
            draw_fibo(fibo, PROMPTS, steps=1)
    finally:
        fibo.tokenizer.padding_side = "right"


def test_heat_of_a_word_beside_longer_negative_prompts(fibo):
    """Texts of both halves are as long as the longest of them."""
    longer = {"negative": "a drawing of a big dog on a mountain, a photo of a house in winter"}
    with heat_maps(fibo, ["dog"]) as maps:
        draw_fibo(fibo, PROMPTS, steps=1, size=SIZE, **longer)
    kept = []
    with dense_fibo(fibo, lambda row, rows: None):
        for block in (*fibo.transformer.transformer_blocks, *fibo.transformer.single_transformer_blocks):
            block.attn.processor.keep = lambda row, rows, seen: kept.append(seen.mean(0)) if row == 3 else None
        draw_fibo(fibo, PROMPTS, steps=1, size=SIZE, **longer)
    tokens = [fibo.tokenizer.decode([token]).strip() for token in fibo.tokenizer(PROMPTS[1])["input_ids"]]
    heat = torch.stack(kept).mean(0)
    assert len(kept) == 3 and heat.shape[1] > len(tokens) and heat[:, len(tokens) :].abs().max() == 0
    assert abs(torch.as_tensor(maps.word("dog", 1)) - heat[:, tokens.index("dog")].reshape(3, 6)).max() <= 1e-6


def test_pictures_that_are_shown_stay_each_rows_own():
    """FIBO Edit's, behind the image, beside texts of which one ends in padding."""
    tiny = tiny_fibo_pipeline(kind="BriaFiboEditPipeline")
    generator = torch.Generator().manual_seed(5)
    shown = torch.randn(1, 6, 8, generator=generator, dtype=torch.float64), places(2, 3, picture=1).double()
    tiny.prepare_reference_latents = lambda **given: shown
    prompts = [f'{{"edit_instruction": "{prompt}"}}' for prompt in PROMPTS]
    options = {"image": Image.new("RGB", (48, 32)), "size": SIZE, "negative": "a drawing"}
    plain = draw_fibo(tiny, prompts, **options)
    with editing(tiny, FreePromptEdit(0.5)):
        actual = draw_fibo(tiny, prompts, **options)

    def rule(row, rows):
        return [(1.0, {"q_image": 2, "k_image": 2})] if row == 3 and state["step"] < 2 else None

    with dense_fibo(tiny, rule) as state:
        assert farthest(actual, draw_fibo(tiny, prompts, **options)) <= EXACT
    assert farthest(actual[0], plain[0]) <= EXACT < 1e-3 < farthest(actual[1], plain[1])
