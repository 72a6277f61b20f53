"""What controllers keep of maps: what is asked of it later, exactly, in no more memory than it takes at any step."""

import gc

import pytest
import torch

from fpe_kernels import AttentionMap
from fpe_pipeline.compat.lazy import LazyMap
from fpe_pipeline.compat.masactrl import masactrl_utils
from fpe_pipeline.compat.prompt_to_prompt import (
    AttentionRefine,
    AttentionReplace,
    AttentionReweight,
    AttentionStore,
    aggregate_attention,
    ptp_utils,
    show_self_attention_comp,
)
from fpe_pipeline.compat.switch import set_compat
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline

TWO = PROMPTS[:2]
QUERIES, WIDTH = 24, 4


def layer(seed, heads, keys=QUERIES, rows=4):
    """A layer's lazy map, its matrix of the conditional half, and its queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, heads, QUERIES, WIDTH), (rows, heads, keys, WIDTH)
    query, key = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    view = LazyMap(AttentionMap(query, key, backend="reference"), halves=(rows // 2, rows - rows // 2))
    view.heads = heads
    matrix = torch.softmax(query @ key.transpose(-1, -2) * WIDTH**-0.5, dim=-1).flatten(0, 1)
    return view, matrix[rows * heads // 2 :], (query, key)


def written(view):
    return view @ torch.eye(view.shape[-1], dtype=view.dtype)


def tensors_of(view):
    """Bytes of the memory that a map keeps alive, of tensors of two axes and more."""
    seen, left, found = set(), [view], {}
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes() if one.ndim > 1 else 0
        elif type(one).__module__.startswith("fpe_") or isinstance(one, list | tuple | dict):
            left += gc.get_referents(one)
    return sum(found.values())


@pytest.mark.parametrize("heads", [1, 2])
def test_a_kept_map_holds_its_own_rows_alone(heads):
    view, matrix, factors = layer(0, heads)
    half = view[2 * heads :]
    assert tensors_of(half) >= sum(part.numel() * 8 for part in factors)
    assert half.keep() is half
    torch.testing.assert_close(written(half), matrix)
    assert not half.holds_numbers
    assert tensors_of(half) <= sum(part.numel() * 8 for part in factors) / 2 + 8 * QUERIES * 4 * heads
    half[:, :, 3] = 0
    assert written(view[2 * heads :])[:, :, 3].min() > 0  # they share nothing any more


def test_few_columns_are_kept_as_numbers():
    view, matrix, _ = layer(1, 2, keys=3)
    half = view[4:]
    half[:, :, 1].mul_(2.0)
    half.keep()
    assert half.holds_numbers
    assert half.nbytes == matrix.numel() * 8
    assert half.clone().holds_numbers
    torch.testing.assert_close(written(half), matrix * torch.tensor([1.0, 2.0, 1.0]))


def test_rows_that_stand_for_others_are_kept():
    view, matrix, _ = layer(2, 2)
    by_prompt = view[4:].reshape(2, 2, QUERIES, QUERIES)
    by_prompt[1:] = by_prompt[0][None]
    half = view[4:].keep()
    torch.testing.assert_close(written(half), torch.cat([matrix[:2]] * 2))
    expanded = by_prompt[:1].expand(3, -1, -1, -1).keep()
    torch.testing.assert_close(written(expanded), matrix[:2].expand(3, -1, -1, -1))


@pytest.mark.parametrize("heads", [1, 2])
def test_a_store_stops_growing(heads):
    """At 1, 10 and 50 steps: the exact sum, never in more bytes than its matrix, nor than the steps' factors."""
    store, sums, held = AttentionStore(), {}, {}
    store.num_att_layers = 2
    for step in range(1, 51):
        store.call_begins()
        for keys, is_cross in ((QUERIES, False), (3, True)):
            view, matrix, _ = layer(100 * step + keys, heads, keys)
            store(view, is_cross, "down")
            store.layer_ends()
            sums[is_cross] = matrix + sums.get(is_cross, 0)
        totals = store.attention_store["down_self"] + store.attention_store["down_cross"]
        held[step] = [total.holds_numbers for total in totals]
        assert all(total.nbytes <= total.numel() * 8 for total in totals), step
        if step == 1:
            own = sum(part.numel() * 8 for part in layer(0, heads)[2]) / 2
            assert totals[0].nbytes <= own + 8 * QUERIES * 4 * heads
    assert [held[steps] for steps in (1, 10, 50)] == [[False, True], [True, True], [True, True]]
    assert tensors_of(totals[0]) == sums[False].numel() * 8
    averages = store.get_average_attention()
    torch.testing.assert_close(written(averages["down_self"][0]), sums[False] / 50)
    torch.testing.assert_close(written(averages["down_cross"][0]), sums[True] / 50)


def edits(**options):
    yield AttentionReplace(TWO, 2, 0.8, 0.4, **options)
    yield AttentionRefine(TWO, 2, 0.8, 0.4, **options)
    yield AttentionReweight(TWO, 2, 0.8, 0.4, equalizer=torch.ones(1, 77), **options)


class Users(AttentionReplace):
    """A user's own, which may look at whatever is kept."""


def test_edits_keep_what_a_blend_reads(pipe):
    assert [edit.keeps for edit in edits()] == [("cross",)] * 3
    assert [edit.keeps for edit in edits(keeps="self")] == [("self",)] * 3
    assert [edit.keeps for edit in edits(compat="original")] == [("cross", "self")] * 3
    with set_compat("original"):
        assert [edit.keeps for edit in edits()] == [("cross", "self")] * 3
    assert Users(TWO, 2, 0.8, 0.4).keeps == ("cross", "self")
    tiny = tiny_pipeline(pipe)
    controller = next(edits())
    with ptp_utils.register_attention_control(tiny, controller):
        sample(tiny, 2, steps=2)
    assert "down_self: not kept" in controller.held()
    assert aggregate_attention(controller, 8, ("up", "down"), True, 0).shape == (8, 8, 77)
    said = r"AttentionReplace keeps cross maps: make it with keeps=\(\"cross\", \"self\"\)"
    for ask in (
        lambda: controller.get_average_attention()["down_self"][0],
        lambda: list(controller.attention_store["up_self"]),
        lambda: show_self_attention_comp(controller, 8, ("up", "down")),
    ):
        with pytest.raises(LookupError, match=said):
            ask()
    kept = AttentionReplace(TWO, 2, 0.8, 0.4, keeps=("cross", "self"))
    with ptp_utils.register_attention_control(tiny, kept):
        sample(tiny, 2, steps=2)
    assert show_self_attention_comp(kept, 8, ("up", "down"), max_com=2).size[1] == 256


def test_kinds_that_do_not_exist():
    with pytest.raises(ValueError, match=r'"cross" and "self", got \(\'words\',\)'):
        AttentionStore(keeps=("words",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keys", [QUERIES, 3])
@pytest.mark.parametrize("tensors", [False, True])
def test_sums_of_many_steps_in_half_precision(dtype, keys, tensors):
    """Each addition in half precision would round the sum, the same way more often than not as it grows."""
    store, editor, total = AttentionStore(), masactrl_utils.AttentionStore(), 0
    store.rows, editor.num_att_layers = 2, 1
    for step in range(60):
        query, key = (part.to(dtype) for part in layer(step, 2, keys, rows=2)[2])
        attention = LazyMap(AttentionMap(query, key, backend="reference"))
        attention = written(attention) if tensors else attention
        total += torch.softmax(query.double() @ key.double().transpose(-1, -2) * WIDTH**-0.5, dim=-1).flatten(0, 1)
        store.forward(attention, False, "up")
        store.layer_ends()
        store.between_steps()
        store.cur_step += 1
        editor.self_attns_step.append(attention)
        editor.cur_step = step + 1
        editor.after_step()
    mean = store.get_average_attention()["up_self"][0]
    rounding = torch.finfo(dtype).eps
    assert mean.dtype == dtype
    torch.testing.assert_close(written(mean).double(), total / 60, rtol=2 * rounding, atol=rounding / 16)
    for kept in (store.attention_store["up_self"][0], editor.self_attns[0]):
        assert kept.dtype == torch.float32
        error = written(kept).double() / total - 1
        assert error.abs().max() < rounding  # of one of the maps
        assert error.mean().abs() < rounding / 16


def test_a_store_that_keeps_maps_in_its_own_way_averages_them_in_their_dtype():
    class Own(AttentionStore):
        def forward(self, attn, is_cross, place_in_unet):
            self.step_store[f"{place_in_unet}_self"].append(attn)
            return attn

    store, (view, matrix, _) = Own(keeps=("cross", "self")), layer(0, 1)
    store.rows = 2
    for _ in range(2):
        store.forward(view[2:], False, "up")
        store.between_steps()
        store.cur_step += 1
    mean = store.get_average_attention()["up_self"][0]
    assert mean.dtype == torch.float64
    torch.testing.assert_close(written(mean), matrix, rtol=0, atol=1e-14)
