"""Several images a prompt, of texts that are masked where they end: diffusers repeats some masks in another order."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, editing, heat_maps
from tests.support.edited_transformers import SOURCE
from tests.support.flow_pipelines import edited_with
from tests.support.tiny_cross import draw_ltx, tiny_ltx_pipeline
from tests.support.tiny_language import tiny_lumina_that_reads, tiny_qwen_that_reads

pytestmark = pytest.mark.usefixtures("in_float64")

LONGER = "a photo of a red car on a snow mountain in winter"
FAST = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"}
GUIDED = {
    "qwen": {"true_cfg_scale": 3.0, "negative_prompt": "a drawing"},
    "lumina": {"guidance_scale": 3.0, "negative_prompt": ["a drawing", "a drawing of a house in winter"]},
}


def made(family):
    stock = tiny_qwen_that_reads() if family == "qwen" else tiny_lumina_that_reads()
    ours = edited_with(stock)
    if family == "qwen":  # as long as the tiny tokenizer makes it
        ours.prompt_template_encode_start_idx = stock.prompt_template_encode_start_idx
    return stock, ours


def noise(family):
    shape = (2, 16, 64) if family == "qwen" else (2, 16, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("family", GUIDED)
def test_each_is_what_it_is_alone(family):
    """No text ends where another prompt's does, in rows that see the negative prompt neither."""
    _, ours = made(family)
    latents, options = noise(family), {**FAST, **GUIDED[family], "self_replace_steps": 0.25}
    alone = [ours(SOURCE, LONGER, latents=one[None], **options).images for one in latents]
    both = ours(SOURCE, LONGER, latents=latents, num_images_per_prompt=2, **options).images
    expected = torch.stack([images[prompt] for prompt in range(2) for images in alone])
    assert (both - expected).abs().max() <= 1e-8
    assert (both[0] - both[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", GUIDED)
def test_masks_of_another_prompt_are_refused(family):
    stock, _ = made(family)
    texts = r"expected the images of prompt 1 to see as many tokens of its text, got \d+, \d+ in encoder_\w*mask"
    options = {**FAST, **GUIDED[family], "num_images_per_prompt": 2}
    for block in (editing(stock, FreePromptEdit(0.5)), heat_maps(stock, "car")):
        with pytest.raises(ValueError, match=texts), block:
            stock([SOURCE, LONGER], **options)
    with editing(stock, FreePromptEdit(0.5)):
        stock([SOURCE, SOURCE], **options | {"negative_prompt": ["a drawing"] * 2})


def test_masks_of_videos(pipe):
    tiny = tiny_ltx_pipeline(pipe)
    given = {"num_videos_per_prompt": 2, "frames": 1, "steps": 2}
    tiny.prepare_latents = lambda *args, **kwargs: torch.zeros(4, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="make one image a prompt in each call"), editing(tiny, FreePromptEdit(0.5)):
        draw_ltx(tiny, [SOURCE, LONGER], **given)
