"""HiDream-I1: what fills its images up, words of three texts, several images; its edits are tested with others'."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.edited_transformers import placed
from tests.support.tiny_hidream import HIDREAM, TEXTS, dense_hidream, draw_hidream, tiny_hidream_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
PROMPTS = ["a photo of a red car on a mountain", "a photo of a red dog on a house"]
SIZE = (6, 12)


@pytest.fixture(scope="module")
def hidream(pipe):
    return tiny_hidream_pipeline(pipe)


def farthest(one, other):
    return float((one - other).abs().max())


def test_what_a_call_is(hidream):
    adapter = adapter_of(hidream.transformer)
    read = adapter.read((), {"hidden_states": torch.zeros(2, 4, *SIZE), "timesteps": 1})
    assert read.size == SIZE and read.references == 24 - 18
    assert adapter.read((torch.zeros(2, 4, 8, 8), 1), {}).references == 0
    paths = ["double_stream_blocks.0", "single_stream_blocks.0", "single_stream_blocks.1"]
    assert [(site.path, site.place) for site in adapter.sites] == [
        (f"{path}.block.attn1", path.partition("_")[0].replace("double", "dual")) for path in paths
    ]
    packed = {"hidden_states": torch.zeros(2, 24, 16), "hidden_states_masks": torch.ones(2, 24), "timesteps": 1}
    with pytest.raises(ValueError, match=r"latents \[B, C, h, w\] of pictures of one size and no mask"):
        adapter.read((), packed)


def test_what_fills_an_image_up_takes_attention_and_has_no_keys(hidream):
    prompts = ["a photo of a red car on a mountain", "a big dog"]
    with editing(hidream, FreePromptEdit(0.5)):
        actual = draw_hidream(hidream, prompts, size=SIZE, guidance=1.0, steps=2)

    def rule(row, rows):
        return [(1.0, {"q_image": 0, "k_image": 0})] if row and state["step"] < 1 else None

    with dense_hidream(hidream, rule) as state:
        assert farthest(actual, draw_hidream(hidream, prompts, size=SIZE, guidance=1.0, steps=2)) <= EXACT
        for block in (*hidream.transformer.double_stream_blocks, *hidream.transformer.single_stream_blocks):
            block.block.attn1.processor.blind = True
        assert farthest(actual, draw_hidream(hidream, prompts, size=SIZE, guidance=1.0, steps=2)) > 1e-4


def test_heat_of_a_word_is_in_its_columns_of_every_text(hidream):
    with heat_maps(hidream, ["dog"]) as maps:
        draw_hidream(hidream, PROMPTS, steps=1, guidance=1.0, size=SIZE)
    kept = []
    with dense_hidream(hidream, lambda row, rows: None):
        for block in (*hidream.transformer.double_stream_blocks, *hidream.transformer.single_stream_blocks):
            block.block.attn1.processor.keep = lambda row, rows, seen: kept.append(seen.mean(0)) if row else None
        draw_hidream(hidream, PROMPTS, steps=1, guidance=1.0, size=SIZE)
    seen = torch.stack(kept).mean(0).unflatten(-1, (3, TEXTS))
    own = [
        seen[:, part, list(words.find("dog"))].mean(-1)
        for part, words in enumerate(placed(HIDREAM, hidream, PROMPTS)[1])
    ]
    assert len(kept) == 3 and all(heat.min() > 1e-4 for heat in own)
    assert abs(torch.as_tensor(maps.word("dog", 1)) - sum(own).reshape(3, 6)).max() <= 1e-6


def test_several_images_of_a_prompt(hidream):
    edit = PromptToPromptEdit(PROMPTS, hidream.tokenizer, cross_replace_steps=0.6, self_replace_steps=0)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with editing(hidream, edit):
        both = draw_hidream(hidream, PROMPTS, latents=noise[[0, 1, 0, 1]], num_images_per_prompt=2, steps=2)
        for image in range(2):
            alone = draw_hidream(hidream, PROMPTS, latents=noise[[image, image]], steps=2)
            assert farthest(both[[image, 2 + image]], alone) <= EXACT
    assert farthest(both[0], both[1]) > 1e-2
