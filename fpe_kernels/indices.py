"""Integers that decide what is computed, and so are known on the host: rows that share maps, ranges, tokens, grids."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from .validation import shape_of

_MOST_RUNS = 64


def check_key_lengths(key_lengths: object, key: Tensor) -> tuple[int, ...] | None:
    """Return the number of keys of each map as ints, or None where that is all of them."""
    if key_lengths is None:
        return None
    if isinstance(key_lengths, Tensor) and key_lengths.device.type != "cpu":
        raise ValueError(
            f"key_lengths decides what is computed, so it must be known on the host: got a tensor on "
            f"{key_lengths.device}. Pass a list of ints, e.g. key_lengths.tolist()."
        )
    entries = _host_integers(key_lengths.tolist() if isinstance(key_lengths, Tensor) else key_lengths)
    if entries is None or isinstance(key_lengths, Integral):
        raise TypeError(f"key_lengths must be a sequence of ints, one for each map, got {key_lengths!r}.")
    maps, keys = key.shape[0], key.shape[2]
    if len(entries) != maps or not all(0 <= entry <= keys for entry in entries):
        raise ValueError(f"key_lengths must have {maps} entries in [0, {keys}], one for each map, got {entries}.")
    return None if all(entry == keys for entry in entries) else tuple(entries)


def check_range(name: str, start: object, stop: object, tokens: int, empty: bool = False) -> tuple[int, int]:
    """Return ``start`` and ``stop`` of a range of ``tokens`` tokens; a ``stop`` of None is their end."""
    stop = tokens if stop is None else stop
    for entry in (start, stop):
        if isinstance(entry, bool) or not isinstance(entry, (Integral, torch.SymInt)):
            raise TypeError(f"a range of {name} is two ints, start and stop, got {start!r} and {stop!r}.")
    first, last = _as_it_varies(cast(int, start)), _as_it_varies(cast(int, stop))
    if not 0 <= first <= last <= tokens or (first == last and not empty):
        raise IndexError(
            f"a range of {name} must have 0 <= start {'<=' if empty else '<'} stop <= {tokens}, got {first} and {last}."
        )
    return first, last


def check_pair(name: str, given: object) -> tuple[int, int | None]:
    """Return a range of tokens, written as one argument, as its start and its stop."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"a range of {name} is two ints, start and stop, got {given!r}.")
    return given[0], given[1]


def _as_it_varies(entry: int) -> int:
    """``entry`` as an int, unless it is a size that varies where a program is exported."""
    return entry if isinstance(entry, torch.SymInt) else int(entry)


def check_map_index(map_index: object, maps: int, name: str = "map_index") -> tuple[int, ...]:
    """Return ``map_index`` as a tuple of ints in [0, maps)."""
    if isinstance(map_index, Tensor):
        if map_index.is_floating_point() or map_index.is_complex() or map_index.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got a tensor of {map_index.dtype}.")
        if map_index.device.type != "cpu":
            raise ValueError(
                f"{name} decides what is launched, so it must be known on the host: "
                f"got a tensor on {map_index.device}. Pass a list of ints, e.g. [0, 0, 1]."
            )
        map_index = map_index.tolist()
    if not isinstance(map_index, Sequence) or isinstance(map_index, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of ints, one for each batch row, got {type(map_index).__name__}.")
    for position, entry in enumerate(map_index):
        if isinstance(entry, bool) or not isinstance(entry, (int, Integral)):
            raise TypeError(f"{name}[{position}] must be an int, got {entry!r}.")
        if not 0 <= int(entry) < maps:
            raise IndexError(
                f"{name}[{position}] is {int(entry)}, but there are {maps} map(s): expected 0 <= index < {maps}."
            )
    return tuple(int(entry) for entry in map_index)


def check_batch_rows(index: object, rows: int) -> slice | list[int]:
    """Return what ``A[index]`` means of ``rows`` batch rows; of an int a slice, which keeps the axis."""
    if isinstance(index, slice):
        return index
    entries = _host_integers(index)
    if entries is None:
        got = repr(index) if isinstance(index, (list, tuple)) else type(index).__name__
        raise TypeError(f"A[i] takes an int, a slice or a list of ints over the batch, got {got}.")
    for entry in entries:
        if not -rows <= entry < rows:
            raise IndexError(f"batch index {entry} is out of range for {rows} row(s).")
    if isinstance(index, Integral):
        return slice(entries[0] % rows, entries[0] % rows + 1)
    return entries


def check_token_index(index: object, tokens: int, device: torch.device) -> Tensor:
    """Return token positions as an int64 tensor on ``device``; negative ones count from the end."""
    entries = _host_integers(index)
    if entries is not None:
        if any(not -tokens <= entry < tokens for entry in entries):
            raise IndexError(f"token index must be in [{-tokens}, {tokens}), got {entries}.")
        return _filled([entry % tokens for entry in entries], device)
    if not isinstance(index, Tensor):
        index = _on_host(index)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool or index.ndim > 1:
        raise TypeError(
            f"index must be an int or a flat sequence of ints, got {index.dtype} of shape {shape_of(index)}."
        )
    index = index.reshape(-1).to(dtype=torch.int64)
    # A compiled function cannot raise by what a tensor holds; the gather that follows checks it on the device. One on
    # the meta device holds nothing.
    checked = index.numel() > 0 and not index.is_meta and not torch.compiler.is_compiling()
    if checked and (int(index.min()) < -tokens or int(index.max()) >= tokens):
        raise IndexError(f"token index must be in [{-tokens}, {tokens}), got {index.tolist()}.")
    index = index.to(device)
    return torch.where(index < 0, index + tokens, index)


def names_twice(index: object, positions: Tensor, tokens: int) -> bool:
    """Whether two of ``positions`` are the same, which :func:`check_token_index` made of ``index``."""
    entries = _host_integers(index)
    if entries is not None:
        # Without waiting for the device, and so in a CUDA graph too.
        return len({entry % tokens for entry in entries}) < len(entries)
    # A compiled function cannot raise by what a tensor holds, and one on the meta device holds nothing.
    unknown = positions.is_meta or torch.compiler.is_compiling()
    return not unknown and positions.unique().numel() < positions.numel()


def _host_integers(index: object) -> list[int] | None:
    """The integers of an int or a sequence of ints; None for anything else."""
    if isinstance(index, Integral) and not isinstance(index, bool):
        return [int(index)]
    if not isinstance(index, Sequence) or isinstance(index, (str, bytes)):
        return None
    if any(isinstance(entry, bool) or not isinstance(entry, Integral) for entry in index):
        return None
    return [int(entry) for entry in index]


def _on_host(index: object) -> Tensor:
    """A tensor of what is neither a tensor nor a sequence of ints, such as an array."""
    try:
        return torch.as_tensor(index, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"index must be an int or a flat sequence of ints, got {index!r}.") from error


def _filled(entries: list[int], device: torch.device) -> Tensor:
    """``entries`` on ``device``, without waiting for it: a few runs by fills, which go into a CUDA graph too."""
    starts = [place for place, entry in enumerate(entries) if place == 0 or entry != entries[place - 1] + 1]
    if len(starts) > _MOST_RUNS or not entries:
        on_host = torch.tensor(entries, dtype=torch.int64, device="cpu")  # whatever the default device is
        if device.type == "cuda" and not torch.compiler.is_compiling():
            on_host = on_host.pin_memory()
        return on_host.to(device, non_blocking=True)
    stops = [*starts[1:], len(entries)]
    return torch.cat(
        [
            torch.arange(entries[start], entries[start] + stop - start, device=device)
            for start, stop in zip(starts, stops, strict=True)
        ]
    )


def check_block_grid(size: object) -> tuple[int, int]:
    """Return the (height, width) of a block grid, of which one int is both."""
    sides = _host_integers(size)
    if sides is not None and isinstance(size, Integral):
        sides = 2 * sides
    if sides is None or len(sides) != 2:
        raise ValueError(f"size must be (height, width) of the block grid, or one int for both, got {size!r}.")
    return sides[0], sides[1]


def check_pooling(name: str, grid: object, tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Check a (height, width) grid of ``tokens`` tokens against the (height, width) of a block grid."""
    sides = _host_integers(grid)
    if sides is None or len(sides) != 2 or sides[0] * sides[1] != tokens:
        raise ValueError(f"{name} must be (height, width) with height · width = {tokens}, got {grid!r}.")
    if not (1 <= size[0] <= sides[0] and 1 <= size[1] <= sides[1]):
        raise ValueError(f"size must be between (1, 1) and {name} = {tuple(sides)}, got {size!r}.")
    return sides[0], sides[1]
