"""Words of Qwen-Image and Lumina 2, inside a text of the pipeline's own: heat, and masks and blends made of it."""

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline import FreePromptEdit, LocalBlend, PromptToPromptEdit, WordMask, editing, heat_maps
from tests.support.dense_joint import dense
from tests.support.edited_transformers import MODELS, placed
from tests.support.slow_cases import few
from tests.support.tiny_language import draw_prompts
from tests.support.tiny_lumina import dense_lumina

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT, HEAT = 1e-8, 1e-6
FAMILIES = ["Qwen-Image", "Lumina 2"]
# Of other lengths, so that the shorter one is padded.
PROMPTS = ["a photo of a red car on a mountain", "a big dog on a house in winter"]
GRID, STEPS = (3, 6), 4
SIZE = {"size": (6, 12)}


@pytest.fixture(scope="module")
def pipes(pipe):
    return {family: MODELS[family].make(pipe) for family in FAMILIES}


class Kept:
    """Heat by prompt, of calls whose rows see their prompts: the block over text keys, mean over heads, summed."""

    def __init__(self, family, tiny, prompts=PROMPTS):
        self.prompts = placed(MODELS[family], tiny, prompts)
        self.sums, self.count = [0] * len(prompts), 0

    def __call__(self, row, rows, block):
        if self.state["calls"] % 2:
            self.sums[row] = self.sums[row] + block.mean(0)
            self.count += row == 0

    def heat(self, number, word):
        tokens = list(self.prompts[number][0].find(word))
        return (self.sums[number] / self.count)[:, tokens].sum(1).reshape(GRID)


def densely(family, tiny, kept, rule=lambda *given: None, prompts=PROMPTS, **options):
    def followed(row, rows):
        return rule(row, rows) if kept.state["calls"] % 2 else None

    around = (
        dense_lumina(tiny, followed, keep=kept)
        if family == "Lumina 2"
        else dense(tiny, followed, steps=range(STEPS), keep=kept)
    )
    with around as kept.state:
        return draw_prompts(tiny, prompts, **SIZE, **options)


def farthest(one, other):
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_heat(pipes, family):
    tiny = pipes[family]
    with heat_maps(tiny, ["car", "dog", "a"]) as maps:
        out = draw_prompts(tiny, PROMPTS, **SIZE)
    kept = Kept(family, tiny)
    assert farthest(out, densely(family, tiny, kept)) <= EXACT
    for word, image in (("car", 0), ("dog", 1), ("a", 0), ("a", 1)):
        assert farthest(maps.word(word, image), kept.heat(image, word)) <= HEAT
    tokens = torch.tensor(kept.prompts[0][0].find("car"))
    for off in (-1, 1):  # a template's length that is off by one is another word's heat
        other = (kept.sums[0] / kept.count)[:, tokens + off].sum(1).reshape(GRID)
        assert farthest(maps.word("car"), other) > 20 * HEAT


@pytest.mark.parametrize("family", few(FAMILIES))
def test_heat_of_several_images(pipes, family):
    """Text encoders receive every prompt once, whatever the images a prompt. The prompts are of one length: diffusers
    repeats masks of padding in another order than the texts that they are of."""
    tiny, known = pipes[family], {}
    prompts = [PROMPTS[0], "a photo of a red car on a house"]
    noise = torch.randn(1, *draw_prompts(tiny, prompts[:1], steps=1).shape[1:], dtype=torch.float64)
    guidance = {"true_cfg_scale" if family == "Qwen-Image" else "guidance_scale": 1.0}
    for images in (1, 2):
        with heat_maps(tiny, ["car"]) as known[images]:
            tiny(
                prompt=prompts,
                latents=noise.repeat(2 * images, *[1] * (noise.ndim - 1)),
                num_images_per_prompt=images,
                num_inference_steps=2,
                height=64,
                width=64,
                output_type="latent",
                **guidance,
            )
    for image in range(4):
        assert farthest(known[2].word("car", image), known[1].word("car", image // 2)) <= HEAT


@pytest.mark.parametrize("family", few(FAMILIES))
def test_a_mask_of_a_word(pipes, family):
    tiny = pipes[family]
    with editing(tiny, FreePromptEdit(1.0, mask=WordMask(PROMPTS[0], "car", tiny.tokenizer))):
        actual = draw_prompts(tiny, PROMPTS, **SIZE)

    def expected(word):
        kept, shares = Kept(family, tiny), {}

        def rule(row, rows):
            step = kept.state["step"]
            if step not in shares:
                heat = kept.heat(0, word) if kept.count else torch.ones(GRID).double()
                shares[step] = (heat / heat.amax()).flatten()
            return [(shares[step], {"q_image": 0, "k_image": 0}), (1 - shares[step], {})] if row else None

        return densely(family, tiny, kept, rule)

    assert farthest(actual, expected("car")) <= 10 * HEAT  # the heat is float32, and steps pass its rounding on
    assert farthest(actual, expected("mountain")) > 100 * HEAT


@pytest.mark.parametrize("family", few(FAMILIES))
def test_a_local_blend(pipes, family):
    tiny = pipes[family]
    blend = LocalBlend(PROMPTS, tiny.tokenizer, ["car", "dog"], 0.9)
    with editing(tiny, FreePromptEdit(0.0) + blend):
        actual = draw_prompts(tiny, PROMPTS, **SIZE)
    kept = Kept(family, tiny)

    def after_step(pipe, step, timestep, values):
        mask = False
        for number, word in enumerate(("car", "dog")):
            heat = F.max_pool2d(kept.heat(number, word)[None, None], 3, stride=1, padding=1)[0, 0]
            mask = mask | (heat / heat.amax() > 0.9)
        assert 0 < mask.double().mean() < 1
        wide = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
        mask = mask.reshape(-1, 1) if family == "Qwen-Image" else wide
        latents = values["latents"]
        return {"latents": torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])}

    expected = densely(family, tiny, kept, callback_on_step_end=after_step)
    assert farthest(actual, expected) <= EXACT


def test_prompts_that_are_cut(pipes):
    """Words behind the last token that the model receives are said to be so, and those before it are found."""
    tiny, long = (
        pipes["Qwen-Image"],
        ["a photo of a red car on a mountain in winter", "a photo of a big dog on a mountain"],
    )
    with heat_maps(tiny, ["car"]) as maps:
        draw_prompts(tiny, long, steps=1, max_sequence_length=7)
    assert maps.word("car").shape == (4, 4)
    with pytest.raises(ValueError, match="past the 7 tokens that are kept"), heat_maps(tiny, ["winter"]):
        draw_prompts(tiny, long, steps=1, max_sequence_length=7)


@pytest.mark.parametrize("family", few(FAMILIES, "Qwen-Image"))
def test_prompts_that_are_changed_on_the_way(pipes, family, monkeypatch):
    tiny = pipes[family]
    encode = type(tiny).encode_prompt

    def shouted(self, prompt, *args, **kwargs):
        return encode(self, [text.replace("car", "house") for text in prompt], *args, **kwargs)

    monkeypatch.setattr(type(tiny), "encode_prompt", shouted)
    prompts = [PROMPTS[0], "a photo of a red dog on a mountain"]
    message = "encodes other tokens than those of the prompt"
    with pytest.raises(ValueError, match=message), editing(tiny, PromptToPromptEdit(prompts, tiny.tokenizer)):
        draw_prompts(tiny, prompts)


@pytest.mark.slow
def test_a_system_text_of_the_call(pipes):
    """Lumina 2 takes the text before the prompts from its call, too."""
    tiny = pipes["Lumina 2"]
    told, before = "of a big house a photo", tiny.system_prompt
    with heat_maps(tiny, ["car"]) as maps:
        draw_prompts(tiny, PROMPTS, **SIZE, system_prompt=told)
    try:
        tiny.system_prompt = told
        with heat_maps(tiny, ["car"]) as expected:
            draw_prompts(tiny, PROMPTS, **SIZE)
    finally:
        tiny.system_prompt = before
    assert farthest(maps.word("car"), expected.word("car")) == 0


def test_embeddings_without_prompts(pipes):
    tiny = pipes["Qwen-Image"]
    embeds, mask = tiny.encode_prompt(PROMPTS)
    with pytest.raises(ValueError, match="the words' prompts are not known"), heat_maps(tiny, ["car"]):
        tiny(prompt_embeds=embeds, prompt_embeds_mask=mask, height=64, width=64, num_inference_steps=1,
             true_cfg_scale=1.0, output_type="latent")  # fmt: skip
