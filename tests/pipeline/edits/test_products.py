"""The algebra of products: plans, sums, and the methods of the literature written with them."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpe_pipeline import BatchRoles, Edit, Product, editing
from fpe_pipeline.edits.joint_products import JointProduct, SegmentRows
from fpe_pipeline.edits.products import MapSpec, plan_products
from fpe_pipeline.edits.selection import LayerSelection
from fpe_pipeline.session.layers.computing import Projections, Rows, evaluate, row_maps
from tests.support.dense import DenseEditProcessor, dense_attention, own, replaced
from tests.support.edited_layer import attention, install, random, run
from tests.support.tiny_unets import tiny_unet, unet_inputs

FIRST = SegmentRows(0, 0)


def test_rows_that_share_a_map_are_computed_together():
    plan = plan_products({3: Product(2, (2,), (3,)), 4: Product(2, (2,), (4,))}, 5)
    (call,) = plan.calls
    assert call.maps == (MapSpec(0, (0,)), MapSpec(1, (1,)), MapSpec(2, (2,)))
    assert call.map_index == (0, 1, 2, 2, 2)
    assert plan.is_plain
    assert (plan.queries, plan.keys, plan.values) == ((0, 1, 2), (0, 1, 2), (0, 1, 2, 3, 4))


def test_maps_over_different_numbers_of_keys_need_calls_of_their_own():
    plan = plan_products({1: Product(1, (0, 1), (0, 1))}, 2)
    assert [call.rows for call in plan.calls] == [(0,), (1,)]


@pytest.mark.parametrize(
    "made",
    [
        lambda tensor: Product(0, (0,), (1,), weight=tensor),
        lambda tensor: Product(0, (0,), (1,), mixing=tensor),
        lambda tensor: JointProduct(FIRST, FIRST, FIRST, weight=tensor),
    ],
    ids=["weight", "mixing", "joint"],
)
def test_products_with_the_very_same_tensor_are_equal(made):
    """Plans are looked up by them; a tensor's own ``==`` is no answer, nor are two tensors one."""
    tensor, other = torch.rand(3, 3), torch.rand(3, 3)
    assert made(tensor) == made(tensor) and hash(made(tensor)) == hash(made(tensor))
    assert made(tensor) != made(other) and made(tensor) != made(tensor.clone())
    assert made(tensor) != made(0.5) and made(0.5) == made(0.5) != tensor


@pytest.mark.parametrize(
    "products",
    [
        {2: Product(0, (0,), (0,))},
        {0: Product(2, (0,), (0,))},
        {0: Product(0, (-1,), (0,))},
        {0: Product(0, (0,), (5,))},
    ],
)
def test_rows_outside_the_batch_are_refused(products):
    with pytest.raises(ValueError, match="outside the batch of 2"):
        plan_products(products, 2)


def test_lists_and_single_rows_are_rows():
    product = Product(1, [1, 0], [1, 0], shifts=[0.0, 0.5])
    assert product == Product(1, (1, 0), (1, 0), shifts=(0.0, 0.5)) and hash(product.map)
    assert Product(1, 0, 0) == Product(1, (0,), (0,))
    assert plan_products({1: product}, 2) is plan_products({1: Product(1, (1, 0), (1, 0), shifts=(0.0, 0.5))}, 2)


@pytest.mark.parametrize("rows", ["01", 0.5, None, (0, 0.5), (True,), {0, 1}])
def test_what_are_no_rows(rows):
    with pytest.raises(TypeError, match="expected rows of the batch as keys"):
        Product(0, rows, (0,))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None, True])
def test_what_is_no_scale(scale):
    with pytest.raises(ValueError, match="expected a finite number as scale"):
        Product(0, (0,), (0,), scale=scale)


def test_maps_of_different_scales_need_calls_of_their_own():
    """And a map of another scale is not the one that a recording has the log-sum-exp of."""
    terms = [Product(2, (2,), (0,)), Product(2, (2,), (0,), scale=2.0), Product(2, (2,), (0,))]
    plan = plan_products({0: terms}, 2, recorded=1)
    assert [(call.rows, call.recorded, call.maps) for call in plan.calls] == [
        ((1,), False, (MapSpec(1, (1,)),)),
        ((0,), False, (MapSpec(2, (2,), scale=2.0),)),
        ((0, 0), True, (MapSpec(2, (2,)),)),
    ]
    assert plan.only_call is None
    assert plan_products({0: Product(0, (0,), (0,), scale=2.0)}, 1).only_call is None
    assert Product(2, (2,), (0,), scale=2.0).describe() == "A(2 · q 2, k 2) @ v 0"


@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 5), (1, 2, 12)])
def test_weights_that_do_not_fit_the_layer(shape):
    query = Rows(random(1, 2, 12, 4), (0,))
    plan = plan_products({0: Product(0, (0,), (0,), weight=torch.ones(shape))}, 1)
    with pytest.raises(ValueError, match=r"2 heads and 12 tokens as \[12\], \[2, 1\] or \[2, 12\], got"):
        evaluate(plan, Projections(query, query, query, scale=0.5))


def test_keys_and_values_have_to_fit():
    with pytest.raises(ValueError, match="without mixing"):
        Product(0, (0, 1), (0,))


ROWS = st.integers(0, 3)


@st.composite
def terms(draw):
    """A product of any kind: (query, keys, values, weight, mixing, scale)."""
    length = draw(st.integers(1, 2))
    keys = tuple(draw(st.lists(ROWS, min_size=length, max_size=length)))
    values = tuple(draw(st.lists(ROWS, min_size=length, max_size=length)))
    weight = draw(st.sampled_from([1.0, 0.5, *(random(*shape, seed=3) for shape in ((12,), (2, 1), (2, 12)))]))
    mixing = draw(st.sampled_from([None, random(12 * length, 12 * length, seed=4) / 4]))
    scale = draw(st.sampled_from([1.0, 1.0, 0.5, 3.0]))
    return draw(ROWS), keys, values, weight, mixing, scale


def product(query, keys, values, weight, mixing, scale=1.0):
    return Product(query, list(keys), list(values), weight, mixing, scale=scale)


@settings(max_examples=60, deadline=None)
@example({0: [(0, (0,), (0,), 1.0, None), (0, (0, 0), (0, 0), 1.0, None)]})  # two calls, the first covering all rows
@given(st.dictionaries(ROWS, st.lists(terms(), min_size=1, max_size=3), min_size=1))
def test_any_sum_of_products_is_dense_mathematics(products):
    attn, hidden_states = attention(), random(4, 12, 16)
    with torch.no_grad():
        expected = dense_attention(attn, hidden_states, [products.get(row, [own(row)]) for row in range(4)])
    edit = {row: [product(*term) for term in given] for row, given in products.items()}
    torch.testing.assert_close(run(install(attn, edit, rows=4), hidden_states), expected, rtol=0, atol=1e-10)


def test_maps_of_rows_are_what_their_outputs_are_made_with():
    """Weighted by pixel, mixed by token and head; a map that two rows use is one object, computed once."""
    alpha, mixing = random(12, seed=7).sigmoid(), random(2, 12, 12, seed=8)
    edit = {
        1: [Product(0, (0,), (1,), weight=alpha), Product(1, (1,), (1,), weight=1 - alpha)],
        2: [
            Product(0, (0,), (2,), mixing=mixing),
            Product(2, (2,), (2,), weight=0.25),
            Product(2, (2,), (2,), weight=random(2, 1, seed=9), scale=2.0),
        ],
    }
    query, key, value = (Rows(random(3, 2, 12, 4, seed=seed), (0, 1, 2)) for seed in range(3))
    layer, plan = Projections(query, key, value, scale=0.5, backend="torch"), plan_products(edit, 3)
    out, columns = evaluate(plan, layer, {2: value.tensor[2, 0, :, :1]})
    maps = row_maps(plan, (0, 1, 2), layer)
    for row, operator in maps.items():
        torch.testing.assert_close(operator @ value.tensor[row : row + 1], out[row : row + 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(operator.dense() @ value.tensor[row], out[row : row + 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(columns[2], maps[2].matmul(value.tensor[2:, :1, :, :1].expand(1, 2, -1, -1))[0])
    assert repr(maps[0] + maps[1] + maps[2]).endswith("terms=6, maps=4)")


# The methods of the literature, each as small as this


@dataclass(frozen=True)
class OnAllSites(Edit):
    kind: str = "self"

    def select(self, sites):
        return LayerSelection.parse(self.kind).match(sites)


@dataclass(frozen=True)
class MasaCtrl(OnAllSites):
    def products(self, site, step, roles):
        return {target: Product(target, (source,), (source,)) for source, target in roles.pairs(conditional=None)}


@dataclass(frozen=True)
class PlugAndPlay(OnAllSites):
    def products(self, site, step, roles):
        return {target: Product(source, (source,), (target,)) for source, target in roles.pairs(conditional=None)}


@dataclass(frozen=True)
class SharedAttention(OnAllSites):
    """StyleAligned's, without its normalisation of queries and keys."""

    def products(self, site, step, roles):
        return {t: Product(t, (s, t), (s, t)) for s, t in roles.pairs(conditional=None)}


@dataclass(frozen=True)
class Regional(OnAllSites):
    """Free-Prompt-Editing in the left half of the image."""

    def products(self, site, step, roles):
        height, width = site.grid
        inside = (torch.arange(width) < width // 2).double().repeat(height)
        return {
            t: (Product(s, (s,), (t,), weight=inside), Product(t, (t,), (t,), weight=1 - inside))
            for s, t in roles.pairs()
        }


@dataclass(frozen=True)
class WordReplace(OnAllSites):
    """Prompt-to-Prompt's cross-attention, with a mapper and an alpha for each word."""

    kind: str = "cross"

    def products(self, site, step, roles):
        mapper, alpha = WORDS
        return {
            t: (
                Product(s, (s,), (t,), mixing=mapper @ torch.diag(alpha)),
                Product(t, (t,), (t,), mixing=torch.diag(1 - alpha)),
            )
            for s, t in roles.pairs()
        }


WORDS = random(5, 5, seed=5).softmax(-1), random(5, seed=6).sigmoid()


def halves(row):
    """(source, is target, is conditional) in a batch of [u_source, u_target, source, target]."""
    return row - row % 2, row % 2 == 1, row >= 2


def dense_rules():
    """For each method: what a row becomes, as a function of the row and the number of tokens."""
    mapper, alpha = WORDS

    def masactrl(row, width):
        source, target, _ = halves(row)
        return [(row, (source,), (source,), 1.0, None)] if target else None

    def plug_and_play(row, width):
        source, target, _ = halves(row)
        return [replaced(source, row)] if target else None

    def shared(row, width):
        source, target, _ = halves(row)
        return [(row, (source, row), (source, row), 1.0, None)] if target else None

    def regional(row, width):
        if row != 3:
            return None
        mask = torch.tensor([[float(x < width // 2) for x in range(width)]] * width, dtype=torch.float64).flatten()
        return [(2, (2,), (3,), mask, None), (3, (3,), (3,), 1 - mask, None)]

    def words(row, width):
        if row != 3:
            return None
        return [(2, (2,), (3,), 1.0, mapper @ torch.diag(alpha)), (3, (3,), (3,), 1.0, torch.diag(1 - alpha))]

    return [
        (MasaCtrl(), masactrl),
        (PlugAndPlay(), plug_and_play),
        (SharedAttention(), shared),
        (Regional(), regional),
        (WordReplace(), words),
    ]


@pytest.mark.parametrize(("edit", "rule"), dense_rules(), ids=lambda value: type(value).__name__)
def test_methods_in_a_whole_unet(edit, rule):
    unet = tiny_unet("sd1")
    args, kwargs = unet_inputs(unet, 4)
    with torch.no_grad():
        unedited = unet(*args, **kwargs).sample
        with editing(unet, edit, classifier_free_guidance=True) as session:
            session.step(0, 1)
            actual = unet(*args, **kwargs).sample

        for site in session.sites:
            if site.kind == edit.kind:
                width = site.at(8, 8).grid[1]
                dense = DenseEditProcessor(lambda row, width=width: rule(row, width))
                unet.get_submodule(site.path).set_processor(dense)
        expected = unet(*args, **kwargs).sample
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert (expected - unedited)[3].abs().max() > 1e-5


def test_an_edit_can_be_of_any_layout():
    """Plug-and-Play's own batch: [source, unconditional, conditional]."""
    unet = tiny_unet("sd1")
    args, kwargs = unet_inputs(unet, 3)
    layout = BatchRoles(conditional=(True, False, True), source_of=(0, 0, 0))
    with torch.no_grad():
        with editing(unet, PlugAndPlay(), roles=layout) as session:
            session.step(0, 1)
            actual = unet(*args, **kwargs).sample
        for site in session.sites:
            if site.kind == "self":
                dense = DenseEditProcessor(lambda row: [replaced(0, row)])
                unet.get_submodule(site.path).set_processor(dense)
        torch.testing.assert_close(actual, unet(*args, **kwargs).sample, rtol=0, atol=1e-10)
