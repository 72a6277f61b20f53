"""How work is cut, as pure functions: nothing is lost, doubled, too wide or out of order."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from fpe_kernels.backends.grouping import rows_by_map
from fpe_kernels.backends.triton.packing import (
    MIN_PIECE,
    chunks,
    device_table,
    needs_wide_index,
    split_width,
    vector_width,
)
from fpe_kernels.testing import LAYOUTS, make


@given(st.integers(1, 1024))
def test_a_width_is_cut_into_powers_of_two_with_the_least_padding(width: int) -> None:
    pieces = split_width(width)
    assert sum(pieces) >= width
    assert all(piece == 0 or (piece >= MIN_PIECE and piece & (piece - 1) == 0) for piece in pieces)
    powers = [1 << exponent for exponent in range(4, 11)]
    best = min(a + b for a in powers for b in (0, *powers) if a + b >= width)
    assert sum(pieces) == best
    assert pieces[0] >= pieces[1]
    assert pieces[0] < width or pieces[1] == 0  # the second piece is never all padding


maps_and_index = st.integers(1, 5).flatmap(
    lambda maps: st.tuples(st.just(maps), st.lists(st.integers(0, maps - 1), max_size=20).map(tuple))
)


@given(maps_and_index, st.integers(0, 700), st.sampled_from([16, 160, 320]), st.booleans())
def test_chunks_cover_every_column_once(shape, value_dim: int, cap: int, together: bool) -> None:
    maps, map_index = shape
    seen: Counter = Counter()
    computed: set[int] = set()
    for chunk in chunks(map_index, maps, value_dim, cap, together):
        assert chunk.branches * (chunk.stop - chunk.start) <= cap
        assert {len(entry) for entry in chunk.table} == {1 + chunk.branches}
        groups = [entry[0] for entry in chunk.table]
        assert len(groups) == len(set(groups))  # two programs of one launch never write one element
        for group, *rows in chunk.table:
            assert chunk.first == (group not in computed)  # later launches find the log-sum-exp that the first wrote
            assert len(set(rows)) == len(rows) or together
            for row in dict.fromkeys(rows):  # a row named again is read and not written
                assert map_index[row] == group
                seen.update((row, column) for column in (range(chunk.start, chunk.stop) if value_dim else [-1]))
        computed |= set(groups)
    columns = range(value_dim) if value_dim else [-1]
    assert seen == Counter((row, column) for row in range(len(map_index)) for column in columns)


def test_maps_of_unequal_width_take_two_launches_or_one() -> None:
    guided = (0, 1, 2, 2)
    assert [chunk.table for chunk in chunks(guided, 3, 64, 320)] == [((0, 0), (1, 1)), ((2, 2, 3),)]
    (one,) = chunks(guided, 3, 64, 320, together=True)
    assert one.table == ((0, 0, 0), (1, 1, 1), (2, 2, 3)) and one.repeats and one.first
    assert not any(chunk.repeats for chunk in chunks(guided, 3, 64, 320))


@given(maps_and_index)
def test_rows_by_map_is_the_inverse_of_the_index(shape) -> None:
    maps, map_index = shape
    groups = rows_by_map(map_index, maps)
    assert len(groups) == maps
    assert sorted(row for rows in groups for row in rows) == list(range(len(map_index)))
    assert all(map_index[row] == group for group, rows in enumerate(groups) for row in rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [8, 12, 40, 5])
def test_a_vector_never_crosses_a_row_or_an_aligned_address(layout: str, dim: int, dtype: torch.dtype) -> None:
    tensor = make((2, 2, 3, dim), dtype=dtype, layout=layout)
    width = vector_width(tensor)
    assert width * tensor.element_size() <= 16
    assert dim % width == 0
    if width > 1:
        assert tensor.stride(3) == 1
        for index in ((0, 0, 0), (1, 1, 2), (0, 1, 1), (1, 0, 2)):
            assert tensor[index].data_ptr() % (width * tensor.element_size()) == 0


def test_vectors_are_as_wide_as_the_layout_allows() -> None:
    assert vector_width(torch.empty(2, 2, 3, 40, dtype=torch.float16)) == 8
    assert vector_width(torch.empty(2, 2, 3, 40)) == 4
    assert vector_width(torch.empty(2, 2, 3, 12, dtype=torch.float16)) == 4
    assert vector_width(make((2, 2, 3, 40), layout="misaligned")) == 1
    assert vector_width(make((2, 2, 3, 40), layout="channels_first")) == 1


@pytest.mark.parametrize(
    ("size", "stride", "rows", "wide"),
    [
        ((2, 8, 4096, 64), (8 * 4096 * 64, 64, 512, 1), 128, False),
        ((2, 1, 64, 64), (2**31, 64, 64, 1), 64, True),  # batch rows far apart
        ((1, 1, 2**20, 64), (0, 0, 2**25, 1), 64, True),  # rows of a tile far apart
        ((1, 1, 2**20, 64), (0, 0, 2**25, 1), 16, False),  # but not in a tile this short
        ((1, 1, 64, 64), (0, 0, 1, 2**25), 64, True),  # entries far apart
    ],
)
def test_wide_indices_where_an_offset_passes_31_bits(size, stride, rows: int, wide: bool) -> None:
    tensor = torch.empty(0, device="meta").new_empty_strided(size, stride)
    assert needs_wide_index(rows, tensor) is wide


def test_a_table_is_copied_to_the_device_once() -> None:
    table = ((0, 1, 2), (1, 0, 3))
    first = device_table(table, torch.device("cpu"))
    assert first is device_table(table, torch.device("cpu"))
    assert first.tolist() == [list(entry) for entry in table]


def test_tables_outlive_whatever_else_is_launched() -> None:
    # A captured CUDA graph reads its table again at every replay.
    cpu = torch.device("cpu")
    first = device_table(((0, 1),), cpu)
    for other in range(3000):
        device_table(((0, other),), cpu)
    assert device_table(((0, 1),), cpu) is first
