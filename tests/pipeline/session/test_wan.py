"""Edits of Wan: against maps that are written out, in float64; videos, one transformer or two, two calls a step."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from fpe_pipeline import (
    ConsistEdit,
    Edit,
    FreePromptEdit,
    MasaCtrlEdit,
    Product,
    PromptToPromptEdit,
    editing,
    heat_maps,
)
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.dense_rows import source_columns
from tests.support.slow_cases import few
from tests.support.tiny_wan import PROMPTS, TEXTS, dense_wan, draw_wan, tiny_wan, tiny_wan_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8
SIZES = {
    "square": {},
    "not square": {"size": (4, 12)},
    "3 targets": {"prompts": 4},
    "one frame": {"frames": 1},
    "no guidance": {"guidance_scale": 1.0},
}


@pytest.fixture(scope="module", params=few({"one transformer": 1, "two transformers": 2}, "two transformers"))
def wan(request, pipe):
    return tiny_wan_pipeline(pipe, request.param)


@pytest.fixture(scope="module")
def wan22(pipe):
    return tiny_wan_pipeline(pipe, 2)


def maps_of_source(row, rows, map_of, value):
    return map_of(0, 0) @ value[row] if row else None


def memory_of_source(row, rows, map_of, value):
    return map_of(row, 0) @ value[0] if row else None


def conditional(rule, state, guided=True):
    """A rule in the first of a step's two calls alone."""
    return lambda *given: rule(*given) if not guided or state["calls"] % 2 else None


def reference(pipe, rules, steps, *, both=False, **options):
    guided = options.get("guidance_scale", 4.0) > 1
    followed = {}
    with dense_wan(pipe, followed, steps) as state:
        followed |= {kind: rule if both else conditional(rule, state, guided) for kind, rule in rules.items()}
        return draw_wan(pipe, **options)


def edited(pipe, edit, **options):
    with editing(pipe, edit) as session:
        out = draw_wan(pipe, **options)
    return out, session.report()


@pytest.mark.parametrize("options", few(SIZES, "not square", "3 targets"))
def test_targets_are_the_papers(wan, options):
    prompts = PROMPTS[: options.get("prompts", 2)]
    columns = source_columns(prompts, wan.tokenizer, TEXTS, doubled=False)
    words = PromptToPromptEdit(prompts, wan.tokenizer, cross_replace_steps=0.6, self_replace_steps=0.25)
    for edit, rules, steps, both in (
        (FreePromptEdit(0.5), {"attn1": maps_of_source}, (0, 1), False),
        (MasaCtrlEdit(1, start_layer=0), {"attn1": memory_of_source}, (1, 2, 3), True),
        (words, {"attn1": maps_of_source, "attn2": columns}, {"attn1": (0,), "attn2": (0, 1, 2)}, False),
    ):
        actual, _ = edited(wan, edit, **options)
        expected = reference(wan, rules, steps, both=both, **options)
        assert (actual - expected).abs().max() <= EXACT, edit
        assert (actual - draw_wan(wan, **options))[1:].abs().amax((1, 2, 3, 4)).min() > 1e-4


def test_layers_of_each_transformer(wan22):
    """The first makes the noisy half of the steps, the second the other; windows and layers go on across them."""
    _, report = edited(wan22, FreePromptEdit(0.75))
    first, second = ([f"transformer{end}.blocks.{block}.attn1" for block in (0, 1)] for end in ("", "_2"))
    assert report.layers == {path: [0, 1] if path in first else [2] for path in first + second}
    _, report = edited(wan22, FreePromptEdit(1.0, layers=["transformer_2.blocks.1"]))
    assert report.layers == {second[1]: [2, 3]}
    _, report = edited(wan22, MasaCtrlEdit(0, start_layer=1))
    assert list(report.layers) == [first[1], second[1]]


WRONG = {
    "the unconditional call too": (True, {"attn1": maps_of_source}, (0, 1, 2)),
    "a step off": (False, {"attn1": maps_of_source}, (0, 1)),
    "keys and values": (False, {"attn1": memory_of_source}, (0, 1, 2)),
    "the wrong layers": (False, {"attn2": maps_of_source}, (0, 1, 2)),
    "the first transformer's steps alone": (False, {"attn1": maps_of_source}, (0, 1)),
}


@pytest.mark.parametrize("wrong", few(WRONG, "the unconditional call too", "a step off"))
def test_other_rules_are_told_apart(wan22, wrong):
    actual, _ = edited(wan22, FreePromptEdit(0.75))
    both, rules, steps = wrong
    assert (actual - reference(wan22, rules, steps, both=both)).abs().max() > 1e-5


def test_queries_before_they_are_turned_are_told_apart(wan22, monkeypatch):
    actual, _ = edited(wan22, FreePromptEdit(0.75))
    monkeypatch.setattr("tests.support.tiny_wan.turned", lambda part, tables: part)
    assert (actual - reference(wan22, {"attn1": maps_of_source}, (0, 1, 2))).abs().max() > 1e-5


def words_of(wan, prompts=2):
    prompts = PROMPTS[:prompts]
    edit = PromptToPromptEdit(prompts, wan.tokenizer, cross_replace_steps=0.6, self_replace_steps=0.25)
    return edit, source_columns(prompts, wan.tokenizer, TEXTS, doubled=False)


@pytest.mark.parametrize("name", few(["Prompt-to-Prompt", "MasaCtrl"]))
def test_mistakes_of_other_edits_show(wan22, name):
    """The half of the calls that is to be left alone (or not to be), steps off by one, a kind of layers left out."""
    if name == "MasaCtrl":
        edit, both = MasaCtrlEdit(1, start_layer=0), True
        rules, steps = {"attn1": memory_of_source}, {"attn1": (1, 2, 3)}
    else:
        edit, columns = words_of(wan22)
        rules, both = {"attn1": maps_of_source, "attn2": columns}, False
        steps = {"attn1": (0,), "attn2": (0, 1, 2)}
    actual, _ = edited(wan22, edit)
    assert (actual - reference(wan22, rules, {"attn1": (), "attn2": (), **steps}, both=both)).abs().max() <= EXACT
    late = {kind: tuple(step + 1 for step in of) for kind, of in steps.items()}
    wrong = [(rules, steps, not both), (rules, late, both)]
    if name == "MasaCtrl":
        wrong.append(({"attn1": maps_of_source}, steps, both))
    else:
        wrong += [({"attn1": maps_of_source}, steps, both), ({"attn2": rules["attn2"]}, steps, both)]
    for of, at, halves in wrong:
        assert (actual - reference(wan22, of, {"attn1": (), "attn2": (), **at}, both=halves)).abs().max() > 1e-6


@pytest.mark.slow
def test_sources_that_are_held(wan):
    """As those of inverted videos are: the source is put somewhere else after every step, and targets look there."""
    held = torch.randn(4, 16, 3, 4, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def hold(pipe, index, timestep, tensors):
        latents = tensors["latents"].clone()
        latents[0] = held[index]
        return {"latents": latents}

    options = {"size": (4, 12), "prompts": 4, "callback_on_step_end": hold}
    edit, columns = words_of(wan, 4)
    for one, rules, steps, both in (
        (FreePromptEdit(0.5), {"attn1": maps_of_source}, (0, 1), False),
        (MasaCtrlEdit(1, start_layer=0), {"attn1": memory_of_source}, (1, 2, 3), True),
        (edit, {"attn1": maps_of_source, "attn2": columns}, {"attn1": (0,), "attn2": (0, 1, 2)}, False),
    ):
        actual, _ = edited(wan, one, **options)
        assert (actual - reference(wan, rules, steps, both=both, **options)).abs().max() <= EXACT
        free = reference(wan, rules, steps, both=both, size=(4, 12), prompts=4)
        assert (actual - free).abs().max() > 1e-4


@pytest.mark.slow
def test_guidance_of_each_transformer(wan22):
    options = {"guidance_scale": 4.0, "guidance_scale_2": 2.0}
    actual, _ = edited(wan22, FreePromptEdit(0.75, both_halves=True), **options)
    expected = reference(wan22, {"attn1": maps_of_source}, (0, 1, 2), both=True, **options)
    assert (actual - expected).abs().max() <= EXACT
    assert (actual - edited(wan22, FreePromptEdit(0.75, both_halves=True))[0]).abs().max() > 1e-5


class OwnMaps(Edit):
    """Every row its own map, computed by the session's processors."""

    def products(self, site, step, roles):
        return {row: Product(row, (row,), (row,)) for row in range(roles.rows)}

    def select(self, sites):
        return tuple(site for site in sites if site.kind == "self")


@pytest.mark.parametrize("dtype", few({"float64": torch.float64, "float32": torch.float32}, "float32"))
def test_the_source_is_the_one_without_an_edit(pipe, dtype):
    tiny = tiny_wan_pipeline(pipe, 2, dtype)
    out, _ = edited(tiny, FreePromptEdit(1.0), prompts=3)
    own, _ = edited(tiny, OwnMaps(), prompts=3)
    plain = draw_wan(tiny, prompts=3)
    # Rows that share a map are computed together, which may round otherwise than each alone.
    bound = 1e-5 if dtype is torch.float32 else 1e-12
    assert (out - own)[0].abs().max() <= bound
    assert (out - plain)[0].abs().max() <= bound and (own - plain).abs().max() <= bound


def test_a_mask_is_the_same_in_every_frame(wan22):
    mask = torch.zeros(32, 96)
    mask[:16] = 1
    actual, _ = edited(wan22, FreePromptEdit(1.0, mask=mask), size=(4, 12))
    weight = torch.zeros(3, 2, 6, dtype=torch.float64)
    weight[:, 0] = 1
    weight = weight.flatten()[:, None]

    def rule(row, rows, map_of, value):
        return (weight * map_of(0, 0) + (1 - weight) * map_of(row, row)) @ value[row] if row else None

    assert (actual - reference(wan22, {"attn1": rule}, range(4), size=(4, 12))).abs().max() <= EXACT


def test_noise_is_shared_between_the_rows(wan22):
    with editing(wan22, FreePromptEdit(0.5)):
        actual = draw_wan(wan22, latents=None, generator=torch.Generator().manual_seed(3))
    again = {"latents": None, "generator": [torch.Generator().manual_seed(3) for _ in range(2)]}
    expected = reference(wan22, {"attn1": maps_of_source}, (0, 1), **again)
    assert (actual - expected).abs().max() <= EXACT


@pytest.mark.slow
def test_several_videos_a_prompt(wan22):
    noise = torch.randn(2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1, 1)
    options = {"frames": 2, "latents": noise, "num_videos_per_prompt": 2}
    actual, _ = edited(wan22, FreePromptEdit(0.5), **options)

    def rule(row, rows, map_of, value):
        return map_of(row - 2, row - 2) @ value[row] if row > 1 else None

    assert (actual - reference(wan22, {"attn1": rule}, (0, 1), **options)).abs().max() <= EXACT


@pytest.mark.slow
def test_fused_projections(pipe):
    tiny = tiny_wan_pipeline(pipe, 2)
    edit = PromptToPromptEdit(PROMPTS[:2], tiny.tokenizer)
    expected, _ = edited(tiny, edit)
    for model in (tiny.transformer, tiny.transformer_2):
        model.fuse_qkv_projections()
    actual, report = edited(tiny, edit)
    assert len(report.layers) == 6 and (actual - expected).abs().max() <= EXACT


def test_image_to_video(pipe, monkeypatch):
    """A picture's keys stand beside those of the text, under a softmax of their own, in all rows as without an edit."""
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.prompt_clean", str)  # which needs ftfy
    config = {"image_dim": 8, "added_kv_proj_dim": 24, "in_channels": 36, "num_layers": 2}
    tiny = tiny_wan_pipeline(
        pipe, kind=WanImageToVideoPipeline, given={"image_encoder": None, "image_processor": None}, **config
    )
    generator = torch.Generator().manual_seed(0)
    noise, condition = (torch.randn(1, c, 2, 8, 8, generator=generator, dtype=torch.float64) for c in (16, 20))
    seen = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    vars(tiny)["vae"] = SimpleNamespace(config=SimpleNamespace(z_dim=16))
    tiny.encode_image = lambda *args, **kwargs: seen[:1]
    # The pipeline repeats one picture; here each row has its own.
    tiny.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "encoder_hidden_states_image": seen}), with_kwargs=True
    )
    tiny.prepare_latents = lambda *args, **kwargs: (
        noise.repeat(2, 1, 1, 1, 1),
        condition.repeat(2, 1, 1, 1, 1),
    )

    def run(**given):
        return tiny(
            image=torch.zeros(1, 3, 64, 64),
            prompt=PROMPTS[:2],
            height=64,
            width=64,
            num_frames=5,
            num_inference_steps=3,
            output_type="latent",
            **given,
        ).frames

    edit = PromptToPromptEdit(PROMPTS[:2], tiny.tokenizer, cross_replace_steps=1.0, self_replace_steps=1.0)
    with editing(tiny, edit):
        actual = run()
    columns = source_columns(PROMPTS[:2], tiny.tokenizer, 512, doubled=False)
    followed = {}
    with dense_wan(tiny, followed, range(3)) as state:
        followed |= {"attn1": conditional(maps_of_source, state), "attn2": conditional(columns, state)}
        expected = run()
    assert (actual - expected).abs().max() <= EXACT
    assert (actual - run()).abs().max() > 1e-4


def test_a_transformer_alone():
    alone = tiny_wan()
    given = {
        "hidden_states": torch.randn(2, 16, 2, 4, 4, dtype=torch.float64),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32, dtype=torch.float64),
    }
    with editing(alone, FreePromptEdit(1.0), classifier_free_guidance=False) as session:
        session.step(0, 2)
        alone(**given)
    assert list(session.report().layers) == ["blocks.0.attn1", "blocks.1.attn1"]


def test_the_pipeline_is_left_as_it_was(wan22):
    models = (wan22.transformer, wan22.transformer_2)
    processors, plain = [dict(model.attn_processors) for model in models], draw_wan(wan22)
    with pytest.raises(RuntimeError, match="stop"), editing(wan22, FreePromptEdit(0.5)):
        draw_wan(wan22)
        assert all("cache_context" in vars(model) for model in models)
        raise RuntimeError("stop")
    assert not any("cache_context" in vars(model) for model in models)
    assert [model.attn_processors for model in models] == processors
    assert not any(model._forward_hooks or model._forward_pre_hooks for model in models)
    assert torch.equal(draw_wan(wan22), plain)


class TestRefusals:
    def test_edits_of_joint_attention(self, wan22):
        with pytest.raises(ValueError, match=r"ConsistEdit edits layers in which .* this model has none"):
            editing(wan22, ConsistEdit())

    def test_heat_of_words(self, wan22):
        with pytest.raises(ValueError, match="tokens of 3 frames"), heat_maps(wan22, ["car"]):
            draw_wan(wan22, prompts=1)

    def test_heat_of_one_frame(self, wan22):
        with heat_maps(wan22, ["car"]) as maps:
            draw_wan(wan22, prompts=1, frames=1, size=(4, 12))
        assert maps.word("car").shape == (2, 6)

    @pytest.mark.parametrize("which", few(["transformer", "transformer_2"], "transformer_2"))
    def test_a_cache_in_either_transformer(self, pipe, which):
        from diffusers import FirstBlockCacheConfig

        tiny = tiny_wan_pipeline(pipe, 2, torch.float32)
        getattr(tiny, which).enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(ValueError, match=rf"FirstBlockCache is on in {which}\b"):
            editing(tiny, FreePromptEdit())

    def test_context_parallelism(self, pipe):
        tiny = tiny_wan_pipeline(pipe, 2, torch.float32)
        tiny.transformer_2.blocks[0].attn1.processor._parallel_config = object()
        message = r"transformer_2\.blocks\.0\.attn1: context parallelism is on"
        with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit()):
            draw_wan(tiny)

    def test_one_frame_too_many(self, wan22):
        call = adapter_of(wan22.transformer).read(
            (torch.zeros(2, 16, 3, 4, 8), torch.ones(2), torch.zeros(2, 5, 32)), {}
        )
        assert call.size == (4, 8, 3) and call.rows == 2
