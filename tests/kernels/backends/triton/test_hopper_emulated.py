"""The kernel for Hopper, its own source, on emulated warps: no deadlock, every tile once, exact, faults found."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from fpe_kernels.backends.triton import hopper
from fpe_kernels.backends.triton.configs import Config
from fpe_kernels.backends.triton.packing import chunks
from fpe_kernels.testing import Case, assert_matches, make_case
from tests.support import gluon_emulator as emulator

KERNEL = emulator.load_kernel()


def ragged(map_index=(0, 0), head_dim: int = 64, queries: int = 150, keys: int = 77, heads: int = 1, **more) -> Case:
    return make_case(
        maps=1 + max(map_index), map_index=map_index, heads=heads, queries=queries, keys=keys, head_dim=head_dim,
        dtype=more.pop("dtype", torch.float16), layout="heads_split", **more,
    )  # fmt: skip


class Computed:
    """What the kernel makes of a case, and what it fetched."""

    def __init__(self, case: Case, tiles, turns=False, known=None, seed=0, kernel=KERNEL, programs=None) -> None:
        config = Config(tiles[0], tiles[1], 4, tiles[2], gluon=True, specialised=turns)
        maps, heads, queries, _ = case.query.shape
        self.out = torch.full(
            (*case.value.shape[:2], queries, case.value.shape[3]), float("nan"), dtype=case.query.dtype
        )
        self.logsumexp = torch.full((maps, heads, queries), float("nan")) if known is None else known
        self.launches, self.fetched = [], Counter()
        tensors = case.query, case.key, case.value
        for chunk in chunks(case.map_index, maps, case.value.shape[3], 10**6):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(hopper, "kernels", lambda: kernel)
                arguments = *tensors, chunk, case.factor, self.out, self.logsumexp, known is not None, config
                for launch in hopper.launches(*arguments):
                    self.launches.append(launch)
                    self.fetched += emulator.run(launch, seed, programs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("turns", [False, True], ids=["", "in turns"])
@pytest.mark.parametrize("tiles", [(64, 32, 3), (128, 16, 2), (192, 32, 2), (256, 16, 3), (256, 64, 2)], ids=str)
def test_ragged_shapes_are_exact_in_any_order_of_warps(tiles, turns, seed) -> None:
    case = ragged(map_index=(0, 0), head_dim=16, queries=270, keys=77 + seed)
    found = Computed(case, tiles, turns, seed=seed)
    assert_matches(case, out=found.out, logsumexp=found.logsumexp)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128, 160])
@pytest.mark.parametrize("map_index", [(0,), (1, 0, 1, 0), (0, 1, 2, 2), (0,) * 4, (0,) * 5], ids=str)
def test_every_width_and_number_of_branches_is_exact(head_dim, map_index) -> None:
    case = ragged(map_index, head_dim, queries=65, keys=50, heads=2)
    found = Computed(case, (64, 16, 2))
    assert_matches(case, out=found.out, logsumexp=found.logsumexp)


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (1, 1), (129, 16), (128, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_whole_tiles_and_few_keys_are_exact(queries, keys, dtype) -> None:
    case = ragged(head_dim=32, queries=queries, keys=keys, dtype=dtype, value_dim=72)
    found = Computed(case, (128, 16, 2), turns=True)
    assert_matches(case, out=found.out, logsumexp=found.logsumexp)


@pytest.mark.parametrize("head_dim", [40, 64])
def test_a_known_log_sum_exp_is_used_and_left_as_it_is(head_dim) -> None:
    case = ragged(head_dim=head_dim)
    known = case.exact["logsumexp"].float()
    found = Computed(case, (128, 32, 2), known=known.clone())
    assert_matches(case, out=found.out)
    assert torch.equal(found.logsumexp, known)


@pytest.mark.parametrize("turns", [False, True], ids=["", "in turns"])
@pytest.mark.parametrize("tiles", [(64, 32, 3), (128, 16, 2), (192, 32, 2), (256, 16, 3)], ids=str)
@pytest.mark.parametrize(
    "programs", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)]
)
def test_programs_that_take_several_tiles_are_exact(programs, tiles, turns) -> None:
    case = ragged((0, 1, 1), 40, queries=270, keys=77, heads=4)
    found = Computed(case, tiles, turns, programs=programs)
    assert max(launch.numbers["programs"] for launch in found.launches) > programs
    assert_matches(case, out=found.out, logsumexp=found.logsumexp)


def test_as_many_programs_are_launched_as_run_at_the_same_time(monkeypatch) -> None:
    case = ragged((0, 0), 16, queries=300, keys=20, heads=2)
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", {"sm_90": 2})
    few = Computed(case, (128, 16, 2))
    assert [launch.programs for launch in few.launches] == [2]  # of the six tiles
    assert_matches(case, out=few.out, logsumexp=few.logsumexp)
    assert [launch.programs for launch in Computed(case, (64, 16, 2)).launches] == [4]


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("tiles", [(64, 16, 2), (256, 32, 3)], ids=str)
def test_every_box_is_fetched_once_by_each_program(head_dim, tiles) -> None:
    case = ragged((0, 0, 1), head_dim, queries=300, keys=100, heads=2)
    found = Computed(case, tiles)
    assert set(found.fetched.values()) == {len(found.launches) // 2}  # programs are counted anew in each launch
    row_tiles, key_tiles = -(-300 // tiles[0]), -(-100 // tiles[1])
    groups, _ = hopper.warpgroups(tiles[0])
    pieces = 2 if head_dim == 40 else 1
    fetches = {name: sum(key[0].startswith(name) for key in found.fetched) for name in ("query", "key", "value")}
    programs = 2 * 2 * row_tiles  # maps, heads
    assert fetches["query"] == programs * groups * pieces
    assert fetches["key"] == programs * key_tiles * pieces
    assert fetches["value"] == 2 * row_tiles * 3 * key_tiles * pieces


def lines(*texts: str) -> str:
    """In the body of the loop over keys."""
    return "".join(f"            {text}\n" for text in texts)


# A text of the kernel, and what stands in its place.
SCORES_READ = "scores = warpgroup_mma_wait(PRODUCTS, deps=[in_flight])"
KEYS_THERE = lines("mbarrier.wait(k_full.index(k_slot), k_phase, pred=step + 1 < tiles)")
VALUES_READ, VALUES_FREE = "accumulators = finished(products, PRODUCTS)", "mbarrier.arrive(v_empty.index(v_slot))"
COUNTED, RESCALED = "init(k_empty.index(slot), count=GROUPS", "rescaled_rows(accumulators, rescale,"
VALUES_THERE = "        mbarrier.wait(v_full.index(v_slot), v_phase)\n        products"
QUERIES_THERE = "        mbarrier.wait(q_full, q_phase)\n"
VALUES_LAST = f"        {VALUES_READ}\n        {VALUES_FREE}\n"


def turned(slot: str, phase: str) -> tuple[str, str]:
    return lines(f"    {slot} = 0", f"    {phase} ^= 1"), lines(f"    {slot} = 0")


PLANTED = {
    "slots that are never free": ("    phase = 1\n", "    phase = 0\n"),
    "a fetching warp whose phase never turns": turned("slot", "phase"),
    "keys whose phase never turns": turned("k_slot", "k_phase"),
    "values whose phase never turns": turned("v_slot", "v_phase"),
    "keys that nobody waits for": (KEYS_THERE, ""),
    "values given back before they are read": (lines(VALUES_READ, VALUES_FREE), lines(VALUES_FREE, VALUES_READ)),
    "values that nobody waits for": (VALUES_THERE, "        products"),
    "scores used in flight": (SCORES_READ, SCORES_READ.replace("PRODUCTS", "PRODUCTS + 1")),
    "one warpgroup gives a slot back for both": (COUNTED, COUNTED.replace("GROUPS", "1")),
    "a barrier that counts the wrong bytes": ("expect(k_full.index(slot), 2", "expect(k_full.index(slot), 4"),
    "a first turn that nobody gives": ("turn_phase = 1 if part == 0 else 0", "turn_phase = 0"),
    "the wrong tile is masked": ("keys - (tiles - 1) * BLOCK_N)[None", "keys - BLOCK_N)[None"),
    "queries that are never given back": ("        mbarrier.arrive(q_empty)  # the next tile's may come\n", ""),
    "queries replaced while they are read": ("        mbarrier.wait(q_empty, q_phase)\n", ""),
    "queries of the tile before": (QUERIES_THERE, ""),
    "a last slot of values that is not given back": (VALUES_LAST, VALUES_LAST.splitlines()[0] + "\n"),
    "a maximum without its rescaling": (RESCALED, RESCALED.replace("rescale,", "1 + 0 * rescale,")),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(planted) -> None:
    kernel = emulator.load_kernel(planted)
    case = ragged(head_dim=16, queries=130, keys=150, amplitude=2.0)
    with pytest.raises(AssertionError):
        for seed in range(10):
            found = Computed(case, (128, 16, 3), turns=True, seed=seed, kernel=kernel, programs=1)
            assert_matches(case, out=found.out, logsumexp=found.logsumexp)
