"""Edits of PixArt, self- and cross-attention without levels: against maps that are written out, in float64."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch.nn import functional as F

from fpe_pipeline import ConsistEdit, FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.prompts.alignment import align_replace, tokenize
from tests.support.tiny_transformers import sharpened, tiny_t5, tiny_vae

EXACT = 1e-8
TEXTS = 24
PROMPTS = [
    "a photo of a red car on a mountain",
    "a photo of a big dog on a mountain",
    "a photo of a red car on a house",
]


@pytest.fixture(scope="module")
def pixart(pipe):
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=32,
        use_additional_conditions=False,
    )
    tiny = PixArtSigmaPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=tiny_t5(pipe.tokenizer).double(),
        vae=tiny_vae().double(),
        transformer=sharpened(transformer).double().eval(),
        scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


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


class Dense:
    """A processor that writes every map out: ``rule(row, rows, maps, values)`` gives a row's output, or None."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            F.linear(given, layer.weight, layer.bias).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, given in ((attn.to_q, hidden_states), (attn.to_k, tokens), (attn.to_v, tokens))
        )
        rows = hidden_states.shape[0]

        def map_of(queries, keys):
            scores = query[queries] @ key[keys].mT / query.shape[-1] ** 0.5
            return (scores if attention_mask is None else scores + attention_mask[keys]).softmax(-1)

        out = []
        for row in range(rows):
            given = self.rule(row, rows, map_of, value)
            out.append(map_of(row, row) @ value[row] if given is None else given)
        merged = torch.stack(out).transpose(1, 2).flatten(2)
        return F.linear(merged, attn.to_out[0].weight, attn.to_out[0].bias)


@contextmanager
def dense(pipe, rules, steps):
    """Layers by the end of their path, "attn1" and "attn2", whose rows follow a rule at some steps."""
    transformer, state = pipe.transformer, {"call": -1}

    def follow(kind):
        def rule(*given):
            return rules[kind](*given) if kind in rules and state["call"] in steps else None

        return rule

    def count(*_):
        state["call"] += 1

    before = dict(transformer.attn_processors)
    hook = transformer.register_forward_pre_hook(count)
    transformer.set_attn_processor({name: Dense(follow(name.split(".")[-2])) for name in before})
    try:
        yield
    finally:
        hook.remove()
        transformer.set_attn_processor(before)


def source_maps(row, rows, map_of, value):
    source = rows // 2
    return map_of(source, source) @ value[row] if row > source else None


def source_memory(row, rows, map_of, value):
    source = row // (rows // 2) * (rows // 2)
    return map_of(row, source) @ value[source] if row > source else None


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
        with dense(pixart, {"attn1": rule}, steps):
            expected = drawn(pixart, prompts, **options)
        assert (actual - expected).abs().max() <= EXACT
        assert list(session.report().layers) == [f"transformer_blocks.{block}.attn1" for block in range(3)]
        with dense(pixart, {"attn1": rule}, (0,)):
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

    with dense(pixart, {"attn1": both(2), "attn2": columns}, range(4)):
        expected = drawn(pixart, prompts)
    assert (actual - expected).abs().max() <= EXACT
    with dense(pixart, {"attn1": both(3), "attn2": columns}, range(4)):
        assert (actual - drawn(pixart, prompts)).abs().max() > 1e-5
    with dense(pixart, {"attn1": both(2)}, range(4)):
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
