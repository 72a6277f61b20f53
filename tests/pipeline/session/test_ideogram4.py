"""Ideogram 4: its two models, where its image begins, and heat; every edit is tested with those of other models."""

import pytest
import torch

from fpe_pipeline import ConsistEdit, FreePromptEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.tiny_ideogram4 import IDEOGRAM4, TEXTS, draw_ideogram4, tiny_ideogram4_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
PROMPTS = ["a photo of a red car on a mountain", "a big dog on a house in winter"]
SIZE = (6, 12)


@pytest.fixture(scope="module")
def ideogram():
    return tiny_ideogram4_pipeline()


def call(ideogram, lengths=(3, 5), texts=5, height=3, width=6, **given):
    """What is read of a call of a model, as the pipeline packs it for texts of these lengths."""
    places, segments, indicator = ideogram._prepare_ids(list(lengths), height, width, texts, torch.device("cpu"))
    packed = {"hidden_states": torch.zeros(len(lengths), texts + height * width, 16), "timestep": torch.ones(2)}
    packed |= {"encoder_hidden_states": None, "position_ids": places, "segment_ids": segments, "indicator": indicator}
    return adapter_of(ideogram).read((), packed | given)


def test_what_a_call_is(ideogram):
    read = call(ideogram)
    assert read.size == (6, 12) and read.text_lengths == (3, 5) and read.half == "conditional"
    assert read.sample.shape == (2, 18, 16)
    alone = call(ideogram, lengths=(0, 0), texts=0)
    assert alone.size == (6, 12) and alone.text_lengths is None and alone.half == "unconditional"


def test_layers_are_counted_in_each_model(ideogram):
    sites = adapter_of(ideogram).sites
    assert [site.index for site in sites] == [0, 1, 2, 0, 1, 2]
    assert {site.path.partition(".")[0] for site in sites} == {"transformer", "unconditional_transformer"}
    assert [site.path for site in adapter_of(ideogram.transformer).sites] == [
        f"layers.{index}.attention" for index in range(3)
    ]


def test_tokens_in_another_order_are_refused(ideogram):
    *_, indicator = ideogram._prepare_ids([3, 5], 3, 6, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match="rows of padding, text and then an image"):
        call(ideogram, indicator=indicator.flip(1))
    with pytest.raises(ValueError, match="rows of padding, text and then an image"):
        call(ideogram, indicator=indicator.roll(1, 1))
    places, *_ = ideogram._prepare_ids([3, 5], 3, 5, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match="18 image tokens, whose places are a grid of 3 x 5"):
        call(ideogram, position_ids=places)


@pytest.mark.parametrize("edit", [FreePromptEdit(0.5), ConsistEdit(0.5)])
def test_both_models_are_edited_as_the_edit_says(ideogram, edit):
    """An edit of rows that see their prompts is in the first model alone, one of all rows in both."""
    with editing(ideogram, edit) as session:
        draw_ideogram4(ideogram, PROMPTS, size=SIZE)
    models = {path.partition(".")[0] for path in session.report().layers}
    assert models == {"transformer"} | ({"unconditional_transformer"} if isinstance(edit, ConsistEdit) else set())


def test_images_a_prompt(ideogram):
    """Each image of a target takes the map of the same image of its source."""
    noise = torch.randn(2, 18, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with editing(ideogram, FreePromptEdit(0.5)):
        together = draw_ideogram4(ideogram, PROMPTS, size=SIZE, num_images_per_prompt=2, latents=noise.repeat(2, 1, 1))
        for image in range(2):
            alone = draw_ideogram4(ideogram, PROMPTS, size=SIZE, latents=noise[[image, image]])
            assert (together[image::2] - alone).abs().max() <= 1e-8


def test_rows_draw_the_same_noise(ideogram):
    options = {"guidance_schedule": [3.0] * 2, "num_inference_steps": 2, "max_sequence_length": TEXTS}
    options |= {"height": 48, "width": 96, "output_type": "latent"}

    def run():
        return ideogram([PROMPTS[0]] * 2, generator=torch.Generator().manual_seed(0), **options).images

    with editing(ideogram, FreePromptEdit(0.5)):
        first, second = run()
    assert (first - second).abs().max() <= 1e-5
    first, second = run()
    assert (first - second).abs().max() > 1e-1


def test_padding_is_not_computed(ideogram):
    """The pipeline fills texts up to 2048 tokens; an edit's layers compute those of the longest text alone."""
    seen = []
    layer = ideogram.transformer.layers[0].attention
    handle = layer.norm_q.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    try:
        with editing(ideogram, FreePromptEdit(1.0)):
            draw_ideogram4(ideogram, PROMPTS, size=SIZE, steps=1)
    finally:
        handle.remove()
    before, after, _ = IDEOGRAM4.template(ideogram)
    longest = max(len(ideogram.tokenizer(f"{before}{prompt}{after}")["input_ids"]) for prompt in PROMPTS)
    assert seen == [18, longest] and longest < TEXTS


def test_heat_of_a_word_is_in_its_own_columns(ideogram):
    """Padding stands before the text, and takes none of it."""
    with heat_maps(ideogram, ["dog", "winter"]) as maps:
        draw_ideogram4(ideogram, PROMPTS, steps=1, size=SIZE)
    before, after, _ = IDEOGRAM4.template(ideogram)
    numbers = ideogram.tokenizer(f"{before}{PROMPTS[1]}{after}")["input_ids"]
    tokens = ideogram.tokenizer.convert_ids_to_tokens(numbers)
    kept = []
    with IDEOGRAM4.dense(ideogram, lambda row, rows: None, "", None):
        for block in ideogram.transformer.layers:
            block.attention.processor.keep = lambda row, rows, seen: kept.append(seen) if row else None
        draw_ideogram4(ideogram, PROMPTS, steps=1, size=SIZE)
    heat = torch.stack([seen.mean(0) for seen in kept]).mean(0)
    for word in ("dog", "winter"):
        (place,) = [number for number, token in enumerate(tokens) if token.strip("Ġ") == word]
        found = torch.as_tensor(maps.word(word, 1))
        assert abs(found - heat[:, place].reshape(3, 6)).max() <= 1e-6
    assert len(kept) == 3


def test_one_model_for_both(ideogram):
    """A pipeline that guides by the same model: calls are told by whether they hold text."""
    apart = ideogram.unconditional_transformer
    ideogram.register_modules(unconditional_transformer=ideogram.transformer)
    try:
        with editing(ideogram, ConsistEdit(0.5)) as session:
            edited = draw_ideogram4(ideogram, PROMPTS, size=SIZE)
        assert len(session.report().layers) == 3
        plain = draw_ideogram4(ideogram, PROMPTS, size=SIZE)
    finally:
        ideogram.register_modules(unconditional_transformer=apart)
    assert (edited - plain)[1].abs().max() > 1e-3 and (edited - plain)[0].abs().max() <= 1e-8


def test_words_of_prompts_that_were_written_anew(ideogram):
    """Prompts that the pipeline rewrites before it encodes them are not those that the edit was written for."""
    words = PromptToPromptEdit(PROMPTS, ideogram.tokenizer, align="refine")
    ideogram.upsample_prompt = lambda prompts, *args, **kwargs: [f"{prompt}, a house" for prompt in prompts]
    try:
        with editing(ideogram, words), pytest.raises(ValueError, match=r"is written for the prompts .*a house"):
            draw_ideogram4(ideogram, PROMPTS, size=SIZE, prompt_upsampling=True)
    finally:
        del ideogram.upsample_prompt
