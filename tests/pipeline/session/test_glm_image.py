"""GLM-Image: what is refused of it, and several images of a layout; its edits are tested with others'."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "GlmImagePipeline"):
    pytest.skip("this diffusers has no GLM-Image", allow_module_level=True)

from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

from fpe_pipeline import FreePromptEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.tiny_glm_image import draw_glm_image, tiny_glm_image_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
PROMPTS = ["a photo of a red car", "a big dog on a house"]


@pytest.fixture(scope="module")
def glm():
    return tiny_glm_image_pipeline()


def test_words_are_refused(glm):
    refused = "reads the layout that another model made of a prompt"
    with pytest.raises(ValueError, match=refused), heat_maps(glm, ["car"]):
        draw_glm_image(glm, PROMPTS)
    with pytest.raises(ValueError, match=refused), editing(glm, PromptToPromptEdit(PROMPTS, glm.tokenizer, "refine")):
        draw_glm_image(glm, PROMPTS)


@pytest.mark.parametrize("mode", ["write", "read"])
def test_keys_and_values_of_pictures_are_refused(glm, mode):
    kept = GlmImageKVCache(num_layers=3)
    adapter, given = adapter_of(glm), {"hidden_states": torch.zeros(2, 4, 8, 12), "timestep": 1, "kv_caches": kept}
    given |= dict.fromkeys(("encoder_hidden_states", "prior_token_id", "prior_token_drop", "target_size"))
    given |= {"crop_coords": None}
    assert adapter.read((), given).size == (8, 12)
    kept.set_mode(mode)
    with pytest.raises(ValueError, match="keeps keys and values of the pictures that it is shown"):
        adapter.read((), given)


def test_several_images_of_a_prompt(glm):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with editing(glm, FreePromptEdit(0.5)):
        both = draw_glm_image(glm, PROMPTS, latents=noise[[0, 1, 0, 1]], num_images_per_prompt=2, steps=2)
        for image in range(2):
            alone = draw_glm_image(glm, PROMPTS, latents=noise[[image, image]], steps=2)
            assert (both[[image, 2 + image]] - alone).abs().max() <= 1e-8
    assert (both[0] - both[1]).abs().max() > 1e-2
