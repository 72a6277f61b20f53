"""Edits of Lumina 2: captions of other lengths, by which its images are turned, and heads that share keys."""

import pytest
import torch

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    MasaCtrlEdit,
    StableFlowEdit,
    editing,
)
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.own_maps import OwnMaps
from tests.support.slow_cases import few
from tests.support.tiny_lumina import dense_lumina, draw_lumina, tiny_lumina_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8


@pytest.fixture(scope="module")
def lumina():
    return tiny_lumina_pipeline()


def reference(pipe, rule, steps, *, both=False, turns=True, **options):
    def followed(row, rows):
        return rule(row, rows) if state["step"] in steps and (both or state["calls"] % 2) else None

    with dense_lumina(pipe, followed, turns=turns) as state:
        return draw_lumina(pipe, **options)


def edited(pipe, edit, **options):
    with editing(pipe, edit) as session:
        out = draw_lumina(pipe, **options)
    return out, session.report()


def taking(*names):
    return lambda row, rows: [(1.0, dict.fromkeys(names, 0))] if row else None


QUERIES_KEYS, MEMORY = taking("q_image", "k_image"), taking("k_image", "v_image")
RULES = {
    "image": (FreePromptEdit(0.5), QUERIES_KEYS, (0, 1), False),
    "consistedit": (ConsistEdit(0.75), QUERIES_KEYS, (0, 1, 2), True),
    "masactrl": (MasaCtrlEdit(1, layers=range(3)), MEMORY, (1, 2, 3), True),
    "stable flow": (StableFlowEdit(layers=range(3)), MEMORY, (0, 1, 2, 3), True),
}
SIZES = {
    "1 target": {},
    "3 targets": {"prompts": 4},
    "not square": {"size": (4, 12)},
    "one length": {"lengths": (6, 6)},
}


@pytest.mark.parametrize("options", few(SIZES, "1 target", "3 targets"))
@pytest.mark.parametrize("rule", few(RULES.keys(), "image"))
def test_targets_are_the_papers(lumina, rule, options):
    edit, dense_rule, steps, both = RULES[rule]
    actual, report = edited(lumina, edit, **options)
    assert (actual - reference(lumina, dense_rule, steps, both=both, **options)).abs().max() <= EXACT
    assert (actual - draw_lumina(lumina, **options))[1:].abs().flatten(1).amax(1).min() > 1e-5
    assert len(report.layers) == 3 and all(tuple(noted) == steps for noted in report.layers.values())


def test_images_stand_where_the_target_begins(lumina):
    """Image tokens of the source are turned to the place of the target's; left as they were, they are another edit."""
    for edit, rule, steps, both in (RULES["image"], RULES["masactrl"]):
        actual, _ = edited(lumina, edit)
        as_they_were = reference(lumina, rule, steps, both=both, turns=False)
        assert (actual - as_they_were).abs().max() > 1e-6
        alike, _ = edited(lumina, edit, lengths=(6, 6))
        as_they_were = reference(lumina, rule, steps, both=both, turns=False, lengths=(6, 6))
        assert (alike - as_they_were).abs().max() <= EXACT


OTHERS = {
    "text": ("q_text", "k_text"),
    "keys alone": ("k_image",),
    "values too": ("q_image", "k_image", "v_image"),
    "nothing": (),
}


@pytest.mark.parametrize("names", few(OTHERS, "keys alone"))
def test_other_rules_are_told_apart(lumina, names):
    options = {"lengths": (6, 6)}
    actual, _ = edited(lumina, FreePromptEdit(0.5), **options)
    assert (actual - reference(lumina, taking(*names), (0, 1), **options)).abs().max() > 1e-6
    assert (actual - reference(lumina, QUERIES_KEYS, (1, 2), **options)).abs().max() > 1e-6
    assert (actual - reference(lumina, QUERIES_KEYS, (0, 1), both=True, **options)).abs().max() > 1e-6


@pytest.mark.slow
def test_guidance_that_ends(lumina):
    actual, _ = edited(lumina, FreePromptEdit(1.0, both_halves=True), cfg_trunc_ratio=0.5)
    expected = reference(lumina, QUERIES_KEYS, range(4), both=True, cfg_trunc_ratio=0.5)
    assert (actual - expected).abs().max() <= EXACT
    with editing(lumina, FreePromptEdit(0.5)):
        first, second = draw_lumina(lumina), draw_lumina(lumina)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", few({"float64": torch.float64, "float32": torch.float32}, "float32"))
def test_the_source_is_the_one_without_an_edit(dtype):
    tiny = tiny_lumina_pipeline(dtype)
    out, _ = edited(tiny, FreePromptEdit(1.0), prompts=3)
    own, report = edited(tiny, OwnMaps(), prompts=3)
    plain = draw_lumina(tiny, prompts=3)
    assert list(report.layers) == ["noise_refiner.0.attn", *(f"layers.{index}.attn" for index in range(3))]
    bound = 1e-5 if dtype is torch.float32 else 1e-11
    assert (out - plain)[0].abs().max() <= bound and (own - plain).abs().max() <= bound


def test_layers_of_the_image_alone_are_edited_where_they_are_named(lumina):
    _, report = edited(lumina, FreePromptEdit(1.0, layers=["noise_refiner.0", "layers.1"]))
    assert list(report.layers) == ["noise_refiner.0.attn", "layers.1.attn"]


def test_sites_are_found_by_walking(lumina):
    assert not hasattr(lumina.transformer, "attn_processors")
    sites = adapter_of(lumina).sites
    assert [(site.kind, site.index) for site in sites] == [("image", 0), ("joint", 0), ("joint", 1), ("joint", 2)]


def test_processors_are_put_back(lumina):
    layers = [block.attn for block in (*lumina.transformer.noise_refiner, *lumina.transformer.layers)]
    before, plain = [layer.processor for layer in layers], draw_lumina(lumina)
    with pytest.raises(RuntimeError, match="stop"), editing(lumina, FreePromptEdit(0.5)):
        draw_lumina(lumina)
        raise RuntimeError("stop")
    assert [layer.processor for layer in layers] == before
    assert torch.equal(draw_lumina(lumina), plain)
