"""Edits of PixArt, self- and cross-attention without levels: against maps that are written out, in float64."""

import pytest
import torch

from fpe_pipeline import ConsistEdit, FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.prompts.alignment import align_replace, tokenize
from tests.support.tiny_pixart import dense_pixart, source_maps, source_memory, tiny_pixart_pipeline

EXACT = 1e-8
TEXTS = 24
PROMPTS = [
    "a photo of a red car on a mountain",
    "a photo of a big dog on a mountain",
    "a photo of a red car on a house",
]


@pytest.fixture(scope="module")
def pixart(pipe):
    return tiny_pixart_pipeline(pipe)


def drawn(pipe, prompts, size=(8, 8), **options):
    noise = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pipe(
        prompts,
        latents=noise.repeat(len(prompts), 1, 1, 1),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=4,
        guidance_scale=4.0,
        max_sequence_length=TEXTS,
        use_resolution_binning=False,
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize("options", [{}, {"size": (6, 12)}], ids=["square", "not square"])
@pytest.mark.parametrize("targets", [1, 2])
def test_self_attention(pixart, targets, options):
    prompts = PROMPTS[: 1 + targets]
    for edit, rule, steps in (
        (FreePromptEdit(0.5), source_maps, (0, 1)),
        (MasaCtrlEdit(1, start_layer=0), source_memory, (1, 2, 3)),
    ):
        with editing(pixart, edit) as session:
            actual = drawn(pixart, prompts, **options)
        with dense_pixart(pixart, {"attn1": rule}, steps):
            expected = drawn(pixart, prompts, **options)
        assert (actual - expected).abs().max() <= EXACT
        assert list(session.report().layers) == [f"transformer_blocks.{block}.attn1" for block in range(3)]
        with dense_pixart(pixart, {"attn1": rule}, (0,)):
            assert (actual - drawn(pixart, prompts, **options)).abs().max() > 1e-5


def test_words(pixart, pipe):
    """Padding of a prompt is masked, and the columns of words are those of the source's own mask."""
    prompts = PROMPTS[:2]
    edit = PromptToPromptEdit(prompts, pipe.tokenizer, cross_replace_steps=1.0, self_replace_steps=0.5)
    with editing(pixart, edit):
        actual = drawn(pixart, prompts)
    mapper = align_replace(*(tokenize(prompt, pipe.tokenizer, TEXTS) for prompt in prompts)).mapper

    def columns(row, rows, map_of, value):
        source = rows // 2
        return map_of(source, source) @ mapper @ value[row] if row > source else None

    def both(kind):
        calls = {"count": 0}

        def rule(row, rows, map_of, value):
            calls["count"] += row == 0
            return source_maps(row, rows, map_of, value) if calls["count"] <= kind * 3 else None

        return rule

    with dense_pixart(pixart, {"attn1": both(2), "attn2": columns}, range(4)):
        expected = drawn(pixart, prompts)
    assert (actual - expected).abs().max() <= EXACT
    with dense_pixart(pixart, {"attn1": both(3), "attn2": columns}, range(4)):
        assert (actual - drawn(pixart, prompts)).abs().max() > 1e-5
    with dense_pixart(pixart, {"attn1": both(2)}, range(4)):
        assert (actual - drawn(pixart, prompts)).abs().max() > 1e-5


def test_heat(pixart):
    with heat_maps(pixart, ["car", "mountain"]) as maps:
        drawn(pixart, PROMPTS[:1], size=(6, 12))
    assert maps.word("car").shape == (3, 6) and not (maps.word("car") == maps.word("mountain")).all()


def test_refusals(pixart):
    with pytest.raises(ValueError, match=r"ConsistEdit edits layers in which .* this model has none"):
        editing(pixart, ConsistEdit())
    with pytest.raises(ValueError, match=r"levels=\(1,\) match none"):
        editing(pixart, FreePromptEdit(levels=1))
