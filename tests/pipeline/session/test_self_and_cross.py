"""Edits of LTX-Video, Allegro and HunyuanDiT: against maps that are written out, in float64."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.dense_rows import source_columns, source_maps, source_memory
from tests.support.slow_cases import few
from tests.support.tiny_cross import (
    BERT_TEXTS,
    PROMPTS,
    T5_TEXTS,
    TEXTS,
    dense_allegro,
    dense_hunyuan,
    dense_ltx,
    draw_allegro,
    draw_hunyuan,
    draw_ltx,
    tiny_allegro_pipeline,
    tiny_hunyuan_pipeline,
    tiny_ltx_pipeline,
)

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8


@dataclass
class Model:
    pipe: Any
    draw: Any
    dense: Any
    texts: Any
    layers: int

    def edited(self, edit, **options):
        with editing(self.pipe, edit) as session:
            out = self.draw(self.pipe, **options)
        return out, session.report()

    def reference(self, rules, steps, **options):
        with self.dense(self.pipe, rules, steps):
            return self.draw(self.pipe, **options)


@pytest.fixture(scope="module")
def ltx(pipe):
    return Model(tiny_ltx_pipeline(pipe), draw_ltx, dense_ltx, TEXTS, 2)


@pytest.fixture(scope="module")
def hunyuan(pipe):
    return Model(tiny_hunyuan_pipeline(pipe), draw_hunyuan, dense_hunyuan, (BERT_TEXTS, T5_TEXTS), 4)


@pytest.fixture(scope="module")
def allegro(pipe):
    return Model(tiny_allegro_pipeline(pipe), draw_allegro, dense_allegro, TEXTS, 2)


@pytest.fixture(params=["ltx", "allegro", "hunyuan"])
def model(request):
    return request.getfixturevalue(request.param)


SIZES = {"square": {}, "not square": {"size": (4, 6)}, "3 targets": {"prompts": 4}}


@pytest.mark.parametrize("options", few(SIZES, "not square"))
def test_targets_are_the_papers(model, options):
    prompts = PROMPTS[: options.get("prompts", 2)]
    tokenizer = model.pipe.tokenizer
    columns = source_columns(prompts, tokenizer, model.texts)
    words = PromptToPromptEdit(prompts, tokenizer, cross_replace_steps=0.6, self_replace_steps=0.25)
    for edit, rules, steps in (
        (FreePromptEdit(0.5), {"attn1": source_maps}, (0, 1)),
        (MasaCtrlEdit(1, start_layer=0), {"attn1": source_memory}, (1, 2, 3)),
        (words, {"attn1": source_maps, "attn2": columns}, {"attn1": (0,), "attn2": (0, 1, 2)}),
    ):
        actual, report = model.edited(edit, **options)
        assert (actual - model.reference(rules, steps, **options)).abs().max() <= EXACT, edit
        assert (actual - model.draw(model.pipe, **options))[1:].abs().flatten(1).amax(1).min() > 1e-5
        assert len(report.layers) == model.layers * len(rules)


@pytest.mark.slow
def test_without_guidance(model):
    actual, _ = model.edited(FreePromptEdit(0.5), guidance_scale=1.0)

    def rule(row, rows, map_of, value):
        return map_of(0, 0) @ value[row] if row else None

    assert (actual - model.reference({"attn1": rule}, (0, 1), guidance_scale=1.0)).abs().max() <= EXACT


def both_halves(row, rows, map_of, value):
    source = row // (rows // 2) * (rows // 2)
    return map_of(source, source) @ value[row]


WRONG = {
    "the unconditional rows too": ({"attn1": both_halves}, (0, 1)),
    "a step off": ({"attn1": source_maps}, (1, 2)),
    "keys and values": ({"attn1": source_memory}, (0, 1)),
    "maps of the text": ({"attn2": source_maps}, (0, 1)),
}


@pytest.mark.parametrize("wrong", few(WRONG, "a step off"))
def test_other_rules_are_told_apart(model, wrong):
    actual, _ = model.edited(FreePromptEdit(0.5))
    assert (actual - model.reference(*wrong)).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["_turned_together", "_turned_apart"])
def test_queries_before_they_are_turned_are_told_apart(ltx, hunyuan, monkeypatch, name):
    model = ltx if name == "_turned_together" else hunyuan
    actual, _ = model.edited(FreePromptEdit(0.5))
    monkeypatch.setattr(f"tests.support.tiny_cross.{name}", lambda part, tables: part)
    assert (actual - model.reference({"attn1": source_maps}, (0, 1))).abs().max() > 1e-6


def test_words_of_both_encoders(hunyuan):
    """A word has tokens in the texts of both encoders, in their order."""
    prompts = PROMPTS[:2]
    actual, _ = hunyuan.edited(PromptToPromptEdit(prompts, hunyuan.pipe.tokenizer, self_replace_steps=0.0))
    rule = source_columns(prompts, hunyuan.pipe.tokenizer, hunyuan.texts)
    assert (actual - hunyuan.reference({"attn2": rule}, range(4))).abs().max() <= EXACT
    swapped = source_columns(prompts, hunyuan.pipe.tokenizer, (T5_TEXTS, BERT_TEXTS))
    assert (actual - hunyuan.reference({"attn2": swapped}, range(4))).abs().max() > 1e-6


@pytest.mark.slow
def test_texts_of_one_call_are_not_those_of_the_next(hunyuan):
    """What was encoded by a call that failed before it denoised is nobody's."""
    edit = FreePromptEdit(0.5)
    expected, _ = hunyuan.edited(edit, prompts=3)
    original = hunyuan.pipe.prepare_latents
    with editing(hunyuan.pipe, edit):
        hunyuan.pipe.prepare_latents = lambda *args, **kwargs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            draw_hunyuan(hunyuan.pipe, prompts=2)
        hunyuan.pipe.prepare_latents = original
        actual = draw_hunyuan(hunyuan.pipe, prompts=3)
    del hunyuan.pipe.prepare_latents
    assert torch.equal(actual, expected)


def test_heat_of_words(hunyuan):
    with heat_maps(hunyuan.pipe, ["car", "mountain"]) as maps:
        draw_hunyuan(hunyuan.pipe, prompts=1, size=(4, 8))
    assert maps.word("car").shape == (2, 4) and not (maps.word("car") == maps.word("mountain")).all()


@pytest.mark.slow
def test_fused_projections(pipe):
    for tiny, draw in ((tiny_ltx_pipeline(pipe), draw_ltx), (tiny_hunyuan_pipeline(pipe), draw_hunyuan)):
        edit = PromptToPromptEdit(PROMPTS[:2], tiny.tokenizer)
        with editing(tiny, edit):
            expected = draw(tiny)
        tiny.transformer.fuse_qkv_projections()
        with editing(tiny, edit) as session:
            actual = draw(tiny)
        assert session.report().layers and (actual - expected).abs().max() <= EXACT


def test_padding_of_texts_is_masked(ltx):
    """LTX masks the padding of each text: what stands there is of no matter."""
    prompts = ["a car", "a photo of a big dog on a mountain"]
    with editing(ltx.pipe, FreePromptEdit(0.5)):
        actual = ltx.draw(ltx.pipe, prompts)
    assert (actual - ltx.reference({"attn1": source_maps}, (0, 1), prompts=prompts)).abs().max() <= EXACT


def test_tokens_of_given_frames(ltx):
    call = {"hidden_states": torch.zeros(2, 20, 16), "timestep": torch.ones(2), "encoder_attention_mask": None}
    call |= {"encoder_hidden_states": torch.zeros(2, 4, 32), "num_frames": 2, "height": 2, "width": 4}
    with pytest.raises(ValueError, match=r"20 tokens for .* = \(2, 4, 2\): tokens of given frames"):
        adapter_of(ltx.pipe).read((), call)
    with pytest.raises(ValueError, match="tokens of given frames"):
        adapter_of(ltx.pipe).read((), {**call, "num_frames": None})
    assert adapter_of(ltx.pipe).read((), {**call, "hidden_states": torch.zeros(2, 16, 16)}).size == (2, 4, 2)


def test_processors_are_put_back(model):
    layers = [part for part in model.pipe.transformer.modules() if hasattr(part, "processor")]
    before, plain = [layer.processor for layer in layers], model.draw(model.pipe)
    with pytest.raises(RuntimeError, match="stop"), editing(model.pipe, FreePromptEdit(0.5)):
        model.draw(model.pipe)
        raise RuntimeError("stop")
    assert [layer.processor for layer in layers] == before
    assert torch.equal(model.draw(model.pipe), plain)
