"""The dense oracle for edits: every method agrees with it, and whatever is wrong is found where it is."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fpe_pipeline import (
    FreePromptEdit,
    LocalBlend,
    MasaCtrlEdit,
    PlugAndPlayEdit,
    Product,
    PromptToPromptEdit,
    StyleAlignedEdit,
    editing,
    make_edit,
)
from fpe_pipeline.edits import SelfAttentionEdit, WordMask
from fpe_pipeline.edits.products import MapSpec
from fpe_pipeline.edits.registry import methods_of
from fpe_pipeline.session import hooks
from fpe_pipeline.session.layers import computing
from fpe_pipeline.testing import TOLERANCE, DenseLayer, check_edit, tiny_unet, words_tokenizer
from fpe_pipeline.testing.dense import WRITTEN_OUT
from tests.support.tiny_pipelines import tiny_pipeline, tiny_sdxl_pipeline
from tests.support.tiny_unets import tiny_unet as any_tiny_unet

METHODS = methods_of("unet")

PROMPTS = ["a photo of a red car", "a photo of a blue car"]
WORDS = {"fpe-regional": {"word": "car"}, "p2p-blend": {"words": ("red", "blue")}}
LAYER = "up_blocks.1.attentions.1.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


@pytest.mark.parametrize("name", METHODS)
def test_every_method(tokenizer, name):
    edit = make_edit(name, PROMPTS, tokenizer, tiny_unet(), **WORDS.get(name, {}))
    check = check_edit(edit)
    assert check.worst.error <= TOLERANCE and check.edited > 20
    assert str(check).startswith(f"{type(edit).__name__}: {check.edited} of {check.compared} outputs are edited")


EDITS = {
    "two targets": lambda t: PromptToPromptEdit([*PROMPTS, "a photo of a red bus"], t, weights={"blue": 3.0}),
    "by a schedule": lambda t: FreePromptEdit(1.0, strength=(1, 0)),
    "by a function": lambda t: FreePromptEdit(1.0, strength=lambda site, step: 0.5 if step.index % 2 else 0.25),
    "by a soft word": lambda t: FreePromptEdit(1.0, mask=WordMask(PROMPTS[0], "car", t, invert=True)),
    "by a picture": lambda t: FreePromptEdit(1.0, mask=torch.linspace(0, 1, 96).expand(64, 96)),
    "blended": lambda t: FreePromptEdit(levels=0) + LocalBlend(PROMPTS, t, ("red", "blue"), 0.8, start=0.2),
    "features alone": lambda t: PlugAndPlayEdit(0.0, 0.5),
    "style": lambda t: StyleAlignedEdit(0.6, shared_score_shift=0.7),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_edits_of_all_kinds(tokenizer, name, guided):
    check_edit(EDITS[name](tokenizer), guided=guided, steps=5)


@pytest.mark.parametrize("shape", ["sd2", "simple"])
def test_other_models(shape):
    check_edit(FreePromptEdit(levels=(0, 1)), any_tiny_unet(shape), steps=3, size=(8, 8), targets=2)


def test_a_pipeline_is_left_alone(pipe):
    tiny, edit = tiny_pipeline(pipe), PromptToPromptEdit(PROMPTS, pipe.tokenizer)
    weights = {name: weight.clone() for name, weight in tiny.unet.state_dict().items()}
    check_edit(edit, tiny, steps=3)
    assert tiny.unet.dtype == torch.float32
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny.unet.state_dict().items())
    with editing(tiny, edit), pytest.raises(ValueError, match="is in an editing session"):
        check_edit(edit, tiny)


@pytest.mark.slow
def test_sdxl(pipe):
    check_edit(MasaCtrlEdit(1, layers="up_blocks"), tiny_sdxl_pipeline(pipe), steps=3)


# Planted faults: of the kernels, of what surrounds them, and of the edit.


def other_map(original):
    """Each call's last product takes another map than it should."""

    def wrong(query, key, value, map_index, **options):
        index = tuple(map_index)
        return original(query, key, value, (*index[:-1], (index[-1] + 1) % len(query)), **options)

    return wrong


def test_a_wrong_product_is_found(monkeypatch):
    monkeypatch.setattr(computing, "shared_attention", other_map(computing.shared_attention))
    edit = FreePromptEdit(1.0, strength=0.5, layers=LAYER)
    with pytest.raises(AssertionError, match=rf"FreePromptEdit differs from written-out maps by .* in {LAYER}: row 3"):
        check_edit(edit)


@pytest.mark.parametrize("fault", ["scale", "nan", "a rounding too much"])
def test_a_wrong_output_is_found_at_its_layer_and_step(monkeypatch, fault):
    original, calls = computing.shared_attention, []

    def wrong(*arguments, **options):
        out = original(*arguments, **options)
        calls.append(out)
        if len(calls) == 4:  # of the fourth step
            return {"scale": out * 1.01, "nan": out * float("nan"), "a rounding too much": out.float().double()}[fault]
        return out

    monkeypatch.setattr(computing, "shared_attention", wrong)
    with pytest.raises(AssertionError) as caught:
        check_edit(FreePromptEdit(1.0, strength=0.5, layers=LAYER), steps=6)
    assert f"at step 3 in {LAYER}" in str(caught.value)


def test_wrong_heat_is_found(tokenizer, monkeypatch):
    """It reaches nothing but the mask: the edit's weights go wrong, a step later."""
    original = computing._column_values
    monkeypatch.setattr(
        computing, "_column_values", lambda call, columns, *rest: original(call, columns, *rest).roll(1, -2)
    )
    with pytest.raises(AssertionError, match="the first at step 1 in"):
        check_edit(FreePromptEdit(1.0, mask=WordMask(PROMPTS[0], "car", tokenizer)), steps=4)


def test_wrong_features_are_found(monkeypatch):
    original = hooks.FeatureHooks._replace
    monkeypatch.setattr(
        hooks.FeatureHooks, "_replace", lambda self, path, *rest: None if "resnets" in path else original(path, *rest)
    )
    with pytest.raises(
        AssertionError, match=r"in the features of up_blocks\.1\.resnets\.1\.conv2: row .* the feature of row"
    ):
        check_edit(PlugAndPlayEdit(0.0, 0.5))


def test_a_wrong_blend_is_found(tokenizer, monkeypatch):
    edit = FreePromptEdit(levels=0) + LocalBlend(PROMPTS, tokenizer, ("red", "blue"), 0.9)
    monkeypatch.setattr("fpe_pipeline.session.session.EditingSession.after_step", lambda self, latents: latents)
    with pytest.raises(AssertionError, match="in the latents after it: row"):
        check_edit(edit)


@dataclass(frozen=True)
class Memory(SelfAttentionEdit):
    """Targets attend to their own and to the source's keys, more to the source's from step to step."""

    wrong_phase: bool = False
    values_swapped: bool = False

    def phase(self, step):
        return () if self.wrong_phase else None

    def products(self, site, step, roles):
        shifts = (0.0, step.index / step.total)
        pairs = roles.pairs(conditional=None)
        if self.values_swapped:
            return {t: Product(t, (t, s), (s, t), shifts=shifts) for s, t in pairs}
        return {t: Product(t, (t, s), (t, s), shifts=shifts) for s, t in pairs}


@dataclass(frozen=True)
class Sharpened(SelfAttentionEdit):
    """In every other head, targets attend more sharply from step to step, and to the source beside themselves."""

    def products(self, site, step, roles):
        chosen = every_other(site.heads)
        return {
            t: (Product(t, [t, s], [t, s], weight=chosen, scale=1 + step.index), Product(t, t, t, weight=1 - chosen))
            for s, t in roles.pairs(conditional=None)
        }


def every_other(heads):
    return (torch.arange(heads) % 2).float()[:, None]


def sharpened(site, step, roles, layer: DenseLayer):
    """The same as an equation on stored maps."""
    if site.kind != "self":
        return {}
    out = {}
    for source, target in roles.pairs(conditional=None):
        keys = torch.cat([layer.key[target], layer.key[source]], dim=-2)
        values = torch.cat([layer.value[target], layer.value[source]], dim=-2)
        sharp = layer.map((1 + step.index) * layer.query[target], keys) @ values
        out[target] = torch.where(every_other(site.heads)[..., None] > 0, sharp, layer.own(target))
    return out


@pytest.mark.parametrize("expected", [None, sharpened], ids=["products", "an equation"])
def test_a_scale_and_weights_of_heads(expected):
    check = check_edit(Sharpened(), expected=expected, targets=2, steps=3)
    assert check.worst.error <= TOLERANCE and check.edited > 20


def test_a_scale_that_is_left_out_is_found(monkeypatch):
    monkeypatch.setattr(Product, "map", property(lambda self: MapSpec(self.query, self.keys, self.style, self.shifts)))
    with pytest.raises(AssertionError, match="Sharpened differs from written-out maps by"):
        check_edit(Sharpened(), steps=2)


def memory(site, step, roles, layer: DenseLayer):
    """The same as an equation on stored maps."""
    if site.kind != "self":
        return {}
    out = {}
    for source, target in roles.pairs(conditional=None):
        keys = torch.cat([layer.key[target], layer.key[source]], dim=-2)
        values = torch.cat([layer.value[target], layer.value[source]], dim=-2)
        bias = torch.zeros(keys.shape[-2], dtype=keys.dtype)
        bias[layer.key.shape[-2] :] = step.index / step.total
        out[target] = layer.map(layer.query[target], keys, bias) @ values
    return out


@pytest.mark.slow
def test_an_equation_of_ones_own():
    check_edit(Memory())
    check = check_edit(Memory(), expected=memory, targets=2, steps=4)
    assert check.worst.error <= TOLERANCE


def test_a_wrong_edit_is_found():
    """Its products agree with themselves; the equation tells."""
    check_edit(Memory(values_swapped=True))
    with pytest.raises(AssertionError, match=r"Memory differs from the equation that is expected by .*attn1: row \d"):
        check_edit(Memory(values_swapped=True), expected=memory)


def test_a_phase_that_calls_different_steps_equal_is_found():
    with pytest.raises(AssertionError, match=r"the first at step 1 in .*attn1"):
        check_edit(Memory(wrong_phase=True))


def test_an_edit_that_does_nothing_is_no_agreement():
    with pytest.warns(RuntimeWarning, match="did nothing"), pytest.raises(ValueError, match="nothing was checked"):
        check_edit(MasaCtrlEdit(start_step=40, start_layer=0))
    with pytest.raises(TypeError, match="expected an Edit"):
        check_edit("fpe")


def test_every_field_of_a_product_is_written_out():
    assert {field.name for field in dataclasses.fields(Product)} == set(WRITTEN_OUT)


def test_nothing_of_the_session_computes_for_it():
    """The dense side imports no plan, no processor and no backend but the reference."""
    for name in ("dense", "shadow"):
        text = (Path(__file__).parents[3] / "fpe_pipeline" / "testing" / f"{name}.py").read_text(encoding="utf-8")
        assert "session." not in text.replace("session.step", "") and "plan_products" not in text
        assert "shared_attention" not in text
