"""Edited layers in one call, and orders that stand from step to step: the same to the bit as without either."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from fpe_pipeline import BatchRoles, FreePromptEdit, MasaCtrlEdit, PlugAndPlayEdit, Product, StyleAlignedEdit, editing
from fpe_pipeline.edits.base import begun, features_of, parts_of
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.models.sites import attention_sites
from fpe_pipeline.models.steps import Step
from fpe_pipeline.session.layers.instructions import Order
from tests.support.edited_layer import GRID, attention, install, random, run
from tests.support.edited_layer import order as order_of
from tests.support.tiny_models import draw
from tests.support.tiny_pipelines import tiny_pipeline

TOKENS = GRID[0] * GRID[1]
PAIRS = BatchRoles.from_batch(6, classifier_free_guidance=True).pairs()

PLANS = {
    "targets with their source's map": {t: Product(s, (s,), (t,)) for s, t in PAIRS},
    "sources apart": {1: Product(0, (0,), (1,)), 3: Product(2, (2,), (3,)), 5: Product(4, (4,), (5,))},
    "queries of one row, keys of another": {t: Product(t, (s,), (s,)) for s, t in PAIRS},
    "rows in another order": {row: Product(5 - row, (5 - row,), (row,)) for row in range(6)},
    "every row its own": {},
}


def generally(monkeypatch):
    monkeypatch.setattr(Order, "straight_line", None)


@pytest.mark.parametrize("products", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("config", [{}, {"residual_connection": True, "rescale_output_factor": 3.0, "bias": True}])
def test_one_call_is_the_general_evaluation(products, config, monkeypatch):
    hidden = random(6, TOKENS, 16)
    straight = install(attention(**config), products)
    assert straight.processor.order.straight_line is not None
    actual = run(straight, hidden)
    generally(monkeypatch)
    general = install(attention(**config), products)
    assert torch.equal(actual, run(general, hidden))
    assert straight.processor.record == general.processor.record
    assert straight.processor.record.held and straight.processor.record.maps


@pytest.mark.parametrize(
    "products",
    [
        {5: Product(0, (0,), (5,), weight=0.5)},
        {5: Product(0, (0,), (5,), weight=torch.ones(TOKENS))},
        {5: (Product(0, (0,), (5,)), Product(5, (5,), (5,)))},
        {5: Product(0, (0, 5), (0, 5))},
        {5: Product(5, (0,), (5,), style=0)},
        {5: Product(0, (0,), (5,), mixing=torch.eye(TOKENS))},
    ],
)
def test_other_plans_take_the_general_way(products):
    assert order_of(attention(), products).straight_line is None


def test_a_layer_that_does_more_takes_the_general_way():
    """Of a plan in one call, layers whose norms or masks come in between are computed as before."""
    products = PLANS["targets with their source's map"]
    mask = torch.zeros(6, 1, TOKENS, dtype=torch.float64)
    mask[..., 3:] = -1e4
    hidden = random(6, TOKENS, 16)
    masked, plain = (run(install(attention(), products), hidden, attention_mask=given) for given in (mask, None))
    assert (masked - plain).abs().max() > 1e-2
    with pytest.raises(ValueError, match="12 tokens and got 6"):
        run(install(attention(), products), hidden[:, :6])


EDITS = {
    "a window": (FreePromptEdit(0.5), (range(5), range(5, 10))),
    "half strength": (FreePromptEdit((0.2, 0.5), strength=0.5), (range(2), range(2, 5), range(5, 10))),
    "a fading strength": (FreePromptEdit(0.2, strength=(1, 0)), (range(1), range(1, 2), range(2, 10))),
    "a mask": (FreePromptEdit(1.0, mask=torch.eye(8)), (range(10),)),
    "masactrl": (MasaCtrlEdit(start_step=4, start_layer=0), (range(4), range(4, 10))),
    "plug and play": (PlugAndPlayEdit(), None),
    "style": (StyleAlignedEdit(), None),
    "two of them": (
        FreePromptEdit(0.5, layers=0) + MasaCtrlEdit(start_step=3, layers=1),
        (range(3), range(3, 5), range(5, 10)),
    ),
}


@pytest.mark.parametrize(("edit", "expected"), EDITS.values(), ids=EDITS)
def test_steps_of_a_phase_have_the_same_products(pipe, edit, expected):
    runs = edit.phases(10)
    assert [step for run in runs for step in run] == list(range(10))
    assert expected is None or runs == expected
    roles = BatchRoles.from_batch(4, classifier_free_guidance=True)
    running = begun(edit)
    sites = tuple(site.at(8, 8) for site in attention_sites(pipe.unet))
    selected = [(part, site) for part in parts_of(running) for site in part.select(sites)]
    for steps in runs:
        first, *others = (Step(index, 10) for index in steps)
        for step in others:
            assert running.active(step) == running.active(first)
            for part, site in selected:
                assert part.active(step) == part.active(first)
                if part.active(step):
                    assert part.products(site, step, roles) == part.products(site, first, roles)
            if running.active(step):
                assert features_of(running, step, roles) == features_of(running, first, roles)


def test_an_order_stands_for_a_window(pipe):
    seen = []
    edit = FreePromptEdit(0.5)
    with editing(pipe, edit) as session:
        hook = pipe.unet.register_forward_hook(lambda *arguments: seen.append(orders(session)))
        draw(pipe, 2, steps=4)
        hook.remove()
    assert seen[0] and not seen[2] and not seen[3]
    assert all(seen[0][path] is seen[1][path] for path in seen[0])
    assert {tuple(steps) for steps in session.report().layers.values()} == {(0, 1)}


def orders(session):
    return {path: processor.order for path, processor in session._layers.ordered.items()}


@dataclass(frozen=True)
class EveryOther(FreePromptEdit):
    """What it inherits says that all steps are alike."""

    def products(self, site, step, roles):
        return super().products(site, step, roles) if step.index % 2 else {}


def test_an_edit_that_hangs_on_the_step_is_asked_at_each(pipe):
    with editing(pipe, EveryOther(1.0)) as session:
        draw(pipe, 2, steps=4)
    assert {tuple(steps) for steps in session.report().layers.values()} == {(1, 3)}


def test_another_batch_or_size_gets_orders_of_its_own(pipe):
    tiny = tiny_pipeline(pipe)
    with editing(tiny, FreePromptEdit(1.0), classifier_free_guidance=True) as session:
        for rows, side in ((4, 8), (6, 8), (4, 16), (4, 8)):
            session.step(0, 2)
            text = torch.zeros(rows, 77, tiny.unet.config.cross_attention_dim)
            tiny.unet(torch.randn(rows, 4, side, side), torch.tensor(500), text)
            assert session.report().batch == rows


@dataclass(frozen=True)
class ByPrompts(FreePromptEdit):
    """What it does follows from what the pipeline encodes, and all steps are alike."""

    replaces: bool = False

    def encoded(self, encoding):
        return replace(self, replaces="car" in encoding.prompts[0])

    def products(self, site, step, roles):
        return super().products(site, step, roles) if self.replaces else {}

    def phase(self, step):
        return ()


def test_a_call_with_other_prompts_gets_orders_of_its_own(pipe):
    tiny, replaced = tiny_pipeline(pipe), []
    with editing(tiny, ByPrompts(1.0)) as session:
        for prompts in (["a cat", "a dog"], ["a car", "a dog"], ["a cat", "a dog"]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EditWarning)
                tiny(prompts, num_inference_steps=2, output_type="latent", generator=torch.Generator())
            replaced.append(bool(session.report().layers))
    assert replaced == [False, True, False]
